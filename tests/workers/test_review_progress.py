"""Who waits behind somebody that gets on is not stuck, and nobody waits for what will never come."""

from __future__ import annotations

from itertools import count

from kvbank.errors import Unavailable
from kvbank.workers.borrower import Lender
from kvbank.workers.sequence import JobSpec


def ticking(engine) -> None:
    """A clock of its own: a hundredth of a second for every look at it, so that a busy machine changes nothing."""
    looks = count()
    engine._clock = lambda: next(looks) / 100


def test_a_job_that_waits_for_an_older_ones_memory_is_not_given_up(alone, run_jobs, prompt) -> None:
    """Together they need more than there is: the younger is computed when the older has ended, however long that takes."""
    jobs = [JobSpec(id=f"j{i}", prompt=prompt(200, i), max_tokens=200, age=i, ignore_eos=True) for i in range(3)]
    want = run_jobs(alone(), *jobs)
    engine = alone(device_blocks=32, stall_s=1.0)
    ticking(engine)
    got = run_jobs(engine, *jobs)
    assert not got.errors
    assert got.tokens == want.tokens


def test_a_job_behind_a_long_prompt_is_not_given_up(alone, run_jobs, prompt) -> None:
    """The older takes the whole prefill budget of every step."""
    jobs = [JobSpec(id="long", prompt=prompt(600, 1), max_tokens=2, age=0, ignore_eos=True),
            JobSpec(id="next", prompt=prompt(100, 2), max_tokens=2, age=1, ignore_eos=True)]
    engine = alone(prefill_chunk_tokens=8, stall_s=0.5)
    ticking(engine)
    got = run_jobs(engine, *jobs)
    assert not got.errors


def test_the_oldest_job_that_cannot_go_on_still_ends(alone, run_jobs, prompt) -> None:
    engine = alone(device_blocks=32, stall_s=0.5)
    ticking(engine)
    engine._capacity_tokens = lambda: 1 << 20
    got = run_jobs(engine, JobSpec(id="a", prompt=prompt(900), max_tokens=2, ignore_eos=True),
                   JobSpec(id="b", prompt=prompt(100, 1), max_tokens=2, age=1, ignore_eos=True))
    assert isinstance(got.errors.pop("a"), Unavailable)
    assert not got.errors and len(got.tokens["b"]) == 2


def test_lenders_that_refuse_do_not_keep_a_job_from_its_own_host_tier(town, prompt) -> None:
    """Advice says that they lend, each of them says no: the job parks instead of asking for ever."""
    job = JobSpec(id="a", prompt=prompt(900), max_tokens=4, ignore_eos=True)
    one = town(lenders=2, device_blocks=32, host_bytes=64 << 20, stall_s=2.0)
    for lender in one.lenders:
        lender.ledger._pool.lendable = lambda: 0
    one.lenders_now = lambda: [Lender(m.id, m.boot, m.address, 40) for m in one.lenders]
    got = one.run(job)
    assert not got.errors
    assert got.tally["a"].parked_blocks_peak > 0


def test_what_a_queued_job_adopted_does_not_keep_the_oldest_from_its_memory(town, alone, run_jobs, prompt) -> None:
    """Four slots here and six at the lender. The queued job's prefix fills the lender; the oldest needs all ten."""
    first = JobSpec(id="first", prompt=prompt(1150, 1), max_tokens=2, ignore_eos=True)
    blocker = JobSpec(id="blocker", prompt=prompt(100, 3), max_tokens=400, age=0, ignore_eos=True)
    oldest = JobSpec(id="oldest", prompt=prompt(1200, 2), max_tokens=8, age=1, ignore_eos=True)
    queued = JobSpec(id="queued", prompt=first.prompt, max_tokens=2, age=2, ignore_eos=True)
    want = run_jobs(alone(), oldest, first)
    one = town(lenders=1, device_blocks=32, lender_blocks=48, stall_s=10.0)
    one.run(first)
    one.settle()
    engine = one.worker.engine
    adopted: list[int] = []

    def free_the_way() -> None:
        waits = next((seq for seq in engine.jobs() if seq.job is queued), None)
        if not adopted and waits is not None and len(waits.adopted) >= 5:
            adopted.append(len(waits.adopted))
            engine.add(oldest)
            engine.cancel("blocker")

    got = one.run(blocker, queued, each_step=free_the_way)
    assert adopted, "nothing was adopted in the queue"
    got.errors.pop("blocker")
    assert not got.errors
    assert got.tokens["oldest"] == want.tokens["oldest"] and got.tokens["queued"] == want.tokens["first"]
