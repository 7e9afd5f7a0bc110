"""Wrong bytes found after they may have been read: nothing made from them survives, and no wrong token is ever final."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvbank.errors import KVBankError
from kvbank.kvstore import loan_events as loans
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.messages import Ref
from kvbank.kvstore.span_table import REMOTE, Span
from kvbank.kvstore.timings import LoanTimings
from kvbank.kvstore.vault import Arena, Vault
from kvbank.workers.borrower import Borrower, Lender
from kvbank.workers.room import TAINTED, Room
from kvbank.workers.seams import Adopted, AdoptEnded, Lost, NoBank
from kvbank.workers.sequence import RUNNING, WAITING, JobSpec, Sequence


@pytest.mark.parametrize("answered", [False, True])
def test_a_tainted_span_takes_everything_after_it_along(town, alone, run_jobs, prompt, answered) -> None:
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=30, ignore_eos=True)
    want = run_jobs(alone(), job)
    bank = town(lenders=2, lender_blocks=160)
    engine = bank.worker.engine
    struck: list[int] = []

    def strike() -> None:
        seq = next(iter(engine.jobs()), None)
        if struck or seq is None or not engine.room.away or (seq.num_output >= 5) is not answered:
            return
        uid = next(span.uid for _, span in seq.table.live() if span.place == "remote")
        struck.append(uid)
        bank.worker.borrower.settle([uid], keep=False)
        engine.room.absorb([Lost(uid, "tainted")])
        assert seq.table.holes.lowest[0] < 1500 and not any(span.keys for i, span in seq.table.live()
                                                            if i * 128 >= seq.table.holes.lowest[0])

    got = bank.run(job, each_step=strike)
    assert struck
    if answered:
        assert isinstance(got.errors["a"], KVBankError) and "submit the job again" in str(got.errors["a"])
    else:
        assert not got.errors
        assert got.tokens["a"] == want.tokens["a"] and got.tally["a"].missed["tainted"] > 0
    again = bank.run(JobSpec(id="b", prompt=job.prompt, max_tokens=30, ignore_eos=True))
    assert again.tokens["b"] == want.tokens["a"]
    bank.settle()
    assert not bank.worker.vault.check() and bank.worker.vault.counts().held == 0


# -- what jobs that ended left behind -----------------------------------------------------------------------------------

ROOT = b"root"


class Shelves:
    def __init__(self) -> None:
        self.forgotten: list[bytes] = []

    def forget(self, keys: Any) -> None:
        self.forgotten += keys


class Books(NoBank):
    def __init__(self) -> None:
        self.settled: list[tuple[int, bool]] = []
        self.distrusted: list[bytes] = []

    def settle(self, uids: Any, *, keep: bool) -> None:
        self.settled += [(uid, keep) for uid in uids]

    def distrust(self, keys: Any) -> None:
        self.distrusted += keys


class House:
    """A worker's books with two blocks of two tokens a span. The first span of job "a" lies at a lender."""

    def __init__(self) -> None:
        self.vault, self.shelves, self.books, self.fetched = Vault(16, blocks_per_span=2), Shelves(), Books(), []
        self.running: list[Sequence] = []
        self.queued: list[Sequence] = []
        self.room = Room(self.vault, self.shelves, self.books, blocks_per_span=2, running=lambda: self.running,    # type: ignore
                         queued=lambda: self.queued, preemptable=list, preempt=lambda seq: None,
                         drop_fetched=self.fetched.extend)
        self.lent = Span(slot=None, place=REMOTE, refs=1, keys=[b"a0", b"a1"], tokens=b"", parent=ROOT)
        self.vault.index.adopt(self.lent)
        self.room.away[self.lent.uid] = self.lent

    def job(self, name: str, keys: list[bytes], spans: list[Span], *, output: int = 0) -> Sequence:
        seq = Sequence(JobSpec(id=name, prompt=[1] * 8, max_tokens=8), 4, 2, now=0.0)
        for index, span in enumerate(spans):
            seq.table.put(index, span)
        seq.table.holes.fill(0, 4 * len(spans))
        seq.keys, seq.state = keys, RUNNING              # type: ignore[assignment]
        for _ in range(output):
            seq.append(1)
        return seq

    def span(self, parent: bytes, *keys: bytes, idle: bool = True) -> Span:
        (span,) = self.vault.new_spans(1)
        for before, key in zip((parent, *keys), keys, strict=False):
            self.vault.index.publish(span, key, b"", before)    # type: ignore[arg-type]
        if idle:
            self.vault.release(span)
        return span


