"""What a lender no longer promises is said to be stale, span by span: the stream and all else that lies there go on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvbank.kvstore.layout import Layout
from kvbank.kvstore.loan_events import Tainted
from kvbank.kvstore.transport.hot import HotPlan, Layer, PlanItem, Want, unpack
from kvbank.kvstore.vault import Arena
from kvbank.workers.attend_server import AttendServer
from kvbank.workers.sequence import JobSpec

LAYOUT = Layout(num_layers=1, layer_first=0, layer_last=1, kv_heads=1, head_dim=8, span_tokens=16, block_size=16, dtype="float32")


class Over:
    """A ledger whose promises have all ended."""

    def pin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> list[bool]:
        return [False] * len(refs)

    def unpin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> None:
        assert not refs

    def digest(self, borrower: bytes, ref: tuple[int, int, int]) -> None: ...

    def taint(self, borrower: bytes, ref: tuple[int, int, int]) -> None: ...


def test_a_plan_of_which_nothing_is_left_is_answered_as_stale() -> None:
    server = AttendServer(Arena(2, LAYOUT.slot_bytes), Over(), lambda borrower: LAYOUT)
    plan = HotPlan(1, 1, 1, 8, 1.0, "fast", (PlanItem(0, ((3, 1, 0, 1), (4, 1, 1, 2))),))
    (data,) = server.serve(b"b" * 16, iter([plan.pack(), Want(1, 7, 0).pack()]))
    answer = unpack(data)
    assert isinstance(answer, Layer) and answer.data == b"" and np.array_equal(answer.stale, [(0, 3), (0, 4)])


def test_a_span_taken_back_from_a_borrower_that_fetches_costs_that_span_only(town, alone, run_jobs, prompt) -> None:
    """Each span is a plan of its own here: all of that plan is stale."""
    job = JobSpec(id="a", prompt=prompt(1700), max_tokens=12, ignore_eos=True)
    want = run_jobs(alone(), job)
    bank = town(lenders=1, lender_blocks=160, staging_spans=1)
    (lender,) = bank.lenders
    lender.ledger.compat = replace(lender.ledger.compat, numerics="another kind of machine")
    taken: list[int] = []

    def take_one() -> None:
        seqs = bank.worker.engine.jobs()
        if not taken and seqs and seqs[0].num_output >= 4:
            (uid, ref), *_ = bank.worker.book.refs().items()
            taken.append(uid)
            with lender.vault.lock:                       # the lender's word does not arrive: the next read finds it out
                lender.ledger.on(lender.banker.now(), Tainted(ref))
    got = bank.run(job, each_step=take_one)
    assert taken and not got.errors and got.tokens["a"] == want.tokens["a"]
    assert got.tally["a"].recomputed_after_fault == 128
    assert not any("lender" in reason for reason in got.tally["a"].missed)
