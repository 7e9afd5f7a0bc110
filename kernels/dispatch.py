"""The one choice of implementation per device and exactness. Everything above calls `paged_attention` and never asks.

    device   "fast"                                      "bitwise"
    cpu      fast_plan.FastPlan, PyTorch's fused op      fixed_plan.FixedPlan over the same op
    cuda     triton_attention.TritonPlan                 fixed_plan.FixedPlan over triton_attention.TritonPairs

"digest" is the canary's: digest.DigestPlan, a sum over hashes of the bytes, on the cpu only (docs/decisions/0018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvbank.kernels.paged_attention import AttentionPlan
    from kvbank.kernels.segments import Geometry, Pairs, Segment


SERVED = {"cpu": ("fast", "bitwise", "digest"), "cuda": ("fast", "bitwise")}


class PairPartials(Protocol):
    """One partial per (row, span) pair: cpu_attention.PairBatch or its like on another device."""

    order: np.ndarray                        # row i of what `run` returns is pair order[i]

    def __init__(self, pairs: Pairs, geometry: Geometry, *, pad: bool) -> None: ...
    def run(self, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]: ...


def choose(exactness: str, device: torch.device) -> Callable[[list[Segment], Geometry, int | None], AttentionPlan]:
    """The plan's class, called with (segments, geometry, window). Raises ValueError when nothing fits."""
    if exactness not in SERVED.get(device.type, ()):
        raise ValueError(f"no attention for exactness {exactness!r} on {device.type}: "
                         "use 'fast' or 'bitwise' on cpu or cuda")
    if exactness == "digest":
        from kvbank.kernels.digest import DigestPlan

        return DigestPlan
    if exactness == "bitwise":
        from kvbank.kernels.fixed_plan import FixedPlan

        return FixedPlan
    if device.type == "cpu":
        from kvbank.kernels.fast_plan import FastPlan

        return FastPlan
    from kvbank.kernels.triton_attention import TritonPlan  # needs Triton, which only Linux has

    return TritonPlan


def pair_batch(device: torch.device) -> type[PairPartials]:
    """The class that computes single spans for FixedPlan."""
    if device.type == "cpu":
        from kvbank.kernels.cpu_attention import PairBatch

        return PairBatch
    from kvbank.kernels.triton_attention import TritonPairs

    return TritonPairs
