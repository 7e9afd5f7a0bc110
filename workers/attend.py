"""Attention over all the places a sequence's KV can be: own slots, a lender's slots, the host tier. The decoder's one seam.

    store k, v of the new rows          q to every lender (written before anything is read)
              |                                  |
    partials over own slots            partials over host spans (through staging)            partials from lenders
              +----------------------------------+--------------------------------------------------+
                                       merged by log-sum-exp

Knows layers and partials; knows nothing of jobs, loans' terms or who holds what tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from kvbank.kernels.digest import DIGEST, merge_digest
from kvbank.kernels.merge_partials import merge_fast, merge_tree
from kvbank.kernels.paged_attention import AttentionPlan, Partials, Segment, paged_attention, plan_attention
from kvbank.kernels.store_kv import StorePlan
from kvbank.workers.batch import StepPlan

Node = tuple[int, int, int]                  # (segment number, level, index) of kernels.paged_attention
Staged = tuple[Tensor, list[tuple[int, list[tuple[int, int]]]]]


@dataclass(slots=True)
class RemoteReply:
    """What came for one layer from all lenders. `whole`: (rows, out, lse). `staged`: K and V that were fetched instead, as
    (kv [n, 2, kv_heads, span_tokens, head_dim], [(segment number, [(span index, row of kv)])]). `later`: more of it, fetched
    group by group while it is iterated, because staging has no room for all of it at once."""

    whole: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    nodes: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)
    staged: list[Staged] = field(default_factory=list)
    later: Iterable[Staged] = ()


class RemoteAttention(Protocol):
    """Queries out, partials back; one object per worker, over all its lenders."""

    def begin(self, plan: StepPlan) -> None:
        """A new step: which rows read which lent spans."""

    def send(self, layer: int, window: int | None, q: Tensor) -> None:
        """q [T, H, d] of the whole batch; returns once written to every lender."""

    def receive(self, layer: int, lost: dict[int, str]) -> RemoteReply:
        """Bounded wait. A span whose partial did not come is added to `lost` (uid -> why), until `later` is used up."""


class Staging(Protocol):
    """Host-tier spans, one layer at a time."""

    def begin(self, plan: StepPlan) -> None: ...

    def groups(self, layer: int) -> Iterable[Staged]:
        """Bounded groups of (kv [n, 2, kv_heads, span_tokens, head_dim], [(segment number, [(index, row of kv)])])."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is the same for every layer."""

    heads: int
    kv_heads: int
    span_tokens: int
    scale: float
    windows: tuple[int | None, ...]          # per layer of this shard
    exactness: str
    dtype: torch.dtype
    device: str = "cpu"


class JoinedAttention:
    """`decoder.forward(..., attend=this)`; call `begin(plan)` before each step."""

    def __init__(
        self, shape: AttentionShape, slots: Tensor, *, remote: RemoteAttention | None = None, staging: Staging | None = None
    ) -> None:
        """slots: `[num_slots, layers, 2, kv_heads, span_tokens, head_dim]`, the arena's view."""
        self.shape = shape
        self._layers = [slots[:, layer] for layer in range(slots.shape[1])]
        self.remote = remote
        self.staging = staging
        self.lost: dict[int, str] = {}
        self.remote_calls = 0

    def begin(self, plan: StepPlan) -> None:
        """Prepare what all layers share: masks and index tensors, once per distinct window."""
        shape = self.shape
        self.lost = {}
        self._num_rows = plan.num_rows
        self._store = StorePlan(torch.from_numpy(plan.slot_mapping), shape.span_tokens, shape.device)
        self._positions = torch.from_numpy(plan.positions).to(shape.device)
        self.rows = plan.rows
        self._segments = [self._segment(rows.first_row, rows.num_rows, rows.local) for rows in plan.rows]
        self._plans = {window: self._plan(self._segments, window) for window in set(shape.windows)}
        self._has_remote = self.remote is not None and any(rows.remote for rows in plan.rows)
        self._has_host = any(rows.host for rows in plan.rows)
        if self._has_remote:
            assert self.remote is not None
            self.remote.begin(plan)
        if self._has_host:
            assert self.staging is not None, "a span is on the host tier, but this shard has none"
            self.staging.begin(plan)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], rotated. Returns [T, heads, head_dim] in q's dtype."""
        shape = self.shape
        window = shape.windows[layer]
        if self._has_remote:
            assert self.remote is not None
            self.remote.send(layer, window, q)
        slots = self._layers[layer]
        self._store.run(slots, k, v)
        parts = [paged_attention(q, slots, self._plans[window], shape.scale)]
        if self._has_host:
            assert self.staging is not None
            parts += [self._staged(kv, uses, window, q) for kv, uses in self.staging.groups(layer)]
        reply = RemoteReply()
        if self._has_remote:
            assert self.remote is not None
            reply = self.remote.receive(layer, self.lost)
            self.remote_calls += 1
            parts += [self._staged(kv, uses, window, q) for kv, uses in chain(reply.staged, reply.later)]
        merged = self._merge_bitwise(parts, reply, q) if shape.exactness == "bitwise" else self._merge_fast(parts, reply)
        return merged.to(q.dtype)

    def _segment(self, first_row: int, num_rows: int, spans: object) -> Segment:
        return Segment(first_row, self._positions[first_row : first_row + num_rows], tuple(spans))  # type: ignore[arg-type]

    def _plan(self, segments: list[Segment], window: int | None) -> AttentionPlan:
        shape = self.shape
        return plan_attention(
            segments, num_rows=self._num_rows, span_tokens=shape.span_tokens, heads=shape.heads,
            kv_heads=shape.kv_heads, window=window, exactness=shape.exactness, device=shape.device, dtype=shape.dtype,
        )

    def _staged(self, kv: Tensor, uses: list[tuple[int, list[tuple[int, int]]]], window: int | None, q: Tensor) -> Partials:
        """Partials over spans that were brought into a staging buffer."""
        spans_of = dict(uses)
        segments = [self._segment(rows.first_row, rows.num_rows, spans_of.get(number, ()))
                    for number, rows in enumerate(self.rows)]
        return paged_attention(q, kv, self._plan(segments, window), self.shape.scale)

    def _merge_fast(self, parts: list[Partials], reply: RemoteReply) -> Tensor:
        wholes = [part.whole for part in parts]
        for rows, out, lse in reply.whole:
            if len(rows) != self._num_rows:    # a lender answers only the rows that asked it
                full_out = out.new_zeros((self._num_rows, *out.shape[1:])).index_copy_(0, rows, out)
                full_lse = lse.new_full((self._num_rows, *lse.shape[1:]), float("-inf")).index_copy_(0, rows, lse)
                out, lse = full_out, full_lse
            wholes.append((out, lse))
        merge = merge_digest if self.shape.exactness == DIGEST else merge_fast
        return wholes[0][0] if len(wholes) == 1 else merge(wholes)[0]

    def _merge_bitwise(self, parts: list[Partials], reply: RemoteReply, q: Tensor) -> Tensor:
        nodes: dict[Node, tuple[Tensor, Tensor]] = dict(reply.nodes)
        for part in parts:
            nodes.update(part.nodes)
        by_segment: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{} for _ in self.rows]
        for (number, level, index), partial in nodes.items():
            by_segment[number][level, index] = partial
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        for number, rows in enumerate(self.rows):
            if by_segment[number]:
                num_spans = -(-rows.stop // self.shape.span_tokens)
                merged, _ = merge_tree(by_segment[number], num_spans)
                out[rows.first_row : rows.first_row + rows.num_rows] = merged
        return out
