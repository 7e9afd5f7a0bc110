"""Attention of a long chunk of one sequence on the CPU: gather its keys once, then one or two fused calls.

With many rows the cost is arithmetic, not reading: copying the keys of the visible spans into one contiguous buffer is
a few per cent, and buys calls over thousands of keys at once.

    keys    |------ past: every row sees all ------|-- own: row t sees the first t+1 --|
            0                                      p0                                  p0 + T
            calls without mask                     squares with is_causal (top-left aligned, which is right here)

Anything else (a window, scattered positions, missing spans) goes the general way: spans that every row sees whole in
calls without mask, the others in calls with an additive mask made from positions.

float32 chunks go another way where they can: only the squares by the fused op, all else as products (cpu_products.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.cpu_attention import SlotRows, flash
from kvbank.kernels.cpu_products import ExpSums, has_products
from kvbank.kernels.segments import Geometry, Segment

STAGED_TOKENS = 8192                         # keys gathered at once: bounds the staging buffer
CAUSAL_ROWS = 128                            # rows of a causal square
SAMPLE_KEYS = 128                            # keys, evenly spread from the first on, that are looked at before all
PRODUCT_ROWS = 64                            # rows from which plain products beat the fused op

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
        self._look_at_all = False                                        # scores so far apart that a sample misleads

    @property
    def sees_nothing(self) -> bool:
        return not self._parts

    def run(self, q: Tensor, kv: Tensor, scale: float) -> _Partial:
        """q [all rows, H, d] -> out [T, H, d] and lse [T, H] of this segment's rows, float32."""
        g = self._geometry
        query = q[self.rows].unflatten(1, (g.kv_heads, g.group)).permute(1, 2, 0, 3)       # [Hk, G, T, d]
        merged = self._products(query, kv, scale) if self._by_products(q) else self._fused(query, kv, scale)
        out, lse = merged
        return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)

    def _by_products(self, q: Tensor) -> bool:
        rows = self.rows.stop - self.rows.start
        last = self._parts[-1]
        below = len(self._parts) > 1 or last.past or rows > CAUSAL_ROWS      # else there are only squares
        return bool(below and last.own and rows >= PRODUCT_ROWS and q.dtype == torch.float32 and has_products())

    def _products(self, query: Tensor, kv: Tensor, scale: float) -> _Partial:
        last = self._parts[-1]
        keys, values = self._gather(last, kv)
        out, lse = _squares(query, keys[:, last.past :], values[:, last.past :], scale)
        while True:
            reference = lse if self._look_at_all else self._sampled(query, lse, keys, scale)
            sums = ExpSums(query, reference, scale)
            if self._look_at_all:
                for keys, _, first_row in self._others(kv, query.shape[2]):
                    sums.look(keys, first_row)
            sums.weigh()
            for keys, values, first_row in self._others(kv, query.shape[2]):
                sums.add(keys, values, first_row)
            if (joined := sums.join(out, lse)) is not None or self._look_at_all:
                assert joined is not None, "a score above the largest score"
                return joined
            self._look_at_all = True                                     # and in the layers that follow

    def _sampled(self, query: Tensor, lse: Tensor, keys: Tensor, scale: float) -> Tensor:
        """A reference for ExpSums: lse or the best score among some other keys that the row sees."""
        past = self._parts[-1].past
        seen, count = (0, past) if past else (CAUSAL_ROWS, CAUSAL_ROWS)  # rows from `seen` on see the first `count`
        sample = keys[:, None, : count : -(-count // SAMPLE_KEYS)].contiguous()
        best = torch.matmul(query[:, :, seen:], sample.transpose(2, 3)).amax(-1).mul_(scale)
        return torch.cat([lse[:, :, :seen], torch.maximum(lse[:, :, seen:], best)], dim=2)

    def _others(self, kv: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """All keys and values but those of the squares, and the first row that sees them; each until the next."""
        *parts, last = self._parts
        for part in parts:
            yield *self._gather(part, kv), 0
        keys, values = self._gather(last, kv)
        if last.past:
            yield keys[:, : last.past], values[:, : last.past], 0
        for stop in range(CAUSAL_ROWS, rows, CAUSAL_ROWS):
            own = slice(last.past + stop - CAUSAL_ROWS, last.past + stop)
            yield keys[:, own], values[:, own], stop

    def _gather(self, part: Part, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [Hk, tokens, d], until the next gather."""
        staged = part.slots.gather(kv, self._staging.room(part.num_slots, kv), heads_first=True).flatten(2, 3)
        return staged[0], staged[1]

    def _fused(self, query: Tensor, kv: Tensor, scale: float) -> _Partial:
        group = self._geometry.group
        merged: _Partial | None = None
        for part in self._parts:
            keys, values = (x[:, None].expand(-1, group, -1, -1) for x in self._gather(part, kv))
            partial = _attend(part, query, keys, values, scale)                            # G heads read one KV head
            merged = partial if merged is None else _merge(merged, partial)
        assert merged is not None, "a segment that sees nothing is not run"
        return merged


def _squares(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Partial:
    """Row t over the keys of its own tile of CAUSAL_ROWS, up to t. keys, values: [Hk, T or more, d]."""
    done = []
    for start in range(0, query.shape[2], CAUSAL_ROWS):
        tile = query[:, :, start : start + CAUSAL_ROWS]
        own_keys, own_values = (x[:, None, start : start + tile.shape[2]].expand(-1, query.shape[1], -1, -1)
                                for x in (keys, values))
        done.append(_fused(tile, own_keys, own_values, scale, causal=True))
    return torch.cat([out for out, _ in done], dim=2), torch.cat([lse for _, lse in done], dim=2)


def _attend(part: Part, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Partial:
    """keys, values: [Hk, G, tokens, d]."""
    if part.own:
        own = _causal(query, keys[:, :, part.past :], values[:, :, part.past :], scale)
        if not part.past:
            return own
        return _merge(_fused(query, keys[:, :, : part.past], values[:, :, : part.past], scale), own)
    if part.mask is None:
        return _fused(query, keys, values, scale)
    out, lse = flash(query, keys, values, 0.0, False, attn_mask=part.mask, scale=scale)
    if part.blind is not None:
        lse = lse.masked_fill(part.blind, float("-inf"))                 # the op says out 0, but also lse 0
    return out.float(), lse


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Partial:
    """Row t over keys 0 .. t. In tiles: the op computes the whole square of a causal call, so small ones waste less."""
    done = []
    for start in range(0, query.shape[2], CAUSAL_ROWS):
        tile = query[:, :, start : start + CAUSAL_ROWS]
        stop = start + tile.shape[2]
        partial = _fused(tile, keys[:, :, start:stop], values[:, :, start:stop], scale, causal=True)
        if start:
            partial = _merge(_fused(tile, keys[:, :, :start], values[:, :, :start], scale), partial)
        done.append(partial)
    if len(done) == 1:
        return done[0]
    return torch.cat([out for out, _ in done], dim=2), torch.cat([lse for _, lse in done], dim=2)


def _fused(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool = False) -> _Partial:
    out, lse = flash(query, keys, values, 0.0, causal, scale=scale)
    return out.float(), lse


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
