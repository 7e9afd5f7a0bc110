"""One worker: whatever the chunk size, the company, preemption or reuse, the tokens are those of a big machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvbank.errors import Cancelled, ConfigError, DeadlineExceeded, Overloaded, TooLong, Unavailable
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sampler import SamplingParams
from kvbank.workers.sequence import JobSpec

BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])


def same(got, want, job: str, exactness: str) -> None:
    """Equal tokens; equal logits bit for bit under bitwise, within 1e-4 under fast."""
    assert got.tokens[job] == want.tokens[job]
    if exactness == "bitwise":
        assert torch.equal(got.logits[job], want.logits[job])
    else:
        assert (got.logits[job] - want.logits[job]).abs().max() < 1e-4


@BOTH
@pytest.mark.parametrize("chunk", [1, 7, 100, 129, 2048])
def test_any_chunk_size_gives_the_same_tokens(alone, run_jobs, prompt, exactness, chunk) -> None:
    job = JobSpec(id="a", prompt=prompt(300), max_tokens=12, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    assert len(set(want.tokens["a"])) > 3, "a degenerate model proves nothing"
    same(run_jobs(alone(exactness=exactness, prefill_chunk_tokens=chunk), job), want, "a", exactness)


@BOTH
def test_company_in_the_batch_changes_nothing(alone, run_jobs, prompt, exactness) -> None:
    job = JobSpec(id="a", prompt=prompt(400), max_tokens=16, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    others = [JobSpec(id=f"x{i}", prompt=prompt(50 + 60 * i, i + 1), max_tokens=20, age=i, ignore_eos=True) for i in range(7)]
    same(run_jobs(alone(exactness=exactness), *others, job), want, "a", exactness)


@BOTH
def test_a_preempted_job_resumes_with_the_same_tokens(alone, run_jobs, prompt, exactness) -> None:
    jobs = [JobSpec(id=f"j{i}", prompt=prompt(250, i), max_tokens=150, age=i, ignore_eos=True) for i in range(4)]
    want = run_jobs(alone(exactness=exactness), *jobs)
    engine = alone(exactness=exactness, device_blocks=80)
    got = run_jobs(engine, *jobs)
    assert engine.room.preemptions > 0, "nothing was preempted"
    for job in jobs:
        same(got, want, job.id, exactness)
    assert engine.vault.counts().held == 0 and not engine.vault.check()


def test_a_second_submission_computes_the_last_block_only(alone, run_jobs, prompt) -> None:
    engine, text = alone(), prompt(1000)
    first = run_jobs(engine, JobSpec(id="a", prompt=text, max_tokens=4, ignore_eos=True))
    rows = engine.counters.forward_rows
    again = run_jobs(engine, JobSpec(id="b", prompt=text, max_tokens=4, ignore_eos=True))
    assert again.tokens["b"] == first.tokens["a"]
    assert again.tally["b"].reused["device"] == 992
    assert again.tally["b"].computed_tokens == engine.counters.forward_rows - rows == 1000 - 992 + 3


def test_of_two_jobs_with_one_prefix_only_the_older_computes_it(alone, run_jobs, prompt) -> None:
    engine, text = alone(), prompt(1600)
    jobs = [JobSpec(id=name, prompt=[*text, extra], max_tokens=4, age=extra, ignore_eos=True)
            for name, extra in (("old", 5), ("young", 6))]
    got = run_jobs(engine, *jobs)
    assert got.tally["young"].reused["device"] == 1600
    assert engine.counters.forward_rows < 1700


def test_different_tenants_share_nothing(alone, run_jobs, prompt) -> None:
    engine, text = alone(), prompt(400)
    run_jobs(engine, JobSpec(id="a", prompt=text, max_tokens=2, tenant="one"))
    got = run_jobs(engine, JobSpec(id="b", prompt=text, max_tokens=2, tenant="two", ignore_eos=True))
    assert not got.tally["b"].reused


def test_different_salts_share_nothing_and_equal_ones_do(alone, run_jobs, prompt) -> None:
    engine, text = alone(), prompt(400)
    want = run_jobs(engine, JobSpec(id="plain", prompt=text, max_tokens=2, ignore_eos=True))
    for name, salt, tenant, reused in (("a", "x", "default", 0), ("b", "y", "default", 0), ("c", "x", "other", 0),
                                       ("d", "x\0y", "default", 0), ("e", "x", "default", 384), ("f", "", "default", 384)):
        got = run_jobs(engine, JobSpec(id=name, prompt=text, max_tokens=2, tenant=tenant, cache_salt=salt, ignore_eos=True))
        assert got.tally[name].reused["device"] == reused, name
        assert got.tokens[name] == want.tokens["plain"]


@BOTH
def test_seeded_sampling_does_not_depend_on_the_company(alone, run_jobs, prompt, exactness) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=11)
    job = JobSpec(id="a", prompt=prompt(200), max_tokens=20, sampling=params, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    others = [JobSpec(id=f"x{i}", prompt=prompt(90, i + 1), max_tokens=20, sampling=params, ignore_eos=True) for i in range(3)]
    assert run_jobs(alone(exactness=exactness), *others, job).tokens["a"] == want.tokens["a"]


def test_an_attempt_resumes_where_the_last_one_stopped(alone, run_jobs, prompt) -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    whole = run_jobs(alone(), JobSpec(id="a", prompt=prompt(100), max_tokens=20, sampling=params, ignore_eos=True)).tokens["a"]
    resumed = JobSpec(id="a", prompt=prompt(100), emitted=whole[:7], max_tokens=20, sampling=params, ignore_eos=True)
    rest = run_jobs(alone(), resumed)
    assert whole[:7] + rest.tokens["a"] == whole


@BOTH
def test_a_sliding_window_needs_no_more_slots_than_it_sees(tmp_path: Path, run_jobs, exactness) -> None:
    write_random_model(tmp_path / "m", seed=3, vocab=512, model_type="mistral", sliding_window=200)
    text = [(i * 7919) % 500 + 3 for i in range(1500)]
    job = JobSpec(id="a", prompt=text, max_tokens=10, ignore_eos=True)

    def engine(**settings):
        return build_engine(WorkerConfig(model=str(tmp_path / "m"), exactness=exactness, **settings))

    want = run_jobs(engine(device_blocks=1024, prefill_chunk_tokens=2048), job)
    small = engine(device_blocks=56, prefill_chunk_tokens=128)
    got = run_jobs(small, job)
    same(got, want, "a", exactness)
    assert small.room.preemptions == 0 and not small.vault.check()


def test_limits_are_typed_and_leave_nothing_behind(alone, run_jobs, prompt) -> None:
    engine = alone(device_blocks=64, max_queue=1)
    too_long = run_jobs(engine, JobSpec(id="a", prompt=prompt(1000), max_tokens=100))
    assert isinstance(too_long.errors["a"], TooLong) and "1024" in str(too_long.errors["a"])
    late = run_jobs(engine, JobSpec(id="b", prompt=prompt(300), max_tokens=500, deadline_s=0.0))
    assert isinstance(late.errors["b"], DeadlineExceeded)
    for name in "cde":
        engine.add(JobSpec(id=name, prompt=prompt(300), max_tokens=4))
    engine.cancel("c")
    crowd = run_jobs(engine)
    assert isinstance(crowd.errors["c"], Cancelled)
    assert any(isinstance(error, Overloaded) for error in crowd.errors.values())
    counts = engine.vault.counts()
    assert counts.held == 0 and not engine.vault.check()


def test_a_job_that_can_never_get_room_ends_unavailable(alone, run_jobs, prompt) -> None:
    engine = alone(device_blocks=24, stall_s=0.2)
    engine._capacity_tokens = lambda: 10_000         # the cluster said it would fit, and then nobody lent
    got = run_jobs(engine, JobSpec(id="a", prompt=prompt(1000), max_tokens=4))
    assert isinstance(got.errors["a"], Unavailable)
    assert engine.vault.counts().held == 0


def swap_keys(slots) -> None:
    """Two whole visible spans may change places unseen, attention being a sum; their keys alone may not."""
    held = slots[1, :, 0].clone()
    slots[1, :, 0] = slots[2, :, 0]
    slots[2, :, 0] = held


NEGATIVE = {
    "zero one span": lambda slots: slots[2].zero_(),
    "swap the keys of two": swap_keys,
    "shift keys by one position": lambda slots: slots[1, :, 0].copy_(slots[1, :, 0].roll(1, dims=2)),
}


@BOTH
@pytest.mark.parametrize("what", NEGATIVE)
def test_a_wrong_span_changes_the_logits(alone, run_jobs, prompt, exactness, what) -> None:
    """The negative control of every identity above: the comparison can fail."""
    job = JobSpec(id="a", prompt=prompt(600), max_tokens=1, ignore_eos=True)
    follow = JobSpec(id="b", prompt=prompt(600), max_tokens=1, ignore_eos=True)
    engine = alone(exactness=exactness)
    want = run_jobs(engine, job)
    slots = engine.backend.arena.view(engine.backend.layout)
    NEGATIVE[what](slots)
    got = run_jobs(engine, follow)
    assert (got.logits["b"] - want.logits["a"]).abs().max() > 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_a_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no CUDA here: use cpu"):
        build_engine(WorkerConfig(model=str(write_random_model(tmp_path, num_layers=1)), device_blocks=24, device="cuda"))
