"""The lender's core, rule by rule. Whole exchanges are told in tests/stories, and walked at random in test_loan_walk."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore import loan_events as ev
from kvbank.kvstore import messages as m
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.ledger import LoanLedger, PutVerdict
from kvbank.kvstore.timings import LoanTimings

ME, BO, CY = (Boot(name.ljust(16).encode()) for name in ("me", "bo", "cy"))
COMPAT = m.Compat(slot_bytes=64, numerics="cpu", model_digest="llama")
SPAN = m.KeptSpan((BlockKey(b"k" * 32),), b"tokens", b"digest")


class Slots:
    def __init__(self, size: int) -> None:
        self.free, self.kept = list(range(size)), dict[int, m.KeptSpan]()

    def lendable(self) -> int:
        return len(self.free)

    def take_for_loan(self, number: int) -> list[int]:
        taken, self.free = self.free[:number], self.free[number:]
        return taken

    def adopt(self, keys: Any, tenant: str) -> list[tuple[int, m.KeptSpan]]:
        return [(slot, self.kept.pop(slot)) for slot, span in list(self.kept.items()) if span.key in keys]

    def give_back(self, slot: int, kept: m.KeptSpan | None) -> None:
        if kept is None:
            self.free.append(slot)
        else:
            self.kept[slot] = kept


class Desk:
    """A ledger with borrowers that have said Hello."""

    def __init__(self, slots: int = 8, **how: Any) -> None:
        self.slots = Slots(slots)
        self.ledger = LoanLedger(ME, COMPAT, self.slots, lend_cap=how.pop("lend_cap", slots), **how)
        for boot in (BO, CY):
            self.say(0.0, m.Hello(m.PROTOCOL_VERSION, boot.decode().strip(), boot, b"n", COMPAT), boot)

    def say(self, now: float, message: Any, sender: Boot = BO) -> list[Any]:
        """The messages that answer."""
        effects = self.ledger.on(now, m.Envelope(sender, ME, message))
        assert self.ledger.check() == []
        return [effect.message for effect in effects if isinstance(effect, ev.Send)]

    def tell(self, now: float, event: Any) -> list[Any]:
        effects = self.ledger.on(now, event)
        assert self.ledger.check() == []
        return [effect.message if isinstance(effect, ev.Send | ev.Answer) else effect for effect in effects]

    def lend(self, now: float, loan: int, spans: int, *, to: Boot = BO, age: float = 5.0, tenant: str = "t", **how: Any) -> Any:
        return self.say(now, m.Borrow(loan, tenant, age, spans, **how), to)[0]

    def fill(self, now: float, ref: m.Ref) -> None:
        assert self.ledger.begin_put(now, ref).kind == "GO"
        assert self.tell(now, ev.PutEnded(ref, SPAN, SPAN.digest)) == [m.Sealed(ref, SPAN.digest)]


def recalled(effects: list[Any]) -> list[tuple[Boot, int, int, str]]:
    return [(each.refs[0].borrower_boot, len(each.refs), each.within_ms, each.why)
            for each in effects if isinstance(each, m.Recall)]


# -- who gets how much ------------------------------------------------------------------------------------------------------


def test_a_borrow_gets_what_there_is_and_the_same_borrow_the_same_grant() -> None:
    desk = Desk(slots=3)
    grant = desk.lend(0.0, 1, 5)
    assert len(grant.refs) == 3 and grant.term_ms == 6000
    assert desk.lend(0.1, 1, 5) == grant
    assert desk.lend(0.1, 1, 5, to=CY) == m.Refuse(1, "CAP", 300)      # the same number of another pair is another loan


@pytest.mark.parametrize(("how", "code"), [
    ({"lend_cap": 0}, "CAP"), ({"slots": 0, "lend_cap": 4}, "FULL"), ({"tenant_quota": 0}, "QUOTA"),
])
def test_a_refusal_names_what_was_short(how: dict[str, Any], code: str) -> None:
    refusal = Desk(**how).lend(0.0, 1, 2)
    assert isinstance(refusal, m.Refuse) and refusal.code == code


def test_a_tenant_gets_no_more_than_its_quota_and_others_still_theirs() -> None:
    desk = Desk(tenant_quota=3)
    assert len(desk.lend(0.0, 1, 2).refs) == 2
    assert len(desk.lend(0.0, 2, 2).refs) == 1
    assert desk.lend(0.0, 3, 2).code == "QUOTA"
    assert len(desk.lend(0.0, 1, 2, to=CY, tenant="other").refs) == 2


def test_who_owes_drains_or_is_a_stranger_gets_typed_refusals() -> None:
    desk = Desk()
    desk.tell(0.0, ev.InDebt(True))
    assert desk.lend(0.0, 1, 1).code == "IN_DEBT" and desk.ledger.lendable() == 0
    desk.tell(0.0, ev.InDebt(False))
    desk.tell(0.0, ev.Drain())
    assert desk.lend(0.0, 2, 1).code == "DRAINING"
    desk.tell(0.0, ev.Drain(on=False))
    assert desk.lend(0.0, 3, 1, to=Boot(b"stranger".ljust(16))).code == "COMPAT"
    assert isinstance(desk.lend(0.0, 3, 1), m.Grant)


def test_in_debt_does_not_take_back_a_promise_that_is_asked_for_again() -> None:
    desk = Desk()
    grant = desk.lend(0.0, 1, 1)
    desk.tell(0.1, ev.InDebt(True, (9.0, "z")))                        # the job in need is younger: nothing is recalled
    assert desk.lend(0.2, 1, 1) == grant


def test_an_adopted_span_is_read_in_place_counted_as_lent_and_cached_again_afterwards() -> None:
    desk = Desk(slots=2)
    desk.slots.kept[7] = SPAN
    grant = desk.lend(0.0, 1, 2, keys=(SPAN.key, BlockKey(b"x" * 32)))
    (ref,) = grant.refs
    assert (ref.slot, grant.sealed_digests, grant.keys) == (7, (b"digest",), (SPAN.key,))
    assert desk.ledger.num_lent == 1 and desk.ledger.pin(ref) and desk.ledger.span_of(ref) == SPAN
    desk.say(0.1, m.Settle((ref,), keep=False))
    assert not desk.slots.kept                                         # still read
    desk.ledger.unpin(ref)
    assert desk.slots.kept == {7: SPAN}
    assert desk.lend(0.2, 2, 1, keys=(BlockKey(b"x" * 32),)).code == "ABSENT"


# -- names and pins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"lender_boot": CY}, {"borrower_boot": CY}, {"loan": 2}, {"slot": 1}, {"gen": 9},
])
def test_a_ref_that_differs_in_anything_is_stale(change: dict[str, Any]) -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    desk.fill(0.0, ref)
    wrong = replace(ref, **change)
    assert desk.ledger.pin(ref) and not desk.ledger.pin(wrong)
    assert desk.ledger.begin_put(0.0, wrong).kind == "STALE" and desk.ledger.span_of(wrong) is None
    desk.say(0.0, m.Settle((wrong,), keep=False))
    assert desk.ledger.num_by_state()["SEALED"] == 1
    assert desk.ledger.counters["stale_reads"] == 1


def test_nobody_settles_what_was_promised_to_another() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    assert desk.say(0.0, m.Settle((ref,), keep=False), sender=CY) == [m.Settled((ref,))]
    assert desk.ledger.live_refs(BO) == [ref]


def test_a_slot_is_not_readable_before_it_is_sealed_nor_after_it_was_revoked() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    assert not desk.ledger.pin(ref)
    desk.fill(0.0, ref)
    assert desk.ledger.pin(ref)
    desk.say(0.1, m.Settle((ref,), keep=False))
    assert not desk.ledger.pin(ref) and desk.ledger.num_by_state()["REVOKED"] == 1
    desk.ledger.unpin(ref)
    assert desk.ledger.num_lent == 0 and len(desk.slots.free) == 8


def test_every_reader_must_leave_before_a_slot_is_free_and_a_slow_one_is_counted() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    desk.fill(0.0, ref)
    assert desk.ledger.pin(ref) and desk.ledger.pin(ref)
    desk.say(0.1, m.Settle((ref,), keep=True))
    desk.ledger.unpin(ref)
    assert desk.ledger.wake_at() == 1.1
    for _ in range(2):
        desk.tell(1.2, ev.Tick())
    assert desk.ledger.counters["slow_pins"] == 1 and desk.ledger.num_lent == 1
    desk.ledger.unpin(ref)
    assert desk.ledger.num_lent == 0 and desk.slots.kept == {0: SPAN}


def test_a_put_is_a_pin_and_only_one_may_write() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    assert desk.ledger.begin_put(0.0, ref).kind == "GO"
    assert desk.ledger.begin_put(0.0, ref).kind == "BUSY"
    desk.say(0.1, m.Settle((ref,), keep=True))
    assert desk.ledger.num_lent == 1
    assert desk.tell(0.2, ev.PutEnded(ref, SPAN, SPAN.digest)) == [m.Stale((ref,))]
    assert desk.ledger.num_lent == 0 and not desk.slots.kept           # HELD when it was settled: nothing to keep


def test_a_sealed_slot_answers_a_second_put_with_its_digest() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    desk.fill(0.0, ref)
    assert desk.ledger.begin_put(0.1, ref) == PutVerdict("SEALED", b"digest")


def test_generations_are_never_used_twice() -> None:
    desk = Desk(slots=1)
    seen = []
    for loan in range(1, 6):
        (ref,) = desk.lend(0.0, loan, 1).refs
        seen.append(ref.gen)
        desk.say(0.0, m.Settle((ref,), keep=False))
    assert seen == sorted(set(seen))


# -- time ---------------------------------------------------------------------------------------------------------------------


def test_a_held_slot_waits_for_bytes_three_seconds_since_the_last_piece() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    assert desk.ledger.begin_put(2.0, ref).kind == "GO"
    desk.tell(4.0, ev.PutBytes(ref))
    desk.say(5.0, m.Renew(1, 1, (1,)))
    assert desk.tell(6.9, ev.Tick()) == []
    assert desk.tell(7.0, ev.Tick()) == [ev.Revoked(ref, "fill"), m.Stale((ref,))]
    assert desk.tell(7.1, ev.PutEnded(ref, None, None)) == [m.Stale((ref,))]


def test_the_term_runs_from_the_receipt_of_a_renew_and_ends_the_whole_loan() -> None:
    desk = Desk()
    refs = desk.lend(0.0, 1, 2).refs
    for ref in refs:
        desk.fill(0.0, ref)
    assert desk.say(5.0, m.Renew(1, 1, (1,))) == [m.Renewed(1, 6000, refs)]
    assert desk.ledger.wake_at() == 11.0
    assert desk.tell(10.9, ev.Tick()) == []
    assert m.Stale(refs) in desk.tell(11.0, ev.Tick())
    assert desk.ledger.num_lent == 0 and desk.ledger.wake_at() == math.inf


def test_a_renew_ends_what_it_does_not_keep_and_leaves_younger_loans_alone() -> None:
    desk = Desk()
    first, second, third = (desk.lend(0.0, loan, 1).refs[0] for loan in (1, 2, 3))
    assert desk.say(1.0, m.Renew(1, 2, (2,))) == [m.Renewed(1, 6000, (second, third))]
    assert first not in desk.ledger.live_refs(BO)


def test_timings_that_contradict_each_other_are_refused() -> None:
    for wrong in ({"term_s": 2.0}, {"borrow_retry_s": 2.0}, {"put_retry_s": 4.0}):
        with pytest.raises(ConfigError):
            LoanTimings(**wrong)


# -- recall -------------------------------------------------------------------------------------------------------------------


def lent_to_three_ages() -> Desk:
    """Two spans to a job of age 2, two to one of age 6, one to one of age 8; all sealed."""
    desk = Desk()
    for loan, age, spans, to in ((1, 2.0, 2, BO), (2, 6.0, 2, BO), (1, 8.0, 1, CY)):
        for ref in desk.lend(0.0, loan, spans, to=to, age=age).refs:
            desk.fill(0.0, ref)
    return desk


def test_need_recalls_the_youngest_first_and_never_an_older_job() -> None:
    desk = lent_to_three_ages()
    assert desk.ledger.num_recallable((4.0, "me")) == 3
    assert recalled(desk.tell(1.0, ev.Need(2, (4.0, "me")))) == [(CY, 1, 2000, "NEED"), (BO, 1, 2000, "NEED")]
    assert recalled(desk.tell(1.0, ev.Need(9, (4.0, "me")))) == [(BO, 1, 2000, "NEED")]
    assert desk.ledger.num_by_state()["SEALED"] == 2                   # the older job's


def test_need_said_again_counts_what_is_coming_already() -> None:
    desk = lent_to_three_ages()
    desk.tell(1.0, ev.Need(2, (4.0, "me")))
    assert desk.tell(1.1, ev.Need(2, (4.0, "me"))) == []
    assert desk.ledger.num_coming() == 2


def test_equal_stamps_are_ordered_by_job() -> None:
    desk = Desk()
    desk.lend(0.0, 1, 1, age=5.0, job="b")
    assert desk.ledger.num_recallable((5.0, "a")) == 1 and desk.ledger.num_recallable((5.0, "c")) == 0


def test_an_urgent_need_hastens_a_calm_recall() -> None:
    desk = lent_to_three_ages()
    assert recalled(desk.tell(0.0, ev.Homecoming(5))) == [(CY, 1, 10_000, "HOME"), (BO, 4, 10_000, "HOME")]
    assert recalled(desk.tell(1.0, ev.Need(1, (4.0, "me")))) == [(CY, 1, 2000, "NEED")]
    assert recalled(desk.tell(1.1, ev.Need(1, (4.0, "me")))) == []
    stale = [each for each in desk.tell(3.0, ev.Tick()) if isinstance(each, m.Stale)]
    assert [each.refs[0].borrower_boot for each in stale] == [CY]


def test_a_recall_is_said_again_with_the_time_that_is_left_until_it_is_settled() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    desk.fill(0.0, ref)
    desk.tell(0.0, ev.Homecoming(1))
    assert recalled(desk.tell(0.5, ev.Tick())) == [(BO, 1, 9500, "HOME")]
    desk.say(0.7, m.Settle((ref,), keep=False))
    assert desk.tell(1.0, ev.Tick()) == [] and desk.ledger.wake_at() == math.inf


def test_after_a_recall_the_pair_opens_no_new_loan_for_ten_seconds() -> None:
    desk = Desk()
    desk.lend(0.0, 1, 1)
    assert ev.Avoid(BO, 11.0) in desk.tell(1.0, ev.Homecoming(1))
    assert desk.lend(2.0, 2, 1) == m.Refuse(2, "FULL", 9000)
    assert isinstance(desk.lend(2.0, 1, 1, to=CY), m.Grant)
    assert isinstance(desk.lend(11.0, 3, 1), m.Grant)


def test_who_gets_into_debt_recalls_calmly_from_younger_jobs() -> None:
    desk = lent_to_three_ages()
    assert recalled(desk.tell(1.0, ev.InDebt(True, (4.0, "me")))) == [(BO, 2, 10_000, "NEED"), (CY, 1, 10_000, "NEED")]


def test_draining_recalls_everything_with_a_minute() -> None:
    desk = lent_to_three_ages()
    assert sorted(recalled(desk.tell(1.0, ev.Drain()))) == [(BO, 4, 60_000, "DRAIN"), (CY, 1, 60_000, "DRAIN")]
    assert desk.ledger.on(1.1, ev.Drain()) == []


# -- peers --------------------------------------------------------------------------------------------------------------------


def test_a_message_for_another_life_is_answered_with_ours_and_changes_nothing() -> None:
    desk = Desk()
    old = Boot(b"me before".ljust(16))
    (effect,) = desk.ledger.on(0.0, m.Envelope(BO, old, m.Borrow(1, "t", 1.0, 1)))
    assert effect == ev.Send(BO, m.OtherBoot(ME, old))
    assert desk.ledger.on(0.0, m.Envelope(BO, old, m.OtherBoot(BO, old))) == []      # never an answer to an answer
    assert desk.ledger.num_lent == 0


@pytest.mark.parametrize("how", [ev.PeerGone(BO), m.Envelope(CY, ME, m.OtherBoot(CY, BO))], ids=["found", "told"])
def test_a_borrower_that_is_gone_gives_everything_back_and_others_keep_theirs(how: Any) -> None:
    desk = lent_to_three_ages()
    for _ in range(2):
        desk.ledger.on(1.0, how)
        assert desk.ledger.num_lent == 1 and desk.ledger.check() == []


def test_hello_is_answered_whatever_boot_it_asks_for() -> None:
    desk = Desk()
    hello = m.Hello(m.PROTOCOL_VERSION, "d", Boot(b"d" * 16), b"nonce", replace(COMPAT, slot_bytes=65))
    (effect,) = desk.ledger.on(0.0, m.Envelope(hello.boot, Boot(b"?" * 16), hello))
    assert effect.message == m.HelloAck(ME, b"nonce", "NO", "slot_size", 8)
    assert desk.lend(0.0, 1, 1, to=hello.boot).code == "COMPAT"
    (answer,) = desk.say(0.0, replace(hello, version=99, compat=COMPAT), hello.boot)
    assert (answer.fit, answer.reason) == ("NO", "version")


@pytest.mark.parametrize(("theirs", "kind", "reason"), [
    ({}, "ATTEND", ""),
    ({"slot_bytes": 8, "model_digest": "another", "kv_heads": 3}, "ATTEND", ""),     # a lender holds anybody's bytes
    ({"slot_bytes": 65}, "NO", "slot_size"),
    ({"span_tokens": 64}, "NO", "span_tokens"),
    ({"block_size": 8}, "NO", "block_size"),
    ({"numerics": "gpu"}, "FETCH_ONLY", "numerics"),
    ({"numerics": ""}, "FETCH_ONLY", "numerics"),
])
def test_fit_says_what_a_lender_can_do_for_a_borrower(theirs: dict[str, Any], kind: str, reason: str) -> None:
    assert m.fit(COMPAT, replace(COMPAT, **theirs)) == m.Fit(kind, reason)


def test_strangers_are_forgotten_in_time_and_borrowers_never() -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    for number in range(3000):
        boot = Boot(number.to_bytes(16, "big"))
        desk.ledger.on(0.0, m.Envelope(boot, ME, m.Hello(m.PROTOCOL_VERSION, "x", boot, b"", COMPAT)))
    assert len(desk.ledger._peers) <= 1024 and BO in desk.ledger._peers
    assert desk.ledger.live_refs(BO) == [ref]


def test_loans_are_shown_with_their_age_and_what_is_left_of_their_term() -> None:
    desk = Desk()
    desk.lend(1.0, 1, 2)
    (view,) = desk.ledger.loans(3.0)
    assert (view.borrower, view.node, view.number, view.slots, view.age_s, view.term_left_s) == (BO, "bo", 1, 2, 2.0, 4.0)


# -- the auditor ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "law"), [
    (lambda ledger, slot: setattr(slot, "state", "REVOKED"), "CONSERVED"),
    (lambda ledger, slot: setattr(slot, "state", "LOST"), "CONSERVED"),
    (lambda ledger, slot: setattr(slot, "pins", -1), "CONSERVED"),
    (lambda ledger, slot: setattr(slot, "span", None), "VERIFIED"),
    (lambda ledger, slot: setattr(slot, "ref", replace(slot.ref, slot=5)), "FENCED"),
    (lambda ledger, slot: setattr(slot, "state", "RECALLED"), "BOUNDED"),
    (lambda ledger, slot: setattr(ledger, "lend_cap", 0), "CONSERVED"),
    (lambda ledger, slot: ledger._loans[BO].clear(), "CONSERVED"),
    (lambda ledger, slot: setattr(ledger._loans[BO][1], "over_at", math.inf), "BOUNDED"),
])
def test_check_names_the_law_that_a_damaged_book_breaks(damage: Any, law: str) -> None:
    desk = Desk()
    (ref,) = desk.lend(0.0, 1, 1).refs
    desk.fill(0.0, ref)
    damage(desk.ledger, desk.ledger._lent[ref.slot])
    assert any(wrong.startswith(law) for wrong in desk.ledger.check())


def test_a_needy_job_waits_for_older_ones_only() -> None:
    """OLDER keeps a job waiting as long as it is said: it must not be said where nobody older holds anything."""
    def press(desk: Desk, age: float, loan: int = 9) -> str:
        return desk.say(1.0, m.Borrow(loan, "t", age, 1, needy=True), BO)[-1].code

    sibling = Desk(2)
    sibling.lend(0.0, 1, 2, to=CY, age=3.0)
    assert press(sibling, 3.0) == "CAP"                          # another shard's, for the same job
    assert press(sibling, 4.0) == "OLDER"
    debtor = Desk(2)
    debtor.tell(0.0, ev.InDebt(True, (5.0, "")))
    assert press(debtor, 3.0) == "FULL"                          # a Borrow of a younger job is in flight there
    assert press(debtor, 6.0) == "OLDER"
    never = Desk(2, lend_cap=0)
    never.tell(0.0, ev.InDebt(True, (1.0, "")))
    assert press(never, 3.0) == "CAP"                            # it borrows for older ones, but lends nothing, ever
