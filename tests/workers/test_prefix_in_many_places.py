"""A long prompt asked a second time: whatever shelf each piece of it lies on, only the last block is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.workers.sequence import JobSpec

LENGTH = 4096
ALL_BUT_LAST = (LENGTH - 1) // 16 * 16
OUTPUTS = 4
BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])


class CountedRows:
    """Rows of every plan that the model was given, counted beside the engine's own counter. Padding does not count."""

    def __init__(self, engine: Any) -> None:
        self.rows = 0
        self._run = engine.backend.run
        engine.backend.run = self.run

    def run(self, plan: Any, **options: Any) -> Any:
        self.rows += int((plan.slot_mapping >= 0).sum())
        return self._run(plan, **options)


@pytest.fixture()
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(64 << 20) as server:
        yield server


@pytest.fixture()
def scattered(town: Any, redis: EmbeddedRedis, prompt: Any) -> Callable[..., Any]:
    """scattered(*jobs, **settings): (bank, rows, what happened) of jobs run on a bank that has run job "a" before, whose
    spans then lie on the device, at lenders, in host memory and in Redis, some in each place.

    Redis has 50 ms to answer. On a machine too busy for that a miss is right, and proves nothing: it all happens again then.
    """
    def build(**settings: Any) -> Any:
        slot = 4 * 2 * 2 * 128 * 32 * 4
        bank = town(lenders=1, device_blocks=160, lender_blocks=64, host_bytes=6 * (slot + 8192), redis=redis.url, **settings)
        bank.first = bank.run(JobSpec(id="a", prompt=prompt(LENGTH), max_tokens=OUTPUTS, ignore_eos=True))
        assert not bank.first.errors
        bank.settle()
        bank.run(JobSpec(id="x", prompt=prompt(700, 1), max_tokens=2, ignore_eos=True))       # drives some spans out
        bank.settle()
        assert bank.worker.store.flush(10.0)
        return bank

    def run(*jobs: JobSpec, **settings: Any) -> tuple[Any, int, Any]:
        for _ in range(5):
            bank = build(**settings)
            counted, before = CountedRows(bank.worker.engine), bank.worker.engine.counters.forward_rows
            got = bank.run(*jobs)
            counters = bank.worker.store.counters()
            if not any(counters.get(f"missed_{why}") for why in ("timeout", "tier_down")):
                break
        assert bank.worker.engine.counters.forward_rows - before == counted.rows
        assert not got.errors
        return bank, counted.rows, got
    return run


@BOTH
def test_a_prefix_on_device_peer_host_and_redis_at_once(scattered, alone, run_jobs, prompt, exactness) -> None:
    want = run_jobs(alone(exactness=exactness), JobSpec(id="a", prompt=prompt(LENGTH), max_tokens=OUTPUTS, ignore_eos=True))
    bank, rows, got = scattered(JobSpec(id="b", prompt=prompt(LENGTH), max_tokens=OUTPUTS, ignore_eos=True), exactness=exactness)
    assert bank.first.tokens["a"] == want.tokens["a"]
    tally = got.tally["b"]
    assert all(tally.reused[place] > 0 for place in ("device", "peer", "host", "redis")), tally.reused
    assert sum(tally.reused.values()) == ALL_BUT_LAST, (tally.reused, tally.missed)
    assert tally.computed_tokens == rows == LENGTH - ALL_BUT_LAST + OUTPUTS - 1
    assert got.tokens["b"] == want.tokens["a"]
    if exactness == "bitwise":
        assert torch.equal(got.logits["b"], want.logits["a"])


@BOTH
def test_two_jobs_at_once_with_a_scattered_prefix_compute_nothing_twice(scattered, prompt, exactness) -> None:
    jobs = [JobSpec(id=name, prompt=prompt(LENGTH), max_tokens=OUTPUTS, ignore_eos=True, age=age)
            for age, name in enumerate("bc")]
    bank, rows, got = scattered(*jobs, exactness=exactness)
    assert got.tokens["b"] == got.tokens["c"] == bank.first.tokens["a"]
    for name in ("b", "c"):
        assert sum(got.tally[name].reused.values()) == ALL_BUT_LAST, (name, got.tally[name])
    assert rows == sum(tally.computed_tokens for tally in got.tally.values())
    again = 16 * bank.worker.engine.room.preemptions              # a preempted job loses its half-filled last block
    assert 0 <= rows - 2 * (LENGTH - ALL_BUT_LAST + OUTPUTS - 1) <= again


