"""LoanLedger: what this member has lent. It alone decides about its slots.

    FREE --Borrow--> HELD --Put--> SEALED --need, drain, homecoming--> RECALLED
      ^                |             |                                     |
      |                +-------------+------- settled, not kept, over -----+
      |                                          v
      +------------- pins = 0 --------------- REVOKED

Safety rests on names and pins: a ref that does not match a live slot exactly is stale, and no slot is given back to the
pool while somebody reads or fills it. Time only decides when to give up waiting. There are no tombstones: a late Borrow
may open a phantom loan, which the borrower settles, its next Renew does not keep, or the fill timer takes back.

Knows slots, states, pins and terms; knows nothing of bytes, sockets, threads or jobs. The caller holds one lock over
vault and ledger during every call, and never while computing, copying or waiting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.loan_events import (
    Answer,
    Avoid,
    Drain,
    Homecoming,
    InDebt,
    LedgerEffect,
    LedgerEvent,
    Need,
    PeerGone,
    PutBytes,
    PutEnded,
    Revoked,
    Send,
    Tainted,
    Tick,
    Yield,
)
from kvbank.kvstore.messages import (
    ABSENT,
    CAP,
    COMPAT,
    DRAIN,
    DRAINING,
    FULL,
    HOME,
    IN_DEBT,
    NEED,
    NO,
    OLDER,
    PROTOCOL_VERSION,
    QUOTA,
    Age,
    BadDigest,
    Borrow,
    Compat,
    Envelope,
    Fit,
    Grant,
    Hello,
    HelloAck,
    KeptSpan,
    OtherBoot,
    Recall,
    Ref,
    Refuse,
    Renew,
    Renewed,
    Sealed,
    Settle,
    Settled,
    Stale,
    fit,
)
from kvbank.kvstore.timings import LoanTimings

FREE, HELD, SEALED, RECALLED, REVOKED = "FREE", "HELD", "SEALED", "RECALLED", "REVOKED"
GO, BUSY, STALE = "GO", "BUSY", "STALE"                  # verdicts of begin_put, beside SEALED

MAX_PEERS = 1024                                         # remembered at once; those that owe are never forgotten
RETRY_MS = {FULL: 300, CAP: 300, QUOTA: 1_000, IN_DEBT: 1_000, DRAINING: 10_000, COMPAT: 60_000, ABSENT: 0, OLDER: 300}


class SlotPool(Protocol):
    """Where the slots come from: the vault."""

    def lendable(self) -> int:
        """Slots that may be given away now: blank or idle, beyond what this member's own admitted jobs need."""

    def take_for_loan(self, number: int) -> Sequence[int]:
        """Up to `number` of them, scrubbed if the tenant may change."""

    def adopt(self, keys: Sequence[BlockKey], tenant: str) -> Sequence[tuple[int, KeptSpan]]:
        """Turn the idle cached spans that end with these keys into lent slots; other keys are left out."""

    def give_back(self, slot: int, kept: KeptSpan | None) -> None:
        """Nobody reads or fills the slot any more. kept: its bytes are an idle cached span now; None: it is blank."""


@dataclass(slots=True)
class LentSlot:
    """One slot from its grant until the pool has it back."""

    ref: Ref
    state: str                         # HELD | SEALED | RECALLED | REVOKED
    fill_by: float = math.inf          # HELD: taken back then, unless bytes come
    recall_by: float = math.inf        # RECALLED: taken back then
    why: str = ""                      # RECALLED: NEED | HOME | DRAIN
    pins: int = 0                      # readers, and the one Put
    putting: bool = False              # one of the pins is a Put; a second one is told BUSY
    bad_puts: int = 0
    span: KeptSpan | None = None       # from SEALED on
    adopted: bool = False              # it was this member's own cache before, and is again afterwards
    keep: bool = False                 # REVOKED: give it back as a cached span
    slow_at: float = math.inf          # REVOKED and pinned: a counter is raised then


