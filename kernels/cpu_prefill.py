"""Attention of a long chunk of one sequence on the CPU: gather its keys once, then few fused calls.

With many rows the cost is arithmetic, not reading: copying the keys of the visible spans into one contiguous buffer is
a few per cent, and buys calls over thousands of keys at once.

    keys    |------ past: every row sees all ------|-- own: row t sees the first t+1 --|
            0                                      p0                                  p0 + T
            one call without mask                  squares with is_causal (top-left aligned, which is right here)

Where every row sees all keys of a call, the G query heads that share a KV head are rows of one head: each key is read
once for all of them, and longer calls run in larger tiles.

Anything else (a window, scattered positions, missing spans) goes the general way: spans that every row sees whole in
calls without mask, the others in calls with an additive mask made from positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.cpu_attention import SlotRows, flash
from kvbank.kernels.segments import Geometry, Segment

STAGED_TOKENS = 8192                         # keys gathered at once: bounds the staging buffer
CAUSAL_ROWS = 256                            # rows of a causal square: the op computes all of it, so half is wasted

_Partial = tuple[Tensor, Tensor]


class Staging:
    """One buffer for gathered keys and values, reused by all layers and segments of a plan."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def room(self, num_slots: int, kv: Tensor) -> Tensor:
        """At least `num_slots` slots of kv, flat; valid until the next call."""
        need = num_slots * kv[0].numel()
        if self._buffer is None or self._buffer.numel() < need or self._buffer.dtype != kv.dtype:
            self._buffer = torch.empty(need, dtype=kv.dtype)
        return self._buffer


@dataclass(frozen=True, slots=True)
class Part:
    """Keys that one gather brings: seen whole by every row, or |-- past --|-- own --| causally, or under a mask."""

    slots: SlotRows
    num_slots: int
    past: int = 0                            # with `own`: tokens from the front that every row sees,
    own: bool = False                        # and behind them the T keys of the rows themselves
    mask: Tensor | None = None               # additive [T, tokens], in q's dtype
    blind: Tensor | None = None              # [T] bool, rows that see none of what is masked; None: all see something


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

    def run(self, q: Tensor, kv: Tensor, scale: float) -> _Partial:
        """q [all rows, H, d] -> out [T, H, d] and lse [T, H] of this segment's rows, float32."""
        g = self._geometry
        query = q[self.rows].unflatten(1, (g.kv_heads, g.group)).permute(1, 2, 0, 3)       # [Hk, G, T, d]
        merged: _Partial | None = None
        for part in self._parts:
            partial = _attend(part, query, *self._gather(part, kv), scale)
            merged = partial if merged is None else _merge(merged, partial)
        assert merged is not None, "a segment that sees nothing is not run"
        out, lse = merged
        return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)

    def _gather(self, part: Part, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [Hk, tokens, d], until the next gather."""
        staged = part.slots.gather(kv, self._staging.room(part.num_slots, kv), heads_first=True).flatten(2, 3)
        return staged[0], staged[1]


def _attend(part: Part, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Partial:
    """query: [Hk, G, T, d]; keys, values: [Hk, tokens, d]. Returns out [Hk, G, T, d] and lse [Hk, G, T], float32."""
    if part.own:
        own = _causal(query, keys[:, part.past :], values[:, part.past :], scale)
        if not part.past:
            return own
        return _merge(_whole(query, keys[:, : part.past], values[:, : part.past], scale), own)
    if part.mask is None:
        return _whole(query, keys, values, scale)
    keys, values = _per_query_head(query, keys, values)
    out, lse = flash(query, keys, values, 0.0, False, attn_mask=part.mask, scale=scale)
    if part.blind is not None:
        lse = lse.masked_fill(part.blind, float("-inf"))                 # the op says out 0, but also lse 0
    return out.float(), lse


def _whole(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Partial:
    """Every row over all keys: the G heads' rows one after the other, as rows of one head."""
    out, lse = flash(query.flatten(1, 2)[None], keys[None], values[None], 0.0, False, scale=scale)
    return out[0].view(query.shape).float(), lse[0].view(query.shape[:3])


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Partial:
    """Row t over keys 0 .. t, in squares along the diagonal and whole keys left of them."""
    done = []
    for start in range(0, query.shape[2], CAUSAL_ROWS):
        tile = query[:, :, start : start + CAUSAL_ROWS]
        stop = start + tile.shape[2]
        own_keys, own_values = _per_query_head(query, keys[:, start:stop], values[:, start:stop])
        out, lse = flash(tile, own_keys, own_values, 0.0, True, scale=scale)
        partial = out.float(), lse
        if start:
            partial = _merge(_whole(tile, keys[:, :start], values[:, :start], scale), partial)
        done.append(partial)
    if len(done) == 1:
        return done[0]
    return torch.cat([out for out, _ in done], dim=2), torch.cat([lse for _, lse in done], dim=2)


def _per_query_head(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Views [Hk, G, tokens, d]: G heads read one KV head."""
    group = query.shape[1]
    return keys[:, None].expand(-1, group, -1, -1), values[:, None].expand(-1, group, -1, -1)


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """Two partials in few ops: b's share is sigmoid(lse_b - lse_a); where both are blind (NaN), a's zero stays."""
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
    parts = [Part(SlotRows(slots), len(slots)) for slots in _tiles(spans[whole, 1], size)]
    for tile in _tiles((~whole).nonzero()[0], size):
        mask, blind = _mask(start[tile], stop[tile], g)
        parts.append(Part(SlotRows(spans[tile, 1]), len(tile), mask=mask, blind=blind))
    return parts


def _causal_parts(past: np.ndarray, own: np.ndarray, offset: int, size: int) -> list[Part]:
    """The past in tiles; the last tile rides in the same gather as the chunk's own spans."""
    tiles = _tiles(past, size)
    tail = tiles.pop() if tiles else past
    parts = [Part(SlotRows(tile), len(tile)) for tile in tiles]
    last = np.concatenate([tail, own])
    return [*parts, Part(SlotRows(last), len(last), past=len(tail) * size + offset, own=True)]


def _tiles(items: np.ndarray, size: int) -> list[np.ndarray]:
    step = max(1, STAGED_TOKENS // size)
    return [items[i : i + step] for i in range(0, len(items), step)]


def _mask(start: np.ndarray, stop: np.ndarray, g: Geometry) -> tuple[Tensor, Tensor | None]:
    """Intervals [n, T] -> additive mask [T, n*S], and which rows see none of it (None: all see something)."""
    offset = np.arange(g.span_tokens)
    hidden = (offset < start[..., None]) | (offset >= stop[..., None])       # [n, T, S]
    flat = torch.from_numpy(hidden).permute(1, 0, 2).flatten(1)
    mask = torch.zeros(flat.shape, dtype=g.dtype).masked_fill_(flat, float("-inf"))
    blind = flat.all(1)
    return mask, blind if bool(blind.any()) else None
