"""Placement: the longest held prefix against load, lenders in the order in which they should be asked."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from kvbank.cluster.membership import Facts, Load, View
from kvbank.cluster.placement import choose_lenders, choose_worker, held_by_replica, leaders_of


@dataclass
class Leader:
    id: str
    jobs_running: int = 0
    jobs_waiting: int = 0
    tokens_pending: int = 0


def chosen(held: dict[str, int], *leaders: Leader, prompt: int = 1600) -> str | None:
    return choose_worker(held, leaders, prompt_tokens=prompt, block_size=16)


def view(
    name: str, kind: str = "model", *, suspect: bool = False, lendable: int = 8, borrowed: int = 0,
    slot_bytes: int = 4096, host: str = "here", replica: int | None = None, shard: int = 0, shards: int = 1,
) -> View:
    facts = Facts(id=name, boot=b"b" * 16, kind=kind, host=host, slot_bytes=slot_bytes, shard=shard, shards=shards,
                  replica=int(name.rpartition("-")[2].split(".")[0]) if replica is None else replica)
    return View(facts=facts, load=Load(slots_lendable=lendable, slots_borrowed=borrowed), silent_s=0.0, suspect=suspect)


def test_nobody_is_nobody() -> None:
    assert chosen({}) is None


def test_the_longest_held_prefix_wins_between_equally_busy_workers() -> None:
    assert chosen({"a": 10, "b": 60}, Leader("a"), Leader("b"), Leader("c")) == "b"


def test_load_beats_a_prefix_when_waiting_costs_more_than_computing() -> None:
    held = {"a": 50}                                             # 800 of 1600 tokens
    assert chosen(held, Leader("a", tokens_pending=700), Leader("b")) == "a"
    assert chosen(held, Leader("a", tokens_pending=900), Leader("b")) == "b"
    assert chosen(held, Leader("a", jobs_waiting=2), Leader("b")) == "b"


def test_a_prefix_longer_than_the_prompt_counts_only_as_the_prompt() -> None:
    assert chosen({"a": 10_000}, Leader("a", jobs_running=30), Leader("b")) == "b"


def test_equal_workers_are_taken_by_fewer_jobs_and_then_by_id_whatever_the_order() -> None:
    leaders = [Leader("b"), Leader("a"), Leader("c")]
    assert {chosen({}, *order) for order in itertools.permutations(leaders)} == {"a"}
    assert chosen({}, Leader("a", jobs_running=1), Leader("b", tokens_pending=64)) == "b"


def test_jobs_that_arrive_one_after_the_other_spread_when_the_caller_counts_what_it_sent() -> None:
    leaders = [Leader(f"w{n}") for n in range(4)]
    for _ in range(16):
        target = next(leader for leader in leaders if leader.id == chosen({}, *leaders))
        target.jobs_running += 1
        target.tokens_pending += 1600
    assert [leader.jobs_running for leader in leaders] == [4, 4, 4, 4]


def test_a_replica_leads_only_when_every_shard_is_there() -> None:
    views = [view("worker-0", shards=2), view("worker-0.1", shard=1, shards=2), view("worker-1", shards=2),
             view("worker-2"), view("lender-0", "lender")]
    assert [v.facts.id for v in leaders_of(views)] == ["worker-0", "worker-2"]
    views[1] = view("worker-0.1", shard=1, shards=2, suspect=True)
    assert [v.facts.id for v in leaders_of(views)] == ["worker-2"]


def test_a_prefix_counts_as_far_as_all_shards_hold_it() -> None:
    views = [view("worker-0", shards=2), view("worker-0.1", shard=1, shards=2), view("worker-1")]
    assert held_by_replica({"worker-0": 9, "worker-0.1": 4, "worker-1": 2}, views) == {"worker-0": 4, "worker-1": 2}
    assert held_by_replica({"worker-0": 9}, views) == {"worker-0": 0, "worker-1": 0}


def test_lenders_are_ordered_by_kind_place_fit_and_size() -> None:
    views = [
        view("worker-0"), view("worker-1", lendable=50), view("worker-2", lendable=3, host="there"),
        view("lender-0", "lender", lendable=2), view("lender-1", "lender", lendable=9),
        view("lender-2", "lender", lendable=12), view("lender-3", "lender", lendable=99, host="there"),
    ]
    best = choose_lenders(views, borrower="worker-0", slots=8, slot_bytes=4096)
    assert [v.facts.id for v in best] == ["lender-2", "lender-1", "lender-0", "lender-3", "worker-1", "worker-2"]


def test_who_cannot_lend_is_not_asked() -> None:
    views = [
        view("worker-0", shards=2), view("worker-0.1", shard=1, shards=2),
        view("lender-0", "lender", lendable=0), view("lender-1", "lender", suspect=True),
        view("lender-2", "lender", slot_bytes=100), view("lender-3", "lender", borrowed=1),
        view("gateway-0", "gateway"), view("lender-4", "lender"),
    ]
    best = choose_lenders(views, borrower="worker-0", slots=1, slot_bytes=4096)
    assert [v.facts.id for v in best] == ["lender-4"]


def test_the_order_of_the_members_does_not_change_the_answer() -> None:
    rng = random.Random(5)
    for _ in range(200):
        views = [view(f"lender-{n}", "lender", lendable=rng.randrange(4), borrowed=rng.randrange(2),
                      suspect=rng.random() < 0.2, host=rng.choice("xy")) for n in range(8)]
        first = choose_lenders(views, borrower="worker-9", slots=2, slot_bytes=1)
        rng.shuffle(views)
        assert choose_lenders(views, borrower="worker-9", slots=2, slot_bytes=1) == first
