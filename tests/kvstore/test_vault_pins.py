"""Pinned spans make room after all others, until their term ends: never more than half of the slots, never instead of a job."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.span_table import Span
from kvbank.kvstore.vault import OutOfSlots, Pinned, Vault

BPS = 2                                              # blocks of a span


class Books:
    """A vault with its own clock, and who made room in it."""

    def __init__(self, slots: int, **settings: object) -> None:
        self.now, self.gone, self._next = 0.0, [], 0
        self.vault = Vault(slots, blocks_per_span=BPS, lend_cap=slots, clock=lambda: self.now,
                           on_evict=lambda span: self.gone.append(span.keys[0]), **settings)

    def run(self, blocks: int, owner: str = "") -> list[Span]:
        """A job that computes so many new blocks, and runs on."""
        spans = self.vault.new_spans(-(-blocks // BPS), owner)
        for at in range(blocks):
            self.vault.index.publish(spans[at // BPS], self._key(), b"", b"")
        return spans

    def leave(self, spans: list[Span]) -> list[BlockKey]:
        """The job ends, its tail first. Returns its keys."""
        for span in reversed(spans):
            self.vault.release(span)
        return [key for span in spans for key in span.keys]

    def cache(self, blocks: int, owner: str = "") -> list[BlockKey]:
        return self.leave(self.run(blocks, owner))

    def pin(self, keys: list[BlockKey], term_s: float = 60.0) -> Pinned:
        return self.vault.pin(*_named(keys), term_s)

    def unpin(self, keys: list[BlockKey]) -> Pinned:
        return self.vault.unpin(*_named(keys))

    def press(self, slots: int) -> list[BlockKey]:
        """Takes slots and gives them back. Returns the first keys of the spans that had to go."""
        self.gone.clear()
        for span in self.vault.new_spans(slots):
            self.vault.release(span)
        assert not self.vault.check()
        return list(self.gone)

    def _key(self) -> BlockKey:
        self._next += 1
        return BlockKey(self._next.to_bytes(32, "big"))


def _named(keys: list[BlockKey]) -> tuple[list[BlockKey], list[BlockKey]]:
    """(last key of each whole span, keys after them)."""
    whole = len(keys) - len(keys) % BPS
    return keys[BPS - 1 : whole : BPS], keys[whole:]


def firsts(keys: list[BlockKey]) -> list[BlockKey]:
    return keys[::BPS]


def test_what_is_pinned_goes_last_and_goes_all_the_same_when_a_job_needs_all() -> None:
    books = Books(8)
    old, new = books.cache(5), books.cache(6)
    assert books.pin(old) == Pinned(5)
    assert books.press(5) == firsts(new)[::-1], "younger, and not pinned"
    assert books.vault.num_pinned == 3
    assert books.press(8) == firsts(old)[::-1], "all that is left: the tail first, as ever"
    assert books.vault.num_pinned == 0
    with pytest.raises(OutOfSlots):
        books.vault.new_spans(9)


def test_a_pin_ends_with_its_term_and_leaves_the_order_as_if_it_had_not_been() -> None:
    books = Books(8)
    old, new = books.cache(4), books.cache(4)
    books.pin(old, 60.0)
    books.pin(old, 10.0)
    books.now = 59.0
    assert books.vault.num_pinned == 2, "a shorter pin shortens none"
    assert books.press(5) == firsts(new)[1:]
    books.now = 60.0
    assert books.vault.num_pinned == 0
    assert books.press(7) == firsts(old)[::-1], "older"
    assert new[1] in books.vault.index


def test_half_of_the_slots_at_most_the_start_of_a_prompt_first_and_an_ended_pin_makes_room() -> None:
    books = Books(8)
    one, other = books.cache(6), books.cache(10)
    assert books.pin(one) == Pinned(6)
    assert books.pin(other) == Pinned(2, left_out=8)
    assert books.pin(other) == Pinned(2, left_out=8), "what is pinned takes no more room"
    assert books.vault.num_pinned == 4
    assert books.press(4) == firsts(other)[:0:-1], "all but its start"
    assert books.unpin(one) == Pinned(6) and books.unpin(one) == Pinned(0)
    assert books.press(7) == firsts(one)[::-1] and books.vault.num_pinned == 1
    assert Books(1).pin(one) == Pinned(0) == Books(8).pin([])


def test_a_span_that_is_read_is_pinned_when_it_becomes_idle() -> None:
    books = Books(8)
    running = books.run(4)
    keys = [key for span in running for key in span.keys]
    assert books.pin(keys) == Pinned(4) and books.vault.counts().held == 2
    books.leave(running)
    other = books.cache(8)
    assert books.press(6) == firsts(other)[::-1]
    assert keys[1] in books.vault.index and books.vault.num_pinned == 2


def test_only_the_blocks_that_end_the_prompt_count_of_a_span_that_goes_on() -> None:
    books = Books(8)
    answered = books.cache(4)                        # the prompt ended with its third block
    assert books.pin(answered[:3]) == Pinned(3)
    assert books.vault.num_pinned == 2
    assert books.pin([*answered[:2], BlockKey(b"?" * 32)]) == Pinned(2), "what does not lie here"


def test_a_pin_follows_what_a_peer_reads_in_place_and_ends_with_what_leaves() -> None:
    books = Books(8)
    vault, keys, others = books.vault, books.cache(8), books.cache(8)
    books.pin(keys)
    lent = vault.lend_idle(keys[1])
    assert lent is not None and lent.slot is not None and vault.num_pinned == 4
    assert books.unpin(keys) == books.pin(keys) == Pinned(8)
    vault.give_back(lent.slot, lent.keys)
    assert vault.num_pinned == 4 and not vault.check()
    assert books.press(4) == firsts(others)[::-1]
    lent = vault.lend_idle(keys[1])
    assert lent is not None and lent.slot is not None
    vault.give_back(lent.slot)                       # its bytes are nobody's now
    assert vault.num_pinned == 3 and not vault.check()
    span = vault.index.find(keys[3])
    assert span is not None and vault.hold(span)
    vault.leave(span, "remote")
    assert vault.num_pinned == 2 and not vault.check()
    vault.distrust([keys[5]])
    assert vault.num_pinned == 1 and not vault.check()
    assert vault.drop_idle() == 1 and vault.num_pinned == 0, "whoever clears the cache means all of it"


def test_when_the_last_pin_went_with_its_slot_tenants_shares_count_as_before() -> None:
    books = Books(8, guarantee=3)
    within = books.cache(4, "a")
    pinned = books.cache(2, "c")
    books.pin(pinned, 86_400.0)
    span = books.vault.index.find(pinned[0])
    assert books.vault.hold(span)
    books.vault.leave(span, "parked")                # its KV goes elsewhere: the slot is blank
    flood = books.cache(12, "b")
    books.gone.clear()
    books.cache(2, "b")
    assert books.gone and not set(books.gone) & set(within) and set(books.gone) <= set(flood)


def test_a_tenants_share_orders_what_is_not_pinned() -> None:
    books = Books(8, guarantee=2)
    pinned, quiet = books.cache(8, "flood"), books.cache(4, "quiet")
    flood = books.cache(4, "flood")
    assert books.pin(pinned) == Pinned(8)
    assert books.press(2) == firsts(flood)[::-1], "who has more than its share gives way"
    assert books.press(4) == firsts(quiet)[::-1], "what is pinned goes last, whosever it is"
    assert set(books.press(8)) == set(firsts(pinned))


@pytest.mark.parametrize("guarantee", [0, 4])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_takes_nothing_pinned_while_there_is_anything_else(seed: int, guarantee: int) -> None:
    rng, books = random.Random(seed), Books(24, guarantee=guarantee)
    vault, running, kept, lent = books.vault, [], [], []
    until: dict[BlockKey, float] = {}                # first key of a pinned span -> when its pin ends
    seen = SimpleNamespace(pinned_went=0, others_went=0, left_out=0)

    def now_pinned() -> set[BlockKey]:
        return {key for key, end in until.items() if end > books.now}

    def idle() -> list[BlockKey]:
        return [span.keys[0] for span in vault._idle.values()]

    def made_room(before: list[BlockKey]) -> None:
        """Idle spans went since `before`."""
        after, pins = set(idle()), now_pinned()
        went = [key for key in before if key not in after]
        others = [key for key in before if key not in pins]
        if any(key in pins for key in went):
            assert all(key in went for key in others), "a pinned span went while others were there"
        elif not guarantee:
            assert went == others[: len(went)], "not the oldest"
        seen.pinned_went += sum(key in pins for key in went)
        seen.others_went += sum(key not in pins for key in went)
        for key in went:
            until.pop(key, None)

    for _ in range(1500):
        before, turn = idle(), rng.random()
        if turn < 0.3:
            blocks = rng.randint(1, 16)
            if -(-blocks // BPS) <= vault.num_free:
                running.append(books.run(blocks, rng.choice("ab")))
                made_room(before)
            else:
                with pytest.raises(OutOfSlots):
                    books.run(blocks)
        elif turn < 0.6 and running:
            kept.append(books.leave(running.pop(rng.randrange(len(running)))))
        elif turn < 0.75 and kept:
            keys, term_s = rng.choice(kept[-6:]), rng.choice([5.0, 50.0])
            room, want, left_out = 12 - len(now_pinned()), Pinned(0), 0
            for first in firsts(keys):
                last = keys[min(keys.index(first) + BPS, len(keys)) - 1]
                span = vault.index.find(last) or next((span for span in lent if span.keys[-1] == last), None)
                if span is not None:
                    blocks = span.keys.index(last) + 1
                    if first in now_pinned() or (room := room - 1) >= 0:
                        want = Pinned(want.blocks + blocks)
                        until[first] = max(books.now + term_s, until.get(first, 0.0))
                    else:
                        left_out += blocks
            assert books.pin(keys, term_s) == Pinned(want.blocks, left_out)
            seen.left_out += left_out
        elif turn < 0.8 and kept:
            keys = rng.choice(kept[-12:])
            books.unpin(keys)
            for first in firsts(keys):
                until.pop(first, None)
        elif turn < 0.86 and before:
            name = rng.choice(before)
            span = vault.index.find(name)
            assert span is not None
            if (one := vault.lend_idle(span.keys[-1])) is not None:
                lent.append(one)
        elif turn < 0.92 and lent:
            one = lent.pop(rng.randrange(len(lent)))
            if rng.random() < 0.5:
                vault.give_back(one.slot, one.keys)
            else:
                vault.give_back(one.slot)
                until.pop(one.keys[0], None)
        elif turn < 0.95:
            slots = vault.take_for_loan(rng.randint(1, 4))
            made_room(before)
            for slot in slots:
                vault.give_back(slot)
        elif turn < 0.96:
            vault.drop_idle()
            for key in before:
                until.pop(key, None)
        books.now += rng.random()
        assert vault.num_pinned == len(now_pinned()) <= 12 and not vault.check()
    assert seen.pinned_went and seen.others_went and seen.left_out, seen
