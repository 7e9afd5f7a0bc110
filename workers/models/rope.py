"""Which rotary angles a model uses, as one float32 table; `kernels.rope` applies it.

Halves are paired as Hugging Face checkpoints pair them (i with i + head_dim/2): cached keys mean the same everywhere.
Su et al. 2021, eq. 34; llama3 scaling as Llama 3.1 released it (long wavelengths slowed down, short ones kept).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvbank.kernels.rope import rope_tables
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
    """cos | sin for every position met so far, float32; grows as positions come.

    Each part has a fixed shape, so a position's row has the same bits however far the table reaches.
    """

    def __init__(self, spec: RopeSpec, head_dim: int, *, device: str | torch.device) -> None:
        self._freqs, self._device = inverse_frequencies(spec, head_dim), device
        self._rows = torch.empty((0, 2 * head_dim), dtype=torch.float32, device=device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `kernels.rope.apply_rope`, each [T, head_dim], of positions [T] int64."""
        last = int(positions.max()) if positions.numel() else 0
        if last >= len(self._rows):
            self._grow(last + 1)
        cos, sin = self._rows.index_select(0, positions).chunk(2, dim=-1)
        return cos, sin

    def _grow(self, count: int) -> None:
        parts = [self._rows]
        for start in range(len(self._rows), count, TABLE_ROWS):
            positions = torch.arange(start, start + TABLE_ROWS)
            parts.append(torch.cat(rope_tables(positions, self._freqs), dim=-1).to(self._device))
        self._rows = torch.cat(parts)
