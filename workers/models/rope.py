"""Rotary positions: a float32 table of cosines and sines, and their application to query and key heads.

Halves are paired as Hugging Face checkpoints pair them (i with i + head_dim/2): cached keys mean the same everywhere.
Su et al. 2021, eq. 34; llama3 scaling as Llama 3.1 released it (long wavelengths slowed down, short ones kept).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvbank.workers.models.config_reader import RopeSpec

TABLE_ROWS = 4096                            # the table grows by this many positions


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians a position turns each pair, [head_dim / 2] float32."""
    freqs = 1.0 / (spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if spec.rope_type == "linear":
        return freqs / spec.factor
    if spec.rope_type == "llama3":
        wavelengths = 2 * math.pi / freqs
        longest, shortest = (spec.original_max_position / f for f in (spec.low_freq_factor, spec.high_freq_factor))
        slowed = torch.where(wavelengths > longest, freqs / spec.factor, freqs)
        mix = (spec.original_max_position / wavelengths - spec.low_freq_factor) / (
            spec.high_freq_factor - spec.low_freq_factor)
        between = (wavelengths <= longest) & (wavelengths >= shortest)
        return torch.where(between, (1 - mix) * slowed / spec.factor + mix * slowed, slowed)
    return freqs


class RopeTable:
    """cos | sin for every position met so far; grows as positions come.

    Each part has a fixed shape, so a position's row has the same bits however far the table reaches.
    """

    def __init__(self, spec: RopeSpec, head_dim: int, *, dtype: torch.dtype, device: str | torch.device) -> None:
        self._freqs = inverse_frequencies(spec, head_dim)
        self._dtype, self._device = dtype, device
        self._rows = torch.empty((0, 2, head_dim), dtype=dtype, device=device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For `rotated`: (cosines, signed sines), each [T, 1, head_dim] in the model's dtype, for positions [T]."""
        last = int(positions.max()) if positions.numel() else 0
        if last >= len(self._rows):
            self._grow(last + 1)
        rows = self._rows.index_select(0, positions)
        return rows[:, :1], rows[:, 1:]

    def _grow(self, count: int) -> None:
        parts = [self._rows]
        for start in range(len(self._rows), count, TABLE_ROWS):
            angles = torch.arange(start, start + TABLE_ROWS, dtype=torch.float32)[:, None] * self._freqs
            cos, sin = angles.cos(), angles.sin()
            part = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
            parts.append(part.to(dtype=self._dtype, device=self._device))
        self._rows = torch.cat(parts)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head turned by its row's angle, contiguous; `heads` is left as it is.

    heads:  [T, any number of heads, head_dim]; x1, x2 = its halves become x1 cos - x2 sin, x2 cos + x1 sin
    cos, sin:  as RopeTable.rows gives them
    One product, one product, one sum, each rounded by itself: fused, an element's bits could depend on its neighbours.
    """
    half = heads.shape[-1] // 2
    swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
    return swapped.mul_(sin).add_(heads * cos)
