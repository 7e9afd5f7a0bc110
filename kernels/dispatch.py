"""The one choice of implementation per device and exactness. Everything above calls `paged_attention` and never asks.

    device    "fast"                              "bitwise"
    cpu       fast_plan.FastPlan (fused CPU op)   fixed_plan.FixedPlan over cpu_attention.PairBatch
    cuda      fast_plan... over Triton            fixed_plan.FixedPlan over triton_attention.PairBatch
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvbank.kernels.paged_attention import AttentionPlan


def choose(exactness: str, device: torch.device) -> Callable[..., AttentionPlan]:
    """The plan class: called with (segments, geometry, window). Raises ValueError when nothing fits."""
    if device.type == "cpu":
        from kvbank.kernels.fast_plan import FastPlan
        from kvbank.kernels.fixed_plan import FixedPlan

        plans: dict[str, Any] = {"fast": FastPlan, "bitwise": FixedPlan}
        if exactness in plans:
            return plans[exactness]
    raise ValueError(f"no attention for exactness {exactness!r} on {device}: use 'fast' or 'bitwise' on cpu or cuda")
