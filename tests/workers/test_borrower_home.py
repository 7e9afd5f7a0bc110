"""Spans on their way home lie in staging, beside the vault: so many at once, and the next when one has landed."""

from __future__ import annotations

from typing import Any

from kvbank.kvstore import loan_events as loans
from kvbank.kvstore.layout import SlotId
from kvbank.kvstore.timings import LoanTimings
from kvbank.kvstore.vault import Arena
from kvbank.workers.borrower import Borrower
from kvbank.workers.seams import Returned, StayedAway


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


def test_no_more_spans_come_home_at_once_than_staging_holds() -> None:
    arena = Arena(6, 64)
    borrower = Borrower(arena, 64, timings=LoanTimings(), wake=lambda: None, lenders=list, staging_spans=2)
    book = Book()
    borrower.connect(book)                               # type: ignore[arg-type]
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
