"""The host tier: never over its limit, oldest out first, and nothing is pulled away from under a reader."""

from __future__ import annotations

import mmap
import random
import threading
from collections import OrderedDict

import psutil
import pytest

from kvbank.kvstore.tiers.host_tier import HostTier

MIB = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(64) * (size // 64) + b"x" * (size % 64)


def test_a_frame_comes_back_as_it_went_whatever_its_parts() -> None:
    tier = HostTier(4 * MIB)
    tier.put({key(1): [b"head", memoryview(b"p" * 100_000), b"", bytearray(b"tail")], key(2): [b"small"]})
    assert tier.get([key(1), key(2), key(3)]) == {key(1): b"head" + b"p" * 100_000 + b"tail", key(2): b"small"}
    assert tier.has([key(2), key(3)]) == {key(2)}


def test_the_least_recently_used_frame_goes_first() -> None:
    left: list[bytes] = []
    tier = HostTier(3 * MIB)
    tier.watch_evictions(lambda name, data: left.append(name))
    for number in (1, 2, 3):
        tier.put({key(number): [bytes(MIB)]})
    tier.get([key(1)])                         # read: recent again
    tier.put({key(2): [bytes(MIB)]})           # put again: recent again
    tier.put({key(4): [bytes(MIB)]})
    assert left == [key(3)] and tier.has([key(1), key(2), key(4)]) == {key(1), key(2), key(4)}


def test_a_leaving_frame_is_shown_with_all_its_bytes() -> None:
    seen: dict[bytes, bytes] = {}
    tier = HostTier(2 * MIB)
    tier.watch_evictions(lambda name, data: seen.update({name: bytes(data)}))
    for number in range(6):
        tier.put({key(number): [content(number, MIB - 100)]})
    assert seen == {key(number): content(number, MIB - 100) for number in range(4)}


def test_a_frame_that_cannot_fit_is_refused_and_drives_nothing_out() -> None:
    tier = HostTier(2 * MIB)
    assert tier.put({key(1): [bytes(MIB)]}) == {key(1)}
    assert tier.put({key(2): [bytes(2 * MIB + 1)]}) == set()
    assert tier.has([key(1)]) == {key(1)}
    assert tier.put({key(1): [bytes(MIB)]}, pin=True) == {key(1)}
    assert tier.put({key(3): [bytes(2 * MIB)]}) == set()
    counters = tier.status().counters
    assert (counters["refused_oversize"], counters["refused_pinned"]) == (1, 1)
    assert tier.status().bytes_used == MIB


def test_pinned_frames_stay_until_the_last_unpin() -> None:
    tier = HostTier(2 * MIB)
    tier.put({key(1): [bytes(MIB)]}, pin=True)
    assert tier.pin([key(1), key(9)]) == {key(1)}
    for number in range(2, 6):
        tier.put({key(number): [bytes(MIB)]})
    assert tier.has([key(1)]) == {key(1)}
    tier.unpin([key(1)])
    tier.put({key(6): [bytes(MIB)]})
    tier.put({key(7): [bytes(MIB)]})
    assert tier.has([key(1)]) == {key(1)}, "one of two pins is left"
    tier.unpin([key(1)])
    tier.unpin([key(1)])                       # once too often: nothing happens
    tier.put({key(8): [bytes(MIB)], key(9): [bytes(MIB)]})
    assert tier.has([key(1)]) == set()


def test_who_parks_a_frame_reads_the_bytes_it_gave_and_not_those_that_rotted_here() -> None:
    """Parked frames are read without verifying them, so what lies here under that name must not be taken for them."""
    tier = HostTier(1 << 20)
    tier.put({b"k": [b"good"]})
    reader = tier.hold(b"k")
    assert reader is not None
    reader.memory[0] ^= 1
    assert tier.put({b"k": [b"good"]}, pin=True) == {b"k"}
    parked = tier.hold(b"k")
    assert parked is not None and bytes(parked.view) == b"good"
    assert bytes(reader.view) == b"food"               # who reads the old ones keeps what it reads
    assert tier.put({b"k": [b"other"]}, pin=True) == {b"k"} and bytes(parked.view) == b"good", "pinned: it stays"
    tier.release(reader)
    tier.release(parked)
    tier.unpin([b"k"])
    assert tier.status().counters["bytes_pinned"] == parked.charge
    tier.unpin([b"k"])
    tier.delete([b"k"])
    assert tier.status().bytes_used == 0 and tier.status().counters["bytes_pinned"] == 0


def test_a_reader_keeps_its_bytes_through_delete_and_eviction() -> None:
    tier = HostTier(2 * MIB)
    tier.put({key(1): [content(1, MIB)]})
    held = tier.hold(key(1))
    assert held is not None
    tier.delete([key(1)])
    assert tier.hold(key(1)) is None and tier.status().bytes_used == MIB, "still charged: it is still there"
    tier.put({key(1): [content(2, MIB)]})      # the key is free again
    tier.put({key(2): [content(3, MIB)]})
    assert held.view == content(1, MIB)
    tier.release(held)
    assert tier.status().bytes_used == MIB and tier.get([key(2)]) == {key(2): content(3, MIB)}


def test_a_limit_of_nothing_holds_nothing() -> None:
    tier = HostTier(0)
    assert tier.put({key(1): [b"x"]}) == set() and tier.status().state == "off"


def test_memory_goes_back_to_the_system() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    tier = HostTier(64 * MIB)
    for number in range(96):
        tier.put({key(number): [bytes(MIB)]})
    assert process.memory_info().rss - before > 56 * MIB
    tier.close()
    assert process.memory_info().rss - before < 8 * MIB and tier.status().bytes_used == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_random_walk_equals_its_model_and_never_exceeds_the_limit(seed: int) -> None:
    """After every step: the same frames as a plain ordered list of (key, charge, pins), and bytes within the limit."""
    rng = random.Random(seed)
    limit = 40 * 70_000
    most = [0]

    def watch(name: bytes, data: memoryview) -> None:
        assert data == content(int.from_bytes(name, "big"), len(data))
        most[0] = max(most[0], tier.status().bytes_used)     # half-way through a put, too

    tier = HostTier(limit)
    tier.watch_evictions(watch)
    model: OrderedDict[bytes, tuple[int, int]] = OrderedDict()      # key -> (charge, pins), oldest first

    def charge(size: int) -> int:
        return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE if size >= 65536 else size + 64

    for _ in range(3000):
        number = rng.randrange(80)
        name, size = key(number), [500, 5000, 70_000, 200_000][number % 4]
        action = rng.choice(["put", "put", "put", "get", "pin", "unpin", "delete"])
        if action == "put":
            pin = rng.random() < 0.1
            stored = tier.put({name: [content(number, size)]}, pin=pin)
            if name in model:
                model[name] = (model[name][0], model[name][1] + pin)
                model.move_to_end(name)
                assert stored == {name}
            elif charge(size) + sum(c for c, pins in model.values() if pins) > limit:
                assert stored == set()
            else:
                while sum(c for c, _ in model.values()) + charge(size) > limit:
                    model.pop(next(old for old, (_, pins) in model.items() if not pins))
                model[name] = (charge(size), int(pin))
                assert stored == {name}
        elif action == "get":
            found = tier.get([name])
            assert found == ({name: content(number, size)} if name in model else {})
            if name in model:
                model.move_to_end(name)
        elif action == "pin":
            assert tier.pin([name]) == ({name} if name in model else set())
            if name in model:
                model[name] = (model[name][0], model[name][1] + 1)
        elif action == "unpin":
            tier.unpin([name])
            if name in model and model[name][1]:
                model[name] = (model[name][0], model[name][1] - 1)
                model.move_to_end(name)
        else:
            tier.delete([name])
            model.pop(name, None)
        status = tier.status()
        assert status.bytes_used == sum(c for c, _ in model.values()) <= limit
        assert status.counters["bytes_pinned"] == sum(c for c, pins in model.values() if pins)
        assert status.frames == len(model) and tier.has([key(n) for n in range(80)]) == set(model)
    assert 0 < most[0] <= limit


def test_threads_see_whole_frames_only_and_the_limit_holds_throughout() -> None:
    tier = HostTier(8 * MIB)
    stop, wrong = threading.Event(), []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            number = rng.randrange(12)
            tier.put({key(number): [bytes([number]) * MIB]})
            if rng.random() < 0.1:
                tier.delete([key(rng.randrange(12))])

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            number = rng.randrange(12)
            if (held := tier.hold(key(number))) is not None:
                if bytes(held.view) != bytes([number]) * MIB:
                    wrong.append(number)
                tier.release(held)
            if tier.status().bytes_used > tier.limit_bytes:
                wrong.append(-1)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    tier.close()
    assert tier.status().bytes_used == 0 and tier.status().frames == 0
