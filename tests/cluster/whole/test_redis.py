"""Redis under whole clusters: it serves what device and host cannot hold, keeps to its cap, and may stop or die at any time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis as redis_py

from kvbank.cluster.client import Client
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis

FRAME = 4 * 2 * 2 * 128 * 32 * 4 + 4096               # a span of the small model, sealed
TINY = {"workers": 1, "lenders": 0, "device_blocks": 80, "host_bytes": FRAME + 8192}


@pytest.fixture()
def server() -> Iterator[Callable[[int], tuple[EmbeddedRedis, redis_py.Redis]]]:
    """server(bytes): a redis-server of the test's own, and a plain client of it."""
    made: list[EmbeddedRedis] = []

    def start(limit_bytes: int) -> tuple[EmbeddedRedis, redis_py.Redis]:
        made.append(EmbeddedRedis(limit_bytes))
        return made[-1], redis_py.Redis.from_url(made[-1].url)
    yield start
    for one in made:
        one.stop()


def frames(raw: redis_py.Redis) -> list[bytes]:
    return [key for key in raw.scan_iter("kvb:*", count=1000) if raw.type(key) == b"string" and raw.strlen(key) > 1000]


def bytes_held(raw: redis_py.Redis) -> int:
    """Bytes of all values at one moment."""
    keys = list(raw.scan_iter("kvb:*", count=1000))
    with raw.pipeline(transaction=True) as pipe:
        for key in keys:
            pipe.type(key)
        kinds = pipe.execute()
    with raw.pipeline(transaction=True) as pipe:
        for key, kind in zip(keys, kinds, strict=True):
            if kind == b"string":
                pipe.strlen(key)
        return sum(pipe.execute())


def served(raw: redis_py.Redis) -> tuple[int, int]:
    """GETs so far, and how often any command found its key."""
    return raw.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"], raw.info("stats")["keyspace_hits"]


def test_a_second_run_comes_from_redis_and_the_server_says_so_too(cluster, big, server, text, until) -> None:
    redis, raw = server(64 << 20)
    want = big.generate(text(1100), max_tokens=8, ignore_eos=True)
    with Client(cluster(**TINY, redis=redis.url).address) as client:
        first = client.generate(text(1100), max_tokens=8, ignore_eos=True)
        for seed in (1, 2):                                                         # drives it out of device and host
            client.generate(text(1200, seed), max_tokens=8, ignore_eos=True)
        until(lambda: len(frames(raw)) >= 8, 10)
        until(lambda: not any(tier.counters["write_behind_bytes"] for tier in client.status().tiers if tier.name == "redis"))
        before = served(raw)
        again = client.generate(text(1100), max_tokens=8, ignore_eos=True)
        after = served(raw)
    assert first.token_ids == again.token_ids == want.token_ids
    from_redis = again.receipt.reused["redis"]
    assert from_redis >= 0.8 * 1100, again.receipt
    found = from_redis // 128 + from_redis % 128 // 16                              # whole spans, then blocks
    gets, hits = after[0] - before[0], after[1] - before[1]
    assert gets == found, "each frame was asked for once"
    assert hits >= found, (hits, again.receipt)


def test_bytes_in_redis_never_exceed_the_cap(cluster, server, text) -> None:
    cap = 3 << 20
    redis, raw = server(64 << 20)                     # the server itself would take far more: the cap is ours
    samples, stop = [], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            samples.append(bytes_held(raw))

    sampler = threading.Thread(target=sample)
    with Client(cluster(**TINY, redis=redis.url, redis_bytes=cap).address) as client:
        sampler.start()
        try:
            for seed in range(12):
                client.generate(text(1100, seed), max_tokens=2, ignore_eos=True)
        finally:
            stop.set()
            sampler.join()
        tier = next(tier for tier in client.status().tiers if tier.name == "redis")
    assert len(samples) > 20 and max(samples) > cap // 2, "nothing was written"
    assert max(samples) <= cap
    assert tier.bytes_limit == cap and tier.bytes_used <= cap


def seconds(client: Client, text: Any, seeds: range) -> list[float]:
    """What each of some new prompts took, by its receipt."""
    return [client.generate(text(500, seed), max_tokens=4, ignore_eos=True).receipt.total_s for seed in seeds]


def test_a_stopped_redis_costs_no_job_more_than_a_moment_and_a_dead_one_nothing(cluster, big, server, text, until) -> None:
    redis, _ = server(64 << 20)
    want = big.generate(text(900, 99), max_tokens=8, ignore_eos=True)
    with Client(cluster(**TINY, redis=redis.url).address) as client:

        def state() -> str:
            return next(tier.state for tier in client.status().tiers if tier.name == "redis")

        client.generate(text(900, 99), max_tokens=8, ignore_eos=True)
        added = []
        for attempt in range(4):                      # other work on this machine may disturb a measurement
            seeds = range(1000 * attempt + 100, 1000 * attempt + 106)
            before = seconds(client, text, seeds)
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                during = seconds(client, text, range(seeds.stop, seeds.stop + 6))
                assert client.generate(text(900, 99), max_tokens=8, ignore_eos=True).token_ids == want.token_ids
                assert state() != "ok", "nobody noticed"
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            added.append(max(during) - max(before))
            if added[-1] <= 0.3:
                break
            until(lambda: state() == "ok", 10)
        assert min(added) <= 0.3, added
        until(lambda: state() == "ok", 10)            # it is used again once it answers
        os.kill(redis.pid, signal.SIGKILL)
        for _ in range(3):
            assert client.generate(text(900, 99), max_tokens=8, ignore_eos=True).token_ids == want.token_ids
        until(lambda: state() != "ok", 10)


def test_an_embedded_redis_that_is_killed_in_the_middle_of_jobs_comes_back(cluster, big, text, until) -> None:
    want = [big.generate(text(900, seed), max_tokens=60, ignore_eos=True).token_ids for seed in range(4)]
    town = cluster(**TINY, redis="embedded")
    with Client(town.address) as client:
        assert client.generate(text(900, 0), max_tokens=60, ignore_eos=True).token_ids == want[0]
        first = town.processes["redis"]
        jobs = [client.submit(text(900, seed), max_tokens=60, ignore_eos=True) for seed in range(4)]
        os.kill(first, signal.SIGKILL)
        assert [job.result(timeout_s=60).token_ids for job in jobs] == want
        until(lambda: town.processes.get("redis", first) != first, 10)
        until(lambda: next(tier.state for tier in client.status().tiers if tier.name == "redis") == "ok", 10)
        assert client.generate(text(900, 1), max_tokens=60, ignore_eos=True).token_ids == want[1]
