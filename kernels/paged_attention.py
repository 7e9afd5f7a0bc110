"""Attention of a whole step over slots: a plan made once per step, run once per layer, partials out.

    segments (rows, positions, spans) --plan_attention--> AttentionPlan --paged_attention(q, kv of one layer)--> Partials

Slots that no segment names are never read and may hold anything, NaN included. Inside a named slot, tokens that no row may see
must hold finite values with finite scores (zeros, or old keys): they are masked, not skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvbank.kernels import dispatch
from kvbank.kernels.cpu_attention import Geometry
from kvbank.kernels.segments import Segment

__all__ = ["AttentionPlan", "Partials", "Segment", "paged_attention", "plan_attention"]

Node = tuple[int, int, int]                  # (segment number, level, index)


@dataclass(frozen=True, slots=True)
class Partials:
    """What the keys of one kv tensor say.

    "fast": `whole` = (out [T, H, d], lse [T, H]) over all rows of q; rows that see nothing have out 0, lse -inf.
    "bitwise": `nodes` = {(segment number, level, index): (out [rows, H, d], lse [rows, H])}, one entry per maximal aligned
    piece held whole: level -1 a span, level 0 a run of 8 spans, level h a subtree of 2^h runs (kernels/merge_partials.py).
    All float32. Valid as long as the caller likes.
    """

    whole: tuple[Tensor, Tensor] | None = None
    nodes: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)


class AttentionPlan(Protocol):
    """Masks, index tensors and staging of one step and one window. Not for two threads at once."""

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials: ...


def plan_attention(
    segments: Sequence[Segment], *, num_rows: int, span_tokens: int, heads: int, kv_heads: int, window: int | None,
    exactness: str, device: str | torch.device, dtype: torch.dtype,
) -> AttentionPlan:
    """Everything about a step that does not depend on the layer.

    num_rows: rows of q, padding included; a row belongs to at most one segment. window: keys a row sees, its own included;
    None: all. exactness: "fast" | "bitwise". dtype: of q and kv. Raises ValueError for an unknown exactness.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    geometry = Geometry(num_rows, span_tokens, heads, kv_heads, dtype, torch.device(device))
    return dispatch.choose(exactness, geometry.device)(list(segments), geometry, window)


def paged_attention(q: Tensor, kv: Tensor, plan: AttentionPlan, scale: float) -> Partials:
    """Attend q over one layer's slots.

    q: [T, H, d] (row-major); kv: [num_slots, 2, Hk, S, d], the strided layer view of an arena, q's dtype and device.
    Oracle: reference.paged_attention.
    """
    return plan.run(q, kv, scale)
