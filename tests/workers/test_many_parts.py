"""Steps too large for one message: cut into parts that a lender can answer, however many they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbank.workers import remote_attention
from kvbank.workers.attend_server import KEPT_PLANS
from kvbank.workers.sequence import JobSpec


def lend_now(bank: Any, spans: int) -> None:
    """Between two steps: that many full spans go to the lenders."""
    engine = bank.worker.engine
    engine.room.lend_ahead(engine.scheduler.running[0], spans)
    while engine.room.waiting:
        engine.wake.wait(0.01)
        engine.room.absorb(bank.worker.borrower.poll())
    assert bank.worker.borrower.num_borrowed == spans


@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
def test_a_step_of_more_plans_than_a_lender_remembers_is_answered(
    town, alone, run_jobs, prompt, monkeypatch, exactness
) -> None:
    """Twelve jobs in one step, each with some rows after a lent span of its own. With 32 heads of 128 a part has 184 rows."""
    texts = [prompt(170, i) for i in range(12)]
    first = [JobSpec(id=f"a{i}", prompt=text[:130], max_tokens=40, ignore_eos=True) for i, text in enumerate(texts)]
    then = [JobSpec(id=f"b{i}", prompt=text, max_tokens=3, ignore_eos=True) for i, text in enumerate(texts)]
    engine = alone(exactness=exactness)
    want = run_jobs(engine, *first).tokens | run_jobs(engine, *then).tokens
    monkeypatch.setattr(remote_attention, "PART_BYTES", 40 * 4 * 33 * 4)     # 40 rows of 4 heads of 32, with their lse
    bank = town(lenders=1, lender_blocks=160, device_blocks=320, exactness=exactness)
    bank.worker.remote.ship = "query"
    most, due = 0, list(then)

    def look() -> None:
        nonlocal most
        most = max(most, len({part.plan.plan for part in bank.worker.remote._parts}))
        running = bank.worker.engine.scheduler.running
        if due and len(running) == 12 and all(seq.num_output for seq in running):
            lend_now(bank, 12)
            while due:
                bank.worker.engine.add(due.pop(0))
    got = bank.run(*first, each_step=look)
    assert most > KEPT_PLANS
    assert not got.errors and got.tokens == want
    assert not any(tally.recomputed_after_fault for tally in got.tally.values()), [dict(t.missed) for t in got.tally.values()]


def test_an_answer_with_a_partial_for_each_span_fits_one_message(town, alone, run_jobs, prompt) -> None:
    """`bitwise`: a lender answers once a row for each piece of the tree that it holds whole; seven of eight spans are seven."""
    job = JobSpec(id="a", prompt=prompt(2400), max_tokens=4, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=1, lender_blocks=320, device_blocks=120, exactness="bitwise", prefill_chunk_tokens=1200)
    bank.worker.remote.ship = "query"
    lent: list[int] = []

    def lend() -> None:
        seqs = bank.worker.engine.jobs()
        if not lent and seqs and seqs[0].prompt_computed >= 1200:
            lent.append(7)
            lend_now(bank, 7)
    got = bank.run(job, each_step=lend)
    assert lent and not got.errors and got.tokens == want.tokens and torch.equal(got.logits["a"], want.logits["a"])
    assert bank.lenders[0].attend.counters.calls > 0
    assert got.tally["a"].recomputed_after_fault == 0, dict(got.tally["a"].missed)
