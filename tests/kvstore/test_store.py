"""The store: what went in comes back bit for bit from whichever shelf has it, or it is a miss with its reason."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.frame import PRIVATE, FrameHeader, encode, seal
from kvbank.kvstore.layout import BlockKey, Layout
from kvbank.kvstore.store import BlockStore, build_store
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.tiers.redis_address import parse
from kvbank.kvstore.tiers.redis_wire import Command, RedisConnection, Reply
from kvbank.kvstore.tiers.tier import TierUnavailable

LAYOUT = Layout(num_layers=4, layer_first=0, layer_last=4, kv_heads=2, head_dim=64)     # 512 KiB a span
SECRET = b"k" * 32
MIB = 1 << 20

Frame = tuple[FrameHeader, bytes]


def span(number: int, layout: Layout = LAYOUT) -> Frame:
    """A span of its own sequence: key, tokens and payload follow from `number`."""
    rng = random.Random(number)
    ids = [rng.randrange(2**31) for _ in range(layout.span_tokens)]
    header = FrameHeader.of_tokens(rng.randbytes(32), ids, layout)
    return header, rng.randbytes(64) * (header.payload_bytes // 64)


def tail(number: int) -> Frame:
    rng = random.Random(number)
    header = FrameHeader.of_tokens(rng.randbytes(32), list(range(LAYOUT.block_size)), LAYOUT)
    return header, rng.randbytes(64) * (header.payload_bytes // 64)


SPANS = [span(number) for number in range(40)]
TAILS = [tail(1000 + number) for number in range(8)]
HOST_ROOM = len(SPANS[0][1]) + 8192            # what one span takes there


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(64 * MIB) as one:
        yield one


@pytest.fixture
def store_of(server: EmbeddedRedis) -> Iterator[Callable[..., BlockStore]]:
    stores: list[BlockStore] = []

    def build(**settings: object) -> BlockStore:
        # A busy machine may keep a server from its core for longer than 50 ms; tests about silence set their own bound.
        patient = {"redis_read_s": 5.0, "redis_write_s": 5.0}
        wanted = {"redis_url": server.url, "host_bytes": 64 * MIB, **patient, **settings}
        config = StoreConfig(**wanted)          # type: ignore[arg-type]
        stores.append(build_store(config, LAYOUT, SECRET))
        return stores[-1]
    yield build
    for store in stores:
        store.close()


def ask(server: EmbeddedRedis, *commands: Command) -> list[Reply]:
    connection = RedisConnection(parse(server.url), connect_s=2.0, silence_s=2.0, max_bulk_bytes=64 * MIB)
    try:
        return connection.exchange(commands, within_s=5.0)
    finally:
        connection.close()


def name(frame: Frame) -> bytes:
    return b"kvb:" + frame[0].key + b":0-4"


def key(frame: Frame) -> bytes:
    return frame[0].key


def same(found: dict, frames: list[Frame]) -> bool:
    return all(found[key(frame)].payload == frame[1] and found[key(frame)].header == frame[0] for frame in frames)


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and not condition():
        time.sleep(0.01)
    return condition()


# -- shelves ----------------------------------------------------------------------------------------------------------

def test_frames_come_back_from_host_and_after_a_restart_from_redis(store_of: Callable[..., BlockStore]) -> None:
    first = store_of()
    everything = SPANS[:10] + TAILS
    assert first.put(everything) == {key(frame) for frame in everything}
    assert first.lookup([key(SPANS[0]), b"x" * 32]) == ["host", None]
    found = first.get([key(frame) for frame in everything], {key(frame): frame[0].tokens for frame in everything})
    assert same(found, everything) and {one.source for one in found.values()} == {"host"}
    assert first.flush(10.0)
    first.close()

    second = store_of()                        # another process's life: nothing but Redis is left
    assert second.lookup([key(frame) for frame in everything]) == ["redis"] * len(everything)
    found = second.get([key(frame) for frame in everything], {key(frame): frame[0].tokens for frame in everything})
    assert same(found, everything) and {one.source for one in found.values()} == {"redis"}


def test_the_payload_lands_in_the_callers_buffer(store_of: Callable[..., BlockStore]) -> None:
    store = store_of(host_bytes=3 * HOST_ROOM)
    store.put(SPANS[:6])
    assert store.flush(10.0)
    buffers = {key(frame): memoryview(bytearray(len(frame[1]) + 10)) for frame in SPANS[:6]}
    fetched = store.fetch(list(buffers), into=buffers)
    assert {one.source for one in fetched.frames.values()} == {"host", "redis"} and not fetched.missed
    for frame in SPANS[:6]:
        assert buffers[key(frame)][:len(frame[1])] == frame[1]
        assert fetched.frames[key(frame)].payload.obj is buffers[key(frame)].obj


def test_what_the_host_drives_out_goes_to_redis_once(store_of: Callable[..., BlockStore]) -> None:
    store = store_of(host_bytes=4 * HOST_ROOM)
    store.put(SPANS[:12], to=("host",))
    assert store.flush(10.0)
    assert store.lookup([key(frame) for frame in SPANS[:12]]) == ["redis"] * 8 + ["host"] * 4
    assert same(store.get([key(frame) for frame in SPANS[:12]]), SPANS[:12])
    store.put(SPANS[:12], to=("host",))        # all again: what Redis has is not sent again
    assert store.flush(10.0)
    puts = store.status()[1].counters["puts"]
    assert puts == 12, "each frame was written once"


def test_a_store_is_usable_with_either_shelf_and_with_none(server: EmbeddedRedis) -> None:
    only_redis = build_store(StoreConfig(host_bytes=0, redis_url=server.url), LAYOUT, SECRET)
    assert only_redis.put(SPANS[:2]) == set() and only_redis.flush(10.0)
    assert same(only_redis.get([key(SPANS[0])]), SPANS[:1])
    only_redis.close()
    only_host = build_store(StoreConfig(), LAYOUT, SECRET)
    only_host.put(SPANS[:2])
    assert only_host.flush(1.0) and same(only_host.get([key(SPANS[0])]), SPANS[:1])
    only_host.close()
    neither = build_store(StoreConfig(host_bytes=0), LAYOUT, SECRET)
    assert neither.put(SPANS[:2]) == set() and neither.fetch([key(SPANS[0])]).missed == {key(SPANS[0]): "over_limit"}
    assert neither.lookup([key(SPANS[0])]) == [None] and neither.status() == [] and neither.flush(0.0)
    neither.close()


def test_the_whole_host_tier_can_be_saved_before_a_stop(store_of: Callable[..., BlockStore]) -> None:
    first = store_of(write_behind_bytes=2 * HOST_ROOM)
    first.put(SPANS[:20], to=("host",))
    assert first.flush(20.0, everything=True)
    first.close()
    assert same(store_of().get([key(frame) for frame in SPANS[:20]]), SPANS[:20])


def test_parked_frames_stay_while_others_come_and_go(store_of: Callable[..., BlockStore]) -> None:
    store = store_of(host_bytes=4 * HOST_ROOM)
    assert store.put(SPANS[:2], to=("host",), pin=True) == {key(frame) for frame in SPANS[:2]}
    store.put(SPANS[2:12], to=("host",))
    assert store.lookup([key(frame) for frame in SPANS[:2]]) == ["host", "host"]
    store.unpin([key(frame) for frame in SPANS[:2]])
    store.put(SPANS[12:20], to=("host",))
    assert store.flush(10.0) and store.lookup([key(SPANS[0])]) == ["redis"], "an ordinary frame again"


def test_a_private_tail_never_leaves_the_process(server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    store = store_of(host_bytes=2 * HOST_ROOM)
    header = FrameHeader(key=BlockKey(b"job-1".ljust(32, b"\0")), keys=(), parent=key(SPANS[0]), layout=LAYOUT,
                         tokens=bytes(4 * 5), fidelity=PRIVATE)
    payload = bytes(header.payload_bytes)
    assert store.put([(header, payload)]) == {header.key}
    assert store.fetch([header.key], fidelity=PRIVATE).frames[header.key].payload == payload
    assert store.flush(10.0, everything=True)
    store.put(SPANS[:4], to=("host",))         # it is driven out
    assert store.flush(10.0)
    assert ask(server, ("EXISTS", b"kvb:" + header.key + b":0-4")) == [0]
    assert store.fetch([header.key], fidelity=PRIVATE).missed == {header.key: "evicted"}


def test_dropped_frames_are_nowhere(store_of: Callable[..., BlockStore]) -> None:
    store = store_of()
    store.put(SPANS[:3])
    assert store.flush(10.0)
    store.drop([key(SPANS[0])])
    assert store.lookup([key(SPANS[0]), key(SPANS[1])]) == [None, "host"]


# -- correct or a miss ------------------------------------------------------------------------------------------------

def lies(frame: Frame) -> dict[str, bytes]:
    """What may lie in Redis under our key and is not the frame."""
    parts = encode(*frame)
    good = b"".join(parts)
    value = good + seal(key(frame), parts, SECRET)
    other = encode(*SPANS[30])
    cuts = {f"cut at {at}": value[:at] for at in (0, 1, 3, 4, 19, 20, 63, 64, 500, 1024, len(value) // 2, len(good) - 4,
                                                  len(good), len(value) - 32, len(value) - 1)}
    flips = {}
    for at in (0, 4, 6, 8, 12, 20, 40, 200, 700, 1100, len(value) // 2, len(good) - 5, len(good) - 1, len(good) + 1,
               len(value) - 1):
        flipped = bytearray(value)
        flipped[at] ^= 0x10
        flips[f"flip at {at}"] = bytes(flipped)
    return {**cuts, **flips, "foreign": b"hello", "foreign and long": bytes(3 * MIB), "longer": value + b"\0",
            "another key's value": b"".join(other) + seal(key(SPANS[30]), other, SECRET),
            "another key's frame under our seal": b"".join(other) + seal(key(frame), other, SECRET),
            "unsealed": good, "sealed by a stranger": good + seal(key(frame), parts, b"z" * 32),
            "an older format": b"KVBF\x00\x00" + value[6:], "nothing": b""}


def test_whatever_lies_in_redis_is_a_miss_with_reason_integrity_and_is_replaced(
        server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    store, frame = store_of(host_bytes=0), SPANS[0]
    wrong = lies(frame)
    for number, (what, value) in enumerate(wrong.items(), 1):
        ask(server, ("SET", name(frame), value))
        fetched = store.fetch([key(frame), key(SPANS[1])])
        assert not fetched.frames and fetched.missed[key(frame)] == "integrity", what
        assert store.counters()["integrity_redis"] == number == store.status()[0].counters["integrity"], what
        assert ask(server, ("EXISTS", name(frame))) == [0], f"{what}: the lie is gone, or nobody could put the truth"
    store.put([frame])
    assert store.flush(10.0) and same(store.get([key(frame)]), [frame])


def test_a_frame_of_other_tokens_is_a_miss(store_of: Callable[..., BlockStore]) -> None:
    store = store_of()
    store.put(SPANS[:1])
    fetched = store.fetch([key(SPANS[0])], {key(SPANS[0]): SPANS[1][0].tokens})
    assert fetched.missed == {key(SPANS[0]): "integrity"} and store.counters()["integrity_host_tokens"] == 1


def test_a_byte_that_flips_in_host_memory_is_a_miss_and_redis_helps_out(store_of: Callable[..., BlockStore]) -> None:
    host = HostTier(64 * MIB)
    redis = store_of()._redis
    store = BlockStore(LAYOUT, host=host, redis=redis, secret=SECRET)
    store.put(SPANS[:1])
    assert store.flush(10.0)
    held = host.hold(key(SPANS[0]))
    assert held is not None
    held.memory[5000] ^= 1                     # a cosmic ray
    host.release(held)
    fetched = store.fetch([key(SPANS[0])])
    assert fetched.frames[key(SPANS[0])].source == "redis" and same(fetched.frames, SPANS[:1])
    assert store.counters()["integrity_host_checksum"] == 1 and not host.has([key(SPANS[0])])


def test_misses_tell_why(server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    store = store_of(host_bytes=2 * HOST_ROOM, redis_bytes=3 * MIB, redis_read_s=0.5)
    store.put(SPANS[:20], to=("host",))
    assert store.flush(10.0)
    missed = store.fetch([key(frame) for frame in [*SPANS[:20], SPANS[39]]]).missed
    assert missed[key(SPANS[39])] == "never_seen" and missed[key(SPANS[0])] == "evicted"
    assert store.counters()["missed_never_seen"] == 1 and store.counters()["missed_evicted"] == len(missed) - 1
    small = build_store(StoreConfig(host_bytes=1000), LAYOUT, SECRET)
    small.put(SPANS[:1])
    assert small.fetch([key(SPANS[0])]).missed == {key(SPANS[0]): "over_limit"}
    small.close()
    server.suspend()
    reasons = [store.fetch([key(SPANS[39])]).missed[key(SPANS[39])] for _ in range(30)]
    assert reasons[0] == "timeout" and reasons[-1] == "tier_down"
    server.resume()


# -- Redis is optional ------------------------------------------------------------------------------------------------

def test_a_redis_that_stops_delays_nobody_and_loses_nothing_that_host_has(
        server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    store = store_of(redis_read_s=0.05, redis_write_s=0.5)
    store.put(SPANS[:5])
    assert store.flush(10.0)
    server.suspend()
    for frame in SPANS[:5]:
        assert store.lookup([key(frame)]) == ["host"] and same(store.get([key(frame)]), [frame])
    store.put(SPANS[5:10])
    for frame in SPANS[20:30]:
        assert store.lookup([key(frame)]) == [None] and not store.get([key(frame)])
    assert store.counters()["lookup_timeout"] == 1, "one of all these waited, and for 50 ms"
    assert not store.flush(0.05), "five frames wait for it"
    server.resume()
    assert store.flush(10.0), "and reach it when it is back"
    assert ask(server, *[("EXISTS", name(frame)) for frame in SPANS[:11]]) == [1] * 10 + [0]


def test_while_redis_is_down_the_queue_is_bounded_and_the_rest_is_dropped_and_counted(
        server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    store = store_of(host_bytes=0, write_behind_bytes=4 * HOST_ROOM)
    server.kill()
    store.fetch([key(SPANS[0])])
    for frame in SPANS:
        store.put([frame])
        assert store.status()[0].counters["write_behind_bytes"] <= 4 * HOST_ROOM
    assert store.status()[0].counters["write_behind_dropped_full"] >= len(SPANS) - 12
    assert store.fetch([key(SPANS[39])]).missed == {key(SPANS[39]): "tier_down"}
    assert eventually(lambda: store.status()[0].state != "ok")     # after five failures; from then on nothing is tried, or lost
    store.put(SPANS[:1])
    assert store.status()[0].counters["write_behind_bytes"], "what is queued stays queued while Redis is down"
    server.start()

    def some_arrived() -> bool:
        there = len(store.get([key(frame) for frame in SPANS]))
        if not there and store.status()[0].counters.get("write_behind_lost"):
            store.put(SPANS[:1])             # on a machine so busy that Redis was late three times, what waited is lost by right
        return 0 < there < len(SPANS)
    assert store.flush(10.0) and eventually(some_arrived)


def test_a_redis_that_is_not_there_at_start_is_no_error(
        server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    server.kill()
    store = store_of()
    assert [status.state for status in store.status()] == ["ok", "open"]
    store.put(SPANS[:2])
    assert same(store.get([key(SPANS[0])]), SPANS[:1])
    server.start()
    assert store.flush(10.0) and eventually(lambda: ask(server, ("EXISTS", name(SPANS[0]))) == [1])


def test_a_key_is_reported_present_only_when_all_its_bytes_are_there(
        server: EmbeddedRedis, store_of: Callable[..., BlockStore]) -> None:
    """Whoever believes `lookup` gets the whole frame: readers look while another store writes."""
    writer, reader = store_of(), store_of(host_bytes=0)
    believed: list[bytes] = []
    wrong: list[bytes] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            where = dict(zip(map(key, SPANS), reader.lookup([key(frame) for frame in SPANS]), strict=True))
            present = [one for one in where if where[one] == "redis"]
            found = reader.get(present)
            believed.extend(found)
            wrong.extend(one for one in present if one not in found)

    thread = threading.Thread(target=read)
    thread.start()
    for frame in SPANS:
        writer.put([frame])
    assert writer.flush(20.0)
    assert eventually(lambda: len(set(believed)) == len(SPANS))
    stop.set()
    thread.join()
    counters = reader.counters()
    assert not wrong and counters.get("integrity_redis", 0) == 0


@pytest.mark.parametrize("seed", range(3))
def test_under_random_faults_every_answer_is_right_or_a_miss_and_limits_hold(
        server: EmbeddedRedis, store_of: Callable[..., BlockStore], seed: int) -> None:
    rng = random.Random(seed)
    limit = 8 * MIB
    store = store_of(host_bytes=6 * HOST_ROOM, redis_bytes=limit, write_behind_bytes=6 * HOST_ROOM, redis_read_s=0.05,
                     redis_write_s=0.5)
    slowest = 0.0
    for _ in range(400):
        fault = rng.random()
        if fault < 0.01:
            server.suspend()
        elif fault < 0.03:
            server.resume()
        elif fault < 0.035:
            server.resume()
            server.kill()
            server.start()
        elif fault < 0.06 and store.status()[1].state == "ok":
            server.resume()
            victim = rng.choice(SPANS)
            ask(server, ("SET", name(victim), rng.choice(list(lies(victim).values()))))
        chosen = rng.sample(SPANS, 3)
        started = time.monotonic()
        if rng.random() < 0.5:
            store.put(chosen, to=rng.choice([("host",), ("redis",), ("host", "redis")]))
        else:
            fetched = store.fetch([key(frame) for frame in chosen])
            slowest = max(slowest, time.monotonic() - started)
            assert fetched.frames.keys() | fetched.missed.keys() == {key(frame) for frame in chosen}
            assert same(fetched.frames, [frame for frame in chosen if key(frame) in fetched.frames])
        host, redis = store.status()
        assert host.bytes_used <= host.bytes_limit and redis.bytes_used <= limit
    assert slowest < 5.0, "nobody hangs"
    server.resume()
    assert store.counters()["hits_host"] > 0 and store.counters()["hits_redis"] > 0


# -- config -----------------------------------------------------------------------------------------------------------

def test_settings_that_cannot_work_are_config_errors_and_a_password_is_not_shown() -> None:
    for wrong in ({"host_bytes": -1}, {"redis_bytes": 0}, {"redis_ttl_s": 0}, {"redis_read_s": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            StoreConfig(**wrong)                # type: ignore[arg-type]
    assert "SECRET" not in repr(StoreConfig(redis_url="redis://:SECRET@h"))
    with pytest.raises(ConfigError):
        build_store(StoreConfig(redis_url="http://h"), LAYOUT, SECRET)


def test_what_must_not_be_used_is_not_read_from_a_redis_that_could_not_be_told(store_of) -> None:
    """It stayed silent when the frame was to be deleted, and is there again: with the frame, until it has heard."""
    store, other = store_of(host_bytes=0), store_of(host_bytes=0)
    header, payload = SPANS[0]
    store.put([SPANS[0]])
    assert store.flush(10.0) and header.key in other.get([header.key])
    tier = store._redis
    real, silent = tier.delete, threading.Event()

    def delete(keys) -> None:
        if not silent.is_set():
            raise TierUnavailable("timeout")
        real(keys)
    tier.delete = delete
    store.drop([header.key])
    assert not store.get([header.key]) and header.key in other.get([header.key])
    silent.set()
    assert store.flush(10.0) and not other.get([header.key])
    store.put([SPANS[0]])                                # computed again
    assert store.flush(10.0) and other.get([header.key])[header.key].payload == payload
