"""Attention over slots on a GPU: one Triton kernel that reads spans in place and returns (out, lse).

A program takes an *item* (some rows of one sequence, some of its spans) and one KV head. The G query heads of that KV
head are rows of its tile too, so each key is loaded once for all of them:

    tile [BLOCK_R, d]:  row m, head g  ->  tile row m*G + g            BLOCK_R // G rows per item
    item table          first row entry | rows | first span entry | spans
    row entries         row of q | first visible key position | the one after the last        and one output row each
    span entries        slot | position of its first key

`TritonPlan` (fast) splits long sequences over items and merges by row; `TritonPairs` (bitwise) gives every (row, span)
pair an entry of its own and always uses the same tile, so a pair's bits do not depend on its company.
Keys that no row of an item may see are not loaded, so here even NaN may lie behind the last token of a span.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbank.kernels.row_merge import RowMerge
from kvbank.kernels.segments import Geometry, Pairs, Partials, Segment, runs_of_equal, visible_pairs

SMALL_TILE, LARGE_TILE, PAIR_TILE = 16, 64, 32       # tile rows: decode, prefill, and always under `bitwise`
ITEMS_WANTED = 512                                   # programs that fill a large GPU a few times over
KEY_TILE_BYTES = 16 << 10                            # of K per inner step; shared memory holds a few of them


@triton.jit
def _attend_items(  # type: ignore[no-untyped-def]
    q, kv, items, rows, spans, out, lse, scale,
    q_stride, slot_stride, value_stride, head_stride, heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.load(items + item * 4)
    num_rows = tl.load(items + item * 4 + 1)
    first_span = tl.load(items + item * 4 + 2)
    num_spans = tl.load(items + item * 4 + 3)

    tile = tl.arange(0, BLOCK_R)
    entry = first_row + tile // GROUP
    head = kv_head * GROUP + tile % GROUP
    live = tile < num_rows * GROUP
    cols = tl.arange(0, BLOCK_D)
    row = tl.load(rows + entry * 3, mask=live, other=0)
    low = tl.load(rows + entry * 3 + 1, mask=live, other=2147483647)         # dead tile rows see nothing
    high = tl.load(rows + entry * 3 + 2, mask=live, other=0)
    lowest = tl.min(low, 0)
    highest = tl.max(high, 0)
    query_at = row[:, None] * q_stride + head[:, None] * DIM + cols[None, :]
    query = tl.load(q + query_at, mask=live[:, None] & (cols[None, :] < DIM), other=0.0)

    if WIDEN:
        query = query.to(tl.float32)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for s in range(num_spans):
        slot = tl.load(spans + (first_span + s) * 2)
        base = tl.load(spans + (first_span + s) * 2 + 1)
        keys = kv + slot * slot_stride + kv_head * head_stride
        for start in range(0, SPAN, BLOCK_N):
            offset = start + tl.arange(0, BLOCK_N)
            position = base + offset
            needed = (offset < SPAN) & (position >= lowest) & (position < highest)
            k = tl.load(keys + offset[None, :] * DIM + cols[:, None],
                        mask=needed[None, :] & (cols[:, None] < DIM), other=0.0)
            if WIDEN:
                k = k.to(tl.float32)
            scores = tl.dot(query, k, input_precision="ieee") * scale
            seen = needed[None, :] & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)          # a row that has seen nothing yet
            weights = tl.exp(scores - safe[:, None])
            decay = tl.exp(top - safe)
            v = tl.load(keys + value_stride + offset[:, None] * DIM + cols[None, :],
                        mask=needed[:, None] & (cols[None, :] < DIM), other=0.0)
            if WIDEN:
                v = v.to(tl.float32)
            acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * decay + tl.sum(weights, 1)
            top = new_top

    blind = total == 0.0
    safe_total = tl.where(blind, 1.0, total)
    out_at = (entry[:, None] * heads + head[:, None]) * DIM + cols[None, :]
    tl.store(out + out_at, acc / safe_total[:, None], mask=live[:, None] & (cols[None, :] < DIM))
    tl.store(lse + entry * heads + head, tl.where(blind, float("-inf"), top + tl.log(safe_total)), mask=live)


class Items:
    """The tables of one launch, on the device."""

    def __init__(self, items: np.ndarray, rows: np.ndarray, spans: np.ndarray, tile: int, geometry: Geometry) -> None:
        """items [n, 4], rows [entries, 3], spans [m, 2]: see the module's docstring."""
        self._items, self._rows, self._spans = (
            torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(geometry.device) for x in (items, rows, spans)
        )
        self._tile = tile
        self._geometry = geometry

    def run(self, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out [entries, H, d] and lse [entries, H], float32."""
        g, dim = self._geometry, q.shape[-1]
        assert kv.stride()[3:] == (dim, 1), "keys of one head lie one after the other"
        q = q.contiguous()
        entries = self._rows.shape[0]
        width, longest = (max(16, triton.next_power_of_2(n)) for n in (dim, g.span_tokens))
        keys = min(max(16, KEY_TILE_BYTES // (width * q.itemsize)), 64, longest)
        out = torch.empty((entries, g.heads, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((entries, g.heads), dtype=torch.float32, device=q.device)
        _attend_items[(self._items.shape[0], g.kv_heads)](
            q, kv, self._items, self._rows, self._spans, out, lse, scale,
            q.stride(0), kv.stride(0), kv.stride(1), kv.stride(2), g.heads,
            GROUP=g.group, DIM=dim, SPAN=g.span_tokens,
            BLOCK_R=self._tile, BLOCK_N=keys, BLOCK_D=width,
            WIDEN=q.device.type == "cpu",                # Triton's interpreter would multiply bfloat16 bit patterns
        )
        return out, lse


class TritonPairs:
    """Like cpu_attention.PairBatch: one partial per pair, `order` says of which."""

    def __init__(self, pairs: Pairs, geometry: Geometry, *, pad: bool) -> None:
        """pad: nothing to do, the tile never changes."""
        self.order = pairs.slot.argsort(kind="stable")
        mine = pairs.take(self.order)
        base = mine.span * geometry.span_tokens
        rows = np.stack([mine.row, base + mine.start, base + mine.stop], axis=1)
        # one item per slot and base (a shared slot is the same span of every sequence), at most a tile of rows each
        tile = max(PAIR_TILE, triton.next_power_of_2(geometry.group))
        _, begins, counts = runs_of_equal(mine.slot * (1 + int(base.max())) + base)
        per_item = tile // geometry.group
        items = [(begin + i, min(per_item, count - i), number, 1)
                 for number, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=True))
                 for i in range(0, count, per_item)]
        spans = np.stack([mine.slot[begins], base[begins]], axis=1)
        self._items = Items(np.array(items), rows, spans, tile, geometry)

    def run(self, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self._items.run(q, kv, scale)


class TritonPlan:
    """`fast` attention on a GPU: rows in tiles, spans of a tile split over programs, one merge."""

    def __init__(self, segments: list[Segment], geometry: Geometry, window: int | None) -> None:
        self._geometry = geometry
        pairs = visible_pairs(segments, geometry.span_tokens, window)
        self._items: Items | None = None
        if not len(pairs):
            return
        longest = max(len(s.positions) for s in segments) * geometry.group
        tile = max(SMALL_TILE if longest <= SMALL_TILE else LARGE_TILE, triton.next_power_of_2(geometry.group))
        items, rows, spans = _split(segments, geometry, window, tile // geometry.group)
        self._items = Items(np.array(items), np.array(rows), np.array(spans), tile, geometry)
        self._merge = RowMerge(np.array(rows)[:, 0], geometry.device, may_be_blind=True)

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials:
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
        if self._items is not None:
            part_out, part_lse = self._merge.run(*self._items.run(q, kv, scale))
            out[self._merge.rows], lse[self._merge.rows] = part_out, part_lse
        return Partials(whole=(out, lse))


def _split(
    segments: list[Segment], geometry: Geometry, window: int | None, per_item: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Items, row entries and span entries of a step."""
    size = geometry.span_tokens
    tiles = []                                           # (rows with their intervals, spans that one of them sees)
    for segment in segments:
        positions = segment.positions.tolist()
        rows = [(segment.first_row + i, 0 if window is None else max(0, p + 1 - window), p + 1)
                for i, p in enumerate(positions)]
        for i in range(0, len(rows), per_item):
            part = rows[i : i + per_item]
            seen = [(slot, index * size) for index, slot in segment.spans
                    if index * size < part[-1][2] and (index + 1) * size > part[0][1]]
            if seen:
                tiles.append((part, seen))
    work = sum(len(seen) for _, seen in tiles) * geometry.kv_heads
    step = max(1, -(-work // ITEMS_WANTED))              # spans per item
    items: list[tuple[int, ...]] = []
    entries: list[tuple[int, ...]] = []
    spans: list[tuple[int, ...]] = []
    for part, seen in tiles:
        for i in range(0, len(seen), step):
            chunk = seen[i : i + step]
            items.append((len(entries), len(part), len(spans), len(chunk)))
            entries.extend(part)
            spans.extend(chunk)
    return items, entries, spans
