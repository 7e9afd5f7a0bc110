"""A lender whose arithmetic is not the borrower's holds spans and hands them out; it never computes on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvbank.kvstore.span_table import REMOTE
from kvbank.workers.attend_server import KEPT_PLANS
from kvbank.workers.sequence import JobSpec

SPAN_LAYER = 2 * 2 * 128 * 32 * 4                        # bytes of one span in one layer of the small model


def strangers(bank: Any, *lenders: Any) -> None:
    for lender in lenders:
        lender.ledger.compat = replace(lender.ledger.compat, numerics="another kind of machine")


@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
@pytest.mark.parametrize("staging_spans", [1, 4, 64])
def test_such_a_lender_is_only_fetched_from(town, alone, run_jobs, prompt, exactness, staging_spans) -> None:
    """Also where staging has no room for all that it holds: then in groups, one after the other."""
    job = JobSpec(id="a", prompt=prompt(1700), max_tokens=12, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    bank = town(lenders=2, exactness=exactness, lender_blocks=48, staging_spans=staging_spans)
    strangers(bank, *bank.lenders)
    got = bank.run(job)
    assert not got.errors and got.tokens["a"] == want.tokens["a"]
    if exactness == "bitwise":
        assert torch.equal(got.logits["a"], want.logits["a"])
    assert not got.tally["a"].missed.keys() - {"never_seen", "last_block"}
    for lender in bank.lenders:
        counters = lender.attend.counters
        assert lender.ledger.counters["loans"] > 0 and counters.layers > 0 and counters.calls == 0
        assert counters.bytes_out <= counters.layers * (staging_spans * SPAN_LAYER * 2 + 64)


def test_beside_it_equal_lenders_attend_as_ever(town, alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(1700), max_tokens=12, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=2, exactness="bitwise", lender_blocks=48, staging_spans=2)
    strangers(bank, bank.lenders[0])
    got = bank.run(job)
    assert not got.errors and got.tokens["a"] == want.tokens["a"] and torch.equal(got.logits["a"], want.logits["a"])
    first, second = (lender.attend.counters for lender in bank.lenders)
    assert first.calls == 0 < first.layers and second.calls > 0


def test_more_groups_than_the_lender_remembers_plans(town, alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(2300), max_tokens=6, ignore_eos=True)
    want = run_jobs(alone(), job)
    bank = town(lenders=1, lender_blocks=160, staging_spans=1)
    strangers(bank, *bank.lenders)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, bank.worker.borrower.num_borrowed)
    got = bank.run(job, each_step=look)
    assert most > KEPT_PLANS, "every span is a group of its own"
    assert not got.errors and got.tokens["a"] == want.tokens["a"] and not got.tally["a"].missed["stale"]


def test_many_jobs_that_read_from_it_at_once_are_all_served(town, alone, run_jobs, prompt) -> None:
    """Each is a group of its own, and there are more than the lender remembers plans, though staging has room for all."""
    jobs = [JobSpec(id=f"j{i}", prompt=prompt(400, i), max_tokens=40, ignore_eos=True, age=i) for i in range(14)]
    want = run_jobs(alone(), *jobs)
    bank = town(lenders=1, device_blocks=200, lender_blocks=640, staging_spans=64)
    strangers(bank, *bank.lenders)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, sum(any(span.place == REMOTE for _, span in seq.table.live()) for seq in bank.worker.engine.jobs()))
    got = bank.run(*jobs, each_step=look)
    assert most > KEPT_PLANS
    assert not got.errors and got.tokens == want.tokens
    assert not any(tally.missed["stale"] for tally in got.tally.values())
    assert bank.lenders[0].attend.counters.calls == 0
