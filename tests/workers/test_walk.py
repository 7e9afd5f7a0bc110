"""A random walk over a whole bank: jobs of all lengths with common prefixes, cancels, seeds, host memory, Redis, and lenders
that die and come. After every job its tokens are those of one big worker; at the end nothing is used, lent or borrowed.

A failure prints the seed.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbank.errors import Cancelled
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine, Failed, Finished, Token
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sampler import SamplingParams
from kvbank.workers.sequence import JobSpec

SLOT = 4 * 2 * 2 * 128 * 32 * 4
LENGTHS = (1, 15, 16, 17, 100, 127, 128, 129, 300, 640, 1100, 1800)


@pytest.fixture()
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(16 << 20) as server:
        yield server


class Walk:
    """One bank, one reference engine, and dice."""

    def __init__(self, seed: int, bank: Any, reference: Engine, run_jobs: Any, prompt: Any) -> None:
        self.rng, self.bank, self.reference = random.Random(seed), bank, reference
        self._run_jobs, self._prompt = run_jobs, prompt
        self.want: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}
        self.live: dict[str, JobSpec] = {}
        self.cancelled: set[str] = set()
        self.reused: Counter[str] = Counter()
        self._until_change = 0
        self.checked = self.deaths = self.births = 0

    def job(self, number: int) -> JobSpec:
        rng = self.rng
        stem = self._prompt(rng.choice((0, 128, 500, 1024)), rng.randrange(3))
        text = stem + self._prompt(rng.choice(LENGTHS), rng.randrange(10))
        sampling = SamplingParams() if rng.random() < 0.5 else SamplingParams(
            temperature=0.9, top_p=rng.choice((1.0, 0.9)), top_k=rng.choice((0, 20)), seed=number)
        return JobSpec(id=f"j{number}", prompt=text, max_tokens=rng.choice((1, 2, 9, 40)), ignore_eos=True, sampling=sampling,
                       age=float(number))

    def run(self, jobs: int) -> None:
        todo, rng, engine = [self.job(n) for n in range(jobs)], self.rng, self.bank.worker.engine
        for job in todo:
            self.want[job.id] = self._run_jobs(self.reference, job).tokens[job.id]
        quiet_since = time.monotonic()
        while todo or self.live:
            while todo and len(self.live) < 5 and rng.random() < 0.3:
                job = todo.pop(0)
                self.live[job.id] = job
                engine.add(job)
            if self.live and rng.random() < 0.01:
                name = rng.choice(sorted(self.live))
                self.cancelled.add(name)
                engine.cancel(name)
            self._until_change -= 1
            if not self._until_change:
                self._change_lenders()
            self.bank.refresh()
            events = engine.step()
            for event in events:
                self._take(event)
            if events:
                quiet_since = time.monotonic()
            else:
                engine.wake.wait(0.002)
            assert time.monotonic() - quiet_since < 40, [(s.job.id, s.state, s.waits_for) for s in engine.jobs()]

    def _take(self, event: Any) -> None:
        if isinstance(event, Token):
            self.got.setdefault(event.job, []).append(event.token)
            return
        self.live.pop(event.job)
        if self._until_change <= 0 and self.rng.random() < 0.4:
            self._until_change = self.rng.randint(1, 20)          # in the middle of somebody's work
        got, want = self.got.get(event.job, []), self.want[event.job]
        if isinstance(event, Finished):
            assert got == want, f"{event.job}: {event.tally}"
            self.checked += 1
            self.reused += event.tally.reused
        else:
            assert isinstance(event, Failed)
            assert isinstance(event.error, Cancelled) and event.job in self.cancelled, event.error
            assert got == want[: len(got)]
        self._check_books()

    def _change_lenders(self) -> None:
        bank = self.bank
        if len(bank.lenders) > 1 and self.rng.random() < 0.5:
            bank.kill(self.rng.randrange(len(bank.lenders)))
            self.deaths += 1
        elif len(bank.lenders) < 4:
            bank.lenders.append(bank._start("lender", f"lender-new-{self.births}"))
            self.births += 1

    def _check_books(self) -> None:
        bank = self.bank
        for member in [bank.worker, *bank.lenders]:
            with member.vault.lock:
                wrong = [*member.vault.check(), *member.ledger.check()]
                if member is bank.worker:
                    wrong += member.book.check()
            assert not wrong, wrong

    def end(self) -> None:
        """Everybody is idle: nothing used, lent or borrowed."""
        self.bank.settle(15.0)
        worker, give_up = self.bank.worker, time.monotonic() + 10
        while worker.engine.room.waiting:                         # what was on its way to a lender comes to an end
            worker.engine.step()
            assert time.monotonic() < give_up, "a move does not end"
            time.sleep(0.01)
        self._check_books()
        counts = worker.vault.counts()
        assert counts.held == counts.lent == 0, counts
        assert worker.borrower.num_borrowed == 0 and not worker.book.refs()
        assert not worker.engine.room.away and not worker.engine.room.parked and not worker.engine.room.waiting
        for member in self.bank.lenders:
            assert member.vault.counts().lent == 0 and member.ledger.num_lent == 0, member.id


@pytest.fixture(scope="session")
def windowed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer sees 300 tokens back: windows cut spans, and what lies behind them is let go."""
    return write_random_model(tmp_path_factory.mktemp("windowed"), seed=8, vocab=512, model_type="mistral", sliding_window=300)


