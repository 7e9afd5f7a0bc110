"""Attention of a whole step over slots: a plan made once per step, run once per layer, partials out.

    segments --plan_attention--> AttentionPlan --paged_attention(q, kv of one layer)--> Partials

What may lie in memory: slots that no segment names are never read and may hold anything, NaN included. Inside a named
slot, tokens that some or all rows may not see are read and masked out: they must hold finite values whose scores are
finite too (zeros or real keys; the vault scrubs a slot before it hands it out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvbank.kernels import dispatch
from kvbank.kernels.segments import Geometry, Node, Partials, Segment

__all__ = ["AttentionPlan", "Node", "Partials", "Segment", "paged_attention", "plan_attention"]


class AttentionPlan(Protocol):
    """Masks, index tensors and staging of one step and one window. Not for two threads at once."""

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials: ...


def plan_attention(
    segments: Sequence[Segment], *, num_rows: int, span_tokens: int, heads: int, kv_heads: int, window: int | None,
    exactness: str, device: str | torch.device, dtype: torch.dtype,
) -> AttentionPlan:
    """Everything about a step that does not depend on the layer.

    num_rows: rows of q, padding included; a row belongs to at most one segment. window: how many keys a row sees, its
    own included; None: all. exactness: "fast" | "bitwise". dtype, device: of q and kv. Raises ValueError when heads do
    not divide, or nothing serves this exactness on this device.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    geometry = Geometry(num_rows, span_tokens, heads, kv_heads, dtype, torch.device(device))
    return dispatch.choose(exactness, geometry.device)(list(segments), geometry, window)


def paged_attention(q: Tensor, kv: Tensor, plan: AttentionPlan, scale: float) -> Partials:
    """Attend q over one layer's slots.

    q: [T, H, d]; kv: [num_slots, 2, Hk, S, d], the strided view of one layer of an arena, in q's dtype and device.
    Query head h reads KV head h // (H // Hk). Oracle: reference.paged_attention.
    """
    return plan.run(q, kv, scale)
