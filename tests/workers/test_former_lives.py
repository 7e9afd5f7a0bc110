"""A lender that comes back under its old name is somebody else: refs of its former life mean nothing to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvbank.kvstore import loan_events as loans
from kvbank.kvstore.layout import Boot
from kvbank.kvstore.messages import Ref
from kvbank.kvstore.timings import LoanTimings
from kvbank.kvstore.vault import Arena
from kvbank.workers.borrower import Borrower, Lender
from kvbank.workers.seams import Move

ME, OLD, NEW = (Boot(letter * 16) for letter in (b"m", b"o", b"n"))


class Banker:
    """Its book says what the test says; all addresses are known."""

    def __init__(self) -> None:
        self.links = self
        self.flips: list[Any] = []
        self.opened: list[Boot] = []

    def knows(self, boot: Boot) -> bool:
        return True

    def hot(self, boot: Boot, **how: Any) -> Any:
        self.opened.append(boot)
        return SimpleNamespace(ended=False)

    def tell_book(self, event: Any) -> list[Any]:
        flips, self.flips = (self.flips, []) if isinstance(event, loans.StepBoundary) else ([], self.flips)
        return flips


def test_a_span_at_a_former_life_is_not_read_at_the_present_one() -> None:
    """Loans, slots and generations are counted anew in each life: the same three numbers name another span there."""
    lives: list[Lender] = []
    borrower, banker = Borrower(Arena(2, 64), 64, timings=LoanTimings(), wake=lambda: None, lenders=lambda: lives), Banker()
    borrower.connect(banker)                             # type: ignore[arg-type]
    for uid, boot in ((1, OLD), (2, NEW)):
        lives[:] = [Lender("lender-0", boot, "", 4)]
        borrower.lend_out([Move(uid, 0, (b"k",), b"", b"")], tenant="t", age=0.0)    # type: ignore[arg-type]
        banker.flips = [loans.Moved(uid, Ref(boot, ME, 1, 0, 1), b"")]
        assert [event.lender for event in borrower.poll()] == ["lender-0"]    # type: ignore[union-attr]
    places = [borrower.where(uid) for uid in (1, 2)]     # nobody has told yet that the old one is gone
    assert [ref for place in places if place for ref in place[1:]] == [(1, 0, 1)] * 2
    for place in places:
        assert place is not None
        borrower.stream(place[0])
    assert banker.opened == [OLD, NEW]
