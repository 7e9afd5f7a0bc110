"""Whatever happens to a span on its way, its slot is somebody's: nothing is left behind when the jobs have ended."""

from __future__ import annotations

from kvbank.kvstore.span_table import REMOTE, Span
from kvbank.kvstore.vault import Vault
from kvbank.workers.room import Room
from kvbank.workers.seams import Adopted, Moved, MustReturn, NoBank, Returned
from kvbank.workers.sequence import RUNNING, JobSpec, Sequence


class Books(NoBank):
    """A bank that notes what it is told."""

    def __init__(self) -> None:
        self.settled: list[int] = []
        self.homeward: dict[int, int] = {}

    def lendable(self) -> int:
        return 8

    def lend_out(self, moves, *, tenant, age, needy=False) -> None:
        self.moves = moves

    def bring_home(self, uid, slot) -> None:
        self.homeward[uid] = slot

    def settle(self, uids, *, keep) -> None:
        self.settled += uids


class Nothing:
    """A backend without tiers."""

    def parkable(self) -> int:
        return 0

    def forget(self, keys) -> None: ...

    def spill(self, span) -> None: ...


def made(tokens: int = 8):
    vault, bank = Vault(4, blocks_per_span=2), Books()
    seq = Sequence(JobSpec(id="a", prompt=list(range(tokens)), max_tokens=4), 4, 2, now=0.0)
    seq.keys = [bytes([i]) * 32 for i in range(tokens // 2)]
    seq.state = RUNNING
    room = Room(vault, Nothing(), bank, blocks_per_span=2, running=lambda: [seq], queued=list,
                preemptable=list, preempt=lambda seq: None)
    return vault, bank, seq, room


def test_an_adopted_span_that_is_recalled_before_anybody_reads_it_takes_no_slot() -> None:
    vault, bank, seq, room = made()
    room.absorb([Adopted("a", seq.keys[1], 900, "lender-0")])
    room.absorb([MustReturn(900, 1.0, "NEED")])
    for uid, slot in bank.homeward.items():
        room.absorb([Returned(uid, slot)])
    assert vault.counts().free == 4 and not vault.check()
    assert not room.away and bank.settled == [900]


def test_a_tainted_span_on_its_way_home_gives_its_slot_back() -> None:
    vault, _, seq, room = made()
    remote = [Span(slot=None, place=REMOTE, keys=seq.keys[i * 2 : i * 2 + 2], refs=1) for i in range(2)]
    for index, span in enumerate(remote):
        seq.table.put(index, span)
        room.away[span.uid] = span
    room.absorb([MustReturn(remote[1].uid, 1.0, "NEED")])
    assert vault.counts().held == 1
    room.lose(remote[0].uid, "tainted")
    assert vault.counts().held == 0 and not vault.check()


def test_what_a_spoiled_job_shares_stays_readable_for_the_other() -> None:
    vault, bank, seq, room = made()
    other = Sequence(JobSpec(id="b", prompt=list(range(8)), max_tokens=4), 4, 2, now=0.0)
    span = Span(slot=None, place=REMOTE, keys=seq.keys[:2], refs=2)
    room.away[span.uid] = span
    for one in (seq, other):
        one.table.put(0, span)
    room.spoil(seq)
    assert span.place == REMOTE and span.refs == 1 and not bank.settled
    room.spoil(other)
    assert bank.settled == [span.uid] and not room.away and not vault.check()


def test_a_lent_span_whose_job_ended_meanwhile_frees_its_slot_and_the_lenders() -> None:
    vault, bank, seq, room = made()
    (span,) = vault.new_spans(1)
    for key in seq.keys[:2]:
        vault.index.publish(span, key, b"", b"root")
    seq.table.put(0, span)
    room.lend_ahead(seq, 1)
    seq.table.put(0, None)
    room.release([span])
    assert vault.counts().held == 1, "its bytes are being sent"
    room.absorb([Moved(span.uid, "lender-0")])
    assert vault.counts().held == 0 and bank.settled == [span.uid] and not vault.check()
