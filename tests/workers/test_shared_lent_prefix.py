"""Jobs that read the same lent spans in one step: each gets its answer, though all asked for the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvbank.workers.sequence import JobSpec


@pytest.mark.parametrize("numerics", ["ours", "another kind of machine"])
@pytest.mark.parametrize("readers", [2, 3])
def test_several_jobs_that_fetch_the_same_spans_in_one_step_are_all_answered(
    town, alone, run_jobs, prompt, numerics, readers
) -> None:
    """One decodes from them, the others have so many rows that K and V come here."""
    text = prompt(270)
    first = JobSpec(id="a", prompt=text, max_tokens=30, ignore_eos=True)
    then = [JobSpec(id=f"b{i}", prompt=text[:256] + prompt(150, i + 1), max_tokens=8, ignore_eos=True) for i in range(readers)]
    engine = alone()
    want = run_jobs(engine, first).tokens | run_jobs(engine, *then).tokens
    bank = town(lenders=1, lender_blocks=160, device_blocks=160)
    (lender,) = bank.lenders
    if numerics != "ours":
        lender.ledger.compat = replace(lender.ledger.compat, numerics=numerics)
    due = list(then)

    def lend_and_follow() -> None:
        running = bank.worker.engine.scheduler.running
        if due and running and running[0].num_output:
            bank.worker.engine.room.lend_ahead(running[0], 2)
            while bank.worker.engine.room.waiting:
                bank.worker.engine.wake.wait(0.01)
                bank.worker.engine.room.absorb(bank.worker.borrower.poll())
            assert bank.worker.borrower.num_borrowed == 2
            while due:
                bank.worker.engine.add(due.pop(0))
    got = bank.run(first, each_step=lend_and_follow)
    assert not got.errors and got.tokens == want
    assert lender.attend.counters.layers > 0
    assert not any(tally.recomputed_after_fault for tally in got.tally.values()), [dict(t.missed) for t in got.tally.values()]
