"""Spans on their way home lie in staging, beside the vault: so many at once, and the next when one has landed."""

from __future__ import annotations

import threading
from typing import Any

from kvbank.kvstore import loan_events as loans
from kvbank.kvstore.layout import Boot, SlotId
from kvbank.kvstore.messages import Ref
from kvbank.kvstore.timings import LoanTimings
from kvbank.kvstore.vault import Arena
from kvbank.workers.borrower import Borrower
from kvbank.workers.seams import Lost, MustReturn, Returned, StayedAway
from kvbank.workers.sequence import JobSpec


class Book:
    """A banker whose book says what the test says."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.flips: list[Any] = []

    def tell_book(self, event: Any) -> list[Any]:
        if isinstance(event, loans.BringHome):
            self.fetched += event.uids
        flips, self.flips = (self.flips, []) if isinstance(event, loans.StepBoundary) else ([], self.flips)
        return flips


def with_spans_away(book: Book, *uids: int, staging_spans: int) -> tuple[Borrower, Arena]:
    """A borrower whose spans of these uids are at a lender."""
    arena = Arena(6, 64)
    borrower = Borrower(arena, 64, timings=LoanTimings(), wake=lambda: None, lenders=list, staging_spans=staging_spans)
    borrower.connect(book)                               # type: ignore[arg-type]
    book.flips = [loans.Moved(uid, ref_of(uid), b"") for uid in uids]
    assert len(borrower.poll()) == len(uids)
    return borrower, arena


def ref_of(uid: int) -> Ref:
    return Ref(Boot(b"l" * 16), Boot(b"b" * 16), 1, uid, uid)


def test_no_more_spans_come_home_at_once_than_staging_holds() -> None:
    book = Book()
    borrower, arena = with_spans_away(book, *range(1, 6), staging_spans=2)
    for uid in range(1, 6):
        borrower.bring_home(uid, SlotId(uid))
    assert book.fetched == [1, 2]
    borrower.staging(1)[:] = bytes([7]) * 64
    book.flips = [loans.CameHome(1, "LOCAL")]
    assert borrower.poll() == [Returned(1, SlotId(1))]
    assert arena.slot(SlotId(1)).tolist() == [7] * 64
    assert book.fetched == [1, 2, 3], "its place in staging is free"
    borrower.settle([4], keep=False)                     # given up while it waits: it never comes
    book.flips = [loans.StayedRemote(2, "give_up")]
    assert borrower.poll() == [StayedAway(2)]
    assert book.fetched == [1, 2, 3, 5]


def test_a_copy_that_comes_after_it_was_given_up_is_not_taken_for_the_next_one(town, alone, run_jobs, prompt) -> None:
    """The first fetch hangs with all its bytes there, is given up, and is done when the second has a buffer of its own."""
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=120, ignore_eos=True)
    want = run_jobs(alone(), job)
    bank = town(lenders=3, lender_blocks=96, recall_calm_s=30.0, recall_urgent_s=30.0, put_retry_s=0.1,
                put_give_up_s=0.5)
    banker, borrower, engine = bank.worker.banker, bank.worker.borrower, bank.worker.engine
    fetch, bring_home = banker._fetch_bytes, borrower.bring_home
    struck, fetched, asked, late = [], [], [], threading.Event()

    def slow(ref: Any, target: memoryview) -> bytes | None:
        digest = fetch(ref, target)
        fetched.append(ref)
        if len(fetched) == 1:
            late.wait(30.0)
        return digest

    def bring(uid: int, slot: SlotId) -> None:
        bring_home(uid, slot)
        asked.append(uid)
        if len(asked) == 2:
            late.set()
    banker._fetch_bytes, borrower.bring_home = slow, bring   # type: ignore[method-assign]

    def strike() -> None:
        seqs = engine.jobs()
        if seqs and seqs[0].num_output == 4:
            engine.room.lend_ahead(seqs[0], 2)           # so that there is room at home
        if not struck and seqs and seqs[0].num_output >= 8 and engine.vault.num_free:
            lender = next(m for m in bank.lenders if m.vault.counts().lent)
            struck.append(lender)
            lender.banker.tell_ledger(loans.Need(1, (-1.0, "")))
        if struck and borrower.num_borrowed and len(fetched) < 2:
            engine.wake.wait(0.02)                       # the answer must not be there before the span is
    got = bank.run(job, each_step=strike)
    assert len(asked) == 2 and asked[0] == asked[1]
    assert not got.errors and got.tokens == want.tokens
    assert len(fetched) == 2 and bank.worker.book.counters["spans_home"] == 1


def test_a_span_that_is_recalled_and_lost_in_the_same_step_leaves_nothing_in_staging() -> None:
    """The engine hears both at once and answers the recall first. Nobody ends what it asks for then: the span is lost."""
    book = Book()
    borrower, _ = with_spans_away(book, 1, 2, staging_spans=1)
    book.flips = [loans.MustReturn(1, 1.0, "NEED"), loans.Lost(1, ref_of(1), "stale")]
    assert borrower.poll() == [MustReturn(1, 1.0, "NEED"), Lost(1, "stale")]
    borrower.bring_home(1, SlotId(3))                    # as Room does, before it comes to the second
    borrower.bring_home(2, SlotId(4))
    assert book.fetched == [2], "the one place in staging is for a span that can come"
