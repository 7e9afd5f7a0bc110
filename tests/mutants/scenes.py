"""What every mutant has to survive, and none may: the same scenes with the same seeds, chosen before any mutant was written.

    storm     two workers, two lenders, host, Redis, bad weather          rust     lent bytes rot, every read verifies them
    window    the same with a sliding window                              models   another model finds this one's Redis
    shards    one replica of two shards                                   protocol the two loan cores alone, virtual time
    lone      one worker, no neighbour, no shelf: the youngest job gives way
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.workers.canary import write_canary
from kvbank.workers.canary_alone import CanaryAlone
from tests.kvstore.test_loan_walk import World
from tests.workers.auditor import Auditor, Broken
from tests.workers.canary_walk import PatientClock, Walk, build_city
from tests.workers.city import BLOCK, SLOT, SPAN, Weather

# (scene, seed, seconds of CPU in which new jobs are begun: wall time when nobody else wants the machine)
SEEDS = (("storm", 11, 7.0), ("protocol", 12, 4.0), ("lone", 19, 2.0), ("rust", 13, 6.0), ("window", 14, 4.0),
         ("models", 15, 4.0), ("shards", 16, 4.0), ("storm", 17, 6.0), ("protocol", 18, 4.0))


# Shorter than those of the walk, and two layers instead of three: more happens in a second.
LENGTHS = (1, 7, 8, 9, 31, 32, 33, 80, 160, 230)
STEMS = (0, SPAN, 2 * SPAN - 3, 4 * SPAN)


_home: list[Path] = []                       # where play_all keeps its canaries


@lru_cache
def _canary(seed: int, window: int | None = None) -> Path:
    return write_canary(_home[0] / f"{seed}-{window}", seed=seed, sliding_window=window, num_layers=2)


@contextmanager
def _walk(folder: Path, seed: int, redis: str | None, *, weather: bool = True, **settings: Any) -> Iterator[Walk]:
    blocks = {"device_blocks": 8 * SPAN // BLOCK, "lender_blocks": 6 * SPAN // BLOCK, "host_bytes": 6 * (SLOT * 2 // 3 + 8192)}
    city = build_city(folder, redis=redis, **{**blocks, **settings})
    try:
        audit = Auditor(lambda: city.living, clock=PatientClock())
        audit.check()
        skies = Weather(city, random.Random(seed + 1), audit=audit) if weather else None
        yield Walk(city, CanaryAlone(folder), random.Random(seed), audit, skies, quiet_s=12.0, strike=0.2,
                   lengths=LENGTHS, stems=STEMS, outputs=(1, 2, 9, 20))
    finally:
        city.stop()


def storm(seed: int, seconds: float, redis: str | None, **settings: Any) -> None:
    with _walk(settings.pop("folder", None) or _canary(0), seed, redis, **settings) as walk:
        walk.run(10_000, cpu_s=seconds)
        walk.end()


def rust(seed: int, seconds: float, redis: str) -> None:
    storm(seed, seconds, redis, verify_attend=True)


def window(seed: int, seconds: float, redis: str) -> None:
    storm(seed, seconds, redis, folder=_canary(0, 3 * 32 + 5))


def shards(seed: int, seconds: float, redis: str) -> None:
    storm(seed, seconds, redis, workers=1, lenders=3, shards=2)


def lone(seed: int, seconds: float, _redis: str) -> None:
    storm(seed, seconds, None, weather=False, workers=1, lenders=0, host_bytes=0, device_blocks=12 * SPAN // BLOCK)


def models(seed: int, seconds: float, redis: str) -> None:
    """Two clusters with one cache secret and one Redis; the same texts go through both."""
    for number in range(2):
        with _walk(_canary(number), seed, redis, weather=False, host_bytes=0) as walk:
            walk.run(10_000, cpu_s=seconds / 2)
            for worker in walk.city.workers:
                worker.vault.drop_idle_spilled()
                worker.store.flush(2.0)
            walk.end()


def protocol(seed: int, seconds: float, redis: str) -> None:
    until, number = time.process_time() + seconds, 0
    while time.process_time() < until:
        world = World(1000 * seed + number, peers=number % 3 == 2).walk(40.0)
        if world.breaches:
            raise Broken(world.breaches[0])
        number += 1


SCENES: dict[str, Callable[[int, float, str], None]] = {
    "storm": storm, "lone": lone, "rust": rust, "window": window, "models": models, "shards": shards, "protocol": protocol}


def play_all(cpu_s: float) -> Iterator[str]:
    """Each scene in turn, and then with further seeds until so many seconds of CPU are used: on a busy machine fewer frames
    come from Redis in time, and less happens in a scene. Yields its name before. What goes wrong is raised."""
    began = time.process_time()
    with EmbeddedRedis(64 << 20) as server, TemporaryDirectory(prefix="kvbank-canary-") as folder:
        _canary.cache_clear()
        _home[:] = [Path(folder)]
        for turn in count():
            for name, seed, seconds in SEEDS:
                if turn and time.process_time() - began >= cpu_s:
                    return
                yield name
                SCENES[name](seed + 100 * turn, seconds, server.url)
