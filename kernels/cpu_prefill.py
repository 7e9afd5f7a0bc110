"""Attention of a long chunk of one sequence on the CPU: gather its keys once, then one or two fused calls.

With many rows the cost is arithmetic, not reading: copying the keys of the visible spans into one contiguous staging buffer
is a few per cent, and buys calls over thousands of keys at once.

    keys    |------ past: every row sees all ------|-- own: row t sees the first t+1 --|
            0                                      p0                                  p0 + T
            one call without mask                  one call, is_causal (top-left aligned, which is right here)

Anything else (a window, scattered positions, missing spans) goes the general way: spans seen whole by every row in one call
without mask, the others in one call with an additive mask made from positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.cpu_attention import Geometry, _flash
from kvbank.kernels.segments import Segment

STAGED_TOKENS = 8192                         # keys gathered at once: bounds the staging buffer


class Staging:
    """One buffer for the gathered keys and values, reused by all layers and segments of a plan."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def gather(self, kv: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the slots in that order, [Hk, n*S, d] each; valid until the next gather."""
        _, two, heads, tokens, dim = kv.shape
        num = slots.shape[0]
        need = two * heads * num * tokens * dim
        if self._buffer is None or self._buffer.numel() < need or self._buffer.dtype != kv.dtype:
            self._buffer = torch.empty(need, dtype=kv.dtype)
        staged = self._buffer[:need].view(two, heads, num, tokens, dim)
        torch.index_select(kv.permute(1, 2, 0, 3, 4), 2, slots, out=staged)
        keys, values = staged.flatten(2, 3)
        return keys, values


@dataclass(frozen=True, slots=True)
class Part:
    """Keys that one gather brings and the calls over them."""

    slots: Tensor                            # [n] int64
    past: int                                # tokens from the front that every row sees
    own: bool                                # behind them: the T keys of the rows themselves, causal
    mask: Tensor | None                      # behind them: additive [T, rest]; rows that see none of it are `blind`
    blind: Tensor | None                     # [T] bool


class ChunkAttention:
    """One segment of many rows. Built once per step; `run` once per layer."""

    def __init__(self, segment: Segment, geometry: Geometry, window: int | None, staging: Staging) -> None:
        self.rows = slice(segment.first_row, segment.first_row + len(segment.positions))
        self._geometry = geometry
        self._staging = staging
        self._parts = _parts(segment, geometry, window)

    @property
    def sees_nothing(self) -> bool:
        return not self._parts

    def run(self, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [all rows, H, d] -> out [T, H, d] and lse [T, H] of this segment's rows, float32."""
        g = self._geometry
        query = q[self.rows].unflatten(1, (g.kv_heads, g.group)).permute(1, 2, 0, 3)       # [Hk, G, T, d]
        merged: tuple[Tensor, Tensor] | None = None
        for part in self._parts:
            keys, values = self._staging.gather(kv, part.slots)
            for partial in self._calls(part, query, keys[:, None], values[:, None], scale):
                merged = partial if merged is None else _merge(merged, partial)
        assert merged is not None, "a segment that sees nothing is not run"
        out, lse = merged
        return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)

    def _calls(self, part: Part, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
        calls = []
        if part.past:
            calls.append(_fused(query, keys[:, :, : part.past], values[:, :, : part.past], None, False, scale))
        if part.own:
            own = slice(part.past, part.past + query.shape[2])
            calls.append(_fused(query, keys[:, :, own], values[:, :, own], None, True, scale))
        elif part.mask is not None:
            rest = slice(part.past, part.past + part.mask.shape[-1])
            out, lse = _fused(query, keys[:, :, rest], values[:, :, rest], part.mask, False, scale)
            if part.blind is not None:
                lse = lse.masked_fill(part.blind, float("-inf"))             # the op says out 0, but lse 0
            calls.append((out, lse))
        return calls


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    keys, values = (x.expand(-1, query.shape[1], -1, -1) for x in (keys, values))          # G heads read one KV head
    out, lse = _flash(query, keys, values, 0.0, causal, attn_mask=mask, scale=scale)
    return out.float(), lse


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two partials in two ops: b's share is sigmoid(lse_b - lse_a). Where neither side sees anything, a stays."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    share = torch.sigmoid(lse_b - lse_a).nan_to_num_(0.0)
    return torch.lerp(out_a, out_b, share[..., None]), torch.logaddexp(lse_a, lse_b)


def _parts(segment: Segment, g: Geometry, window: int | None) -> list[Part]:
    positions = segment.positions.cpu().numpy()
    size = g.span_tokens
    spans = np.array(segment.spans, dtype=np.int64).reshape(-1, 2)
    seen = positions[None, :] - spans[:, :1] * size + 1                      # [spans, T]
    stop = np.clip(seen, 0, size)
    start = np.zeros_like(stop) if window is None else np.clip(seen - window, 0, size)
    live = (start < stop).any(1)
    spans, start, stop = spans[live], start[live], stop[live]
    if not len(spans):
        return []
    first, last = int(positions[0]) // size, int(positions[-1]) // size
    own = spans[:, 0] >= first
    consecutive = int(positions[-1] - positions[0]) == len(positions) - 1
    if consecutive and not start.any() and np.array_equal(spans[own, 0], np.arange(first, last + 1)):
        return _causal_parts(spans[~own, 1], spans[own, 1], int(positions[0]) % size, size)
    whole = (start == 0).all(1) & (stop == size).all(1)
    parts = [Part(torch.from_numpy(slots), len(slots) * size, False, None, None)
             for slots in _tiles(spans[whole, 1], size)]
    ragged = np.flatnonzero(~whole)
    for tile in _tiles(ragged, size):
        mask, blind = _mask(start[tile], stop[tile], g)
        parts.append(Part(torch.from_numpy(spans[tile, 1]), 0, False, mask, blind))
    return parts


def _causal_parts(past: np.ndarray, own: np.ndarray, offset: int, size: int) -> list[Part]:
    """The past in tiles; the last tile rides in the same gather as the chunk's own spans."""
    tiles = _tiles(past, size)
    tail = tiles.pop() if tiles else past
    parts = [Part(torch.from_numpy(tile), len(tile) * size, False, None, None) for tile in tiles]
    return [*parts, Part(torch.from_numpy(np.concatenate([tail, own])), len(tail) * size + offset, True, None, None)]


def _tiles(items: np.ndarray, size: int) -> list[np.ndarray]:
    step = max(1, STAGED_TOKENS // size)
    return [items[i : i + step] for i in range(0, len(items), step)]


def _mask(start: np.ndarray, stop: np.ndarray, g: Geometry) -> tuple[Tensor, Tensor | None]:
    """Intervals [n, T] -> additive mask [T, n*S], and which rows see none of it (None: all see something)."""
    offset = np.arange(g.span_tokens)
    hidden = (offset < start[..., None]) | (offset >= stop[..., None])       # [n, T, S]
    hidden = torch.from_numpy(hidden).permute(1, 0, 2).flatten(1)
    mask = torch.zeros(hidden.shape, dtype=g.dtype).masked_fill_(hidden, float("-inf"))
    blind = hidden.all(1)
    return mask, blind if bool(blind.any()) else None
