"""Room: gets slots when the vault has none, and keeps the books of what this worker has elsewhere.

The ladder of make_room, one rung after the other:

    0 recall what is lent to younger jobs elsewhere (it comes within two seconds; the ladder does not wait for it), and
      give back what nobody here reads yet of what peers lend us
    1 evict idle cached spans        (the vault does it by itself; their bytes spill to the tiers)
    2 lend out the oldest full spans (a neighbour holds them and computes on them)
    3 park them on the host tier     (read back through staging, layer by layer)
    4 preempt the youngest job       (its spans become idle; it is found again by key)
    5 drop spans of one's own that are not full, above the lowest hole (nobody takes such a span)
    6 press lenders that have nothing left: they call back what younger jobs elsewhere hold

The oldest job is never preempted, and the oldest of all workers gets what it presses for, so one job always progresses.
Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.messages import OLDER
from kvbank.kvstore.span_table import GONE, HOST, LOCAL, REMOTE, Span
from kvbank.kvstore.vault import OutOfSlots, Vault
from kvbank.workers.seams import (
    Adopted,
    AdoptEnded,
    Backend,
    Bank,
    BankEvent,
    GiveWay,
    Lost,
    Move,
    Moved,
    MustReturn,
    Returned,
    Stayed,
    StayedAway,
)
from kvbank.workers.sequence import Sequence

PRESS_SPANS = 8                            # asked for at once of lenders that must call them back

TAINTED = "tainted"                        # reason of a loss: wrong bytes may have been used, not only lost


class Room:
    """One per engine."""

    def __init__(
        self, vault: Vault, backend: Backend, bank: Bank, *, blocks_per_span: int,
        running: Callable[[], list[Sequence]], queued: Callable[[], list[Sequence]],
        preemptable: Callable[[], list[Sequence]], preempt: Callable[[Sequence], None],
        drop_fetched: Callable[[list[BlockKey]], None] = lambda keys: None,
    ) -> None:
        """running, queued: oldest first. preemptable: running and not in the current plan. preempt: sends a running
        sequence back to the queue. drop_fetched: what came from the tiers under these keys is not used."""
        self._vault, self._backend, self._bank = vault, backend, bank
        self._bps = blocks_per_span
        self._running, self._queued = running, queued
        self._preemptable, self._preempt = preemptable, preempt
        self._drop_fetched = drop_fetched
        self._moving: dict[int, Span] = {}         # a copy is on its way to a lender
        self.away: dict[int, Span] = {}            # REMOTE, by uid
        self.parked: dict[int, Span] = {}          # HOST, by uid
        self._returning: dict[int, SlotId] = {}    # REMOTE, a copy is on its way home into this slot
        self.adopt_ended: list[str] = []
        self.older_elsewhere: float | None = None  # an older job on another worker wants what jobs here hold; its stamp
        self.outranked = False                     # older jobs elsewhere hold what the oldest here pressed for
        self.spoiled: list[Sequence] = []          # answered from bytes that turned out wrong: they fail
        self.preemptions = 0

    # -- making room -------------------------------------------------------------------------------------------------

    def make(self, seq: Sequence, short: int, *, planned: set[int]) -> bool:
        """Try to free `short` slots for `seq`. True when at least one is free now; False: wait, or nothing can be done.

        planned: uids of spans that the plan in the making reads; lending them is fine (they flip after the step), parking
        them is not.
        """
        if self._drop_unfinished(seq, begun=False):
            return True
        self._bank.recall(short, age=seq.job.age)   # what younger jobs elsewhere hold of ours comes back by and by
        movable = self._movable(seq)
        if (wanted := short - len(self._moving)) > 0:
            if wanted > (lendable := self._bank.lendable()):
                self._give_back(seq)
            self._lend(seq, movable[: min(wanted, lendable)])
        if len(self._moving) >= short:
            return False                            # they will be free within a step or two
        if self._park([span for span in movable if not span.moving and span.uid not in planned][: short - len(self._moving)]):
            return True
        if self._moving:
            return False
        if self._preempt_younger(seq) or self._drop_unfinished(seq, begun=True):
            return True
        if self._bank.callable_back():
            rest = -(-seq.num_tokens // seq.table.span_tokens) - len(seq.table.live())
            self._lend(seq, [span for span in movable if not span.moving][: max(short, min(rest, PRESS_SPANS))], needy=True)
        return False

    def lend_ahead(self, seq: Sequence, wanted: int) -> None:
        """Start lending before the slots are short, so that the copy overlaps with compute."""
        wanted = min(wanted - len(self._moving), self._bank.lendable())
        if wanted > 0:
            self._lend(seq, self._movable(seq)[:wanted])

    @property
    def waiting(self) -> bool:
        """Slots are on their way to being free."""
        return bool(self._moving)

    def _movable(self, seq: Sequence) -> list[Span]:
        """Full local spans, those of `seq` first, oldest first; the span being written is never full."""
        found: dict[int, Span] = {}
        others = [other for other in reversed(self._running()) if other is not seq]
        for owner in [seq, *others]:
            for _, span in owner.table.live():
                if span.place == LOCAL and not span.moving and len(span.keys) == self._bps:
                    found.setdefault(span.uid, span)
        return list(found.values())

    def _lend(self, seq: Sequence, spans: list[Span], *, needy: bool = False) -> None:
        if not spans:
            return
        moves = []
        for span in spans:
            span.moving = True
            self._moving[span.uid] = span
            assert span.slot is not None
            moves.append(Move(span.uid, span.slot, tuple(span.keys), span.tokens, span.parent))
        self._bank.lend_out(moves, tenant=seq.job.tenant, age=seq.job.age, needy=needy)

    def _give_back(self, seq: Sequence) -> None:
        """A queued job holds nothing that a running one needs: what it adopted goes back to the lenders, who cache it. So
        does what `seq` adopted for a place that was filled otherwise since."""
        for other in self._queued():
            self.settle(other.adopted.values())
            other.adopted.clear()
        filled = [key for key in seq.adopted if seq.table.at(seq.keys.index(key) // self._bps) is not None]
        self.settle([seq.adopted.pop(key) for key in filled])

    def _park(self, spans: list[Span]) -> bool:
        parked = 0
        for span in spans[: self._backend.parkable()]:
            self._leave_tail(span)
            if not self._backend.park(span):
                break
            self._vault.leave(span, HOST)
            self.parked[span.uid] = span
            parked += 1
        return parked > 0

    def _leave_tail(self, span: Span) -> None:
        """The span leaves the device under the key of its last block; its prompt's end must be found without that."""
        if (tail := span.prompt_tail()) is not None:
            self._backend.spill(tail)

    def _drop_unfinished(self, seq: Sequence, *, begun: bool) -> bool:
        """Free the slots of `seq` above its lowest hole whose spans are not full. Steps that lost what they read leave such
        spans behind; what is lower is computed first and needs the slots. begun: also of spans that hold something, which
        is computed again."""
        table, before = seq.table, self._vault.num_free
        lowest = table.holes.lowest[0] // table.span_tokens
        for index, span in table.live():
            if index <= lowest or span.place != LOCAL or span.moving or len(span.keys) == self._bps:
                continue
            start, stop = index * table.span_tokens, min((index + 1) * table.span_tokens, seq.num_tokens)
            if begun or table.holes.overlap(start, stop) == stop - start:
                if table.lose(index, seq.num_tokens):
                    self._reopen_window(seq)
                self.release([span])
        return self._vault.num_free > before

    def _preempt_younger(self, seq: Sequence) -> bool:
        candidates = self._preemptable()
        if not candidates or candidates[-1].age <= seq.age:
            return False
        before = self._vault.num_free
        self._preempt(candidates[-1])
        self.preemptions += 1
        return self._vault.num_free > before

    # -- what the bank tells -----------------------------------------------------------------------------------------

    def absorb(self, events: list[BankEvent]) -> None:
        """Apply what happened to lent spans. Called at a step boundary: no reader is under way."""
        for event in events:
            match event:
                case Moved():
                    self._moved(event)
                case Stayed():
                    self.outranked |= event.reason == OLDER
                    self._stayed(event.uid)
                case Lost():
                    self.lose(event.uid, event.reason)
                case MustReturn():
                    self._must_return(event)
                case Returned():
                    self._returned(event)
                case StayedAway():
                    if (slot := self._returning.pop(event.uid, None)) is not None:
                        self._vault.blank_slots([slot])
                case Adopted():
                    self._adopted(event)
                case AdoptEnded():
                    self.adopt_ended.append(event.job)
                case GiveWay():
                    self.older_elsewhere = event.age if self.older_elsewhere is None else min(event.age, self.older_elsewhere)

    def lose(self, uid: int, reason: str) -> None:
        """A span's bytes are gone: every sequence that reads it gets a hole, and no new match finds it."""
        span = self.away.pop(uid, None) or self.parked.pop(uid, None)
        if (slot := self._returning.pop(uid, None)) is not None:
            self._vault.blank_slots([slot])
        if span is None:
            return
        self._vault.index.withdraw(span)
        span.place = GONE
        if reason == TAINTED:
            self._distrust(span)
            return
        for seq in self._running():
            for index, held in seq.table.live():
                if held is span:
                    lost = seq.table.lose(index, seq.num_tokens)
                    seq.lost.add(index * seq.table.span_tokens, index * seq.table.span_tokens + lost)
                    seq.loss_reason = reason
                    self._reopen_window(seq)

    def _distrust(self, lost: Span) -> None:
        """A span's bytes were wrong: what was made from it is not found again, whoever made it and wherever we know it to
        lie, and the jobs that read any of it are computed again from there, or fail."""
        jobs = [*self._running(), *self._queued()]
        wrong = dict.fromkeys(lost.keys)
        for seq in jobs:                           # the chains of running jobs also pass through spans that are not listed
            start = next((at for at, key in enumerate(seq.keys) if key in wrong), len(seq.keys))
            wrong |= dict.fromkeys(seq.keys[start:])
        made = {span.uid for span in (lost, *self._forget(wrong))}
        for seq in self._running():
            first = next((at for at, span in seq.table.live() if span.uid in made), None)
            if first is not None:
                self._taint(seq, first)
        for seq in self._queued():                 # what a preempted job said before
            answered = seq.num_output > len(seq.job.emitted) and any(key in wrong for key in seq.keys)
            if answered and seq not in self.spoiled:
                self.spoiled.append(seq)

    def _forget(self, keys: Iterable[BlockKey]) -> list[Span]:
        """Nothing that is known under these keys, or was made from it, is found again, here or elsewhere. Who reads it goes
        on. Returns the spans on the device, and those that peers borrowed in place."""
        made = self._vault.distrust(keys)
        wrong = dict.fromkeys([*keys, *(key for span in made for key in span.keys)])
        for seq in [*self._running(), *self._queued()]:
            for key in [key for key in seq.adopted if key in wrong]:
                if not (span := seq.adopted.pop(key)).refs and self.away.pop(span.uid, None) is not None:
                    span.place = GONE
                    self._bank.settle([span.uid], keep=False)
        self._backend.forget(list(wrong))
        self._bank.distrust(list(wrong))
        self._drop_fetched(list(wrong))
        return made

    def spoil(self, seq: Sequence) -> None:
        """What a job computed and read gave no finite numbers: none of it is found again, nor what others made from it. They
        are not to blame, and end only if they get no finite numbers either."""
        self._forget(seq.keys)
        self._taint(seq, 0)

    def _taint(self, seq: Sequence, index: int) -> None:
        """Wrong bytes may have been read: all KV from here on is forgotten everywhere. A job that answered from it fails;
        one that has not is computed again from the last verified position."""
        start = index * seq.table.span_tokens
        spans = [span for at, span in seq.table.live() if at >= index]
        for span in spans:
            self._vault.index.withdraw(span)
            if not self._vault.release(span):
                continue                        # ours, or others read it still: the last of them ends it
            if span.place == HOST and self.parked.pop(span.uid, None) is not None:
                self._backend.unpark(span.uid, None)
            if self.away.pop(span.uid, None) is not None:
                if (slot := self._returning.pop(span.uid, None)) is not None:
                    self._vault.blank_slots([slot])
                self._bank.settle([span.uid], keep=False)
            span.place = GONE
        self._backend.forget([key for span in spans if span.place != HOST for key in span.keys])
        for at in range(index, len(seq.table.spans)):
            seq.table.put(at, None)
        seq.table.holes.add(start, seq.num_tokens)
        seq.lost.add(start, seq.num_tokens)
        seq.loss_reason = TAINTED
        if seq.num_output > len(seq.job.emitted) and seq not in self.spoiled:
            self.spoiled.append(seq)

    def _reopen_window(self, seq: Sequence) -> None:
        """Replaying under a sliding window needs KV that was let go: start over from position 0."""
        if seq.table.released:
            gone = seq.table.released * seq.table.span_tokens
            seq.table.holes.add(0, gone)
            seq.lost.add(0, gone)
            seq.table.released = 0

    def release(self, spans: Iterable[Span]) -> None:
        """A sequence no longer reads these. The last reader of a span elsewhere settles it."""
        unread = [span for span in spans if self._vault.release(span)]
        for span in unread:
            self._vault.index.withdraw(span)
            if span.place == HOST and self.parked.pop(span.uid, None) is not None:
                self._backend.unpark(span.uid, None)
        self.settle(unread)

    def settle(self, spans: Iterable[Span]) -> None:
        """Nobody here reads these any more; lenders may cache what they hold of them."""
        settled = []
        for span in spans:
            if self.away.pop(span.uid, None) is not None:
                if (slot := self._returning.pop(span.uid, None)) is not None:
                    self._vault.blank_slots([slot])
                settled.append(span.uid)
            span.place = GONE
        if settled:
            self._bank.settle(settled, keep=True)

    def _moved(self, event: Moved) -> None:
        span = self._moving.pop(event.uid, None)
        if span is None or not span.refs or span.place != LOCAL:
            if span is not None:
                span.moving = False
                if not span.refs and span.place == LOCAL:
                    self._vault.retire(span)
            self._bank.settle([event.uid], keep=False)
            return
        span.moving = False
        self._leave_tail(span)
        self._vault.leave(span, REMOTE)
        span.lender = event.lender
        self.away[span.uid] = span
        for seq in self._running():
            if any(held is span for _, held in seq.table.live()):
                for lender in (event.lender, *event.also):
                    seq.tally.lenders.setdefault(lender)

    def _stayed(self, uid: int) -> None:
        span = self._moving.pop(uid, None)
        if span is not None:
            span.moving = False
            if not span.refs and span.place == LOCAL:
                self._vault.retire(span)

    def _must_return(self, event: MustReturn) -> None:
        """The RETURN rungs: a free slot of ours, else drop it and replay it when there is room."""
        span = self.away.get(event.uid)
        if span is None or event.uid in self._returning:
            return
        if not span.refs:                           # adopted, and nobody has come to read it yet: not worth a slot
            self.lose(event.uid, "recalled")
            self._bank.settle([event.uid], keep=False)
            return
        try:
            (slot,) = self._vault.take_slots(1, span.owner)
        except OutOfSlots:
            self.lose(event.uid, f"recalled_{event.why.lower()}")
            self._bank.settle([event.uid], keep=False)
            return                                  # replayed when there is room again
        self._returning[event.uid] = slot
        self._bank.bring_home(event.uid, slot)

    def _returned(self, event: Returned) -> None:
        span = self.away.pop(event.uid, None)
        if self._returning.pop(event.uid, None) is None or span is None:
            return                                  # lost or no longer needed meanwhile
        self._vault.settle_in(span, event.slot)

    def _adopted(self, event: Adopted) -> None:
        for seq in [*self._running(), *self._queued()]:
            if seq.job.id == event.job and event.key in seq.keys and event.key not in seq.adopted:
                group = seq.keys.index(event.key) + 1
                first = group - self._bps
                tokens = seq.token_bytes(first * seq.block_size, group * seq.block_size)
                span = Span(slot=None, place=REMOTE, keys=seq.keys[first:group], tokens=tokens, lender=event.lender,
                            uid=event.uid, parent=seq.keys[first - 1] if first else b"", owner=seq.owner)
                self.away[event.uid] = span
                seq.adopted[event.key] = span
                seq.tally.lenders.setdefault(event.lender)
                return
        self._bank.settle([event.uid], keep=True)
