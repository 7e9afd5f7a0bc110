"""DebtBook: where this borrower reads each span it lent out, and what it still owes. The borrower's half of the protocol.

    LOCAL --granted slot--> SENDING --Sealed--> REMOTE --Recall, home--> RETURNING --verified--> LOCAL | SPILLED
      ^                        |                  |                          |
      +---- stale, give up ----+                  +---- stale, gone, silent--+--> LOST

Reads flip only at a StepBoundary, so no Attend of ours is ever under a flip; until then the old copy stays and is read.
"No answer" never means "did not happen": requests are said again under the same name, and Renew reconciles both books.

Knows uids, refs, loans and timers; knows nothing of bytes, slots, sequences or sockets. One thread at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.loan_events import (
    Adopt,
    Adopted,
    AdoptFailed,
    AttendSilent,
    AttendSlow,
    Avoid,
    BackToLocal,
    BookEffect,
    BookEvent,
    BringHome,
    CameHome,
    CopyVerified,
    FetchFailed,
    FlipsWaiting,
    Gone,
    InDebt,
    Lost,
    Moved,
    MustReturn,
    NoLongerNeeded,
    PeerGone,
    ProbePeer,
    PutDone,
    PutFailed,
    Send,
    StartFetch,
    StartPut,
    StayedRemote,
    StepBoundary,
    Tick,
    Want,
)
from kvbank.kvstore.messages import (
    ABSENT,
    Age,
    Borrow,
    Envelope,
    Grant,
    HelloAck,
    OtherBoot,
    Recall,
    Ref,
    Refuse,
    Renew,
    Renewed,
    Settle,
    Settled,
    Stale,
)
from kvbank.kvstore.timings import LoanTimings

SENDING, REMOTE, RETURNING = "SENDING", "REMOTE", "RETURNING"
ASKED, OPEN = "ASKED", "OPEN"


@dataclass(slots=True)
class Debt:
    """One span at a lender, or on its way there or back."""

    uid: int
    ref: Ref
    state: str                                # SENDING | REMOTE | RETURNING
    digest: bytes = b""                       # noted at Sealed
    key: BlockKey | None = None               # adopted, and not told to the engine yet
    retry_at: float = math.inf                # say StartPut or StartFetch again
    give_up_at: float = math.inf
    drop_at: float = math.inf                 # recalled: lost then, if it found no place
    to: str = ""                              # RETURNING: LOCAL | SPILLED
    flip: str = ""                            # at the next boundary: moved | adopted | home | gone | or the reason it is lost
    keep: bool = False                        # flip gone: worth caching at the lender


@dataclass(slots=True)
class Asking:
    """Spans that want a lender, and who may still be asked."""

    uids: list[int]
    candidates: list[Boot]
    tenant: str
    age: Age
    deadline: float
    keys: dict[BlockKey, int] = field(default_factory=dict)     # adopt: key -> uid
    asked: int = 0
    last_code: str = "nobody"


@dataclass(slots=True)
class Loan:
    """One loan with one lender. OPEN ones have refs."""

    number: int
    state: str
    asking: Asking
    retry_at: float
    give_up_at: float


@dataclass(slots=True)
class LenderView:
    """One life of one lender, as this borrower sees it."""

    boot: Boot
    drawn: int = 0                            # loans drawn so far
    loans: dict[int, Loan] = field(default_factory=dict)
    renew_no: int = 0
    renew_at: float = math.inf
    known_when_sent: frozenset[Ref] = frozenset()
    avoid_until: float = -math.inf


class DebtBook:
    """`on` returns what to do; flips come only in the list that answers a StepBoundary. `wake_at`: come back with a Tick."""

    def __init__(self, boot: Boot, *, timings: LoanTimings | None = None) -> None:
        self.boot = boot
        self.timings = timings or LoanTimings()
        self.counters: Counter[str] = Counter()
        self._lenders: dict[Boot, LenderView] = {}
        self._debts: dict[int, Debt] = {}
        self._by_ref: dict[Ref, Debt] = {}
        self._owes = False
        self._out: list[BookEffect] = []

    def on(self, now: float, event: BookEvent) -> list[BookEffect]:
        """One event in, what to do out. Handling the same event twice changes nothing."""
        self._out = []
        if isinstance(event, Envelope):
            if event.to_boot == self.boot:
                self.table[type(event.message)](self, now, event.message, event.from_boot)
        else:
            self.table[type(event)](self, now, event, self.boot)
        self._tell_debt()
        return self._out

    def wake_at(self) -> float:
        times = [min(d.retry_at, d.give_up_at, d.drop_at) for d in self._debts.values()]
        for lender in self._lenders.values():
            times.append(lender.renew_at)
            times += [min(loan.retry_at, loan.give_up_at) for loan in lender.loans.values()]
        return min(times, default=math.inf)

    def refs(self) -> dict[int, Ref]:
        """uid -> where it is read, of every REMOTE or RETURNING span."""
        return {d.uid: d.ref for d in self._debts.values() if d.state != SENDING}

    def check(self) -> list[str]:
        """Broken laws, in words; empty when all is well."""
        wrong = []
        for debt in self._debts.values():
            loan = self._lenders.get(debt.ref.lender_boot, LenderView(debt.ref.lender_boot)).loans.get(debt.ref.loan)
            if loan is None or loan.state != OPEN:
                wrong.append(f"CONSERVED: span {debt.uid} is {debt.state} at {debt.ref}, whose loan is not open")
            if debt.state in (SENDING, RETURNING) and debt.give_up_at == math.inf and not debt.flip:
                wrong.append(f"BOUNDED: span {debt.uid} is {debt.state} for ever")
        if self._by_ref != {d.ref: d for d in self._debts.values()}:
            wrong.append("CONSERVED: two spans have one ref")
        return wrong

    # -- lending out ---------------------------------------------------------------------------------------------------------

    def _want(self, now: float, event: Want, _sender: Boot) -> None:
        uids = [uid for uid in event.uids if uid not in self._debts]
        if uids:
            self._ask(now, Asking(uids, list(event.lenders), event.tenant, event.age, event.deadline))

    def _adopt(self, now: float, event: Adopt, _sender: Boot) -> None:
        keys = dict(zip(event.keys, event.uids, strict=True))
        self._ask(now, Asking(list(event.uids), [event.lender], event.tenant, event.age, math.inf, keys=keys))

    def _ask(self, now: float, asking: Asking) -> None:
        """The next candidate, or nobody."""
        while asking.candidates and asking.asked < self.timings.borrow_candidates and now < asking.deadline:
            lender = self._lender(asking.candidates.pop(0))
            if now < lender.avoid_until:
                asking.last_code = "avoided"
                continue
            asking.asked += 1
            lender.drawn += 1
            loan = Loan(lender.drawn, ASKED, asking, now + self.timings.borrow_retry_s, now + self.timings.borrow_give_up_s)
            lender.loans[loan.number] = loan
            lender.renew_at = min(lender.renew_at, now + self.timings.renew_s)
            self._say_borrow(lender, loan)
            return
        for uid in asking.uids:
            self._refused(asking, uid, asking.last_code)

    def _refused(self, asking: Asking, uid: int, why: str) -> None:
        if asking.keys:
            key = next(key for key, named in asking.keys.items() if named == uid)
            self._out.append(AdoptFailed(uid, key, why))
        else:
            self._out.append(BackToLocal(uid, why))

    def _say_borrow(self, lender: LenderView, loan: Loan) -> None:
        asking = loan.asking
        stamp, job = asking.age
        self._send(lender.boot, Borrow(loan.number, asking.tenant, stamp, len(asking.uids), job, tuple(asking.keys)))

    def _grant(self, now: float, message: Grant, sender: Boot) -> None:
        self._granted(now, self._lender(sender), message.loan, message.refs, message)

    def _granted(self, now: float, lender: LenderView, number: int, refs: tuple[Ref, ...], grant: Grant | None) -> None:
        loan = lender.loans.get(number)
        if loan is None:
            self._send(lender.boot, Settle(refs, False))      # a phantom: asked for once, given up since
            return
        if loan.state != ASKED:
            return
        loan.state, loan.retry_at, loan.give_up_at = OPEN, math.inf, math.inf
        if loan.asking.keys:
            self._adopted(now, lender, loan, refs, grant)
            return
        taken = loan.asking.uids[: len(refs)]
        for uid, ref in zip(taken, refs, strict=False):
            debt = Debt(uid, ref, SENDING, retry_at=now + self.timings.put_retry_s, give_up_at=now + self.timings.put_give_up_s)
            self._book(debt)
            self._out.append(StartPut(uid, ref))
        if refs[len(taken) :]:
            self._send(lender.boot, Settle(refs[len(taken) :], False))
        loan.asking.uids = loan.asking.uids[len(taken) :]
        if loan.asking.uids:
            rest, loan.asking = loan.asking, Asking([], [], loan.asking.tenant, loan.asking.age, math.inf)
            self._ask(now, rest)
        self._close_if_empty(lender, loan)

    def _adopted(self, now: float, lender: LenderView, loan: Loan, refs: tuple[Ref, ...], grant: Grant | None) -> None:
        asking, named = loan.asking, dict(loan.asking.keys)
        if grant is not None:
            for ref, key, digest in zip(refs, grant.keys, grant.sealed_digests, strict=False):
                uid = named.pop(key, None)
                if uid is None:
                    self._send(lender.boot, Settle((ref,), True))
                    continue
                self._book(Debt(uid, ref, REMOTE, digest=digest, key=key, flip="adopted"))
                self._out.append(FlipsWaiting())
        else:                                                 # heard of by Renewed only: the digests are not known
            self._send(lender.boot, Settle(refs, True))
        for key, uid in named.items():
            self._out.append(AdoptFailed(uid, key, ABSENT))
        asking.uids.clear()
        self._close_if_empty(lender, loan)

    def _refuse(self, now: float, message: Refuse, sender: Boot) -> None:
        lender = self._lender(sender)
        loan = lender.loans.get(message.loan)
        if loan is not None and loan.state == ASKED:
            self.counters[f"refused_{message.code}"] += 1
            loan.asking.last_code = message.code
            lender.avoid_until = max(lender.avoid_until, now + message.retry_ms / 1e3)
            del lender.loans[message.loan]
            self._ask(now, loan.asking)

    # -- on the way ----------------------------------------------------------------------------------------------------------

    def _put_done(self, now: float, event: PutDone, _sender: Boot) -> None:
        debt = self._by_ref.get(event.ref)
        if debt is None or debt.state != SENDING or debt.flip:
            return
        if event.digest != event.sealed:
            self._back(now, debt, "digest")
            return
        debt.digest, debt.flip = event.digest, "moved"
        debt.retry_at = debt.give_up_at = math.inf
        self._out.append(FlipsWaiting())

    def _put_failed(self, now: float, event: PutFailed, _sender: Boot) -> None:
        debt = self._by_ref.get(event.ref)
        if debt is not None and debt.state == SENDING and event.why == "stale":
            self._back(now, debt, "stale")

    def _bring_home(self, now: float, event: BringHome, _sender: Boot) -> None:
        for uid in event.uids:
            debt = self._debts.get(uid)
            if debt is None or debt.state == SENDING or debt.flip:
                continue
            debt.state, debt.to = RETURNING, event.to
            debt.retry_at, debt.give_up_at = now + self.timings.put_retry_s, now + self.timings.put_give_up_s
            self._out.append(StartFetch(uid, debt.ref, debt.to, debt.digest))

    def _copy_verified(self, now: float, event: CopyVerified, _sender: Boot) -> None:
        debt = self._debts.get(event.uid)
        if debt is None or debt.state != RETURNING or debt.flip:
            return
        self._flip(debt, "home" if event.digest == debt.digest else "tainted")

    def _fetch_failed(self, now: float, event: FetchFailed, _sender: Boot) -> None:
        debt = self._debts.get(event.uid)
        if debt is not None and debt.state == RETURNING and event.why == "stale":
            self._flip(debt, "stale")

    def _no_longer_needed(self, now: float, event: NoLongerNeeded, _sender: Boot) -> None:
        for uid in event.uids:
            debt = self._debts.get(uid)
            if debt is None:
                self._out.append(Gone(uid))
            elif debt.flip in ("", "moved", "adopted", "home"):
                debt.keep = event.keep
                self._flip(debt, "gone")

    # -- what lenders say ----------------------------------------------------------------------------------------------------

    def _recall(self, now: float, message: Recall, _sender: Boot) -> None:
        for ref in message.refs:
            debt = self._by_ref.get(ref)
            if debt is None or debt.flip in ("gone", "home"):
                continue
            if debt.state == SENDING:
                self._back(now, debt, "recall")
            elif debt.drop_at == math.inf:
                within_s = message.within_ms / 1e3
                debt.drop_at = now + self.timings.drop_share * within_s
                self._out.append(MustReturn(debt.uid, within_s, message.why))

    def _stale(self, now: float, message: Stale, _sender: Boot) -> None:
        for ref in message.refs:
            if (debt := self._by_ref.get(ref)) is not None:
                self._ended(now, debt, "stale")

    def _renewed(self, now: float, message: Renewed, sender: Boot) -> None:
        lender = self._lenders.get(sender)
        if lender is None or message.no != lender.renew_no:
            return
        listed = frozenset(message.refs)
        for debt in [d for d in self._debts.values() if d.ref in lender.known_when_sent and d.ref not in listed]:
            self._ended(now, debt, "missing")
        unknown: dict[int, list[Ref]] = {}
        for ref in message.refs:
            if ref not in self._by_ref:
                unknown.setdefault(ref.loan, []).append(ref)
        for number, refs in unknown.items():
            loan = lender.loans.get(number)
            if loan is not None and loan.state == ASKED:
                self._granted(now, lender, number, tuple(refs), None)
            elif number <= lender.drawn:
                self._send(sender, Settle(tuple(refs), False))
        if not lender.loans and not listed:
            lender.renew_at = math.inf                        # both books are empty

    def _other_boot(self, now: float, message: OtherBoot, _sender: Boot) -> None:
        self._peer_gone(now, PeerGone(message.asked), self.boot)

    def _nothing(self, now: float, message: Any, _sender: Boot) -> None:
        """Heard, and nothing follows from it."""

    # -- peers ---------------------------------------------------------------------------------------------------------------

    def _peer_gone(self, now: float, event: PeerGone, _sender: Boot) -> None:
        for debt in [d for d in self._debts.values() if d.ref.lender_boot == event.boot]:
            self._ended(now, debt, "gone")
        lender = self._lenders.get(event.boot)
        if lender is None:
            return
        lender.avoid_until = math.inf                         # that life is over
        asked = [loan for loan in lender.loans.values() if loan.state == ASKED]
        lender.loans = {number: loan for number, loan in lender.loans.items() if loan.state == OPEN}
        lender.renew_at = math.inf
        for loan in asked:
            loan.asking.last_code = "gone"
            self._ask(now, loan.asking)

    def _attend_silent(self, now: float, event: AttendSilent, _sender: Boot) -> None:
        lender = self._lender(event.lender)
        lender.avoid_until = max(lender.avoid_until, now + self.timings.quarantine_s)
        for debt in [d for d in self._debts.values() if d.ref.lender_boot == event.lender]:
            self._ended(now, debt, "silent")
        self._out.append(ProbePeer(event.lender))

    def _attend_slow(self, now: float, event: AttendSlow, _sender: Boot) -> None:
        self._out.append(ProbePeer(event.lender))

    def _avoid(self, now: float, event: Avoid, _sender: Boot) -> None:
        lender = self._lender(event.boot)
        lender.avoid_until = max(lender.avoid_until, event.until)

    # -- flips ---------------------------------------------------------------------------------------------------------------

    def _step_boundary(self, now: float, _event: StepBoundary, _sender: Boot) -> None:
        settle: dict[tuple[Boot, bool], list[Ref]] = {}
        for debt in [d for d in self._debts.values() if d.flip]:
            flip, debt.flip = debt.flip, ""
            if flip == "moved":
                debt.state = REMOTE
                self._out.append(Moved(debt.uid, debt.ref, debt.digest))
                continue
            if flip == "adopted":
                assert debt.key is not None
                self._out.append(Adopted(debt.uid, debt.key, debt.ref, debt.digest))
                continue
            if flip == "home":
                self._out.append(CameHome(debt.uid, debt.to))
            elif flip == "gone":
                self._out.append(Gone(debt.uid))
            else:
                self._out.append(Lost(debt.uid, debt.ref, flip))
                self.counters[f"lost_{flip}"] += 1
            settle.setdefault((debt.ref.lender_boot, debt.keep and flip == "gone"), []).append(debt.ref)
            self._strike(debt)
        for (boot, keep), refs in settle.items():
            self._send(boot, Settle(tuple(refs), keep))

    def _flip(self, debt: Debt, how: str) -> None:
        debt.flip = how
        debt.retry_at = debt.give_up_at = debt.drop_at = math.inf
        self._out.append(FlipsWaiting())

    def _ended(self, now: float, debt: Debt, why: str) -> None:
        """The promise is over: what was still local stays so, what was read there is lost at the next boundary."""
        if debt.state == SENDING:
            self._back(now, debt, why)
        elif debt.flip == "adopted" and debt.key is not None:
            self._out.append(AdoptFailed(debt.uid, debt.key, why))
            self._strike(debt)
        elif debt.flip not in ("gone", "home"):
            self._flip(debt, why)

    def _back(self, now: float, debt: Debt, why: str) -> None:
        self.counters[f"back_{why}"] += 1
        self._strike(debt)
        self._send(debt.ref.lender_boot, Settle((debt.ref,), False))
        self._out.append(BackToLocal(debt.uid, why))

    # -- timers --------------------------------------------------------------------------------------------------------------

    def _tick(self, now: float, _event: Tick, _sender: Boot) -> None:
        for lender in list(self._lenders.values()):
            for loan in [loan for loan in lender.loans.values() if loan.state == ASKED]:
                if loan.give_up_at <= now:
                    loan.asking.last_code = "give_up"
                    del lender.loans[loan.number]
                    self._ask(now, loan.asking)
                elif loan.retry_at <= now:
                    loan.retry_at = now + self.timings.borrow_retry_s
                    self._say_borrow(lender, loan)
            if lender.renew_at <= now:
                self._renew(now, lender)
        for debt in list(self._debts.values()):
            self._tick_debt(now, debt)

    def _tick_debt(self, now: float, debt: Debt) -> None:
        if debt.drop_at <= now:
            self._flip(debt, "recall")
        elif debt.give_up_at <= now:
            debt.retry_at = debt.give_up_at = math.inf
            if debt.state == SENDING:
                self._back(now, debt, "give_up")
            else:
                debt.state = REMOTE
                self._out.append(StayedRemote(debt.uid, "give_up"))
                if debt.drop_at < math.inf:
                    self._out.append(MustReturn(debt.uid, max(0.0, debt.drop_at - now), "again"))
        elif debt.retry_at <= now:
            debt.retry_at = now + self.timings.put_retry_s
            again = StartPut(debt.uid, debt.ref) if debt.state == SENDING else \
                StartFetch(debt.uid, debt.ref, debt.to, debt.digest)
            self._out.append(again)

    def _renew(self, now: float, lender: LenderView) -> None:
        lender.renew_no += 1
        lender.renew_at = now + self.timings.renew_s
        lender.known_when_sent = frozenset(d.ref for d in self._debts.values() if d.ref.lender_boot == lender.boot)
        self._send(lender.boot, Renew(lender.renew_no, lender.drawn, tuple(lender.loans)))

    # -- the books -----------------------------------------------------------------------------------------------------------

    def _lender(self, boot: Boot) -> LenderView:
        if boot not in self._lenders:
            self._lenders[boot] = LenderView(boot)
        return self._lenders[boot]

    def _book(self, debt: Debt) -> None:
        self._debts[debt.uid] = debt
        self._by_ref[debt.ref] = debt

    def _strike(self, debt: Debt) -> None:
        """The debt is over; its loan with it when it was the last."""
        self._debts.pop(debt.uid, None)
        self._by_ref.pop(debt.ref, None)
        lender = self._lender(debt.ref.lender_boot)
        if (loan := lender.loans.get(debt.ref.loan)) is not None:
            self._close_if_empty(lender, loan)

    def _close_if_empty(self, lender: LenderView, loan: Loan) -> None:
        if loan.state == OPEN and not any(
            d.ref.loan == loan.number and d.ref.lender_boot == lender.boot for d in self._debts.values()
        ):
            lender.loans.pop(loan.number, None)

    def _tell_debt(self) -> None:
        """Law 5: whoever owes, or asks, grants nothing. Passed on before any Send of the same list."""
        loans = [loan for lender in self._lenders.values() for loan in lender.loans.values()]
        if bool(loans) != self._owes:
            self._owes = bool(loans)
            age = min((loan.asking.age for loan in loans), default=None)
            self._out.insert(0, InDebt(self._owes, age))

    def _send(self, boot: Boot, message: Any) -> None:
        self._out.append(Send(boot, message))

    table: ClassVar[dict[type, Callable[[Any, float, Any, Boot], None]]] = {
        Want: _want,
        Adopt: _adopt,
        Grant: _grant,
        Refuse: _refuse,
        PutDone: _put_done,
        PutFailed: _put_failed,
        BringHome: _bring_home,
        CopyVerified: _copy_verified,
        FetchFailed: _fetch_failed,
        NoLongerNeeded: _no_longer_needed,
        Recall: _recall,
        Stale: _stale,
        Renewed: _renewed,
        OtherBoot: _other_boot,
        HelloAck: _nothing,
        Settled: _nothing,
        PeerGone: _peer_gone,
        AttendSilent: _attend_silent,
        AttendSlow: _attend_slow,
        Avoid: _avoid,
        StepBoundary: _step_boundary,
        Tick: _tick,
    }
