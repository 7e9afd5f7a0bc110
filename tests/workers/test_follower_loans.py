"""A follower's loans alone: the leader's names of spans are not this shard's, and must never be taken for them."""

from __future__ import annotations

from typing import Any

from kvbank.workers.batch import PlanBuilder
from kvbank.workers.chain_frames import Lend, Settle
from kvbank.workers.follower_loans import FollowerLoans
from kvbank.workers.seams import BankEvent, Lost, Move, Moved


class Bank:
    """Tells what the test puts into `news`."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.news: list[BankEvent] = []

    def lend_out(self, moves: list[Move], **_: Any) -> None:
        self.moves += moves

    def bring_home(self, uid: int, slot: Any) -> None: ...

    def settle(self, uids: list[int], *, keep: bool) -> None: ...

    def poll(self) -> list[BankEvent]:
        news, self.news = self.news, []
        return news


def lent(uids: list[int]) -> tuple[Bank, FollowerLoans, list[int]]:
    bank = Bank()
    loans = FollowerLoans(bank)
    loans.lend(Lend(1, tuple((uid, slot, (b"k" * 32,), b"", b"") for slot, uid in enumerate(uids)), "", 0.0, False))
    mine = [move.uid for move in bank.moves]
    bank.news = [Moved(uid, "lender", ()) for uid in mine]
    loans.take_events()
    return bank, loans, mine


def test_a_span_that_was_lost_here_is_not_read_as_another_one_whose_own_name_is_the_leaders_for_it() -> None:
    """The leader's plan was under way when the span was lost. Names are numbers that every process counts for itself."""
    _, _, (own,) = lent([1])
    theirs = own + 2                                   # what this shard will call the second span of the next Lend
    bank, loans, mine = lent([theirs, 10**6])
    assert mine[1] == theirs
    bank.news = [Lost(mine[0], "silent")]
    loans.take_events()
    builder = PlanBuilder(1, 128, pad=False)
    builder.add([1], 300, [(2, 9)], remote=[(0, theirs), (1, 10**6)], host=[], draw=None)
    (_, gone), (_, there) = loans.placed(builder.build()).rows[0].remote
    assert there == mine[1] and gone not in mine, "KV of another span would be read"
    assert loans.theirs(gone) == theirs and loans.theirs(there) == 10**6, "and the leader hears which one is lost"


def test_settled_spans_are_forgotten() -> None:
    _, loans, _ = lent([1, 2])
    loans.settle(Settle((1, 2), False))
    assert loans.idle
