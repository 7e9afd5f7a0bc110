"""Capacity: how many tokens the cluster can hold for one job.

    slots of the best placed replica + what others may lend it + what its host tier takes, in tokens

A worker asks the same question again with its own books: the gateway's answer only comes before there is a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbank.proto.control_pb2 import Member, MemberView

FRAME_BYTES = 8192                   # what a parked span takes on the host beside its KV, at most


class Views(Protocol):
    """What is asked of the roster."""

    members: list[MemberView]        # another list whenever they are news


class Capacity:
    """`capacity_tokens` of the members that the roster has now. Every job asks, and they are news twice a second."""

    def __init__(
        self, roster: Views, *, span_tokens: int, host_bytes: int, lend_cap: float | None, windowed: bool = False,
    ) -> None:
        """windowed: every layer of the model has a window, and spans behind all of them are let go: any length fits."""
        self._roster, self._span_tokens, self._host_bytes, self._lend_cap = roster, span_tokens, host_bytes, lend_cap
        self._windowed = windowed
        self._counted: list[MemberView] | None = None
        self._tokens: int | None = None

    def __call__(self) -> int | None:
        """Tokens; None: unbounded, or no replica yet."""
        if self._windowed:
            return None
        if self._counted is not (members := self._roster.members):
            self._tokens = capacity_tokens([view.member for view in members], span_tokens=self._span_tokens,
                                           host_bytes=self._host_bytes, lend_cap=self._lend_cap)
            self._counted = members
        return self._tokens


def capacity_tokens(
    members: Sequence[Member], *, span_tokens: int, host_bytes: int, lend_cap: float | None
) -> int | None:
    """Tokens that the best placed replica could hold for one job if everything else were idle; None: no replica yet.

    Its own slots, what others may lend it (replicas of several shards lend nothing), and its host tier.
    """
    best = None
    for lead in members:
        if lead.kind != "model" or lead.shard != 0:
            continue
        shards = max(1, lead.shards)
        lendable = sum(
            int(other.slots_total * ((1.0 if other.kind == "lender" else 0.5) if lend_cap is None else lend_cap))
            for other in members
            if other.slot_bytes >= lead.slot_bytes
            and (other.kind == "lender" or (other.kind == "model" and other.replica != lead.replica and shards == 1))
        )
        parked = host_bytes // (lead.slot_bytes + FRAME_BYTES) if lead.slot_bytes else 0
        best = max(best or 0, (lead.slots_total + lendable // shards + parked) * span_tokens)
    return best
