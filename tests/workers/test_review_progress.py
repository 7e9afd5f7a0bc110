"""Who waits behind somebody that gets on is not stuck, and nobody waits for what will never come."""

from __future__ import annotations

from itertools import count

import pytest

from kvbank.errors import Unavailable
from kvbank.kvstore.vault import Vault
from kvbank.workers.batch import StepResult
from kvbank.workers.borrower import Lender
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine, Finished
from kvbank.workers.seams import Moved, NoBank
from kvbank.workers.sequence import JobSpec


def ticking(engine) -> None:
    """A clock of its own: a hundredth of a second for every look at it, so that a busy machine changes nothing."""
    looks = count()
    engine._clock = lambda: next(looks) / 100


@pytest.mark.slow
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
    one.lenders_now = lambda asker: [Lender(m.id, m.boot, m.address, 40) for m in one.lenders]
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


class Generous(NoBank):
    """A bank whose lenders take everything at once."""

    def __init__(self) -> None:
        self.news: list[Moved] = []

    def lendable(self) -> int:
        return 100

    def lend_out(self, moves, *, tenant, age, needy=False) -> None:
        self.news += [Moved(move.uid, "lender-0") for move in moves]

    def settle(self, uids, *, keep) -> None: ...

    def poll(self) -> list[Moved]:
        news, self.news = self.news, []
        return news


class Faulty:
    """A model that always says 7, and loses spans at lenders: `faults` is a list of (in the step that computes from token
    `start` on, every lent span with at least this index), each met once and in this order."""

    def __init__(self, *faults: tuple[int, int]) -> None:
        self.faults = list(faults)

    def run(self, plan, **_options) -> StepResult:
        (rows,), lost = plan.rows, {}
        if self.faults and rows.start == self.faults[0][0]:
            _, first = self.faults.pop(0)
            lost = {uid: "silent" for index, uid in rows.remote if index >= first}
            assert lost, "the fault had no effect"
        return StepResult([7 for _ in plan.draws], lost)

    def copy_tokens(self, source, target, start, stop) -> None: ...

    def parkable(self) -> int:
        return 0

    def spill(self, span) -> None: ...


@pytest.mark.parametrize(("chunk", "slots", "faults"), [
    (16, 6, [(48, 2), (8, 0)]),              # two steps that lost what they read leave slots behind with nothing in them
    (2, 3, [(54, 8), (34, 4), (18, 0)]),     # steps end within spans: what they leave behind is half full
])
def test_losses_one_below_the_other_leave_room_for_the_lowest(chunk, slots, faults) -> None:
    config = WorkerConfig(model="", device_blocks=2 * slots, block_size=2, span_tokens=4, prefill_chunk_tokens=chunk)
    vault, backend = Vault(slots, blocks_per_span=2), Faulty(*faults)
    engine = Engine(config, vault, backend, clock=lambda: 0.0, root_of=lambda tenant: b"root", bank=Generous(),
                    capacity_tokens=lambda: 1000)
    engine.add(JobSpec(id="a", prompt=list(range(72)), max_tokens=4))
    end = engine.run_until_idle(max_steps=500)[-1]
    assert isinstance(end, Finished) and not backend.faults
    assert end.tally.recomputed_after_fault > 0
    assert vault.counts().held == 0 and not vault.check() and not engine.room.away


def test_the_same_prompt_again_where_it_just_fits(alone, run_jobs, prompt) -> None:
    """Its last blocks lie in the only slot that is not in use: there is none to copy them to."""
    engine = alone(device_blocks=24, stall_s=2.0)
    jobs = [JobSpec(id=name, prompt=prompt(300), max_tokens=4, ignore_eos=True) for name in "ab"]
    first, again = run_jobs(engine, jobs[0]), run_jobs(engine, jobs[1])
    assert not again.errors and again.tokens["b"] == first.tokens["a"]
    assert again.tally["b"].reused["device"] >= 256
