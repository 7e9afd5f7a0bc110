"""Attention over slots on the CPU, built on the one fused op that also returns the log-sum-exp.

`PairBatch` computes one partial per (row, span) pair, for all sequences of a step at once. Slots are read in place: adjacent
slots are one strided view, so a run of them is one call with the spans as its batch.

    kv[a:b, 0]  [n, Hk, S, d]         n adjacent slots, keys                  q  [n, Hk, M*G, d]
                                      M rows read each of them; the G query heads of a KV head are rows too

Facts about the op (PyTorch 2.13): a fully masked row returns lse 0 (no such row gets here); an all-zero mask gives the same
bits as none and costs nothing measurable; a row's bits do not depend on batch or row count once rows are padded to 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.segments import Pairs

PAD_ROWS = 8                                 # the op's row count that makes bits independent of how many rows there are

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all layers of a step share."""

    num_rows: int
    span_tokens: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Call:
    """One fused call: slots first .. first+num-1, each read by the same number of rows."""

    first: int
    num: int
    rows: int                                # M: real rows per slot
    padded: int                              # rows per slot as computed
    query: Tensor                            # int64 index into q as [T*Hk, G*d]: [num or 1, Hk, padded], flat
    shared: bool                             # every slot is read by the same rows: `query` is for one slot
    mask: Tensor | None                      # additive [num, 1, padded*G or 1, S], q's dtype


class PairBatch:
    """Partials of pairs. `run` returns them in the order of `self.pairs` (sorted by slot)."""

    def __init__(self, pairs: Pairs, geometry: Geometry, *, pad: bool) -> None:
        """pad: give every call a multiple of 8 rows, so that bits do not depend on the batch (`bitwise`)."""
        self.order = np.argsort(pairs.slot, kind="stable")
        self.pairs = pairs.take(self.order)
        self.geometry = geometry
        self._pad = pad
        self._calls = [self._call(first, num, rows, at) for first, num, rows, at in self._runs()]

    def run(self, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [T, H, d], kv [num_slots, 2, Hk, S, d] -> out [P, G, Hk, d] and lse [P, G, Hk], float32."""
        heads = q.reshape(q.shape[0] * self.geometry.kv_heads, -1)
        parts = [self._attend(call, heads, kv, scale) for call in self._calls]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def _attend(self, call: Call, heads: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        g = self.geometry
        rows = call.padded * g.group
        query = heads.index_select(0, call.query).view(1 if call.shared else call.num, g.kv_heads, rows, kv.shape[-1])
        if call.shared:
            query = query.expand(call.num, -1, -1, -1)
        slots = kv[call.first : call.first + call.num]
        out, lse = _flash(query, slots[:, 0], slots[:, 1], 0.0, False, attn_mask=call.mask, scale=scale)
        out = out.transpose(1, 2).unflatten(1, (call.padded, g.group))       # [num, padded, G, Hk, d], contiguous
        lse = lse.transpose(1, 2).unflatten(1, (call.padded, g.group))
        if call.padded != call.rows:
            out, lse = out[:, : call.rows], lse[:, : call.rows]
        return out.flatten(0, 1).float(), lse.flatten(0, 1)

    def _runs(self) -> list[tuple[int, int, int, int]]:
        """(first slot, number of slots, rows per slot, index of the first pair), over maximal runs of adjacent slots."""
        slots, starts, rows = np.unique(self.pairs.slot, return_index=True, return_counts=True)
        cuts = np.flatnonzero((np.diff(slots) != 1) | (np.diff(rows) != 0)) + 1
        edges = [0, *cuts.tolist(), len(slots)]
        return [(int(slots[a]), b - a, int(rows[a]), int(starts[a])) for a, b in zip(edges, edges[1:], strict=False) if b > a]

    def _call(self, first: int, num: int, rows: int, at: int) -> Call:
        g, pairs = self.geometry, self.pairs
        part = slice(at, at + num * rows)
        padded = rows
        if self._pad:
            while (padded * g.group) % PAD_ROWS:
                padded += 1
        row = _pad(pairs.row[part].reshape(num, rows), padded)
        shared = bool((row == row[0]).all())
        if shared:
            row = row[:1]
        query = (row[:, None, :] * g.kv_heads + np.arange(g.kv_heads)[None, :, None]).reshape(-1)
        start, stop = (_pad(x[part].reshape(num, rows), padded) for x in (pairs.start, pairs.stop))
        mask = None
        if start.any() or (stop != g.span_tokens).any():
            mask = additive_mask(start, stop, g)
        return Call(first, num, rows, padded, torch.from_numpy(query), shared, mask)


def additive_mask(start: np.ndarray, stop: np.ndarray, geometry: Geometry) -> Tensor:
    """0 where start <= offset < stop, else -inf: [num, 1, rows * G or 1, S] for intervals [num, rows]."""
    offset = torch.arange(geometry.span_tokens)
    first, last = torch.from_numpy(start)[..., None], torch.from_numpy(stop)[..., None]
    hidden = (offset < first) | (offset >= last)                             # [num, rows, S]
    mask = torch.zeros(hidden.shape, dtype=geometry.dtype).masked_fill_(hidden, float("-inf"))
    if start.shape[1] > 1 and geometry.group > 1:
        mask = mask.repeat_interleave(geometry.group, dim=1)
    return mask[:, None]


def _pad(rows: np.ndarray, width: int) -> np.ndarray:
    """Repeat the last column until there are `width`."""
    return np.concatenate([rows, np.repeat(rows[:, -1:], width - rows.shape[1], axis=1)], axis=1)
