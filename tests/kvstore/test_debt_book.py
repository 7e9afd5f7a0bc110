"""The borrower's core, rule by rule. Whole exchanges are told in tests/stories, and walked at random in test_loan_walk."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvbank.kvstore import loan_events as ev
from kvbank.kvstore import messages as m
from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.layout import BlockKey, Boot

ME, LO, MO = (Boot(name.ljust(16).encode()) for name in ("me", "lo", "mo"))
AGE = (5.0, "job")
KEYS = tuple(BlockKey(letter * 32) for letter in (b"a", b"b", b"c"))


class Desk:
    """A book, and lenders that say what the test makes them say."""

    def __init__(self) -> None:
        self.book = DebtBook(ME)
        self.gen = 0

    def tell(self, now: float, event: Any) -> list[Any]:
        """Effects, with a Send as its message and FlipsWaiting left out."""
        effects = self.book.on(now, event)
        assert self.book.check() == []
        return [effect.message if isinstance(effect, ev.Send) else effect
                for effect in effects if not isinstance(effect, ev.FlipsWaiting)]

    def say(self, now: float, message: Any, sender: Boot = LO) -> list[Any]:
        return self.tell(now, m.Envelope(sender, ME, message))

    def want(self, now: float, *uids: int, lenders: tuple[Boot, ...] = (LO,), age: m.Age = AGE, **how: Any) -> list[Any]:
        return self.tell(now, ev.Want(lenders, uids, "t", age, **how))

    def refs(self, loan: int, number: int, lender: Boot = LO) -> tuple[m.Ref, ...]:
        self.gen += number
        return tuple(m.Ref(lender, ME, loan, slot, self.gen - slot) for slot in range(number))

    def sending(self, now: float, *uids: int, loan: int = 1, lender: Boot = LO) -> tuple[m.Ref, ...]:
        self.want(now, *uids, lenders=(lender,))
        refs = self.refs(loan, len(uids), lender)
        self.say(now, m.Grant(loan, refs, 6000), lender)
        return refs

    def remote(self, now: float, *uids: int, loan: int = 1, lender: Boot = LO) -> tuple[m.Ref, ...]:
        refs = self.sending(now, *uids, loan=loan, lender=lender)
        for ref in refs:
            self.tell(now, ev.PutDone(ref, b"digest", b"digest"))
        moved = self.boundary(now)
        assert [each for each in moved if isinstance(each, ev.Moved)] == [
            ev.Moved(uid, ref, b"digest") for uid, ref in zip(uids, refs, strict=True)]
        return refs

    def boundary(self, now: float) -> list[Any]:
        return self.tell(now, ev.StepBoundary())


# -- asking -------------------------------------------------------------------------------------------------------------------


def test_a_want_asks_once_even_when_it_is_told_twice() -> None:
    desk = Desk()
    assert desk.want(0.0, 1, 2) == [ev.InDebt(True, AGE), m.Borrow(1, "t", 5.0, 2, "job")]
    assert desk.want(0.0, 1, 2) == []
    assert desk.want(0.0, 2, 3) == [m.Borrow(2, "t", 5.0, 1, "job")]


def test_a_span_given_up_at_its_lender_and_wanted_again_before_the_boundary_hears_that_it_stays() -> None:
    """The engine moved it, had no use for it there, read it at home again, and wants to lend it: it must get an answer."""
    desk = Desk()
    desk.remote(0.0, 1)
    desk.tell(0.1, ev.NoLongerNeeded((1,), False))
    assert desk.want(0.1, 1) == [ev.BackToLocal(1, "leaving")]
    assert ev.Gone(1) in desk.boundary(0.2)
    assert m.Borrow(2, "t", 5.0, 1, "job") in desk.want(0.3, 1)


def test_law_5_is_told_before_the_borrow_is_sent_and_again_when_all_is_settled() -> None:
    desk = Desk()
    first, *_ = desk.book.on(0.0, ev.Want((LO,), (1,), "t", AGE))
    assert first == ev.InDebt(True, AGE)
    assert desk.say(0.1, m.Refuse(1, "FULL", 300)) == [ev.InDebt(False), ev.BackToLocal(1, "FULL")]


def test_the_ledger_hears_of_the_oldest_job_that_borrows() -> None:
    desk = Desk()
    desk.want(0.0, 1)
    assert ev.InDebt(True, (2.0, "old")) in desk.want(0.0, 2, age=(2.0, "old"))
    assert not any(isinstance(each, ev.InDebt) for each in desk.want(0.0, 3, age=(9.0, "young")))


def test_a_borrow_is_said_again_and_after_a_second_the_next_candidate_is_asked() -> None:
    desk = Desk()
    desk.want(0.0, 1, lenders=(LO, MO))
    assert desk.book.wake_at() == 0.3
    assert desk.tell(0.3, ev.Tick()) == [m.Borrow(1, "t", 5.0, 1, "job")]
    effects = desk.book.on(1.0, ev.Tick())
    assert ev.Send(MO, m.Borrow(1, "t", 5.0, 1, "job")) in effects
    assert ev.BackToLocal(1, "give_up") in desk.tell(2.0, ev.Tick())


def test_at_most_three_candidates_are_asked() -> None:
    desk = Desk()
    boots = tuple(Boot(bytes([i]) * 16) for i in range(5))
    desk.want(0.0, 1, lenders=boots)
    for boot in boots[:2]:
        assert m.Borrow in [type(each) for each in desk.say(0.0, m.Refuse(1, "FULL", 300), boot)]
    assert ev.BackToLocal(1, "CAP") in desk.say(0.0, m.Refuse(1, "CAP", 300), boots[2])


def test_a_want_ends_at_its_deadline() -> None:
    desk = Desk()
    desk.want(0.0, 1, lenders=(LO, MO), deadline=0.5)
    assert desk.book.wake_at() == 0.3
    desk.tell(0.3, ev.Tick())
    assert ev.BackToLocal(1, "give_up") in desk.tell(0.5, ev.Tick())
    assert desk.want(0.6, 2, deadline=0.5) == [ev.BackToLocal(2, "nobody")]


def test_a_lender_that_refused_is_left_alone_for_as_long_as_it_said() -> None:
    desk = Desk()
    desk.want(0.0, 1)
    desk.say(0.0, m.Refuse(1, "FULL", 300))
    assert desk.want(0.2, 1) == [ev.BackToLocal(1, "avoided")]
    assert m.Borrow(2, "t", 5.0, 1, "job") in desk.want(0.3, 1)


def test_what_a_grant_leaves_over_is_asked_of_the_next_and_what_it_gives_too_much_is_settled() -> None:
    desk = Desk()
    desk.want(0.0, 1, 2, lenders=(LO, MO))
    (ref,) = desk.refs(1, 1)
    assert desk.say(0.0, m.Grant(1, (ref,), 6000)) == [ev.StartPut(1, ref), m.Borrow(1, "t", 5.0, 1, "job")]
    refs = desk.refs(1, 2, MO)
    assert desk.say(0.0, m.Grant(1, refs, 6000), MO) == [ev.StartPut(2, refs[0]), m.Settle(refs[1:], False)]


def test_a_span_that_nobody_needs_any_more_is_not_sent_after_all() -> None:
    desk = Desk()
    desk.want(0.0, 1)
    assert desk.tell(0.1, ev.NoLongerNeeded((1,))) == [ev.InDebt(False), ev.Gone(1)]
    refs = desk.refs(1, 1)
    assert desk.say(0.2, m.Grant(1, refs, 6000)) == [m.Settle(refs, False)]


def test_refs_that_are_not_ours_or_not_the_senders_are_never_taken() -> None:
    desk = Desk()
    desk.want(0.0, 1)
    (ref,) = desk.refs(1, 1)
    foreign = (m.Ref(LO, MO, 1, 0, 1), m.Ref(MO, ME, 1, 0, 1), m.Ref(LO, ME, 2, 0, 1))
    assert ev.StartPut(1, ref) in desk.say(0.0, m.Grant(1, (*foreign, ref), 6000))
    assert desk.book.held() == [ref]
    assert desk.say(0.0, m.Stale((ref,)), MO) == []                    # nor may another lender end it


# -- sending ------------------------------------------------------------------------------------------------------------------


def test_a_span_is_read_locally_until_a_boundary_after_it_was_sealed() -> None:
    desk = Desk()
    (ref,) = desk.sending(0.0, 1)
    assert desk.boundary(0.1) == [] and desk.book.refs() == {}
    assert desk.book.on(0.2, ev.PutDone(ref, b"x", b"x")) == [ev.FlipsWaiting()]
    assert desk.book.refs() == {} and desk.book.state(1) == "SENDING"
    assert desk.boundary(0.3) == [ev.Moved(1, ref, b"x")] and desk.boundary(0.4) == []
    assert desk.book.refs() == {1: ref} and desk.book.state(1) == "REMOTE"


def test_a_seal_over_other_bytes_is_no_seal() -> None:
    desk = Desk()
    (ref,) = desk.sending(0.0, 1)
    assert desk.tell(0.1, ev.PutDone(ref, b"mine", b"theirs")) == [
        ev.InDebt(False), ev.BackToLocal(1, "digest"), m.Settle((ref,), False)]
    assert desk.boundary(0.2) == []


def test_a_put_is_started_again_every_half_second_and_given_up_after_three() -> None:
    desk = Desk()
    (ref,) = desk.sending(0.0, 1)
    said = []
    while (now := desk.book.wake_at()) <= 3.0:
        said += [(now, type(each).__name__) for each in desk.tell(now, ev.Tick()) if not isinstance(each, m.Renew)]
    assert [now for now, what in said if what == "StartPut"] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert (3.0, "BackToLocal") in said and (3.0, "Settle") in said
    assert desk.tell(3.1, ev.PutDone(ref, b"x", b"x")) == []


@pytest.mark.parametrize(("how", "reason"), [
    (m.Stale, "stale"), (lambda refs: m.Recall(refs, 2000, "NEED"), "recall"),
    (lambda refs: m.Refuse(1, "FULL", 300), "refused"),
])
def test_sending_ends_locally_whatever_the_lender_takes_back(how: Any, reason: str) -> None:
    desk = Desk()
    refs = desk.sending(0.0, 1)
    effects = desk.say(0.1, how(refs))
    assert ev.BackToLocal(1, reason) in effects and m.Settle(refs, False) in effects
    assert desk.book.held() == []


def test_what_was_being_sent_is_never_kept_as_cache() -> None:
    desk = Desk()
    refs = desk.sending(0.0, 1)
    desk.tell(0.1, ev.PutDone(refs[0], b"x", b"x"))
    desk.tell(0.1, ev.NoLongerNeeded((1,), keep=True))
    assert m.Settle(refs, False) in desk.boundary(0.2)


# -- at the lender --------------------------------------------------------------------------------------------------------------


def test_one_renew_goes_to_a_pair_for_all_its_loans() -> None:
    desk = Desk()
    desk.remote(0.0, 1)
    desk.remote(0.1, 2, loan=2)
    assert desk.book.wake_at() == 1.5
    assert desk.tell(1.5, ev.Tick()) == [m.Renew(1, 2, (1, 2))]
    assert desk.tell(3.0, ev.Tick()) == [m.Renew(2, 2, (1, 2))]


def test_a_renewed_says_what_is_missing_even_when_it_is_an_old_one() -> None:
    desk = Desk()
    (first,) = desk.remote(0.0, 1)
    desk.tell(1.5, ev.Tick())
    (second,) = desk.remote(1.6, 2, loan=2)
    desk.tell(3.0, ev.Tick())
    desk.say(3.1, m.Renewed(1, 6000, ()))                              # written before the second was granted
    assert [each for each in desk.boundary(3.2) if isinstance(each, ev.Lost)] == [ev.Lost(1, first, "missing")]
    assert desk.book.refs() == {2: second}


def test_a_renewed_that_was_never_asked_for_is_ignored() -> None:
    desk = Desk()
    desk.remote(0.0, 1)
    assert desk.say(0.1, m.Renewed(7, 6000, ())) == [] and desk.boundary(0.2) == []


def test_a_listed_ref_that_is_not_held_is_settled() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    (other,) = desk.refs(1, 1)
    desk.tell(1.5, ev.Tick())
    assert desk.say(1.6, m.Renewed(1, 6000, (ref, other))) == [m.Settle((other,), False)]


def test_renewing_stops_when_both_books_are_empty_or_the_term_is_over() -> None:
    desk = Desk()
    desk.remote(0.0, 1)
    desk.tell(0.1, ev.NoLongerNeeded((1,)))
    desk.boundary(0.2)
    assert m.Renew(1, 1, ()) in desk.tell(1.5, ev.Tick())
    desk.say(1.6, m.Renewed(1, 6000, ()))
    assert desk.book.wake_at() == math.inf

    desk.remote(10.0, 2, loan=2)
    desk.tell(10.1, ev.NoLongerNeeded((2,)))
    desk.boundary(10.2)
    renews = 0
    while (now := desk.book.wake_at()) < math.inf:                      # nobody answers
        renews += len(desk.tell(now, ev.Tick()))
    assert renews == 4


def test_a_lender_that_never_answers_a_renew_is_probed_once_a_term() -> None:
    desk = Desk()
    desk.remote(0.0, 1)
    probed = [now for now in (1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 10.5, 12.0) if ev.ProbePeer(LO) in desk.tell(now, ev.Tick())]
    assert probed == [6.0, 12.0]


def test_a_released_span_is_settled_at_the_boundary_and_not_before() -> None:
    desk = Desk()
    refs = desk.remote(0.0, 1, 2)
    assert desk.tell(0.1, ev.NoLongerNeeded((1, 2), keep=True)) == []
    assert desk.boundary(0.2) == [ev.InDebt(False), ev.Gone(1), ev.Gone(2), m.Settle(refs, True)]
    assert desk.tell(0.3, ev.NoLongerNeeded((1, 2))) == [] and desk.boundary(0.4) == []


def test_a_span_that_was_lost_is_not_kept_as_cache_although_it_is_released() -> None:
    desk = Desk()
    refs = desk.remote(0.0, 1)
    desk.say(0.1, m.Stale(refs))
    desk.tell(0.1, ev.NoLongerNeeded((1,), keep=True))
    assert desk.boundary(0.2) == [ev.InDebt(False), ev.Gone(1), m.Settle(refs, False)]


@pytest.mark.parametrize(("event", "reason"), [
    (ev.PeerGone(LO), "gone"), (m.Envelope(MO, ME, m.OtherBoot(MO, LO)), "gone"), (ev.AttendSilent(LO), "silent"),
])
def test_all_that_is_at_a_lost_lender_is_lost_once_and_the_rest_stays(event: Any, reason: str) -> None:
    desk = Desk()
    (there,) = desk.remote(0.0, 1)
    desk.sending(0.0, 2, loan=2)
    (elsewhere,) = desk.remote(0.0, 3, lender=MO)
    assert ev.BackToLocal(2, reason) in desk.tell(0.1, event)
    desk.tell(0.1, event)
    assert [each for each in desk.boundary(0.2) if isinstance(each, ev.Lost)] == [ev.Lost(1, there, reason)]
    assert desk.book.refs() == {3: elsewhere} and desk.boundary(0.3) == []
    assert desk.want(5.0, 1) == [ev.BackToLocal(1, "avoided")]


def test_an_asked_loan_of_a_lost_lender_moves_on_at_once() -> None:
    desk = Desk()
    desk.want(0.0, 1, lenders=(LO, MO))
    assert m.Borrow(1, "t", 5.0, 1, "job") in desk.tell(0.1, ev.PeerGone(LO))
    assert desk.book.loans_at(MO) == {1: "ASKED"} and desk.book.loans_at(LO) == {}


def test_loan_numbers_are_not_used_again_even_for_a_lender_that_seemed_gone() -> None:
    desk = Desk()
    desk.want(0.0, 1)
    desk.tell(0.1, ev.PeerGone(LO))
    assert m.Borrow(2, "t", 5.0, 1, "job") in desk.want(20.0, 1)


# -- the way back ----------------------------------------------------------------------------------------------------------------


def test_a_recall_must_be_obeyed_by_80_percent_of_its_time_or_the_span_is_lost() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    assert desk.say(0.0, m.Recall((ref,), 2000, "NEED")) == [ev.MustReturn(1, 1.6, "NEED")]
    assert desk.say(0.5, m.Recall((ref,), 1500, "NEED")) == []          # said again
    assert desk.book.refs() == {1: ref}                                 # still served, still read
    assert desk.tell(1.6, ev.Tick()) in ([], [m.Renew(1, 1, (1,))])
    assert ev.Lost(1, ref, "recall") in desk.boundary(1.61)


def test_a_later_recall_may_shorten_the_time_and_never_lengthens_it() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    desk.say(0.0, m.Recall((ref,), 1000, "HOME"))
    desk.say(0.5, m.Recall((ref,), 60_000, "DRAIN"))
    assert desk.book.wake_at() == 0.8
    desk.say(0.5, m.Recall((ref,), 100, "NEED"))
    assert desk.book.wake_at() == pytest.approx(0.58)


def test_coming_home_flips_only_after_the_copy_is_verified_and_at_a_boundary() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    assert desk.tell(0.1, ev.BringHome((1,), "LOCAL")) == [ev.StartFetch(1, ref, "LOCAL", b"digest", 1)]
    assert desk.tell(0.1, ev.BringHome((1,), "LOCAL")) == []
    assert desk.boundary(0.2) == [] and desk.book.state(1) == "RETURNING"
    desk.tell(0.3, ev.CopyVerified(1, b"digest", 1))
    assert desk.book.refs() == {1: ref}
    assert desk.boundary(0.4) == [ev.InDebt(False), ev.CameHome(1, "LOCAL"), m.Settle((ref,), False)]


def test_a_verified_copy_saves_a_span_whose_lender_went() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    desk.tell(0.1, ev.BringHome((1,), "SPILLED"))
    desk.say(0.2, m.Stale((ref,)))
    desk.tell(0.3, ev.CopyVerified(1, b"digest", 1))                       # its last bytes were on the way
    assert ev.CameHome(1, "SPILLED") in desk.boundary(0.4)


def test_a_fetch_is_started_again_and_given_up_and_a_recall_then_asks_for_another_rung() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    desk.say(0.0, m.Recall((ref,), 10_000, "HOME"))
    desk.tell(0.0, ev.BringHome((1,), "LOCAL"))
    fetches = 0
    while (now := desk.book.wake_at()) < 3.0:
        fetches += ev.StartFetch(1, ref, "LOCAL", b"digest", 1) in desk.tell(now, ev.Tick())
    assert fetches == 5
    assert [each for each in desk.tell(3.0, ev.Tick()) if not isinstance(each, m.Renew)] == [
        ev.StayedRemote(1, "give_up"), ev.MustReturn(1, 5.0, "HOME")]
    assert desk.book.refs() == {1: ref}


def test_a_copy_of_a_fetch_that_was_given_up_is_not_the_next_ones() -> None:
    """It lies in a buffer that nobody looks at any more."""
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    desk.tell(0.0, ev.BringHome((1,), "LOCAL"))
    assert ev.StayedRemote(1, "give_up") in desk.tell(3.0, ev.Tick())
    assert desk.tell(3.1, ev.BringHome((1,), "LOCAL")) == [ev.StartFetch(1, ref, "LOCAL", b"digest", 2)]
    desk.tell(3.2, ev.CopyVerified(1, b"digest", 1))
    assert desk.boundary(3.3) == []
    desk.tell(3.4, ev.CopyVerified(1, b"digest", 2))
    assert ev.CameHome(1, "LOCAL") in desk.boundary(3.5)


def test_a_wrong_copy_is_fetched_again_and_twice_wrong_is_tainted() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    desk.tell(0.1, ev.BringHome((1,), "LOCAL"))
    assert desk.tell(0.2, ev.CopyVerified(1, b"wrong", 1)) == [ev.StartFetch(1, ref, "LOCAL", b"digest", 1)]
    desk.tell(0.3, ev.CopyVerified(1, b"wrong", 1))
    assert ev.Lost(1, ref, "tainted") in desk.boundary(0.4)


def test_a_span_moves_from_one_lender_to_another_and_the_old_copy_is_read_until_then() -> None:
    desk = Desk()
    (old,) = desk.remote(0.0, 1)
    desk.want(0.1, 1, lenders=(MO,))
    (new,) = desk.refs(1, 1, MO)
    assert desk.say(0.1, m.Grant(1, (new,), 6000), MO) == [ev.StartPut(1, new, old, b"digest")]
    assert desk.book.refs() == {1: old} and desk.book.state(1) == "RETURNING"
    desk.tell(0.2, ev.PutDone(new, b"digest", b"digest"))
    assert desk.boundary(0.3) == [ev.Moved(1, new, b"digest"), m.Settle((old,), False)]


def test_a_relayed_copy_with_another_digest_is_not_flipped_to() -> None:
    desk = Desk()
    (old,) = desk.remote(0.0, 1)
    desk.want(0.1, 1, lenders=(MO,))
    (new,) = desk.refs(1, 1, MO)
    desk.say(0.1, m.Grant(1, (new,), 6000), MO)
    assert desk.tell(0.2, ev.PutDone(new, b"other", b"other")) == [ev.StayedRemote(1, "digest"), m.Settle((new,), False)]
    assert desk.boundary(0.3) == [] and desk.book.refs() == {1: old}


# -- adopting -----------------------------------------------------------------------------------------------------------------


def test_adopted_spans_appear_at_a_boundary_and_absent_ones_fail() -> None:
    desk = Desk()
    effects = desk.tell(0.0, ev.Adopt(LO, (7, 8), KEYS[:2], "t", AGE))
    assert effects == [ev.InDebt(True, AGE), m.Borrow(1, "t", 5.0, 2, "job", KEYS[:2])]
    (ref,) = desk.refs(1, 1)
    grant = m.Grant(1, (ref,), 6000, (b"digest",), (KEYS[1],))
    assert desk.say(0.1, grant) == [ev.AdoptFailed(7, KEYS[0], "ABSENT")]
    assert desk.say(0.1, grant) == []
    assert desk.boundary(0.2) == [ev.Adopted(8, KEYS[1], ref, b"digest")] and desk.boundary(0.3) == []


def test_an_adopted_span_that_ends_before_anybody_saw_it_just_fails() -> None:
    desk = Desk()
    desk.tell(0.0, ev.Adopt(LO, (7,), KEYS[:1], "t", AGE))
    (ref,) = desk.refs(1, 1)
    desk.say(0.1, m.Grant(1, (ref,), 6000, (b"digest",), KEYS[:1]))
    assert ev.AdoptFailed(7, KEYS[0], "recall") in desk.say(0.1, m.Recall((ref,), 2000, "NEED"))
    assert desk.boundary(0.2) == [] and desk.book.held() == []


def test_a_renewed_cannot_open_an_adopted_loan_because_it_names_no_digests() -> None:
    desk = Desk()
    desk.remote(0.0, 1)
    desk.tell(1.4, ev.Adopt(LO, (7,), KEYS[:1], "t", AGE))
    desk.tell(1.5, ev.Tick())
    (ref,) = desk.refs(2, 1)
    desk.say(1.6, m.Renewed(1, 6000, (*desk.book.held(), ref)))
    assert ref not in desk.book.held() and desk.book.loans_at(LO) == {1: "OPEN", 2: "ASKED"}


# -- the rest -----------------------------------------------------------------------------------------------------------------


def test_a_message_for_an_earlier_life_is_answered_with_ours() -> None:
    desk = Desk()
    (ref,) = desk.remote(0.0, 1)
    old = Boot(b"me before".ljust(16))
    assert desk.book.on(0.1, m.Envelope(LO, old, m.Stale((ref,)))) == [ev.Send(LO, m.OtherBoot(ME, old))]
    assert desk.book.on(0.1, m.Envelope(LO, old, m.OtherBoot(LO, old))) == []
    assert desk.book.refs() == {1: ref}


def test_check_names_the_law_that_a_damaged_book_breaks() -> None:
    for damage, law in (
        (lambda book: book._by_ref.clear(), "CONSERVED"),
        (lambda book: book._lenders[LO].loans.clear(), "CONSERVED"),
        (lambda book: setattr(book._debts[1], "state", "SENDING"), "CONSERVED"),
        (lambda book: setattr(book._debts[1], "to", "LOCAL"), "BOUNDED"),
        (lambda book: setattr(book._lenders[LO], "renew_at", math.inf), "BOUNDED"),
        (lambda book: setattr(book, "_told", ev.InDebt(False)), "LAW 5"),
    ):
        desk = Desk()
        desk.remote(0.0, 1)
        damage(desk.book)
        assert any(wrong.startswith(law) for wrong in desk.book.check()), law
