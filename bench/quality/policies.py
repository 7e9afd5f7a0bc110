"""What may be held of a context: the seam for policies, and the controls that every policy is measured against.

    full               all of it
    random-eviction    a random set per layer and head, drawn once
    random-selection   a random set per layer and head, drawn anew for every token that attends
    recent-window      the last tokens
    streaming          the first four and the last tokens

To add one: a class with these three members, and its name in POLICIES. An evictor ends in `Evicted(context, index)`, a
selector in `Selected(context, tokens, choose)`; what changes rows (a codec, a merge) brings a Fork of its own. Nothing
is kept between contexts: a policy has no state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bench.quality.attention import Evicted, Fork, Index, Prefilled, Rows, Selected, Whole

SINKS = 4


class Policy(Protocol):
    """One way to hold less of a context than all of it."""

    name: str
    query_aware: bool                    # sees the question first: what it keeps serves no other, and it is compared apart

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        """tokens: the budget, rows per layer and KV head on average, at least 1. asked: None unless query_aware; then by
        layer the queries [R, heads, d] of the question (not of its answer) under full attention."""
        ...


class Full:
    name, query_aware = "full", False

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        return Whole(context)


class RandomEviction:
    """Smaller budgets keep a part of what larger ones do."""

    name, query_aware = "random-eviction", False

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        def draw(layer: int, head: int) -> Tensor:
            order = torch.randperm(context.length, generator=chance(self.name, context.seed, layer, head))
            return order[:tokens].sort().values

        return Evicted(context, index_of(context, draw))


class RandomSelection:
    """What a row reads depends on its page, question, position, layer and head only."""

    name, query_aware = "random-selection", False

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        def choose(layer: int, head: int, q: Tensor, rows: Rows) -> Tensor:
            chosen = torch.zeros((len(q), context.length), dtype=torch.bool)
            for row, place in enumerate(zip(rows.turn.tolist(), rows.positions.tolist(), strict=True)):
                order = torch.randperm(context.length, generator=chance(self.name, context.seed, layer, head, *place))
                chosen[row, order[:tokens]] = True
            return chosen

        return Selected(context, tokens, choose)


class RecentWindow:
    name, query_aware = "recent-window", False

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        last = torch.arange(context.length - tokens, context.length)
        return Evicted(context, index_of(context, lambda layer, head: last))


class Streaming:
    """Attention sinks: arXiv 2309.17453. Keys keep the rotation of their place in the text."""

    name, query_aware = "streaming", False

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        sinks = min(SINKS, tokens)
        kept = torch.cat((torch.arange(sinks), torch.arange(context.length - tokens + sinks, context.length)))
        return Evicted(context, index_of(context, lambda layer, head: kept))


CONTROLS: tuple[Callable[[], Policy], ...] = (RandomEviction, RandomSelection, RecentWindow, Streaming)
POLICIES: dict[str, Callable[[], Policy]] = {kind().name: kind for kind in (Full, *CONTROLS)}


def index_of(context: Prefilled, places: Callable[[int, int], Tensor]) -> Index:
    """The index whose entries are `places(layer, kv head)`."""
    return [[places(layer, head) for head in range(len(keys))] for layer, keys in enumerate(context.keys)]


def chance(*names: object) -> torch.Generator:
    """A generator of these names, the same in every process."""
    seed = hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))