@BOTH
def test_a_common_prefix_of_concurrent_jobs_is_computed_once(alone, run_jobs, prompt, exactness) -> None:
    engine = alone(exactness=exactness)
    texts = [prompt(LENGTH) + prompt(50 + 40 * i, i + 1) for i in range(3)]
    jobs = [JobSpec(id=f"j{i}", prompt=text, max_tokens=OUTPUTS, ignore_eos=True, age=i) for i, text in enumerate(texts)]
    want = [run_jobs(alone(exactness=exactness), job) for job in jobs]
    counted = CountedRows(engine)
    got = run_jobs(engine, *jobs)
    for i, one in enumerate(want):
        assert got.tokens[f"j{i}"] == one.tokens[f"j{i}"]
    rows = engine.counters.forward_rows
    assert rows == counted.rows == sum(tally.computed_tokens for tally in got.tally.values())
    own = sum(len(text) - LENGTH + OUTPUTS - 1 for text in texts)
    assert LENGTH + own <= rows <= LENGTH + own + 3 * 128, "the common part was computed more than once"


def test_the_end_of_a_prompt_is_found_again_where_its_span_went_on_with_the_answer(alone, run_jobs, prompt, small_model, redis):
    """The prompt ends inside a span that the answer fills: its blocks are stored one by one beside the span."""
    from kvbank.kvstore.config import StoreConfig
    from kvbank.workers.assembly import build_engine
    from kvbank.workers.config import WorkerConfig

    engine = build_engine(WorkerConfig(model=str(small_model), device_blocks=64), secret=b"s" * 32, digest="d",
                          store_config=StoreConfig(host_bytes=0, redis_url=redis.url, redis_bytes=32 << 20))
    try:
        first = run_jobs(engine, JobSpec(id="a", prompt=prompt(300), max_tokens=150, ignore_eos=True))
        engine.vault.drop_idle_spilled()
        assert engine.store.flush(10.0)
        again = run_jobs(engine, JobSpec(id="b", prompt=prompt(300), max_tokens=150, ignore_eos=True))
    finally:
        engine.store.close()
    assert again.tokens["b"] == first.tokens["a"]
    assert again.tally["b"].reused["redis"] == 288, again.tally["b"]


def test_a_job_that_comes_while_the_first_is_still_in_prefill_waits_for_it_and_computes_nothing_twice(town, prompt) -> None:
    bank = town(lenders=1, device_blocks=160, lender_blocks=160)
    engine, joined = bank.worker.engine, []

    def join() -> None:
        if not joined and any(1024 <= seq.prompt_computed < 3000 for seq in engine.jobs()):
            joined.append(True)
            engine.add(JobSpec(id="b", prompt=prompt(LENGTH), max_tokens=OUTPUTS, ignore_eos=True, age=1))

    got = bank.run(JobSpec(id="a", prompt=prompt(LENGTH), max_tokens=OUTPUTS, ignore_eos=True), each_step=join)
    assert joined and not got.errors
    assert got.tokens["b"] == got.tokens["a"]
    assert sum(got.tally["b"].reused.values()) == ALL_BUT_LAST, got.tally["b"]
    assert engine.counters.forward_rows == got.tally["a"].computed_tokens + got.tally["b"].computed_tokens
    assert got.tally["a"].computed_tokens == LENGTH + OUTPUTS - 1


def test_a_job_that_waited_behind_its_own_prefix_finds_it_at_the_lender_when_its_turn_comes(town, prompt) -> None:
    """The first job had the prefix here, borrowed; it ends, and what it borrowed goes back to the lender's cache."""
    bank = town(lenders=1, device_blocks=64, lender_blocks=160, max_batch=1)
    engine = bank.worker.engine
    jobs = [JobSpec(id=name, prompt=prompt(1500), max_tokens=OUTPUTS, ignore_eos=True, age=age) for age, name in enumerate("ab")]
    late = []

    def join() -> None:
        if not late and any(seq.num_output for seq in engine.jobs()):
            late.append(True)
            engine.add(jobs[1])

    got = bank.run(jobs[0], each_step=join)
    assert late and not got.errors and got.tokens["b"] == got.tokens["a"]
    assert got.tally["b"].reused["peer"] > 0, got.tally["b"]
    assert sum(got.tally["b"].reused.values()) == 1500 // 16 * 16, got.tally["b"]
