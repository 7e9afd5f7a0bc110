"""Spilled, parked, fetched back: from host memory and a real Redis, also after everything restarted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.sequence import JobSpec

SECRET = b"s" * 32
BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])


@pytest.fixture()
def engine(small_model: Path):
    made = []

    def build(host_bytes: int = 0, redis_url: str | None = None, **settings):
        store = StoreConfig(host_bytes=host_bytes, redis_url=redis_url, redis_bytes=64 << 20)
        capacity = settings.pop("capacity", None)
        made.append(build_engine(WorkerConfig(model=str(small_model), **settings), secret=SECRET, digest="d", store_config=store,
                                 capacity_tokens=capacity))
        return made[-1]

    yield build
    for one in made:
        one.store.close()


def check_same(got, want, exactness, mine="b", theirs="a") -> None:
    assert got.tokens[mine] == want.tokens[theirs]
    if exactness == "bitwise":
        assert torch.equal(got.logits[mine], want.logits[theirs])


@BOTH
def test_evicted_spans_come_back_from_host_memory(engine, run_jobs, prompt, exactness) -> None:
    small = engine(host_bytes=64 << 20, device_blocks=80, exactness=exactness)
    want = run_jobs(small, JobSpec(id="a", prompt=prompt(900), max_tokens=6, ignore_eos=True))
    run_jobs(small, JobSpec(id="x", prompt=prompt(1100, 1), max_tokens=2, ignore_eos=True))
    got = run_jobs(small, JobSpec(id="b", prompt=prompt(900), max_tokens=6, ignore_eos=True))
    check_same(got, want, exactness)
    reused = got.tally["b"].reused
    assert reused["host"] >= 700 and sum(reused.values()) == 896, reused


@BOTH
def test_everything_restarts_and_redis_still_has_it(engine, run_jobs, prompt, exactness) -> None:
    with EmbeddedRedis(64 << 20) as redis:
        first = engine(redis_url=redis.url, device_blocks=80, exactness=exactness)
        want = run_jobs(first, JobSpec(id="a", prompt=prompt(1000), max_tokens=6, ignore_eos=True))
        first.vault.drop_idle_spilled()
        assert first.store.flush(5.0)
        second = engine(redis_url=redis.url, device_blocks=80, exactness=exactness)
        got = run_jobs(second, JobSpec(id="b", prompt=prompt(1000), max_tokens=6, ignore_eos=True))
    check_same(got, want, exactness)
    assert got.tally["b"].reused["redis"] == 992
    assert got.tally["b"].computed_tokens == 8 + 5


def test_salts_share_nothing_on_the_shelves_either(engine, run_jobs, prompt) -> None:
    with EmbeddedRedis(64 << 20) as redis:
        def ask(where: str, name: str, salt: str, tenant: str = "default") -> int:
            """Tokens of this prompt that the shelf had, in a worker that has just started."""
            shelves = {"redis_url": redis.url} if where == "redis" else {"host_bytes": 64 << 20}
            worker = host if where == "host" else engine(device_blocks=80, **shelves)
            job = JobSpec(id=name, prompt=prompt(900), max_tokens=2, tenant=tenant, cache_salt=salt, ignore_eos=True)
            reused = run_jobs(worker, job).tally[name].reused
            worker.vault.drop_idle_spilled()
            assert worker.store.flush(5.0)
            return sum(reused.values())

        host = engine(host_bytes=64 << 20, device_blocks=80)
        for where in ("host", "redis"):
            others = [("", "default"), ("x", "default"), ("y", "default"), ("x", "other"), ("", "other")]
            assert [ask(where, f"{salt}-{tenant}", salt, tenant) for salt, tenant in others] == [0] * 5, where
            assert [ask(where, f"{salt}-{tenant}-2", salt, tenant) for salt, tenant in others] == [896] * 5, where


@BOTH
def test_a_job_larger_than_the_vault_parks_its_oldest_spans_on_the_host(engine, alone, run_jobs, prompt, exactness) -> None:
    job = JobSpec(id="a", prompt=prompt(2000), max_tokens=12, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    small = engine(host_bytes=64 << 20, device_blocks=56, exactness=exactness, capacity=lambda: 100_000)
    got = run_jobs(small, job)
    check_same(got, want, exactness, mine="a")
    assert got.tally["a"].parked_blocks_peak >= 64
    counts = small.vault.counts()
    assert counts.held == 0 and not small.vault.check() and not small.room.parked
    again = run_jobs(small, JobSpec(id="b", prompt=prompt(2000), max_tokens=12, ignore_eos=True))
    check_same(again, want, exactness)
    assert sum(again.tally["b"].reused.values()) >= 0.9 * 2000


def test_foreign_bytes_under_our_keys_are_a_miss(engine, run_jobs, prompt) -> None:
    import redis as redis_py

    with EmbeddedRedis(64 << 20) as server:
        first = engine(redis_url=server.url, device_blocks=80)
        want = run_jobs(first, JobSpec(id="a", prompt=prompt(600), max_tokens=6, ignore_eos=True))
        first.vault.drop_idle_spilled()
        assert first.store.flush(5.0)
        client = redis_py.Redis.from_url(server.url)
        keys = [key for key in client.scan_iter("kvb:*") if client.type(key) == b"string" and client.strlen(key) > 10_000]
        assert keys
        for key in keys:
            client.set(key, b"\x00" * client.strlen(key))
        second = engine(redis_url=server.url, device_blocks=80)
        got = run_jobs(second, JobSpec(id="b", prompt=prompt(600), max_tokens=6, ignore_eos=True))
    assert got.tokens["b"] == want.tokens["a"]
    assert got.tally["b"].missed["integrity"] > 0 and not got.tally["b"].reused
