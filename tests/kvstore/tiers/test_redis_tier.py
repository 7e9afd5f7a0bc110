"""The Redis tier against a real server that is stopped, killed, emptied, full, or somebody else's."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.kvstore.tiers.redis_address import parse
from kvbank.kvstore.tiers.redis_budget import INDEX, OverLimit, RedisBudget
from kvbank.kvstore.tiers.redis_tier import RedisTier, probe
from kvbank.kvstore.tiers.redis_wire import Command, RedisConnection, Reply
from kvbank.kvstore.tiers.tier import TierUnavailable

MIB = 1 << 20
KIB = 1 << 10


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def value(number: int, size: int = 100 * KIB) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(64 * MIB) as one:
        yield one


@pytest.fixture
def tier_of(server: EmbeddedRedis) -> Iterator[Callable[..., RedisTier]]:
    tiers: list[RedisTier] = []

    def build(**settings: float) -> RedisTier:
        # A busy machine may keep a server from its core for longer than 50 ms; tests about silence set their own bound.
        patient = {"read_s": 5.0, "write_s": 5.0}
        wanted = {"limit_bytes": 32 * MIB, "layers": "0-4", "value_bytes": MIB, **patient, **settings}
        tiers.append(RedisTier(server.url, **wanted))   # type: ignore[arg-type]
        return tiers[-1]
    yield build
    for tier in tiers:
        tier.close()


def ask(server: EmbeddedRedis, *commands: Command) -> list[Reply]:
    """What an independent look at the server says."""
    connection = RedisConnection(parse(server.url), connect_s=2.0, silence_s=2.0, max_bulk_bytes=64 * MIB)
    try:
        return connection.exchange(commands, within_s=5.0)
    finally:
        connection.close()


def bytes_there(server: EmbeddedRedis) -> int:
    (keys,) = ask(server, ("KEYS", b"kvb:*"))
    assert isinstance(keys, list)
    frames = [bytes(name) for name in keys if name != INDEX]               # type: ignore[arg-type]
    # In one transaction, or a frame counted before it made room would be added to the one it made room for.
    *_, lengths = ask(server, ("MULTI",), *[("STRLEN", name) for name in frames], ("EXEC",))
    return sum(lengths)                        # type: ignore[arg-type]


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(TierUnavailable) as caught:
        call()
    return caught.value.reason


# -- as it should be --------------------------------------------------------------------------------------------------

def test_values_come_back_as_they_went_in_batched_round_trips(tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(round_trip_bytes=3 * MIB)
    values = {key(number): value(number) for number in range(40)}
    stored = tier.put({name: [data[:7], memoryview(data)[7:]] for name, data in values.items()})
    assert stored == set(values)
    assert tier.get([*values, key(99)]) == values
    assert tier.has([key(1), key(99)]) == {key(1)} and tier.knows(key(1)) and not tier.knows(key(99))
    assert tier.put({key(1): [value(1)]}) == {key(1)}, "here already: nothing is sent"
    status = tier.status()
    assert status.counters["puts"] == 40 and status.counters["hits"] == 40 and status.counters["misses"] == 1
    assert (status.name, status.state) == ("redis", "ok")
    tier.delete([key(1)])
    assert tier.has([key(1)]) == set() and not tier.knows(key(1))


def test_workers_share_frames_and_shards_do_not_mix_them(tier_of: Callable[..., RedisTier]) -> None:
    one, same, other = tier_of(), tier_of(), tier_of(layers="4-8")
    one.put({key(1): [value(1)]})
    assert same.get([key(1)]) == {key(1): value(1)} and other.get([key(1)]) == {}


def test_the_server_forgets_a_frame_that_nobody_reads_and_keeps_one_that_is_read(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(ttl_s=1000)
    tier.put({key(1): [value(1)]})
    name = b"kvb:" + key(1) + b":0-4"
    (left,) = ask(server, ("TTL", name))
    assert isinstance(left, int) and 990 <= left <= 1000
    ask(server, ("EXPIRE", name, 50))
    tier.get([key(1)])
    assert eventually(lambda: ask(server, ("TTL", name))[0] > 900), "a read refreshes it"       # type: ignore[operator]


# -- the byte cap -----------------------------------------------------------------------------------------------------

def test_bytes_in_redis_stay_within_the_cap_at_every_sample_with_three_writers(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    limit = 4 * MIB
    tiers = [tier_of(limit_bytes=limit, round_trip_bytes=400 * KIB) for _ in range(3)]
    stop, samples = threading.Event(), []

    def write(tier: RedisTier, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            numbers = [rng.randrange(150) for _ in range(3)]
            tier.put({key(number): [value(number, 50 * KIB + 1000 * number)] for number in numbers})

    def sample() -> None:
        while not stop.is_set():
            samples.append(bytes_there(server))

    threads = [threading.Thread(target=write, args=(tier, seed)) for seed, tier in enumerate(tiers)]
    sampler = threading.Thread(target=sample)
    for thread in [sampler, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    sampler.join()
    assert len(samples) > 5 and max(samples) <= limit
    assert max(samples) > limit // 2, "it is used, too"
    assert all(tier.status().bytes_used <= limit for tier in tiers)
    (total,) = ask(server, ("ZSCORE", INDEX, b""))
    (rows,) = ask(server, ("ZRANGE", INDEX, 0, -1))
    assert isinstance(rows, list)
    charged = sum(int.from_bytes(bytes(row)[:8], "big") for row in rows if row)                 # type: ignore[arg-type]
    assert float(bytes(total)) == charged >= bytes_there(server), "the account is exact"        # type: ignore[arg-type]
    counters = [tier.status().counters for tier in tiers]
    assert sum(each["released_for_room"] for each in counters) > 0
    assert all(each["breaker_opened"] == 0 for each in counters)


def test_the_oldest_unread_frames_make_room(tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(limit_bytes=MIB)
    for number in range(9):
        tier.put({key(number): [value(number)]})
    tier.get([key(0)])
    assert eventually(lambda: not tier._touched), "the read is reported"
    assert eventually(lambda: tier.status().frames == 9)
    tier.put({key(10): [value(10)], key(11): [value(11)]})
    left = tier.has([key(number) for number in range(12)])
    assert {key(0), key(10), key(11)} <= left and key(1) not in left


def test_a_frame_beyond_the_cap_is_refused_and_drives_nothing_out(tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(limit_bytes=200 * KIB)
    tier.put({key(1): [value(1)]})
    assert tier.put({key(2): [value(2, 300 * KIB)]}) == set()
    assert tier.has([key(1), key(2)]) == {key(1)} and tier.status().counters["refused_over_limit"] == 1


def test_the_account_survives_a_restart_of_the_writer_and_a_lost_index(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    first = tier_of(limit_bytes=MIB)
    first.put({key(number): [value(number)] for number in range(8)})
    first.close()
    ask(server, ("DEL", INDEX), ("SET", b"not-ours", b"x"))
    second = tier_of(limit_bytes=MIB)
    second.put({key(20): [value(20)], key(21): [value(21)], key(22): [value(22)]})
    assert second.has([key(20), key(21), key(22)]) == {key(20), key(21), key(22)}
    assert 800 * KIB < bytes_there(server) <= MIB
    assert ask(server, ("GET", b"not-ours")) == [b"x"]


def test_what_expired_or_was_deleted_by_others_is_no_longer_charged(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of()
    tier.put({key(number): [value(number)] for number in range(8)})
    ask(server, *[("DEL", b"kvb:" + key(number) + b":0-4") for number in range(5)])
    assert eventually(lambda: tier.status().bytes_used == 3 * (100 * KIB + 256))


def test_a_writer_that_died_half_way_does_not_block_the_cap_for_ever(server: EmbeddedRedis) -> None:
    connection = RedisConnection(parse(server.url), connect_s=2.0, silence_s=2.0)
    budget = RedisBudget(1000)

    def on(commands: list[Command]) -> list[Reply]:
        return connection.exchange(commands, within_s=2.0) if commands else []
    assert budget.reserve(on, {b"kvb:dead": 500}, now_ms=1_000_000) == {b"kvb:dead"}    # type: ignore[arg-type]
    assert budget.reserve(on, {b"kvb:dead": 500}, now_ms=1_010_000) == set(), "it is another's"     # type: ignore[arg-type]
    with pytest.raises(OverLimit):
        budget.reserve(on, {b"kvb:new": 500}, now_ms=1_030_000)                         # type: ignore[arg-type]
    assert budget.total == 756
    assert budget.reserve(on, {b"kvb:new": 500}, now_ms=1_061_000) == {b"kvb:new"}      # type: ignore[arg-type]
    assert budget.total == 756 and budget.released == 1
    connection.close()


def test_only_frames_are_deleted_whatever_somebody_writes_into_the_index(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    ask(server, ("SET", b"theirs", b"x"), ("ZADD", INDEX, -(2**50), (900 * KIB).to_bytes(8, "big") + b"theirs",
                                           900 * KIB, b""))
    tier = tier_of(limit_bytes=MIB)
    for number in range(12):
        tier.put({key(number): [value(number)]})
    assert ask(server, ("GET", b"theirs")) == [b"x"] and bytes_there(server) <= MIB


def test_a_read_reported_late_does_not_settle_what_another_is_writing(server: EmbeddedRedis) -> None:
    """Else the sweep would find it missing and uncharge it, and its bytes would arrive after that."""
    connection = RedisConnection(parse(server.url), connect_s=2.0, silence_s=2.0)
    budget, sizes = RedisBudget(10_000), {b"kvb:a": 500}

    def on(commands: list[Command]) -> list[Reply]:
        return connection.exchange(commands, within_s=2.0) if commands else []
    budget.reserve(on, sizes, now_ms=1_000)                                # type: ignore[arg-type]
    on(budget.touch_commands(sizes, now_ms=2_000))
    budget.sweep(on, now_ms=3_000)                                         # type: ignore[arg-type]
    assert budget.total == 756
    on(budget.settle_commands(sizes, now_ms=4_000))
    budget.sweep(on, now_ms=5_000)                                         # type: ignore[arg-type]
    assert budget.total == 0, "settled, and not there: no longer charged"
    connection.close()


# -- down, slow, full, emptied ----------------------------------------------------------------------------------------

def test_a_stopped_server_costs_one_request_its_timeout_and_the_others_nothing(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(read_s=0.05, write_s=0.5)
    tier.put({key(1): [value(1)]})
    server.suspend()
    reasons = [reason(lambda: tier.get([key(1)])) for _ in range(200)]
    assert reasons == ["timeout"] + ["tier_down"] * 199, "one was kept waiting for 50 ms, the others for nothing"
    assert eventually(lambda: tier.status().state == "open", 2.0) and tier.status().counters["timeouts"] >= 1
    assert reason(lambda: tier.has([key(1)])) == reason(lambda: tier.put({key(2): [b"x"]})) == "tier_down"
    server.resume()
    assert eventually(lambda: tier.state == "ok", 5.0)
    assert tier.get([key(1)]) == {key(1): value(1)}


def test_a_short_stop_is_over_as_soon_as_the_server_is(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(read_s=0.05, write_s=0.5)
    tier.put({key(1): [value(1)]})
    server.suspend()
    assert reason(lambda: tier.has([key(1)])) == "timeout"
    server.resume()
    assert eventually(lambda: tier.state == "ok", 3.0) and tier.has([key(1)]) == {key(1)}
    assert tier.status().counters["breaker_opened"] <= 1


def test_a_killed_server_is_a_miss_and_comes_back_empty(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of()
    tier.put({key(1): [value(1)]})
    server.kill()
    for _ in range(20):
        assert reason(lambda: tier.get([key(1)])) == "tier_down"
    assert tier.status().state == "open" and not tier.knows(key(1))
    assert tier.status().counters["lost"] == 5, "five times a refused connection, then nobody asks"
    server.start()
    assert eventually(lambda: tier.state == "ok", 5.0)
    assert tier.get([key(1)]) == {} and tier.put({key(1): [value(1)]}) == {key(1)}
    assert tier.get([key(1)]) == {key(1): value(1)}


def test_a_restart_between_two_requests_is_not_even_noticed(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of()
    tier.put({key(1): [value(1)]})
    tier.get([key(1)])
    server.kill()
    server.start()
    assert tier.get([key(1)]) == {} and tier.state == "ok" and not tier.knows(key(1))
    assert tier.put({key(1): [value(1)]}) == {key(1)}


def test_an_emptied_server_is_misses_and_then_filled_again(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of()
    tier.put({key(number): [value(number)] for number in range(5)})
    ask(server, ("FLUSHALL",))
    assert tier.get([key(1)]) == {} and tier.has([key(2)]) == set() and not tier.knows(key(2))
    assert tier.put({key(1): [value(1)]}) == {key(1)}
    assert eventually(lambda: tier.status().bytes_used == 100 * KIB + 256), "the account begins anew"


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru", "allkeys-random", "volatile-lru"])
def test_a_server_with_hardly_any_memory_gives_misses_only(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier], policy: str) -> None:
    ask(server, ("CONFIG", "SET", "maxmemory-policy", policy), ("CONFIG", "SET", "maxmemory", 4 * MIB))
    tier = tier_of()
    sent = {key(number): value(number) for number in range(80)}
    stored = set[bytes]()
    for name, data in sent.items():
        stored |= tier.put({name: [data]})
    found = tier.get(list(sent))
    assert tier.state == "ok" and 0 < len(found) < 80
    assert all(data == sent[name] for name, data in found.items())
    if policy == "noeviction":
        assert len(stored) < 80 and sum(count for name, count in tier.status().counters.items()
                                        if name in ("refused_oom", "refused_execabort")) > 0


def test_a_read_only_replica_serves_reads_and_refuses_writes(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of()
    tier.put({key(1): [value(1)]})
    ask(server, ("CONFIG", "SET", "replica-serve-stale-data", "yes"), ("REPLICAOF", "127.0.0.1", 1))
    assert tier.get([key(1)]) == {key(1): value(1)}
    assert tier.put({key(2): [value(2)]}) == set() and tier.state == "ok"


def test_a_value_of_another_kind_or_size_under_our_key_is_no_error(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    ask(server, ("LPUSH", b"kvb:" + key(1) + b":0-4", b"x"), ("SET", b"kvb:" + key(2) + b":0-4", bytes(3 * MIB)))
    tier = tier_of()
    assert tier.get([key(1), key(2), key(3)]) == {key(2): b""}, "what is too long to be ours is not even kept"
    assert tier.state == "ok" and tier.status().counters["refused_wrongtype"] == 1


def test_an_index_of_another_kind_stops_writes_and_nothing_else(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    ask(server, ("SET", INDEX, b"junk"))
    tier = tier_of()
    assert tier.put({key(1): [value(1)]}) == set() and tier.get([key(1)]) == {} and tier.state == "ok"
    ask(server, ("DEL", INDEX))
    assert tier.put({key(1): [value(1)]}) == {key(1)}


def test_a_server_that_is_not_there_at_start_is_used_when_it_comes(
        server: EmbeddedRedis, tier_of: Callable[..., RedisTier]) -> None:
    server.kill()
    tier = tier_of()
    assert tier.status().state == "open" and reason(lambda: tier.get([key(1)])) == "tier_down"
    server.start()
    assert eventually(lambda: tier.state == "ok", 5.0) and tier.put({key(1): [value(1)]}) == {key(1)}


def test_more_readers_than_connections_wait_their_turn(tier_of: Callable[..., RedisTier]) -> None:
    tier = tier_of(max_connections=2)
    tier.put({key(number): [value(number)] for number in range(10)})
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            number = rng.randrange(10)
            if tier.get([key(number)]) != {key(number): value(number)}:
                wrong.append(number)
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and tier.status().counters["connects"] <= 5


# -- checks at start --------------------------------------------------------------------------------------------------

def test_probe_tells_what_is_wrong_and_what_to_do_without_the_password(server: EmbeddedRedis) -> None:
    probe(server.url)
    with pytest.raises(ConfigError, match="cannot be reached") as unreachable:
        probe("redis://me:SECRET@127.0.0.1:1/0")
    with pytest.raises(ConfigError, match="refused us with WRONGPASS") as refused:
        probe(f"unix://:SECRET@{server.socket}")
    with pytest.raises(ConfigError, match="refused us with ERR"):
        probe(server.url.replace("db=0", "db=7"))
    server.suspend()
    with pytest.raises(ConfigError, match="no answer within") as silent:
        probe(server.url, within_s=0.2)
    server.resume()
    for caught in (unreachable, refused, silent):
        assert "SECRET" not in str(caught.value) and str(parse(server.url).password) not in str(caught.value)
        assert "embedded" in str(caught.value)
