"""Who gives way when slots are short: with a guarantee, whoever has more than it; without one, the oldest."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.span_table import Span
from kvbank.kvstore.vault import Vault


def cache(vault: Vault, owner: str, number: int) -> None:
    """Spans that the owner used and left behind."""
    for span in vault.new_spans(number, owner):
        leave(vault, span)


def leave(vault: Vault, span: Span) -> None:
    """Its one reader goes; its bytes stay as cache."""
    for number in range(2):
        vault.index.publish(span, BlockKey(os.urandom(32)), bytes(4 * number), b"")
    vault.release(span)


def owners(vault: Vault) -> Counter[str]:
    return Counter(span.owner for span in vault._idle.values())


def vault(slots: int, guarantee: int) -> Vault:
    return Vault(slots, blocks_per_span=2, guarantee=guarantee)


def test_a_flood_of_one_tenant_leaves_another_what_it_is_promised() -> None:
    one = vault(10, guarantee=3)
    cache(one, "quiet", 5)
    for _ in range(50):
        cache(one, "flood", 2)
    assert owners(one) == {"quiet": 5, "flood": 5}, "over its share, the flood drives out itself"
    running = one.new_spans(5, "flood")
    assert owners(one) == {"quiet": 5} and len(running) == 5
    running += one.new_spans(2, "flood")
    assert owners(one) == {"quiet": 3}, "what the quiet one has beyond its share is free to use"
    one = vault(10, guarantee=0)
    cache(one, "quiet", 5)
    for _ in range(50):
        cache(one, "flood", 2)
    assert owners(one) == {"flood": 10}, "without a guarantee the oldest goes"


def test_who_has_more_than_its_share_makes_room_for_itself_before_others_do() -> None:
    one = vault(10, guarantee=2)
    cache(one, "a", 5)
    cache(one, "b", 5)
    cache(one, "b", 1)
    assert owners(one) == {"a": 5, "b": 5}, "b has more than 2: its own oldest goes, although a's are older"
    cache(one, "c", 2)
    assert owners(one) == {"a": 3, "b": 5, "c": 2}
    assert not one.check()


def test_a_span_that_a_peer_adopted_counts_as_its_owners_again_and_borrowers_cache_has_no_promise() -> None:
    one = Vault(6, blocks_per_span=2, guarantee=3, lend_cap=6)
    cache(one, "a", 3)
    for key in [span.keys[-1] for span in one._idle.values()]:
        span = one.lend_idle(key)
        assert span is not None and span.slot is not None
        one.give_back(span.slot, span.keys, b"")
    assert owners(one) == {"a": 3}
    for slot in one.take_for_loan(3):                        # lent to somebody, and kept for that borrower
        one.give_back(slot, [BlockKey(os.urandom(32)), BlockKey(os.urandom(32))])
    assert owners(one) == {"a": 3, "": 3}
    one.new_spans(3, "b")
    assert owners(one) == {"a": 3}


def test_what_is_promised_is_no_reason_to_stand_still() -> None:
    """More promised than there is: the one that computes goes on."""
    one = vault(4, guarantee=4)
    cache(one, "a", 4)
    held = one.new_spans(4, "b")
    assert len(held) == 4 and owners(one) == {} and not one.check()


@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_never_takes_from_who_has_no_more_than_its_share_while_others_have_more(seed: int) -> None:
    rng = random.Random(seed)
    one, guarantee = vault(24, 5), 5
    running: list[Span] = []
    for _ in range(1000):
        if running and (not one.num_free or rng.random() < 0.5):
            leave(one, running.pop(rng.randrange(len(running))))
            continue
        owner, idle = rng.choice("aaabc"), owners(one)
        has = Counter(span.owner for span in (*one._held.values(), *one._idle.values()))
        running += one.new_spans(1, owner)
        for victim in idle - owners(one):
            others_over = [name for name in idle if has[name] > guarantee]
            has[owner] += 1
            if has[victim] <= guarantee:
                assert not others_over and (victim == owner or not idle[owner]), (owner, victim, has, idle)
            elif victim != owner:
                assert has[owner] <= guarantee or not idle[owner], "who has more than its share goes first"
        assert not one.check()
