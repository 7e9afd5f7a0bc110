"""Bugs in the loan protocol: in the lender's ledger, the borrower's book, and the doors that bytes pass."""

from __future__ import annotations

import math
from dataclasses import replace as changed
from typing import Any

from kvbank.kvstore import ledger as lender
from kvbank.kvstore import loan_events as ev
from kvbank.kvstore import messages as m
from kvbank.kvstore.debt_book import OPEN
from tests.mutants.planted import Mutant, nothing

LEDGER, BOOK = "kvstore.ledger:LoanLedger.", "kvstore.debt_book:DebtBook."


def pins_count_nothing(real: Any) -> Any:
    def pin(self: Any, ref: m.Ref) -> bool:
        slot = self._find(ref)
        return slot is not None and slot.state in (lender.SEALED, lender.RECALLED)
    return pin


def unpins_if_pinned(real: Any) -> Any:
    """Not a bug of its own: what the mutants need that lose count, so that the harm shows and not an assertion."""
    def unpin(self: Any, ref: m.Ref) -> None:
        if getattr(self._find(ref), "pins", 0):
            real(self, ref)
    return unpin


def ends_puts_that_go_on(real: Any) -> Any:
    """Likewise, for a Put."""
    def put_ended(self: Any, now: float, event: ev.PutEnded, sender: Any) -> None:
        if getattr(self._find(event.ref), "putting", False):
            real(self, now, event, sender)
        else:
            self._out.append(ev.Answer(m.Stale((event.ref,))))
    return put_ended


COUNT_LOST = {"kvstore.ledger:LoanLedger.unpin": unpins_if_pinned, "kvstore.ledger:LoanLedger._put_ended": ends_puts_that_go_on}


def slot_is_name_enough(real: Any) -> Any:
    return lambda self, ref: self._lent.get(ref.slot)


def seals_whatever_came(real: Any) -> Any:
    def put_ended(self: Any, now: float, event: ev.PutEnded, sender: Any) -> None:
        if event.span is not None and event.got is not None:
            event = changed(event, got=event.span.digest)
        real(self, now, event, sender)
    return put_ended


def renew_without_upto(real: Any) -> Any:
    return lambda self, now, message, sender: real(self, now, changed(message, upto=1 << 60), sender)


def not_known_when_sent(real: Any) -> Any:
    def hold(self: Any, known: Any, loan: Any, ref: m.Ref, debt: Any) -> None:
        real(self, known, loan, ref, debt)
        loan.refs[ref] = -1
    return hold


def grants_anew(real: Any) -> Any:
    def borrow(self: Any, now: float, message: m.Borrow, sender: Any) -> None:
        loan = self._loans.get(sender, {}).pop(message.loan, None)       # said again: a fresh loan under the same number
        real(self, now, message, sender)
        del loan
    return borrow


def no_term(real: Any) -> Any:
    def new_loan(self: Any, now: float, message: m.Borrow, sender: Any) -> Any:
        loan = real(self, now, message, sender)
        loan.over_at = math.inf
        return loan
    return new_loan


def generations_stand_still(real: Any) -> Any:
    def name(self: Any, loan: Any, slot: int) -> m.Ref:
        ref = real(self, loan, slot)
        self._gen = 1
        return changed(ref, gen=1)
    return name


def frees_while_pinned(real: Any) -> Any:
    def free_when_idle(self: Any, slot: Any) -> None:
        if slot.state == lender.REVOKED and slot.ref.slot in self._lent:
            slot.pins = 0
            real(self, slot)
    return free_when_idle


def settles_by_slot(real: Any) -> Any:
    def settle(self: Any, now: float, message: m.Settle, sender: Any) -> None:
        real(self, now, message, sender)
        for ref in message.refs:
            if (slot := self._lent.get(ref.slot)) is not None and slot.state != lender.REVOKED:
                self._revoke(now, slot, "settled", keep=message.keep and slot.state != lender.HELD)
    return settle


def flips_before_sealed(real: Any) -> Any:
    def open_loan(self: Any, now: float, known: Any, loan: Any, refs: Any) -> None:
        real(self, now, known, loan, refs)
        for ref in loan.refs if loan.state == OPEN else ():
            if (debt := self._by_ref.get(ref)) is not None and debt.filling == ref and not debt.sealed:
                debt.sealed = True
                self._mark(debt)
    return open_loan


