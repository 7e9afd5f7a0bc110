"""DebtBook: where this borrower reads each span it lent out, and what it owes. The borrower's half of the protocol.

    LOCAL --granted slot--> SENDING --Sealed--> REMOTE --Recall, home--> RETURNING --verified--> LOCAL|SPILLED|REMOTE
      ^                        |                  |                          |
      +---- stale, give up ----+                  +---- stale, gone, silent--+--> LOST, unless a verified copy exists

Reads flip only at a StepBoundary, so no Attend of ours is ever under a flip; until then the old copy stays and is read.
"No answer" never means "did not happen": requests are said again under the same name, and Renew reconciles both books.
LOCAL, SPILLED, LOST and GONE spans are the engine's: the book forgets them with the effect that says so.

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
    ATTEND,
    CAP,
    FULL,
    OLDER,
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

LOCAL, SENDING, REMOTE, RETURNING = "LOCAL", "SENDING", "REMOTE", "RETURNING"
ASKED, OPEN = "ASKED", "OPEN"                 # a loan that is ENDED is forgotten; its number is never drawn again

MAX_BAD_COPIES = 2                            # a wire may garble one copy; two mean that the lender's bytes are wrong


@dataclass(slots=True)
class Debt:
    """One span at a lender, or on its way there or back."""

    uid: int
    state: str                                # SENDING | REMOTE | RETURNING
    ref: Ref | None                           # where it is read; None while SENDING: it is read locally
    filling: Ref | None = None                # the slot its bytes are sent to: SENDING, or RETURNING to another lender
    digest: bytes = b""                       # noted at Sealed
    key: BlockKey | None = None               # adopted, and the engine does not know yet
    to: str = ""                              # RETURNING by a fetch: LOCAL | SPILLED
    attempt: int = 0                          # of that fetch: counted for each BringHome, never used again
    retry_at: float = math.inf                # say StartPut or StartFetch again
    give_up_at: float = math.inf
    drop_at: float = math.inf                 # recalled: lost then, if it found no place
    why: str = ""                             # of the recall
    bad_copies: int = 0
    # what waits for the step boundary; the first that holds happens
    gone: bool = False                        # no job needs it
    keep: bool = False                        # gone, and worth caching at the lender
    fetched: bool = False                     # a verified copy lies in `to`
    sealed: bool = False                      # a verified copy lies in `filling`
    ended: str = ""                           # the promise of `ref` is over, and why: lost


@dataclass(slots=True)
class Asking:
    """Spans that want a lender, and who may still be asked."""

    uids: list[int]
    candidates: list[Boot]
    tenant: str
    age: Age
    deadline: float
    keys: dict[int, BlockKey] = field(default_factory=dict)     # adopt: uid -> key
    needy: bool = False
    trace: str = ""
    asked: int = 0
    last_code: str = "nobody"


@dataclass(slots=True)
class Loan:
    """One loan with one lender. ASKED ones wait for an answer; OPEN ones have refs."""

    number: int
    state: str
    asking: Asking
    retry_at: float
    give_up_at: float
    refs: dict[Ref, int] = field(default_factory=dict)          # held -> number of the last Renew sent before it was


@dataclass(slots=True)
class LenderView:
    """One life of one lender, as this borrower sees it."""

    boot: Boot
    drawn: int = 0                            # loans drawn so far
    loans: dict[int, Loan] = field(default_factory=dict)
    renew_no: int = 0
    renew_at: float = math.inf
    avoid_until: float = -math.inf
    full_until: float = -math.inf             # has no slot to fill; what it caches may be lent where it lies all the same
    changed_no: int = 0                       # the last Renew sent before the last loan or ref ended
    changed_at: float = -math.inf
    heard_at: float = -math.inf
    gone: bool = False                        # that life is over, by all we know: nothing is said to it
    fit: str = ""                             # what it said it can do with our spans: ATTEND | FETCH_ONLY | NO


class DebtBook:
    """`on` returns what to do, flips only in answer to a StepBoundary. `wake_at` says when to come back with a Tick."""

    def __init__(self, boot: Boot, *, timings: LoanTimings | None = None) -> None:
        self.boot = boot
        self.timings = timings or LoanTimings()
        self.counters: Counter[str] = Counter()
        self._lenders: dict[Boot, LenderView] = {}
        self._debts: dict[int, Debt] = {}
        self._by_ref: dict[Ref, Debt] = {}
        self._asked: dict[int, Asking] = {}             # uid -> the want it is part of, while nobody granted it
        self._flips: dict[int, None] = {}               # uids with something for the next step boundary
        self._attempts = 0                              # fetches begun
        self._told: InDebt = InDebt(False)
        self._settling: dict[tuple[Boot, bool], list[Ref]] = {}
        self._out: list[BookEffect] = []

    def on(self, now: float, event: BookEvent) -> list[BookEffect]:
        """One event in, what to do out. Handling the same event twice changes nothing."""
        self._out = []
        if isinstance(event, Envelope):
            self._arrived(now, event)
        else:
            self.table[type(event)](self, now, event, self.boot)
        for (boot, keep), refs in self._settling.items():
            self._send(boot, Settle(tuple(refs), keep))
        self._settling = {}
        self._tell_debt()
        return self._out

    def wake_at(self) -> float:
        """When the next timer ends; infinity when none runs."""
        times = [min(debt.retry_at, debt.give_up_at, debt.drop_at) for debt in self._debts.values()]
        for lender in self._lenders.values():
            times.append(lender.renew_at)
            times += [min(loan.retry_at, loan.give_up_at) for loan in lender.loans.values()]
        return min(times, default=math.inf)

    def refs(self) -> dict[int, Ref]:
        """uid -> where it is read, of every REMOTE or RETURNING span."""
        return {debt.uid: debt.ref for debt in self._debts.values() if debt.ref is not None}

    def state(self, uid: int) -> str:
        """LOCAL also for a span the book has never heard of, or has forgotten."""
        return self._debts[uid].state if uid in self._debts else LOCAL

    def held(self) -> list[Ref]:
        """Every ref this borrower takes for a promise: read, or being filled. For an auditor, beside `live_refs`."""
        return list(self._by_ref)

    def loans_at(self, lender: Boot) -> dict[int, str]:
        """Number -> ASKED | OPEN, of the loans with that life of a lender."""
        known = self._lenders.get(lender)
        return {} if known is None else {loan.number: loan.state for loan in known.loans.values()}

    @property
    def flips_waiting(self) -> bool:
        """The next StepBoundary changes something. Safe to ask without the lock: one that comes a moment later can wait."""
        return bool(self._flips)

    @property
    def owes(self) -> bool:
        """Law 5: something is borrowed, or a Borrow is in flight."""
        return any(lender.loans for lender in self._lenders.values())

    def avoids(self, now: float, lender: Boot) -> bool:
        """That life of a lender would not be asked now: it refused, recalled or stayed silent a moment ago."""
        known = self._lenders.get(lender)
        return known is not None and now < max(known.avoid_until, known.full_until)

    def attends(self, lender: Boot) -> bool:
        """That life of a lender said that its arithmetic gives our bits. Any other only hands out what it holds."""
        known = self._lenders.get(lender)
        return known is not None and known.fit == ATTEND

    def check(self) -> list[str]:
        """Broken laws, in words; empty when all is well."""
        wrong = []
        for debt in self._debts.values():
            refs = [ref for ref in (debt.ref, debt.filling) if ref is not None]
            for ref in refs:
                loan = self._loan_of(ref)
                if loan is None or loan.state != OPEN or ref not in loan.refs or self._by_ref.get(ref) is not debt:
                    wrong.append(f"CONSERVED: span {debt.uid} is {debt.state} at {ref}, which no open loan knows")
            if not refs or (debt.state == SENDING) != (debt.ref is None):
                wrong.append(f"CONSERVED: span {debt.uid} is {debt.state} with {len(refs)} refs")
            moving = debt.filling is not None or bool(debt.to)
            if moving and debt.give_up_at == math.inf and debt.uid not in self._flips:
                wrong.append(f"BOUNDED: span {debt.uid} is {debt.state} for ever")
        held = [ref for lender in self._lenders.values() for loan in lender.loans.values() for ref in loan.refs]
        if len(held) != len(self._by_ref) or any(ref not in self._by_ref for ref in held):
            wrong.append("CONSERVED: refs of loans are not the refs of spans")
        for lender in self._lenders.values():
            for loan in lender.loans.values():
                if loan.state == OPEN and not loan.refs:
                    wrong.append(f"CONSERVED: loan {loan.number} is open and empty")
                if loan.state == ASKED and loan.give_up_at == math.inf:
                    wrong.append(f"BOUNDED: loan {loan.number} is asked for ever")
            if lender.loans and lender.renew_at == math.inf and not lender.gone:
                wrong.append(f"BOUNDED: {len(lender.loans)} loans are not renewed")
        wrong += [f"CONSERVED: flip of unknown span {uid}" for uid in self._flips if uid not in self._debts]
        if self._told.owes != self.owes:
            wrong.append("LAW 5: the ledger was not told about our debt")
        return wrong

    # -- lending out -------------------------------------------------------------------------------------------------

    def _want(self, now: float, event: Want, _sender: Boot) -> None:
        uids = [uid for uid in event.uids if uid not in self._asked and self._may_move(uid)]
        for uid in event.uids:
            if (debt := self._debts.get(uid)) is not None and debt.gone:
                self._out.append(BackToLocal(uid, "leaving"))  # it was given up at its lender a moment ago: later again
        if uids:
            self._ask(now, Asking(uids, list(event.lenders), event.tenant, event.age, event.deadline, needy=event.needy,
                                  trace=event.trace))

    def _adopt(self, now: float, event: Adopt, _sender: Boot) -> None:
        keys = dict(zip(event.uids, event.keys, strict=True))
        keys = {uid: key for uid, key in keys.items() if uid not in self._asked and uid not in self._debts}
        if keys:
            self._ask(now, Asking(list(keys), [event.lender], event.tenant, event.age, math.inf, keys=keys,
                                  trace=event.trace))

    def _may_move(self, uid: int) -> bool:
        """LOCAL as far as the book knows, or at a lender with nothing under way."""
        debt = self._debts.get(uid)
        return debt is None or (debt.filling is None and not debt.to and uid not in self._flips)

    def _ask(self, now: float, asking: Asking) -> None:
        """The next candidate, or nobody."""
        while asking.candidates and asking.asked < self.timings.borrow_candidates and now < asking.deadline:
            lender = self._lender(asking.candidates.pop(0))
            if now < lender.avoid_until or (not asking.keys and now < lender.full_until):
                _note(asking, "avoided")
                continue
            asking.asked += 1
            lender.gone = False
            lender.drawn += 1
            give_up_at = min(now + self.timings.borrow_give_up_s, asking.deadline)
            loan = Loan(lender.drawn, ASKED, asking, now + self.timings.borrow_retry_s, give_up_at)
            if not lender.loans:
                lender.heard_at = now
            lender.loans[loan.number] = loan
            lender.renew_at = min(lender.renew_at, now + self.timings.renew_s)
            self._asked.update(dict.fromkeys(asking.uids, asking))
            self.counters["loans_asked"] += 1
            self._say_borrow(lender, loan)
            return
        for uid in list(asking.uids):
            self._not_granted(now, asking, uid, asking.last_code)

    def _say_borrow(self, lender: LenderView, loan: Loan) -> None:
        asking, (stamp, job) = loan.asking, loan.asking.age
        keys = tuple(asking.keys.values())
        self._send(lender.boot, Borrow(loan.number, asking.tenant, stamp, len(asking.uids), job, keys, asking.needy,
                                       asking.trace))

    def _not_granted(self, now: float, asking: Asking, uid: int, why: str) -> None:
        asking.uids.remove(uid)
        self._asked.pop(uid, None)
        if asking.keys:
            self._out.append(AdoptFailed(uid, asking.keys.pop(uid), why))
        elif (debt := self._debts.get(uid)) is not None:
            self._stay(now, debt, why)
        else:
            self._out.append(BackToLocal(uid, why))

    def _unask(self, now: float, lender: LenderView, loan: Loan, why: str) -> None:
        """An ASKED loan ends without slots that we know of; a Grant still under way is a phantom. Ask the next."""
        self._forget_loan(now, lender, loan)
        _note(loan.asking, why)
        self._ask(now, loan.asking)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _grant(self, now: float, message: Grant, sender: Boot) -> None:
        refs = tuple(ref for ref in message.refs if self._is_ours(ref, sender) and ref.loan == message.loan)
        sealed = dict(zip(message.keys, zip(message.refs, message.sealed_digests, strict=False), strict=False))
        lender = self._lender(sender)
        loan = lender.loans.get(message.loan)
        if loan is None or loan.state != ASKED:
            self._settle_unknown(now, refs, sender)            # a phantom, or the same Grant again
        elif loan.asking.keys:
            self._open_adopted(now, lender, loan, sealed, refs)
        else:
            self._open(now, lender, loan, refs)

    def _open(self, now: float, lender: LenderView, loan: Loan, refs: tuple[Ref, ...]) -> None:
        asking = loan.asking
        self._opened(loan)
        for uid in [uid for uid in asking.uids if not self._may_move(uid)]:
            asking.uids.remove(uid)                            # it found another way, or its end, while we asked
            del self._asked[uid]
        for ref in refs:
            if not asking.uids:
                self._settle(ref)
                continue
            uid = asking.uids.pop(0)
            del self._asked[uid]
            debt = self._debts.get(uid)
            if debt is None:
                debt = self._debts[uid] = Debt(uid, SENDING, None)
            else:
                debt.state = RETURNING
            debt.filling, debt.sealed = ref, False
            debt.retry_at, debt.give_up_at = now + self.timings.put_retry_s, now + self.timings.put_give_up_s
            self._hold(lender, loan, ref, debt)
            self._out.append(StartPut(uid, ref, debt.ref, debt.digest))
        if asking.uids:                                        # a partial grant: the next candidate may have the rest
            self._ask(now, asking)
        if not loan.refs:
            self._forget_loan(now, lender, loan)

    def _open_adopted(
        self, now: float, lender: LenderView, loan: Loan, sealed: dict[BlockKey, tuple[Ref, bytes]],
        refs: tuple[Ref, ...],
    ) -> None:
        asking = loan.asking
        self._opened(loan)
        for uid, key in list(asking.keys.items()):
            ref, digest = sealed.get(key, (None, b""))
            if ref is None or ref not in refs or ref in self._by_ref:
                self._not_granted(now, asking, uid, ABSENT)
                continue
            asking.uids.remove(uid)
            del asking.keys[uid], self._asked[uid]
            debt = self._debts[uid] = Debt(uid, REMOTE, ref, digest=digest, key=key)
            self._hold(lender, loan, ref, debt)
            self._mark(debt)
        self._settle_unknown(now, refs, lender.boot)
        if not loan.refs:
            self._forget_loan(now, lender, loan)

    def _opened(self, loan: Loan) -> None:
        loan.state, loan.retry_at, loan.give_up_at = OPEN, math.inf, math.inf
        self.counters["loans_opened"] += 1

    def _refuse(self, now: float, message: Refuse, sender: Boot) -> None:
        lender = self._lender(sender)
        loan = lender.loans.get(message.loan)
        if loan is None:
            return
        if loan.state == ASKED:
            self.counters[f"refused_{message.code}"] += 1
            until = now + message.retry_ms / 1e3
            if message.code in (FULL, CAP, OLDER):
                lender.full_until = max(lender.full_until, until)
            else:
                lender.avoid_until = max(lender.avoid_until, until)
            self._unask(now, lender, loan, message.code)
        else:                                                  # an earlier answer, or the slots were taken back since
            for ref in list(loan.refs):
                if self._by_ref[ref].filling == ref:
                    self._stop_filling(now, self._by_ref[ref], "refused")

    def _renewed(self, now: float, message: Renewed, sender: Boot) -> None:
        lender = self._lenders.get(sender)
        if lender is None or message.no > lender.renew_no:
            return
        listed = frozenset(message.refs)
        for loan in list(lender.loans.values()):
            for ref, before in list(loan.refs.items()):
                if before < message.no and ref not in listed:  # held when that Renew was sent, and no promise any more
                    self._promise_over(now, ref, "missing")
        unknown: dict[int, list[Ref]] = {}
        for ref in message.refs:
            if ref not in self._by_ref and self._is_ours(ref, sender):
                unknown.setdefault(ref.loan, []).append(ref)
        for number, refs in unknown.items():
            asked = lender.loans.get(number)
            if asked is None or asked.state != ASKED:
                self._settle_unknown(now, tuple(refs), sender)
            elif not asked.asking.keys:                        # an adopted one needs its digests: the Grant comes again
                self._open(now, lender, asked, tuple(refs))
        if not lender.loans and not unknown and message.no > lender.changed_no:
            lender.renew_at = math.inf                         # both books are empty

    # -- on the way --------------------------------------------------------------------------------------------------

    def _put_done(self, now: float, event: PutDone, _sender: Boot) -> None:
        debt = self._by_ref.get(event.ref)
        if debt is None or debt.filling != event.ref or debt.sealed:
            return                                             # late: that promise is over, or known already
        if event.digest != event.sealed or (debt.digest and debt.digest != event.sealed):
            self._stop_filling(now, debt, "digest")
            return
        debt.digest, debt.sealed = event.sealed, True
        debt.retry_at = debt.give_up_at = math.inf
        self._mark(debt)

    def _put_failed(self, now: float, event: PutFailed, _sender: Boot) -> None:
        debt = self._by_ref.get(event.ref)
        if debt is not None and debt.filling == event.ref and event.why == "stale":
            self._stop_filling(now, debt, "stale")

    def _bring_home(self, now: float, event: BringHome, _sender: Boot) -> None:
        for uid in event.uids:
            debt = self._debts.get(uid)
            if debt is None or debt.ref is None or uid in self._flips or debt.to:
                continue
            if debt.filling is not None:                       # it was moving on to another lender: home is better
                self._let_go(now, debt.filling)
                debt.filling = None
            self._attempts += 1
            debt.state, debt.to, debt.attempt = RETURNING, event.to, self._attempts
            debt.retry_at, debt.give_up_at = now + self.timings.put_retry_s, now + self.timings.put_give_up_s
            self._out.append(StartFetch(uid, debt.ref, debt.to, debt.digest, debt.attempt))

    def _copy_verified(self, now: float, event: CopyVerified, _sender: Boot) -> None:
        debt = self._debts.get(event.uid)
        if debt is None or debt.ref is None or not debt.to or debt.fetched or event.attempt != debt.attempt:
            return                                             # late: it was given up, and the engine looks elsewhere now
        if event.digest == debt.digest:
            debt.fetched = True
            debt.retry_at = debt.give_up_at = debt.drop_at = math.inf
            self._mark(debt)
            return
        debt.bad_copies += 1
        self.counters["bad_copies"] += 1
        if debt.bad_copies >= MAX_BAD_COPIES:
            self._promise_over(now, debt.ref, "tainted")
        elif not debt.ended:
            debt.retry_at = now + self.timings.put_retry_s
            self._out.append(StartFetch(debt.uid, debt.ref, debt.to, debt.digest, debt.attempt))

    def _fetch_failed(self, now: float, event: FetchFailed, _sender: Boot) -> None:
        debt = self._debts.get(event.uid)
        if debt is not None and debt.ref is not None and debt.to and event.why == "stale":
            self._promise_over(now, debt.ref, "stale")

    def _no_longer_needed(self, now: float, event: NoLongerNeeded, _sender: Boot) -> None:
        for uid in event.uids:
            if (debt := self._debts.get(uid)) is not None:
                debt.gone, debt.keep = True, event.keep
                self._mark(debt)
            if (asking := self._asked.pop(uid, None)) is not None:
                asking.uids.remove(uid)
                asking.keys.pop(uid, None)
                if debt is None:
                    self._out.append(Gone(uid))
        for lender in self._lenders.values():                  # wants that nobody wants now: their Grants are phantoms
            for loan in [one for one in lender.loans.values() if one.state == ASKED and not one.asking.uids]:
                self._forget_loan(now, lender, loan)

    # -- what lenders say --------------------------------------------------------------------------------------------

    def _arrived(self, now: float, envelope: Envelope) -> None:
        message = envelope.message
        if envelope.to_boot != self.boot:
            if not isinstance(message, OtherBoot):
                self._send(envelope.from_boot, OtherBoot(self.boot, envelope.to_boot))
            return
        if (lender := self._lenders.get(envelope.from_boot)) is not None:
            lender.heard_at = now
            if lender.gone:                                    # a false alarm, or a last word on its way
                lender.gone = False
                self._changed(now, lender)
        self.table[type(message)](self, now, message, envelope.from_boot)

    def _recall(self, now: float, message: Recall, sender: Boot) -> None:
        lender, within_s = self._lender(sender), message.within_ms / 1e3
        lender.avoid_until = max(lender.avoid_until, now + self.timings.quarantine_s)
        for ref in message.refs:
            debt = self._by_ref.get(ref)
            if debt is None:
                self._settle_unknown(now, (ref,), sender)
            elif debt.filling == ref:
                self._stop_filling(now, debt, "recall")
            elif debt.key is not None:                         # adopted a moment ago, and nobody reads it yet
                self._promise_over(now, ref, "recall")
            elif not (debt.gone or debt.fetched or debt.sealed or debt.ended):
                first, debt.why = debt.drop_at == math.inf, message.why
                debt.drop_at = min(debt.drop_at, now + self.timings.drop_share * within_s)
                if first:
                    self._out.append(MustReturn(debt.uid, debt.drop_at - now, message.why))

    def _stale(self, now: float, message: Stale, sender: Boot) -> None:
        for ref in message.refs:
            if sender in (ref.lender_boot, self.boot):         # the lender said so, or an Attend was answered so
                self._promise_over(now, ref, "stale")

    def _other_boot(self, now: float, message: OtherBoot, _sender: Boot) -> None:
        self._peer_gone(now, PeerGone(message.asked), self.boot)

    def _hello_ack(self, now: float, message: HelloAck, sender: Boot) -> None:
        self._lender(sender).fit = message.fit

    def _nothing(self, now: float, message: Any, _sender: Boot) -> None:
        """Heard, and nothing follows from it."""

    # -- peers -------------------------------------------------------------------------------------------------------

    def _peer_gone(self, now: float, event: PeerGone, _sender: Boot) -> None:
        if (lender := self._lenders.get(event.boot)) is not None:
            lender.gone, lender.renew_at = True, math.inf
            self._drop_lender(now, lender, "gone")

    def _attend_silent(self, now: float, event: AttendSilent, _sender: Boot) -> None:
        self._drop_lender(now, self._lender(event.lender), "silent")
        self._out.append(ProbePeer(event.lender))

    def _drop_lender(self, now: float, lender: LenderView, why: str) -> None:
        """Nothing there can be read, as far as we know. If it lives, our Settle or its term frees the slots."""
        lender.avoid_until = max(lender.avoid_until, now + self.timings.quarantine_s)
        for loan in list(lender.loans.values()):
            for ref in list(loan.refs):
                self._promise_over(now, ref, why)
            if loan.state == ASKED:
                self._unask(now, lender, loan, why)

    def _attend_slow(self, now: float, event: AttendSlow, _sender: Boot) -> None:
        self._out.append(ProbePeer(event.lender))

    def _avoid(self, now: float, event: Avoid, _sender: Boot) -> None:
        lender = self._lender(event.boot)
        lender.avoid_until = max(lender.avoid_until, event.until)

    # -- failed moves ------------------------------------------------------------------------------------------------

    def _promise_over(self, now: float, ref: Ref, why: str) -> None:
        """What is still local stays so; what is read there is lost at the boundary, unless a copy is verified by then."""
        debt = self._by_ref.get(ref)
        if debt is None:
            return
        if debt.filling == ref:
            self._stop_filling(now, debt, why)
        elif debt.key is not None:
            self._out.append(AdoptFailed(debt.uid, debt.key, why))
            self._strike(now, debt)
        elif not debt.ended or why == "tainted":
            debt.ended = why
            debt.drop_at = debt.retry_at = math.inf
            self._mark(debt)

    def _stop_filling(self, now: float, debt: Debt, why: str) -> None:
        """The slot being filled is given up. A span that was SENDING is, and always was, read locally."""
        if debt.ref is None:
            self.counters[f"back_{why}"] += 1
            self._strike(now, debt)
            self._out.append(Gone(debt.uid) if debt.gone else BackToLocal(debt.uid, why))
            return
        assert debt.filling is not None
        self._let_go(now, debt.filling)
        debt.filling, debt.sealed = None, False
        self._stay(now, debt, why)

    def _stay(self, now: float, debt: Debt, why: str) -> None:
        """A move away from `ref` failed; it is read there as before, and a recall still runs."""
        debt.state, debt.to = REMOTE, ""
        debt.retry_at = debt.give_up_at = math.inf
        if debt.gone or debt.ended:
            return                                             # the boundary decides
        self._out.append(StayedRemote(debt.uid, why))
        if debt.drop_at < math.inf:
            self._out.append(MustReturn(debt.uid, max(0.0, debt.drop_at - now), debt.why))

    # -- flips -------------------------------------------------------------------------------------------------------

    def _step_boundary(self, now: float, _event: StepBoundary, _sender: Boot) -> None:
        flips, self._flips = self._flips, {}
        for uid in flips:
            debt = self._debts[uid]
            if debt.gone:
                self._out.append(Gone(uid))
                self._strike(now, debt, keep=debt.keep and not debt.ended)
            elif debt.fetched:
                self._out.append(CameHome(uid, debt.to))
                self.counters["spans_home"] += 1
                self._strike(now, debt)
            elif debt.sealed and debt.filling is not None:
                self._move(now, debt, debt.filling)
            elif debt.ended:
                assert debt.ref is not None
                self._out.append(Lost(uid, debt.ref, debt.ended))
                self.counters[f"lost_{debt.ended}"] += 1
                self._strike(now, debt)
            elif debt.key is not None:
                assert debt.ref is not None
                self._out.append(Adopted(uid, debt.key, debt.ref, debt.digest))
                self.counters["spans_adopted"] += 1
                debt.key = None

    def _move(self, now: float, debt: Debt, ref: Ref) -> None:
        old, debt.ref, debt.filling, debt.sealed, debt.state = debt.ref, ref, None, False, REMOTE
        debt.drop_at, debt.ended = math.inf, ""
        self._out.append(Moved(debt.uid, ref, debt.digest))
        self.counters["spans_moved"] += 1
        if old is not None:
            self._let_go(now, old)

    def _mark(self, debt: Debt) -> None:
        self._flips[debt.uid] = None
        self._out.append(FlipsWaiting())

    # -- timers ------------------------------------------------------------------------------------------------------

    def _tick(self, now: float, _event: Tick, _sender: Boot) -> None:
        for lender in list(self._lenders.values()):
            for loan in [loan for loan in lender.loans.values() if loan.state == ASKED]:
                if loan.give_up_at <= now:
                    lender.avoid_until = max(lender.avoid_until, now + self.timings.quarantine_s)
                    self._unask(now, lender, loan, "give_up")
                elif loan.retry_at <= now:
                    loan.retry_at = now + self.timings.borrow_retry_s
                    self._say_borrow(lender, loan)
            if lender.renew_at <= now:
                self._renew(now, lender)
        for debt in list(self._debts.values()):
            self._tick_debt(now, debt)

    def _tick_debt(self, now: float, debt: Debt) -> None:
        if debt.drop_at <= now and debt.ref is not None:
            self._promise_over(now, debt.ref, "recall")
        if debt.give_up_at <= now:
            if debt.filling is not None:
                self._stop_filling(now, debt, "give_up")
            else:
                self._stay(now, debt, "give_up")
        elif debt.retry_at <= now:
            debt.retry_at = now + self.timings.put_retry_s
            if debt.filling is not None:
                self._out.append(StartPut(debt.uid, debt.filling, debt.ref, debt.digest))
            elif debt.ref is not None:
                self._out.append(StartFetch(debt.uid, debt.ref, debt.to, debt.digest, debt.attempt))

    def _renew(self, now: float, lender: LenderView) -> None:
        """One for all loans of the pair; goes on a little after the last one, so that a lost Settle is noticed."""
        if not lender.loans and now - lender.changed_at >= self.timings.term_s:
            lender.renew_at = math.inf                         # the term has ended whatever was left
            return
        lender.renew_no += 1
        lender.renew_at = now + self.timings.renew_s
        self._send(lender.boot, Renew(lender.renew_no, lender.drawn, tuple(lender.loans)))
        if lender.loans and now - lender.heard_at >= self.timings.term_s:
            lender.heard_at = now                              # nothing reads there, or we would know: once a term
            self._out.append(ProbePeer(lender.boot))

    # -- the books ---------------------------------------------------------------------------------------------------

    def _lender(self, boot: Boot) -> LenderView:
        if boot not in self._lenders:
            self._lenders[boot] = LenderView(boot)
        return self._lenders[boot]

    def _loan_of(self, ref: Ref) -> Loan | None:
        lender = self._lenders.get(ref.lender_boot)
        return None if lender is None else lender.loans.get(ref.loan)

    def _is_ours(self, ref: Ref, sender: Boot) -> bool:
        return ref.borrower_boot == self.boot and ref.lender_boot == sender

    def _hold(self, lender: LenderView, loan: Loan, ref: Ref, debt: Debt) -> None:
        loan.refs[ref] = lender.renew_no
        self._by_ref[ref] = debt

    def _let_go(self, now: float, ref: Ref, *, keep: bool = False) -> None:
        """The ref is not ours any more; the loan ends with its last one."""
        del self._by_ref[ref]
        self._settle(ref, keep=keep)
        lender, loan = self._lender(ref.lender_boot), self._loan_of(ref)
        assert loan is not None
        del loan.refs[ref]
        self._changed(now, lender)
        if not loan.refs and loan.state == OPEN:
            self._forget_loan(now, lender, loan)

    def _strike(self, now: float, debt: Debt, *, keep: bool = False) -> None:
        """Forget the span. What was only being filled is never kept: its bytes may have come from a slot in change."""
        del self._debts[debt.uid]
        self._flips.pop(debt.uid, None)
        if debt.filling is not None:
            self._let_go(now, debt.filling)
        if debt.ref is not None:
            self._let_go(now, debt.ref, keep=keep)

    def _forget_loan(self, now: float, lender: LenderView, loan: Loan) -> None:
        lender.loans.pop(loan.number, None)
        self._changed(now, lender)

    def _changed(self, now: float, lender: LenderView) -> None:
        """A loan or ref ended: go on renewing until the lender has seen it too."""
        lender.changed_no, lender.changed_at = lender.renew_no, now
        if not lender.gone:
            lender.renew_at = min(lender.renew_at, now + self.timings.renew_s)

    def _settle_unknown(self, now: float, refs: tuple[Ref, ...], sender: Boot) -> None:
        """Promises that we do not hold, or not any more."""
        for ref in refs:
            if ref not in self._by_ref and self._is_ours(ref, sender):
                self._settle(ref)
                self._changed(now, self._lender(sender))

    def _settle(self, ref: Ref, *, keep: bool = False) -> None:
        if not self._lender(ref.lender_boot).gone:
            self._settling.setdefault((ref.lender_boot, keep), []).append(ref)

    def _tell_debt(self) -> None:
        """Law 5: whoever owes, or asks, grants nothing. Passed on before any Send of the same list."""
        ages = [loan.asking.age for lender in self._lenders.values() for loan in lender.loans.values()]
        told = InDebt(bool(ages), min(ages, default=None))
        if told != self._told:
            self._told = told
            self._out.insert(0, told)

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
        HelloAck: _hello_ack,
        Settled: _nothing,
        PeerGone: _peer_gone,
        AttendSilent: _attend_silent,
        AttendSlow: _attend_slow,
        Avoid: _avoid,
        StepBoundary: _step_boundary,
        Tick: _tick,
    }


def _note(asking: Asking, code: str) -> None:
    """Why nobody granted it. That older jobs hold the memory of one lender is worth more than what others said."""
    if asking.last_code != OLDER:
        asking.last_code = code
