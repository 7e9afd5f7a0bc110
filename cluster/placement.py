"""Placement: which replica takes a job, and who could lend. Pure functions: equal input, equal answer everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from kvbank.cluster.membership import View

RUNNING_TOKENS = 64                  # what one decoding job delays a new prompt, in prompt tokens
WAITING_TOKENS = 512                 # what one job already queued does, beside its own prompt tokens


class Leader(Protocol):
    """Shard 0 of a replica whose shards are all alive; its numbers may include what the caller just sent there."""

    @property
    def id(self) -> str: ...
    @property
    def jobs_running(self) -> int: ...
    @property
    def jobs_waiting(self) -> int: ...
    @property
    def tokens_pending(self) -> int: ...


def choose_worker(
    held: Mapping[str, int], leaders: Iterable[Leader], *, prompt_tokens: int, block_size: int
) -> str | None:
    """The id of the leader that would begin to answer first; None when there is none.

    held:  leading blocks of the prompt that each leader's replica holds
    Cost, in prompt tokens: those it must still compute for this prompt, those it owes to others, and its jobs. Equal
    costs go to the one with fewer jobs, then to the one that holds more, then to the smaller id.
    """
    def cost(leader: Leader) -> tuple[float, int, int, str]:
        reused = min(held.get(leader.id, 0) * block_size, prompt_tokens)
        jobs = leader.jobs_running + leader.jobs_waiting
        owed = leader.tokens_pending + RUNNING_TOKENS * leader.jobs_running + WAITING_TOKENS * leader.jobs_waiting
        return (prompt_tokens - reused + owed, jobs, -reused, leader.id)

    return min(leaders, key=cost).id if (leaders := list(leaders)) else None


def leaders_of(views: Sequence[View]) -> list[View]:
    """Shard 0 of each replica of which every shard is alive and none is suspect, by id."""
    whole: dict[int, list[View]] = {}
    for view in views:
        if view.facts.kind == "model" and not view.suspect:
            whole.setdefault(view.facts.replica, []).append(view)
    found = [
        view for shards in whole.values() for view in shards
        if view.facts.shard == 0 and len({v.facts.shard for v in shards}) >= view.facts.shards
    ]
    return sorted(found, key=lambda view: view.facts.id)


def held_by_replica(leading: Mapping[str, int], views: Sequence[View]) -> dict[str, int]:
    """Leading blocks by leader: what all shards of its replica hold, because a hit on fewer is none."""
    made: dict[str, int] = {}
    for leader in leaders_of(views):
        shards = [v for v in views if v.facts.kind == "model" and v.facts.replica == leader.facts.replica]
        made[leader.facts.id] = min(leading.get(v.facts.id, 0) for v in shards)
    return made


def choose_lenders(
    views: Sequence[View], *, borrower: str, slots: int, slot_bytes: int, limit: int = 8
) -> list[View]:
    """Who could lend `slots` slots of `slot_bytes` to `borrower` now, best first.

    Not asked: the borrower and the shards of its own replica, suspects, those without a lendable slot or whose slots
    are too small, and those in debt themselves (they would refuse). First those that host no model, then those on the
    borrower's own machine, then those that can take it all (a loan from one lender costs one call a layer), then those
    with more to lend; equal ones by id.
    """
    by_id = {view.facts.id: view for view in views}
    asker = by_id[borrower].facts if borrower in by_id else None
    fit = [
        view for view in views
        if view.facts.id != borrower and view.facts.kind in ("model", "lender") and not view.suspect
        and view.load.slots_lendable > 0 and view.load.slots_borrowed == 0 and view.facts.slot_bytes >= slot_bytes
        and not (asker and view.facts.kind == asker.kind == "model" and view.facts.replica == asker.replica)
    ]
    fit.sort(key=lambda view: (
        view.facts.kind != "lender",
        asker is not None and view.facts.host != asker.host,
        view.load.slots_lendable < slots,
        -view.load.slots_lendable,
        view.facts.id,
    ))
    return fit[:limit]