def takes_any_copy(real: Any) -> Any:
    def copy_verified(self: Any, now: float, event: ev.CopyVerified, sender: Any) -> None:
        debt = self._debts.get(event.uid)
        real(self, now, event if debt is None else changed(event, digest=debt.digest), sender)
    return copy_verified


def forgets_what_it_owes(real: Any) -> Any:
    def tell_debt(self: Any) -> None:
        self._told = ev.InDebt(bool([1 for known in self._lenders.values() if known.loans]))
    return tell_debt


def a_wrong_digest_is_good_enough(real: Any) -> Any:
    def digest(data: Any) -> bytes:
        return bytes(4) + memoryview(data).nbytes.to_bytes(8, "little")
    return digest


MUTANTS = [
    Mutant("a read pins nothing", "A reads slot 3 for B. B settles it; the ledger sees no pin and frees it; C's Put fills it "
           "while "
           "A still reads: A's sum is half of B's span and half of C's.",
           {LEDGER + "pin": pins_count_nothing, LEDGER + "unpin": nothing}),
    Mutant("a slot is freed while it is read or filled", "As above, but the pin was counted: the revoke frees the slot in spite "
           "of it.", {LEDGER + "_free_when_idle": frees_while_pinned, **COUNT_LOST}),
    Mutant("a ref is known by its slot alone", "B's loan of slot 3 ends, C gets slot 3. B's late Attend names slot 3 with the "
           "old generation, is served, and B reads C's span.", {LEDGER + "_find": slot_is_name_enough, **COUNT_LOST}),
    Mutant("generations are not counted", "Slot 3 is lent to B as generation 1, ends, and is lent to B again as generation 1: "
           "the late Settle of the first ends the second.", {LEDGER + "_name": generations_stand_still}),
    Mutant("Settle ends whatever is in the slot", "B settles slot 3; the Settle is said again, late, when slot 3 is C's. C's "
           "span is freed while C reads it there.", {LEDGER + "_settle": settles_by_slot}),
    Mutant("the lender seals without comparing digests", "A byte of B's Put flips on the way; the lender answers Sealed with "
           "B's digest; B frees its copy and reads the flipped byte from then on.", {LEDGER + "_put_ended": seals_whatever_came}),
    Mutant("every digest is the same", "The byte flips on the way, both ends hash it, and both hashes are zero.",
           {"kvstore.transport.bulk:digest": a_wrong_digest_is_good_enough}),
    Mutant("a Renew ends loans drawn after it", "B sends Renew(upto 4), then Borrow 5. The Renew is late: the lender finds "
           "loan 5 "
           "not named in it and ends it.", {LEDGER + "_renew": renew_without_upto}),
    Mutant("missing from Renewed means gone, though granted since", "B sends Renew, gets a Grant, then hears the Renewed that "
           "was "
           "written before the Grant: its new slot is not listed, and B gives up a live promise.",
           {BOOK + "_hold": not_known_when_sent}),
    Mutant("a Borrow said twice is granted twice", "The Grant is lost, B says Borrow 1 again, and the lender takes two more "
           "slots "
           "for it: the first two belong to nobody.", {LEDGER + "_borrow": grants_anew}),
    Mutant("a loan without a term", "B dies. Its loan never ends, and its slots never come back.",
           {LEDGER + "_new_loan": no_term}),
    Mutant("read at the lender before it is sealed", "The Grant arrives, B flips at the next step and frees its copy; the Put "
           "has "
           "not ended, and the sum is over zeros.", {BOOK + "_open": flips_before_sealed}),
    Mutant("any copy that comes home is taken", "A recalled span comes home with a byte flipped on the way; its digest is not "
           "compared with the one noted at Sealed.", {BOOK + "_copy_verified": takes_any_copy}),
    Mutant("the ledger is not told of the debt", "A borrows from B, and B from A: each waits for the other's slots (law 5).",
           {BOOK + "_tell_debt": forgets_what_it_owes}),
]
