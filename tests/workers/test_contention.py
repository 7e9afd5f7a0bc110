"""Several workers whose jobs together need more than there is: the oldest gets on, whoever holds the memory, and the others
wait for it. Nobody blocks anybody for ever, and every job ends with its own tokens."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from kvbank.errors import Unavailable
from kvbank.kvstore.messages import OLDER
from kvbank.workers import scheduler
from kvbank.workers.engine import Failed, Finished, Token
from kvbank.workers.sequence import JobSpec


def drive(town: Any, jobs: dict[int, list[JobSpec]], within_s: float = 100.0) -> tuple[dict[str, list[int]], list[Failed]]:
    """Run jobs (worker -> jobs) on all workers side by side to their end: tokens by job, and who failed."""
    for number, some in jobs.items():
        for job in some:
            town.workers[number].engine.add(job)
    tokens: dict[str, list[int]] = {}
    failed: list[Failed] = []
    open_jobs, give_up = {job.id for some in jobs.values() for job in some}, time.monotonic() + within_s
    while open_jobs:
        town.refresh()
        made = [event for worker in town.workers for event in worker.engine.step()]
        for event in made:
            if isinstance(event, Token):
                tokens.setdefault(event.job, []).append(event.token)
            elif isinstance(event, (Finished, Failed)):
                open_jobs.discard(event.job)
                failed += [event] if isinstance(event, Failed) else []
        if not made:
            town.worker.engine.wake.wait(0.002)
        assert time.monotonic() < give_up, [
            (worker.id, seq.job.id, seq.state, seq.waits_for) for worker in town.workers for seq in worker.engine.jobs()]
    return tokens, failed


def job(name: str, tokens: list[int], age: float, max_tokens: int = 12) -> JobSpec:
    return JobSpec(id=name, prompt=tokens, max_tokens=max_tokens, ignore_eos=True, age=age)


QUICK = {"exactness": "bitwise", "stall_s": 15.0, "avoid_s": 0.5, "recall_urgent_s": 1.0}


def test_two_workers_that_need_the_same_lender_do_not_block_each_other(town, alone, run_jobs, prompt) -> None:
    jobs = {0: [job("old", prompt(3600, 1), 1.0)], 1: [job("young", prompt(3600, 2), 2.0)]}
    want = run_jobs(alone(exactness="bitwise"), *jobs[0], *jobs[1]).tokens
    bank = town(replicas=2, lenders=1, device_blocks=96, lender_blocks=160, **QUICK)
    got, failed = drive(bank, jobs)
    assert not failed, failed
    assert got == want
    assert bank.lenders[0].ledger.counters["recalls"], "nothing was called back"


def test_a_worker_gives_its_own_memory_to_an_older_job_elsewhere(town, alone, run_jobs, prompt) -> None:
    """The older job fits only with what the younger job's worker lends; that one needs the lender that the older has."""
    jobs = {0: [job("old", prompt(3500, 1), 1.0)], 1: [job("young", prompt(3000, 2), 2.0)]}
    want = run_jobs(alone(exactness="bitwise"), *jobs[0], *jobs[1]).tokens
    bank = town(replicas=2, lenders=1, device_blocks=96, lender_blocks=96, **QUICK)
    got, failed = drive(bank, jobs)
    assert not failed, failed
    assert got == want


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1, *range(100, 120)))])
def test_a_walk_in_which_memory_is_always_short(town, alone, run_jobs, prompt, seed) -> None:
    """No job is refused, none stalls, none gets a wrong token, and nothing is left lent. With the product's own stall_s: on a
    busy machine the whole walk takes 30 s."""
    rng = random.Random(seed)
    jobs: dict[int, list[JobSpec]] = {0: [], 1: [], 2: []}
    for number in range(9):
        length = rng.choice((300, 900, 1800, 2600))
        jobs[rng.randrange(3)].append(job(f"j{number}", prompt(length, number), float(number), rng.choice((2, 12, 30))))
    everything = [one for some in jobs.values() for one in some]
    want = {one.id: run_jobs(alone(exactness="bitwise"), one).tokens[one.id] for one in everything}
    bank = town(replicas=3, lenders=1, device_blocks=64, lender_blocks=96, **{**QUICK, "stall_s": 30.0})
    got, failed = drive(bank, jobs, within_s=200.0)
    assert not failed, failed
    assert got == want
    bank.settle(10.0)
    for member in [*bank.workers, *bank.lenders]:
        with member.vault.lock:
            assert not member.vault.check() and not member.ledger.check(), member.id
        assert member.vault.counts().lent == 0, member.id


def test_nobody_waits_for_ever_for_older_jobs_that_only_a_lender_knows_of(town, prompt, monkeypatch) -> None:
    """A lender says OLDER by the label of its loans, and the job that a label names may have ended long ago."""
    monkeypatch.setattr(scheduler, "OUTRANKED_STALLS", 3)
    bank = town(lenders=1, device_blocks=48, lender_blocks=32, stall_s=2.0)     # a busy lender has its time
    bank.lenders[0].ledger._make_way = lambda *_: (OLDER, 300)
    bank.worker.engine._capacity_tokens = lambda: 1 << 20
    started = time.monotonic()
    _, failed = drive(bank, {0: [job("a", prompt(2000, 1), 1.0)]}, within_s=20.0)
    assert [type(one.error) for one in failed] == [Unavailable]
    assert time.monotonic() - started > 6.0, "it did not wait for the older job at all"