@dataclass(slots=True)
class OpenLoan:
    """The live slots of one loan: never empty."""

    borrower: Boot
    number: int
    tenant: str
    age: Age
    granted_at: float
    over_at: float                     # the term
    adopted: bool
    trace: str = ""                    # traceparent of the job it was made for
    slots: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Peer:
    """A borrower that said Hello."""

    node: str
    fit: Fit
    quarantined_until: float = -math.inf
    recall_at: float = math.inf        # say Recall again


@dataclass(frozen=True, slots=True)
class LoanView:
    """One open loan, for `status`."""

    borrower: Boot
    node: str
    number: int
    slots: int
    tenant: str
    age_s: float
    term_left_s: float
    recalled: int                      # of its slots, called back and not here yet


@dataclass(frozen=True, slots=True)
class PutVerdict:
    """GO: write, then PutEnded. SEALED: answer Sealed(digest). BUSY: another Put fills it, drop this. STALE: say so."""

    kind: str
    digest: bytes = b""


class LoanLedger:
    """The lender's half of the protocol. `on` returns what to do; `wake_at` says when to come back with a Tick."""

    def __init__(
        self, boot: Boot, compat: Compat, pool: SlotPool, *, lend_cap: int,
        timings: LoanTimings | None = None, tenant_quota: int | None = None,
    ) -> None:
        """lend_cap: slots lent at once, at most. tenant_quota: of them, for one tenant."""
        self.boot = boot
        self.compat = compat
        self.lend_cap = lend_cap
        self.tenant_quota = tenant_quota
        self.timings = timings or LoanTimings()
        self.draining = False
        self.in_debt = False
        self._debt_age: Age | None = None                    # of the oldest job we borrow for
        self.counters: Counter[str] = Counter()
        self._pool = pool
        self._gen = 0
        self._lent: dict[int, LentSlot] = {}
        self._loans: dict[Boot, dict[int, OpenLoan]] = {}
        self._peers: dict[Boot, Peer] = {}
        self._out: list[LedgerEffect] = []

    def on(self, now: float, event: LedgerEvent) -> list[LedgerEffect]:
        """One event in, what to do out. Handling the same event twice changes nothing."""
        self._out = []
        if isinstance(event, Envelope):
            self._arrived(now, event)
        else:
            self.table[type(event)](self, now, event, self.boot)
        return self._out

    def wake_at(self) -> float:
        """When the next timer ends; infinity when none runs."""
        times = [loan.over_at for loans in self._loans.values() for loan in loans.values()]
        times += [min(slot.fill_by, slot.recall_by, slot.slow_at) for slot in self._lent.values()]
        times += [peer.recall_at for peer in self._peers.values()]
        return min(times, default=math.inf)

    # -- reads and writes of slots: called by servicer threads, under the lock ---------------------------------------

    def pin(self, ref: Ref) -> bool:
        """Start to read a slot. False: the ref is stale, do not touch it. Each True needs one `unpin`."""
        slot = self._find(ref)
        if slot is None or slot.state not in (SEALED, RECALLED):
            self.counters["stale_reads"] += 1
            return False
        slot.pins += 1
        return True

    def unpin(self, ref: Ref) -> None:
        """The read is over. The last one out of a revoked slot frees it."""
        slot = self._find(ref)
        assert slot is not None and slot.pins > 0, f"unpin without pin: {ref}"
        slot.pins -= 1
        self._free_when_idle(slot)

    def begin_put(self, now: float, ref: Ref) -> PutVerdict:
        """May these bytes be placed? GO pins the slot until PutEnded."""
        slot = self._find(ref)
        if slot is None or slot.state == REVOKED:
            self.counters["stale_puts"] += 1
            return PutVerdict(STALE)
        if slot.state != HELD:
            assert slot.span is not None
            return PutVerdict(SEALED, slot.span.digest)
        if slot.putting:               # two writers of one slot: the slower could spoil what the faster had verified
            return PutVerdict(BUSY)
        slot.putting = True
        slot.pins += 1
        slot.fill_by = now + self.timings.fill_s
        return PutVerdict(GO)

    def span_of(self, ref: Ref) -> KeptSpan | None:
        """What the slot holds, for Fetch and for a re-hash; None when the ref is stale or not sealed."""
        slot = self._find(ref)
        return slot.span if slot is not None and slot.state in (SEALED, RECALLED) else None

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def num_lent(self) -> int:
        """Slots away from the pool: also those revoked and still pinned."""
        return len(self._lent)

    def num_coming(self) -> int:
        """Lent slots on their way back."""
        return sum(slot.state in (RECALLED, REVOKED) for slot in self._lent.values())

    def num_recallable(self, age: Age) -> int:
        """Lent slots that a job of this age could call back: those lent to younger jobs."""
        return sum(len(loan.slots) for loan in self._all_loans() if loan.age > age)

    def num_by_state(self) -> dict[str, int]:
        counts = Counter(slot.state for slot in self._lent.values())
        return {state: counts[state] for state in (HELD, SEALED, RECALLED, REVOKED)}

    def lendable(self) -> int:
        """Slots a stranger would get now."""
        if self.draining or self.in_debt:
            return 0
        return max(0, min(self.lend_cap - self.num_lent, self._pool.lendable()))

    def loans(self, now: float) -> list[LoanView]:
        return [
            LoanView(loan.borrower, self._node(loan.borrower), loan.number, len(loan.slots), loan.tenant,
                     now - loan.granted_at, loan.over_at - now,
                     sum(self._lent[slot].state == RECALLED for slot in loan.slots))
            for loan in self._all_loans()
        ]

    def trace_of(self, borrower: Boot, number: int) -> str:
        """The traceparent of the job that a loan was made for; empty when nobody traces it or the loan is over."""
        loan = self._loans.get(borrower, {}).get(number)
        return loan.trace if loan is not None else ""

    def live_refs(self, borrower: Boot) -> list[Ref]:
        """Every promise to that borrower that still holds."""
        loans = self._loans.get(borrower, {})
        return [self._lent[slot].ref for loan in loans.values() for slot in loan.slots]

    def check(self) -> list[str]:
        """Broken laws, in words; empty when all is well."""
        wrong = []
        in_loans = [slot for loan in self._all_loans() for slot in loan.slots]
        live = [number for number, slot in self._lent.items() if slot.state != REVOKED]
        if sorted(in_loans) != sorted(live):
            wrong.append(f"CONSERVED: slots of open loans {sorted(in_loans)} are not the live slots {sorted(live)}")
        if self.num_lent > self.lend_cap:
            wrong.append(f"CONSERVED: {self.num_lent} slots lent, the cap is {self.lend_cap}")
        gens = [slot.ref.gen for slot in self._lent.values()]
        if len(set(gens)) != len(gens) or any(gen > self._gen for gen in gens):
            wrong.append(f"FENCED: generations are not unique: {sorted(gens)}")
        for loan in self._all_loans():
            if not loan.slots:
                wrong.append(f"CONSERVED: loan {loan.number} is open and empty")
            if loan.over_at == math.inf:
                wrong.append(f"BOUNDED: loan {loan.number} has no term")
        for number, slot in self._lent.items():
            wrong += [f"{law}: slot {number} {slot.ref} is {slot.state}: {what}"
                      for law, what in self._wrong_with(slot, number)]
        return wrong

    def _wrong_with(self, slot: LentSlot, number: int) -> list[tuple[str, str]]:
        wrong = []
        if slot.ref.slot != number or slot.ref.lender_boot != self.boot:
            wrong.append(("FENCED", "its ref names another slot"))
        if slot.state not in (HELD, SEALED, RECALLED, REVOKED):
            wrong.append(("CONSERVED", "no such state"))
        if slot.pins < 0 or (slot.state == REVOKED and slot.pins == 0) or (slot.putting and slot.pins == 0):
            wrong.append(("CONSERVED", f"{slot.pins} pins"))
        if slot.state in (SEALED, RECALLED) and (slot.span is None or slot.putting):
            wrong.append(("VERIFIED", "readable without a verified span"))
        if slot.state == HELD and (slot.span is not None or slot.fill_by == math.inf):
            wrong.append(("BOUNDED", "waits for bytes for ever"))
        if slot.state == RECALLED and slot.recall_by == math.inf:
            wrong.append(("BOUNDED", "recalled without a deadline"))
        return wrong

    # -- messages ----------------------------------------------------------------------------------------------------

    def _arrived(self, now: float, envelope: Envelope) -> None:
        message = envelope.message
        if envelope.to_boot != self.boot and not isinstance(message, Hello):
            if not isinstance(message, OtherBoot):
                self._send(envelope.from_boot, OtherBoot(self.boot, envelope.to_boot))
            return
        self.table[type(message)](self, now, message, envelope.from_boot)

    def _hello(self, _now: float, message: Hello, sender: Boot) -> None:
        how = fit(self.compat, message.compat) if message.version == PROTOCOL_VERSION else Fit(NO, "version")
        if (peer := self._peers.get(sender)) is None:
            self._forget_strangers()
            self._peers[sender] = Peer(message.node, how)
        else:
            peer.node, peer.fit = message.node, how
        self._send(sender, HelloAck(self.boot, message.nonce, how.kind, how.reason, self.lendable()))

    def _borrow(self, now: float, message: Borrow, sender: Boot) -> None:
        loan = self._loans.get(sender, {}).get(message.loan)
        if loan is None:
            code, retry_ms, room = self._room_for(now, message, sender)
            if not code:
                lend = self._adopt if message.keys else self._open
                loan = lend(now, message, sender, room)
                code = "" if loan is not None else ABSENT if message.keys else FULL
                retry_ms = RETRY_MS.get(code, 0)
            if loan is None:
                if message.needy and code in (FULL, CAP, IN_DEBT) and now >= self._peers[sender].quarantined_until:
                    code, retry_ms = self._make_way(now, code, message, sender)
                self.counters[f"refused_{code}"] += 1
                self._send(sender, Refuse(message.loan, code, retry_ms))
                return
            self.counters["loans"] += 1
            self.counters["slots_granted"] += len(loan.slots)
        slots = [self._lent[slot] for slot in loan.slots]
        spans = [slot.span for slot in slots if loan.adopted and slot.span is not None]
        self._send(sender, Grant(
            loan.number, tuple(slot.ref for slot in slots), _ms(self.timings.term_s),
            tuple(span.digest for span in spans), tuple(span.key for span in spans),
        ))

    def _room_for(self, now: float, message: Borrow, sender: Boot) -> tuple[str, int, int]:
        """(code, retry_ms, room): the code that refuses a new loan, or "" and how many slots it may have."""
        peer = self._peers.get(sender)
        if peer is None or peer.fit.kind == NO or message.loan < 1 or sender == self.boot:
            return COMPAT, RETRY_MS[COMPAT], 0
        if self.draining:
            return DRAINING, RETRY_MS[DRAINING], 0
        if self.in_debt:                                     # law 5
            return IN_DEBT, RETRY_MS[IN_DEBT], 0
        if now < peer.quarantined_until:                     # law 8
            return FULL, _ms(peer.quarantined_until - now), 0
        room = self.lend_cap - self.num_lent
        if room < 1:
            return CAP, RETRY_MS[CAP], 0
        if self.tenant_quota is not None:
            lent = sum(len(loan.slots) for loan in self._all_loans() if loan.tenant == message.tenant)
            room = min(room, self.tenant_quota - lent)
            if room < 1:
                return QUOTA, RETRY_MS[QUOTA], 0
        return "", 0, min(room, len(message.keys) or message.spans)

    def _make_way(self, now: float, code: str, message: Borrow, sender: Boot) -> tuple[str, int]:
        """A job elsewhere cannot go on, and there is nothing to lend: call back what others borrowed for younger jobs, and
        have our own younger jobs give way (law 8). OLDER, wait for their end, is said only where older ones hold it: loans
        for the same job are another shard's, and what we borrow for a younger one is given back soon."""
        age, others = (message.age, message.job), [loan for loan in self._youngest_first() if loan.borrower != sender]
        if younger := [loan for loan in others if loan.age > age]:
            self._recall_some(now, message.spans, younger, NEED, self.timings.recall_urgent_s)
            return FULL, RETRY_MS[FULL]
        if sum(len(loan.slots) for loan in self._loans.get(sender, {}).values()) >= self.lend_cap:
            return CAP, RETRY_MS[CAP]                        # whoever ends, the asker cannot have more
        if code != CAP:                                      # beside what is lent, our own jobs hold slots
            self._out.append(Yield(age))
        in_debt_for_older = code == IN_DEBT and self._debt_age is not None and self._debt_age < age
        if in_debt_for_older or code == FULL or any(loan.age < age for loan in others):
            return OLDER, RETRY_MS[OLDER]
        return (CAP if code == CAP else FULL), RETRY_MS[FULL]

    def _open(self, now: float, message: Borrow, sender: Boot, room: int) -> OpenLoan | None:
        slots = self._pool.take_for_loan(min(room, self._pool.lendable()))
        loan = self._new_loan(now, message, sender)
        for slot in slots:
            self._lend(loan, slot, LentSlot(self._name(loan, slot), HELD, fill_by=now + self.timings.fill_s))
        return self._keep_if_any(loan)

    def _adopt(self, now: float, message: Borrow, sender: Boot, room: int) -> OpenLoan | None:
        found = self._pool.adopt(message.keys[:room], message.tenant)
        loan = self._new_loan(now, message, sender)
        for slot, span in found:
            self._lend(loan, slot, LentSlot(self._name(loan, slot), SEALED, span=span, adopted=True))
        return self._keep_if_any(loan)

    def _renew(self, now: float, message: Renew, sender: Boot) -> None:
        keep = frozenset(message.keep)
        for loan in list(self._loans.get(sender, {}).values()):
            if loan.number in keep:
                loan.over_at = now + self.timings.term_s
            elif loan.number <= message.upto:                # a higher one is younger than this Renew
                self._revoke_loan(now, loan, "not_kept")
        self._send(sender, Renewed(message.no, _ms(self.timings.term_s), tuple(self.live_refs(sender))))

    def _settle(self, now: float, message: Settle, sender: Boot) -> None:
        for ref in message.refs:
            slot = self._find(ref)
            if slot is not None and ref.borrower_boot == sender and slot.state != REVOKED:
                self._revoke(now, slot, "settled", keep=message.keep and slot.state != HELD)
        self._send(sender, Settled(message.refs))            # also for unknown ones: they are settled

    def _other_boot(self, now: float, message: OtherBoot, _sender: Boot) -> None:
        self._peer_gone(now, PeerGone(message.asked), self.boot)

    # -- the driver's events -----------------------------------------------------------------------------------------

    def _put_bytes(self, now: float, event: PutBytes, _sender: Boot) -> None:
        slot = self._find(event.ref)
        if slot is not None and slot.state == HELD:
            slot.fill_by = now + self.timings.fill_s

    def _put_ended(self, now: float, event: PutEnded, _sender: Boot) -> None:
        slot = self._find(event.ref)
        assert slot is not None and slot.putting, f"a Put ended that did not begin: {event.ref}"
        slot.putting = False
        slot.pins -= 1
        if slot.state == REVOKED:
            self._out.append(Answer(Stale((event.ref,))))
            self._free_when_idle(slot)
        elif event.span is not None and event.got == event.span.digest:
            slot.state, slot.span, slot.fill_by = SEALED, event.span, math.inf
            self.counters["slots_sealed"] += 1
            self._out.append(Answer(Sealed(event.ref, event.got)))
        elif event.got is not None:
            slot.bad_puts += 1
            self.counters["bad_digests"] += 1
            self._out.append(Answer(BadDigest(event.ref)))
            if slot.bad_puts == 2:
                self._revoke(now, slot, "digest")

    def _tainted(self, now: float, event: Tainted, _sender: Boot) -> None:
        slot = self._find(event.ref)
        if slot is not None and slot.state in (SEALED, RECALLED):
            slot.adopted = False                             # it would be cached again
            self._say_stale(now, slot, "tainted")

    def _need(self, now: float, event: Need, _sender: Boot) -> None:
        within = self.timings.recall_urgent_s if event.urgent else self.timings.recall_calm_s
        younger = [loan for loan in self._youngest_first() if loan.age > event.age]                  # law 8
        self._recall_some(now, event.slots, younger, NEED, within)

    def _homecoming(self, now: float, event: Homecoming, _sender: Boot) -> None:
        self._recall_some(now, event.slots, self._youngest_first(), HOME, self.timings.recall_calm_s)

    def _drain(self, now: float, event: Drain, _sender: Boot) -> None:
        self.draining = event.on
        if event.on:
            live = [slot for slot in self._lent.values() if slot.state in (HELD, SEALED)]
            self._recall(now, live, DRAIN, self.timings.recall_drain_s)

    def _in_debt(self, now: float, event: InDebt, _sender: Boot) -> None:
        self.in_debt, self._debt_age = event.owes, event.age
        if event.owes and event.age is not None:             # law 6, among those that law 8 allows
            younger = [loan for loan in self._all_loans() if loan.age > event.age]
            slots = [self._lent[slot] for loan in younger for slot in loan.slots]
            self._recall(now, [s for s in slots if s.state != RECALLED], NEED, self.timings.recall_calm_s)

    def _peer_gone(self, now: float, event: PeerGone, _sender: Boot) -> None:
        for loan in list(self._loans.get(event.boot, {}).values()):
            self._revoke_loan(now, loan, "gone")             # should it live after all, it may borrow again at once

    def _tick(self, now: float, _event: Tick, _sender: Boot) -> None:
        for loan in [loan for loan in self._all_loans() if loan.over_at <= now]:
            self._send(loan.borrower, Stale(self._revoke_loan(now, loan, "term")))
        for slot in list(self._lent.values()):
            if slot.state == HELD and slot.fill_by <= now:
                self._say_stale(now, slot, "fill")
            elif slot.state == RECALLED and slot.recall_by <= now:
                self._say_stale(now, slot, "recall_over")
            elif slot.slow_at <= now:
                self.counters["slow_pins"] += 1
                slot.slow_at = math.inf
        for boot, peer in self._peers.items():
            if peer.recall_at <= now:
                self._say_recall(now, boot, peer)

    table: ClassVar[dict[type, Callable[[Any, float, Any, Boot], None]]] = {
        Hello: _hello,
        Borrow: _borrow,
        Renew: _renew,
        Settle: _settle,
        OtherBoot: _other_boot,
        PutBytes: _put_bytes,
        PutEnded: _put_ended,
        Tainted: _tainted,
        Need: _need,
        Homecoming: _homecoming,
        Drain: _drain,
        InDebt: _in_debt,
        PeerGone: _peer_gone,
        Tick: _tick,
    }

    # -- recalls -----------------------------------------------------------------------------------------------------

    def _recall_some(self, now: float, number: int, loans: list[OpenLoan], why: str, within_s: float) -> None:
        """See to it that `number` slots are on their way, taking more from `loans` in their order; hasten slow ones."""
        slots = [self._lent[slot] for loan in loans for slot in loan.slots]
        revoked = sum(slot.state == REVOKED for slot in self._lent.values())
        late = [s for s in slots if s.state == RECALLED and s.recall_by > now + within_s]
        coming = sum(s.state == RECALLED and s.recall_by <= now + within_s for s in self._lent.values())
        asked = [*late, *(s for s in slots if s.state == HELD), *(s for s in slots if s.state == SEALED)]
        self._recall(now, asked[: max(0, number - revoked - coming)], why, within_s)

    def _recall(self, now: float, slots: list[LentSlot], why: str, within_s: float) -> None:
        told: dict[Boot, list[Ref]] = {}
        for slot in slots:
            told.setdefault(slot.ref.borrower_boot, []).append(slot.ref)
            if slot.state == HELD:
                self._revoke(now, slot, "recall")
            else:
                slot.state, slot.why, slot.recall_by = RECALLED, why, min(slot.recall_by, now + within_s)
        for boot, refs in told.items():
            self.counters["recalls"] += 1
            self._send(boot, Recall(tuple(refs), _ms(within_s), why))
            if (peer := self._peers.get(boot)) is not None:
                peer.quarantined_until = now + self.timings.quarantine_s
                peer.recall_at = min(peer.recall_at, now + self.timings.recall_repeat_s)
            self._out.append(Avoid(boot, now + self.timings.quarantine_s))

    def _say_recall(self, now: float, boot: Boot, peer: Peer) -> None:
        """The same Recall again, with the time that is left."""
        asked: dict[str, list[LentSlot]] = {}
        for ref in self.live_refs(boot):
            if (slot := self._lent[ref.slot]).state == RECALLED:
                asked.setdefault(slot.why, []).append(slot)
        for why, slots in asked.items():
            within_s = min(slot.recall_by for slot in slots) - now
            self._send(boot, Recall(tuple(slot.ref for slot in slots), _ms(within_s), why))
        peer.recall_at = now + self.timings.recall_repeat_s if asked else math.inf

    # -- the life of a slot ------------------------------------------------------------------------------------------

    def _find(self, ref: Ref) -> LentSlot | None:
        slot = self._lent.get(ref.slot)
        return slot if slot is not None and slot.ref == ref else None

    def _new_loan(self, now: float, message: Borrow, sender: Boot) -> OpenLoan:
        return OpenLoan(sender, message.loan, message.tenant, (message.age, message.job), granted_at=now,
                        over_at=now + self.timings.term_s, adopted=bool(message.keys), trace=message.trace)

    def _name(self, loan: OpenLoan, slot: int) -> Ref:
        self._gen += 1
        return Ref(self.boot, loan.borrower, loan.number, slot, self._gen)

    def _lend(self, loan: OpenLoan, number: int, slot: LentSlot) -> None:
        assert number not in self._lent, f"the pool gave slot {number} away twice"
        self._lent[number] = slot
        loan.slots.append(number)

    def _keep_if_any(self, loan: OpenLoan) -> OpenLoan | None:
        if not loan.slots:
            return None
        self._loans.setdefault(loan.borrower, {})[loan.number] = loan
        return loan

    def _revoke_loan(self, now: float, loan: OpenLoan, why: str) -> tuple[Ref, ...]:
        slots = [self._lent[slot] for slot in loan.slots]
        for slot in slots:
            self._revoke(now, slot, why)
        return tuple(slot.ref for slot in slots)

    def _say_stale(self, now: float, slot: LentSlot, why: str) -> None:
        self._revoke(now, slot, why)
        self._send(slot.ref.borrower_boot, Stale((slot.ref,)))

    def _revoke(self, now: float, slot: LentSlot, why: str, *, keep: bool = False) -> None:
        """The promise ends. The slot is free once nobody reads or fills it."""
        ref = slot.ref
        loans = self._loans[ref.borrower_boot]
        loans[ref.loan].slots.remove(ref.slot)
        if not loans[ref.loan].slots:
            del loans[ref.loan]
        if not loans:
            del self._loans[ref.borrower_boot]
        slot.state, slot.keep = REVOKED, keep or slot.adopted
        slot.fill_by = slot.recall_by = math.inf
        slot.slow_at = now + self.timings.slow_pin_s
        self.counters[f"revoked_{why}"] += 1
        self._out.append(Revoked(ref, why))
        self._free_when_idle(slot)

    def _free_when_idle(self, slot: LentSlot) -> None:
        """REVOKED with pins = 0: the only way to FREE."""
        if slot.state == REVOKED and slot.pins == 0:
            del self._lent[slot.ref.slot]
            self._pool.give_back(slot.ref.slot, slot.span if slot.keep else None)

    def _all_loans(self) -> list[OpenLoan]:
        return [loan for loans in self._loans.values() for loan in loans.values()]

    def _youngest_first(self) -> list[OpenLoan]:
        return sorted(self._all_loans(), key=lambda loan: loan.age, reverse=True)

    def _node(self, boot: Boot) -> str:
        return self._peers[boot].node if boot in self._peers else boot[:4].hex()

    def _forget_strangers(self) -> None:
        if len(self._peers) >= MAX_PEERS:
            idle = [boot for boot in self._peers if boot not in self._loans]
            for boot in idle[: MAX_PEERS // 2]:
                del self._peers[boot]

    def _send(self, boot: Boot, message: Any) -> None:
        self._out.append(Send(boot, message))


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