def walk(
    seed: int, jobs: int, town: Callable[..., Any], redis: EmbeddedRedis, model: Path, run_jobs: Any, prompt: Any, shards: int = 1
) -> Walk:
    bank = town(model=str(model), shards=shards, lenders=3, device_blocks=96, lender_blocks=64, redis=redis.url,
                host_bytes=8 * (SLOT + 8192), redis_bytes=8 << 20, exactness="bitwise", attend_lost_s=0.5, avoid_s=0.5,
                stall_s=60)
    reference = build_engine(WorkerConfig(model=str(model), device_blocks=1024, exactness="bitwise"))
    made = Walk(seed, bank, reference, run_jobs, prompt)
    print(f"seed {seed}")
    made.run(jobs)
    made.end()
    return made


@pytest.mark.parametrize("seed", [*(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1)), 2])
def test_a_random_walk_gives_every_job_its_own_tokens_and_leaves_empty_books(
    town, redis, small_model, run_jobs, prompt, seed
) -> None:
    done = walk(seed, 20, town, redis, small_model, run_jobs, prompt)
    assert done.checked > 10


def test_a_random_walk_with_a_sliding_window(town, redis, windowed_model, run_jobs, prompt) -> None:
    done = walk(0, 20, town, redis, windowed_model, run_jobs, prompt)
    assert done.checked > 10


def test_a_random_walk_with_two_shards(town, redis, small_model, run_jobs, prompt) -> None:
    done = walk(0, 20, town, redis, small_model, run_jobs, prompt, shards=2)
    assert done.checked > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 110))
def test_a_long_random_walk(town, redis, small_model, run_jobs, prompt, seed) -> None:
    done = walk(seed, 60, town, redis, small_model, run_jobs, prompt)
    assert done.checked > 30 and done.deaths and done.births
    assert done.reused["device"] and done.reused["peer"] and done.reused["host"] + done.reused["redis"], done.reused


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(200, 206))
def test_a_long_random_walk_with_a_sliding_window(town, redis, windowed_model, run_jobs, prompt, seed) -> None:
    assert walk(seed, 60, town, redis, windowed_model, run_jobs, prompt).checked > 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(300, 304))
def test_a_long_random_walk_with_two_shards(town, redis, small_model, run_jobs, prompt, seed) -> None:
    assert walk(seed, 60, town, redis, small_model, run_jobs, prompt, shards=2).checked > 30