def test_idle_spans_that_were_made_from_a_tainted_one_are_not_found_again() -> None:
    house = House()
    mine = house.span(b"a1", b"b0", b"b1", idle=False)
    house.running = [house.job("a", [b"a0", b"a1", b"b0", b"b1"], [house.lent, mine])]
    house.span(b"a1", b"c0", b"c1")                      # made right from it, by a job that ended
    house.span(b"b1", b"d0", b"d1")                      # made from what "a" made from it
    house.span(b"d1", b"e0")                             # and further down
    house.span(ROOT, b"a0", b"x1")                       # its first block was copied from there
    house.span(ROOT, b"y0", b"y1")                       # another text
    house.room.absorb([Lost(house.lent.uid, TAINTED)])
    assert house.vault.index.keys() == [b"y0", b"y1"]
    counts = house.vault.counts()
    assert (counts.idle, counts.held, counts.blank) == (1, 0, 15) and not house.vault.check()
    made = {b"a0", b"a1", b"b0", b"b1", b"c0", b"c1", b"d0", b"d1", b"e0", b"x1"}
    assert set(house.shelves.forgotten) == set(house.books.distrusted) == set(house.fetched) == made
    assert house.running[0].table.holes.lowest == (0, 8)


@pytest.mark.parametrize("tainted", [False, True])
def test_cache_that_a_peer_borrowed_in_place_comes_back_only_if_it_was_not_made_from_a_tainted_span(tainted) -> None:
    house = House()
    house.vault.lend_cap = 8
    idle = house.span(b"a1", b"c0", b"c1")
    below = house.span(b"c1", b"e0", b"e1")
    assert house.vault.lend_idle(BlockKey(b"c1")) is idle and idle.slot is not None
    if tainted:
        house.room.absorb([Lost(house.lent.uid, TAINTED)])
        assert house.vault.index.keys() == []
    house.vault.give_back(idle.slot, idle.keys)
    assert (house.vault.index.find(BlockKey(b"c1")) is None) == tainted == (house.vault.index.find(BlockKey(b"e1")) is not below)
    house.room.absorb([Lost(house.lent.uid, TAINTED)])
    if not tainted:
        assert house.vault.index.keys() == [], "it still knows what it was made from"
    assert not house.vault.check() and house.vault.counts().blank == 16


def test_jobs_that_read_what_was_made_from_a_tainted_span_are_computed_again_or_fail() -> None:
    """Two have a first span of their own, and read as their second one what was made from the tainted first of "a"."""
    house = House()
    keys = [b"a0", b"a1", b"b0", b"b1"]
    shared = house.span(b"a1", b"b0", b"b1", idle=False)
    own = [Span(slot=None, keys=keys[:2], parent=ROOT, refs=1) for _ in range(2)]    # not listed: "a" was first
    house.running = [house.job("a", keys, [house.lent]), house.job("b", keys, [own[0], shared]),
                     house.job("c", keys, [own[1], shared], output=1)]
    shared.refs = 2
    house.room.absorb([Lost(house.lent.uid, TAINTED)])
    assert house.running[1].table.at(0) is own[0] and house.running[1].table.holes.lowest == (4, 8)
    assert house.room.spoiled == [house.running[2]]
    assert house.vault.counts().held == 0


def test_a_waiting_job_does_not_use_what_it_adopted_of_a_tainted_text() -> None:
    house = House()
    house.running = [house.job("a", [b"a0", b"a1"], [house.lent])]
    waiting = house.job("b", [b"a0", b"a1", b"z0", b"z1"], [])
    adopted = {key: Span(slot=None, place=REMOTE, keys=[key], parent=b"?") for key in (b"z1", b"other")}
    waiting.adopted.update(adopted)                      # type: ignore[arg-type]
    house.room.away |= {span.uid: span for span in adopted.values()}
    house.queued = [waiting]
    house.room.absorb([Lost(house.lent.uid, TAINTED)])
    assert list(waiting.adopted) == [b"other"] == [span.keys[0] for span in house.room.away.values()]
    assert (adopted[b"z1"].uid, False) in house.books.settled


def test_a_preempted_job_that_answered_from_a_tainted_text_fails_too() -> None:
    """It reads nothing while it waits; what it said already was made from those bytes, as far as anybody knows."""
    house = House()
    keys = [b"a0", b"a1", b"b0"]
    house.running = [house.job("a", keys[:2], [house.lent])]
    answered, begun = house.job("b", list(keys), [], output=1), house.job("c", list(keys), [])
    other = house.job("d", [b"y0", b"y1"], [], output=1)
    for seq in (answered, begun, other):
        seq.state = WAITING
    house.queued = [answered, begun, other]
    house.room.absorb([Lost(house.lent.uid, TAINTED)])
    assert house.room.spoiled == [answered]


