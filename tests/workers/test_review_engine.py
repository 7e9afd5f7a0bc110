"""A bug in one step costs its jobs and never the worker; receipts name every source and lender."""

from __future__ import annotations

import pytest

from kvbank.errors import KVBankError, TooLong
from kvbank.workers.engine import Failed
from kvbank.workers.seams import BackendLost
from kvbank.workers.sequence import JobSpec


def broken_once(owner, name: str) -> None:
    real, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        return real(*args, **kwargs)
    setattr(owner, name, fail)


def test_a_job_refused_in_a_step_that_broke_hears_of_it(alone, prompt) -> None:
    engine = alone(device_blocks=64)
    broken_once(engine.backend, "run")
    engine.add(JobSpec(id="a", prompt=prompt(50), max_tokens=4))
    engine.add(JobSpec(id="long", prompt=prompt(5000), max_tokens=4))
    with pytest.raises(RuntimeError):
        engine.step()
    told = {event.job: event.error for event in engine.fail_all(KVBankError("internal")) if isinstance(event, Failed)}
    assert isinstance(told["long"], TooLong) and set(told) == {"a", "long"}
    assert engine.step() == [] and not engine.busy


def test_a_lost_shard_is_told_once_to_every_job(alone, prompt) -> None:
    engine = alone(device_blocks=64)

    def lost(plan, **kwargs):
        raise BackendLost("a shard is gone")
    engine.backend.run = lost
    engine.add(JobSpec(id="a", prompt=prompt(50), max_tokens=4))
    engine.add(JobSpec(id="long", prompt=prompt(5000), max_tokens=4))
    assert sorted(event.job for event in engine.step()) == ["a", "long"]


def test_a_job_that_cannot_be_taken_apart_does_not_end_the_engine(alone, run_jobs, prompt) -> None:
    engine = alone(device_blocks=64)
    for name in "ab":
        engine.add(JobSpec(id=name, prompt=prompt(50), max_tokens=40, ignore_eos=True))
    engine.step()
    broken_once(engine.room, "release")
    told = engine.fail_all(KVBankError("internal"))
    assert {event.job for event in told} == {"a", "b"} and not engine.busy
    got = run_jobs(engine, JobSpec(id="c", prompt=prompt(50), max_tokens=4, ignore_eos=True))
    assert len(got.tokens["c"]) == 4


def test_a_job_that_joins_a_lent_prefix_names_its_lender(town, prompt) -> None:
    one = town(lenders=2, device_blocks=48)
    text, asked = prompt(900), []

    def ask_again() -> None:
        room = one.worker.engine.room
        if room.away and not asked and any(s.num_output > 4 for s in one.worker.engine.jobs()):
            asked.append(dict(room.away))
            one.worker.engine.add(JobSpec(id="b", prompt=text, max_tokens=4, age=1, ignore_eos=True))
    got = one.run(JobSpec(id="a", prompt=text, max_tokens=120, ignore_eos=True), each_step=ask_again)
    assert asked and got.tally["b"].borrowed_blocks_peak > 0
    assert set(got.tally["b"].lenders) <= set(got.tally["a"].lenders) and got.tally["b"].lenders


def test_kv_that_gave_no_finite_logits_is_not_found_again(alone, run_jobs, prompt) -> None:
    text = prompt(300)
    want = run_jobs(alone(), JobSpec(id="b", prompt=text, max_tokens=4, ignore_eos=True))
    engine = alone()
    real, spoiled = engine.backend.run, []

    def run(plan, **kwargs):
        result = real(plan, **kwargs)
        if plan.draws and not spoiled:
            spoiled.append(1)
            result.tokens = [-1] * len(result.tokens)
        return result
    engine.backend.run = run
    assert "a" in run_jobs(engine, JobSpec(id="a", prompt=text, max_tokens=4, ignore_eos=True)).errors
    got = run_jobs(engine, JobSpec(id="b", prompt=text, max_tokens=4, ignore_eos=True))
    assert not got.tally["b"].reused and got.tokens["b"] == want.tokens["b"]
    assert engine.vault.counts().held == 0 and not engine.vault.check()


def test_a_job_continued_from_another_worker_says_why_its_prompt_was_computed(alone, run_jobs, prompt) -> None:
    """Its answer so far is computed with it, and is no part of the prompt's last block."""
    job = JobSpec(id="a", prompt=prompt(300), emitted=prompt(200, 1), max_tokens=204, ignore_eos=True)
    tally = run_jobs(alone(), job).tally["a"]
    assert sum(tally.missed.values()) == 300
    assert tally.missed["last_block"] == 300 - 299 // 16 * 16
