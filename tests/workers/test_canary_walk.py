"""Canary jobs over a bank in bad weather, and ten thousand in good weather; the laws of conservation are checked all the way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.workers.canary_alone import CanaryAlone
from tests.workers.auditor import Auditor, Footprint
from tests.workers.canary_walk import PatientClock, Walk, build_city
from tests.workers.city import Weather

PAIRS = 6                                    # of members that may meet late: a session, a hot stream, and gRPC's threads for them


@pytest.fixture()
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(64 << 20) as server:
        yield server


@pytest.fixture()
def walk(canary: Path, redis: EmbeddedRedis) -> Iterator[Callable[..., Walk]]:
    """walk(seed, weather=True, **settings of the city): built, and stopped at the end."""
    cities: list[Any] = []

    def build(seed: int, *, weather: bool = True, **settings: Any) -> Walk:
        print(f"seed {seed}")
        rng = random.Random(seed)
        city = build_city(canary, redis=redis.url, **settings)
        cities.append(city)
        audit = Auditor(lambda: city.living, clock=PatientClock())
        audit.check()
        return Walk(city, CanaryAlone(canary), rng, audit, Weather(city, random.Random(seed + 1)) if weather else None)

    yield build
    for city in cities:
        city.stop()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_canaries_survive_bad_weather(walk, seed) -> None:
    done = walk(seed)
    done.run(60)
    done.end()
    assert done.checked > 40 and done.seen["borrowed"], done.seen
    assert sum(done.weather.did.values()) > 10, done.weather.did


def run_jobs_in_good_weather(walk, jobs: int) -> None:
    """The first fifth of the jobs makes all threads, connections and buffers that the rest then has to do with (L7)."""
    done = walk(7, weather=False)
    done.cancel = 0.02
    done.run(jobs // 5)
    done.end()
    warm = Footprint.now()
    done.run(jobs - jobs // 5)
    done.end()
    warm.check_back(few=PAIRS * 4)
    print(f"{done.checked} jobs checked, {done.tokens} tokens, {done.audit.checks} audits, {done.audit.hashed} slots hashed, "
          f"reused {dict(done.reused)}, {dict(done.seen)}")
    assert done.checked + done.seen["cancelled"] == jobs
    assert done.seen["borrowed"] and done.seen["cancelled"]
    assert done.reused["device"] and done.reused["peer"] and done.reused["host"] and done.reused["redis"], done.reused


@pytest.mark.timeout(600)
def test_three_hundred_jobs_over_two_workers_and_two_lenders(walk) -> None:
    run_jobs_in_good_weather(walk, 300)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_jobs_over_two_workers_and_two_lenders(walk) -> None:
    run_jobs_in_good_weather(walk, 10_000)