def test_a_spoiled_job_ends_while_it_waits(alone, prompt) -> None:
    engine = alone()
    seq = engine.scheduler.add(JobSpec(id="a", prompt=prompt(300), max_tokens=4), 0.0)
    engine.room.spoiled.append(seq)
    ((failed, error),) = engine.scheduler.expire(0.0)
    assert failed is seq and "submit the job again" in str(error) and not engine.scheduler.busy


class Banker:
    """Its book grants what the test says."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.flips: list[Any] = []
        self.links = self
        self.asked = threading.Event()

    def knows(self, boot: Boot) -> bool:
        return True

    def tell_book(self, event: Any) -> list[Any]:
        self.told.append(event)
        if isinstance(event, loans.Adopt):
            self.asked.set()
        flips, self.flips = (self.flips, []) if isinstance(event, loans.StepBoundary) else ([], self.flips)
        return flips


def test_peers_are_not_asked_again_for_what_was_tainted() -> None:
    boot, bad, good = Boot(b"l" * 16), BlockKey(b"bad"), BlockKey(b"good")
    borrower = Borrower(Arena(2, 64), 64, timings=LoanTimings(), wake=lambda: None, lenders=list,
                        locate=lambda keys: [(Lender("l", boot, "", 1), list(keys))])
    banker, ref = Banker(), Ref(boot, Boot(b"m" * 16), 1, 0, 1)
    borrower.connect(banker)                             # type: ignore[arg-type]
    banker.flips = [loans.Adopted(1, bad, ref, b""), loans.Adopted(2, good, ref, b"")]
    borrower.poll()
    borrower.settle([1, 2], keep=True)
    assert borrower.left([bad, good]) == [bad, good]
    borrower.distrust([bad])
    assert borrower.left([bad, good]) == [good]
    assert borrower.adopt("job", [bad, good], tenant="t", age=0.0) and banker.asked.wait(10.0)
    borrower.close()
    (asked,) = [event for event in banker.told if isinstance(event, loans.Adopt)]
    assert asked.keys == (good,)
    # And one that was asked for before: it is given back unread.
    banker.flips = [loans.Adopted(3, bad, ref, b""), loans.Adopted(asked.uids[0], good, ref, b"")]
    assert [type(event) for event in borrower.poll()] == [AdoptEnded, Adopted, AdoptEnded]
    assert loans.NoLongerNeeded((3,), False) in banker.told and borrower.where(3) is None


def test_what_is_distrusted_is_not_left_as_cache_by_its_last_reader() -> None:
    borrower, banker = Borrower(Arena(2, 64), 64, timings=LoanTimings(), wake=lambda: None, lenders=list), Banker()
    borrower.connect(banker)                             # type: ignore[arg-type]
    ref, bad, good = Ref(Boot(b"l" * 16), Boot(b"m" * 16), 1, 0, 1), BlockKey(b"bad"), BlockKey(b"good")
    banker.flips = [loans.Adopted(1, bad, ref, b""), loans.Adopted(2, good, ref, b"")]
    borrower.poll()
    borrower.distrust([bad])
    banker.told.clear()
    borrower.settle([1, 2], keep=True)
    told: list[Any] = banker.told
    assert {(uid, event.keep) for event in told for uid in event.uids} == {(1, False), (2, True)}


# -- no finite numbers ---------------------------------------------------------------------------------------------------


def test_what_a_spoiled_job_made_is_not_found_again_and_other_jobs_go_on() -> None:
    house = House()
    mine = house.span(b"a1", b"b0", b"b1", idle=False)
    spoiled = house.job("a", [b"a0", b"a1", b"b0", b"b1"], [house.lent, mine])
    beside = house.job("b", [b"a0", b"a1", b"c0", b"c1"], [house.lent], output=1)
    house.lent.refs = 2
    house.running = [spoiled, beside]
    waiting = house.job("w", [b"a0", b"a1", b"z0", b"z1"], [])
    adopted = Span(slot=None, place=REMOTE, keys=[BlockKey(b"b1")], parent=b"?")
    waiting.adopted[BlockKey(b"b1")] = adopted
    house.room.away[adopted.uid] = adopted
    house.queued = [waiting]
    house.span(b"b1", b"d0", b"d1")                      # a job that ended made it from what "a" made
    house.span(ROOT, b"y0", b"y1")                       # another text
    house.room.spoil(spoiled)
    assert house.vault.index.keys() == [b"y0", b"y1"]
    assert {b"a0", b"a1", b"b0", b"b1", b"d0", b"d1"} == set(house.books.distrusted) == set(house.fetched)
    assert {b"b0", b"b1", b"d0", b"d1"} <= set(house.shelves.forgotten)
    assert beside.table.at(0) is house.lent and not beside.table.holes.overlap(0, 4) and not house.room.spoiled
    assert not waiting.adopted and (adopted.uid, False) in house.books.settled
