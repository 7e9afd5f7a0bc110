"""A lender that needs its slots gets them back in time, and the borrower's tokens stay right whatever rung that took."""

from __future__ import annotations

import pytest
import torch

from kvbank.kvstore.loan_events import Drain, Need
from kvbank.workers.sequence import JobSpec

OLDEST = (-1.0, "")


@pytest.mark.parametrize("what", [Need(3, OLDEST), Drain()])
@pytest.mark.parametrize("room_at_home", [True, False])
def test_recalled_spans_come_home_or_are_replayed(town, alone, run_jobs, prompt, what, room_at_home) -> None:
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=60, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=3, lender_blocks=96, exactness="bitwise", recall_urgent_s=1.0, recall_calm_s=1.0, recall_drain_s=1.0,
                device_blocks=48)
    struck: list[int] = []

    def strike() -> None:
        running = bank.worker.engine.jobs()
        if not struck and running and running[0].num_output >= 8:
            lender = next(m for m in bank.lenders if m.vault.counts().lent)
            struck.append(lender.vault.counts().lent)
            if room_at_home:
                bank.worker.engine.vault.drop_idle()
            lender.banker.tell_ledger(what)

    got = bank.run(job, each_step=strike)
    assert struck, "nothing was recalled"
    assert not got.errors and got.tokens["a"] == want.tokens["a"]
    assert torch.equal(got.logits["a"], want.logits["a"])
    bank.settle()
    for member in bank.lenders:
        assert not member.ledger.check() and not member.vault.check()
    assert not bank.worker.vault.check() and not bank.worker.book.check()
    assert bank.worker.vault.counts().held == 0


def test_a_worker_short_of_slots_recalls_what_it_lent_to_younger_jobs(town, prompt) -> None:
    bank = town(lenders=1, lender_blocks=96)
    asked: list[tuple[int, float]] = []
    bank.worker.borrower.recall = lambda slots, *, age: asked.append((slots, age))
    bank.run(JobSpec(id="a", prompt=prompt(1000), max_tokens=2, ignore_eos=True, age=7.0))
    assert asked and all(slots > 0 and age == 7.0 for slots, age in asked)
