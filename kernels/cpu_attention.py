"""One partial per (row, span) pair on the CPU, for all sequences of a step at once, read from the slots in place.

Built on the one fused op that also returns the log-sum-exp. Adjacent slots are one strided view, so a run of them is
one call with the spans as its batch:

    keys   kv[a:b, 0]   [n, Hk, S, d]          n slots, each read by M rows
    query               [n, Hk, M*G, d]        the G query heads that share a KV head are rows too

A call has a price of its own (12 us where this was written, 30 elsewhere, 40 to 140 when it has to wake a second
thread), so slots that lie scattered in short runs are copied into one buffer first (tiles of at most 8 MiB) and take one
call. Copying is no bargain for more than that: processors differ by six in how fast they do it (docs/decisions/0016).

Facts about the op (PyTorch 2.13, CPU): a fully masked row returns lse 0 (no such row gets here); a zero mask gives the
bits of no mask and costs nothing measurable; bits of a row do not depend on batch, threads or rows once rows are padded
to a multiple of 8, except that a call of a single (batch, head) may thread its GEMM inside: such a call is doubled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.segments import Geometry, Pairs, runs_of_equal

PAD_ROWS = 8                                 # the row count that makes bits independent of how many rows there are
LONG_RUN = 4096                              # adjacent keys, counted for each KV head, that are worth a call of their own
TILE_BYTES = 8 << 20                         # most that is copied for one call: what stays in the cache
MASK_ROWS = 16                               # rows of a slot up to which a mask that says nothing is free
SHORT_SLOTS = 4                              # slots seen by half from which they are worth a call of their own

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class SlotRows:
    """Copies chosen slots of a layer into a buffer, by rows of S*d elements, in one parallel op.

    `index_select` over whole slots would start one parallel region per slot once a slot has 32k elements.
    """

    def __init__(self, slots: np.ndarray) -> None:
        self._slots = slots
        self._index: dict[tuple[int, bool], Tensor] = {}                 # by (rows per slot of the arena, heads first)

    def gather(self, kv: Tensor, buffer: Tensor, *, heads_first: bool, tokens: int | None = None) -> Tensor:
        """kv [num_slots, 2, Hk, S, d] -> the chosen slots in order, in the flat `buffer`, which must be large enough.

        Returns [n, 2, Hk, S, d], or with heads_first [2, Hk, n, S, d]: each head's keys in one piece. tokens: only so
        many of each slot, from its beginning.
        """
        num_slots, two, heads, span_tokens, dim = kv.shape
        size, tokens = span_tokens * dim, tokens or span_tokens
        order = (two, heads, len(self._slots)) if heads_first else (len(self._slots), two, heads)
        out = buffer[: len(self._slots) * two * heads * tokens * dim].view(*order, tokens, dim)
        if kv.stride(0) % size or kv.stride()[1:] != (heads * size, size, dim, 1):
            chosen = kv.narrow(3, 0, tokens)[torch.from_numpy(self._slots)]             # an unusual view: plain, slower
            return out.copy_(chosen.permute(1, 2, 0, 3, 4) if heads_first else chosen)
        step = kv.stride(0) // size
        index = self._index.get((step, heads_first))
        if index is None:
            rows = self._slots[:, None] * step + np.arange(two * heads)
            index = torch.from_numpy((rows.T if heads_first else rows).reshape(-1).copy())
            self._index[step, heads_first] = index
        flat = kv.as_strided(((num_slots - 1) * step + two * heads, tokens * dim), (size, 1))
        torch.index_select(flat, 0, index, out=out.view(-1, tokens * dim))
        return out


@dataclass(frozen=True, slots=True)
class Call:
    """One fused call over n slots, each read by the same number of rows."""

    slots: np.ndarray                        # [n]
    adjacent: bool                           # slots[0] .. slots[0] + n-1: may be read in place
    rows: int                                # M: real rows per slot
    padded: int                              # rows per slot as computed
    query: Tensor | None                     # index into q as [T*Hk, G*d], of [n, Hk, padded]; None: q as it is
    shared: bool                             # every slot is read by the same rows: the query is for one slot
    mask: Tensor | None                      # additive [n, 1, padded*G or 1, tokens], q's dtype
    tokens: int                              # how many of each slot are read: S, or less where nobody sees the rest
    tiles: dict[int, list[SlotRows]]         # by slots per tile: how to copy them; filled when first needed

    def copies(self, step: int) -> list[SlotRows]:
        """The slots in tiles of `step`."""
        if step not in self.tiles:
            self.tiles[step] = [SlotRows(self.slots[i : i + step]) for i in range(0, len(self.slots), step)]
        return self.tiles[step]


class PairBatch:
    """Partials of pairs. Row i of what `run` returns is pair `order[i]`: call by call, slot by slot, row by row."""

    def __init__(self, pairs: Pairs, geometry: Geometry, *, pad: bool) -> None:
        """pad: give every call a shape that makes a pair's bits depend on its row and span alone (`bitwise`)."""
        self.geometry = geometry
        self._pad = pad
        by_slot = pairs.slot.argsort(kind="stable")
        slots, begins, rows = runs_of_equal(pairs.slot[by_slot])
        partly = (pairs.start[by_slot] > 0) | (pairs.stop[by_slot] < geometry.span_tokens)
        kind = (np.logical_or.reduceat(partly, begins) & (rows > MASK_ROWS)).astype(np.int64)
        if not pad:
            short = np.maximum.reduceat(pairs.stop[by_slot], begins) <= geometry.span_tokens // 2
            if short.sum() >= SHORT_SLOTS:
                kind += 2 * short
        groups = _groups(slots, rows, kind, geometry)
        if len(groups) > 1:
            order = np.concatenate([group for group, _ in groups])       # slots in the order of calls
            by_slot = np.concatenate([by_slot[begins[i] : begins[i] + rows[i]] for i in order])
        self.order = by_slot
        self._pairs = pairs.take(by_slot)
        self._calls: list[Call] = []
        done = 0
        for group, adjacent in groups:
            width = int(rows[group[0]])
            stop = done + len(group) * width
            self._calls.append(self._call(slots[group], adjacent, slice(done, stop), width))
            done = stop
        self._buffer: Tensor | None = None

    def run(self, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [T, H, d], kv [num_slots, 2, Hk, S, d] -> out [P, H, d] and lse [P, H], float32."""
        parts: list[tuple[Tensor, Tensor]] = []
        slot_bytes = kv.stride(1) * 2 * kv.itemsize
        for call in self._calls:
            query, num = self._query(call, q), len(call.slots)
            if call.adjacent:
                slots = kv.narrow(0, int(call.slots[0]), num).narrow(3, 0, call.tokens)
                parts.append(self._attend(call, query, slots, call.mask, scale))
                continue
            step = max(1, TILE_BYTES // slot_bytes)
            for i, tile in enumerate(call.copies(step)):
                part = slice(i * step, (i + 1) * step)
                mask = call.mask if call.mask is None else call.mask[part]
                copied = tile.gather(kv, self._room(kv), heads_first=False, tokens=call.tokens)
                parts.append(self._attend(call, query[part], copied, mask, scale))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def _query(self, call: Call, q: Tensor) -> Tensor:
        """[n, Hk, padded*G, d], a view or one gather."""
        group, heads, dim, num = self.geometry.group, self.geometry.kv_heads, q.shape[-1], len(call.slots)
        if call.query is not None:
            q = q.reshape(q.shape[0] * heads, group * dim).index_select(0, call.query)
        q = q.view(1 if call.shared else num, heads, call.padded * group, dim)
        return q.expand(num, -1, -1, -1) if call.shared else q

    def _attend(
        self, call: Call, query: Tensor, slots: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        group, (num, heads, _, dim) = self.geometry.group, query.shape
        keys, values = slots.unbind(1)
        twice = self._pad and num * heads == 1                           # see the module's docstring
        if twice:
            query, keys, values = (x.expand(2, -1, -1, -1) for x in (query, keys, values))
        out, lse = flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        if twice:
            out, lse = out[:1], lse[:1]
        if call.padded > 1:                                              # [n, Hk, padded*G] -> [n, M, Hk, G]
            out = out.view(num, heads, call.padded, group, dim)[:, :, : call.rows].transpose(1, 2)
            lse = lse.unflatten(2, (call.padded, group))[:, :, : call.rows].transpose(1, 2)
        pairs = num * call.rows
        return out.reshape(pairs, heads * group, dim).float(), lse.reshape(pairs, heads * group)

    def _room(self, kv: Tensor) -> Tensor:
        """The buffer for copied slots, shared by the calls of a plan and by all layers."""
        if self._buffer is None or self._buffer.dtype != kv.dtype:
            slot = kv[0].numel()
            most = max(len(call.slots) for call in self._calls)
            self._buffer = torch.empty(min(most * slot, max(slot, TILE_BYTES // kv.itemsize)), dtype=kv.dtype)
        return self._buffer

    def _call(self, slots: np.ndarray, adjacent: bool, part: slice, rows: int) -> Call:
        g, pairs, num = self.geometry, self._pairs, len(slots)
        padded = rows
        if self._pad:
            while (padded * g.group) % PAD_ROWS:
                padded += 1
        row = _widen(pairs.row[part].reshape(num, rows), padded)
        shared = num > 1 and bool((row == row[0]).all())
        if shared:
            row = row[:1]
        query = None
        if padded > 1 or len(row) != g.num_rows or not (row[:, 0] == np.arange(len(row))).all():
            query = torch.from_numpy((row[:, None, :] * g.kv_heads + np.arange(g.kv_heads)[:, None]).reshape(-1))
        start, stop = pairs.start[part], pairs.stop[part]
        tokens = g.span_tokens
        if not self._pad and num >= SHORT_SLOTS:
            tokens = min(tokens, -(-int(stop.max()) // 16) * 16)
        mask = None
        if start.any() or (stop != g.span_tokens).any():
            mask = additive_mask(_widen(start.reshape(num, rows), padded), _widen(stop.reshape(num, rows), padded), g)
            mask = mask[..., :tokens]
        return Call(slots, adjacent, rows, padded, query, shared, mask, tokens, {})


def _groups(slots: np.ndarray, rows: np.ndarray, kind: np.ndarray, g: Geometry) -> list[tuple[np.ndarray, bool]]:
    """Which slots go in one call: (indices into `slots`, adjacent).

    A call's slots are read by equally many rows and are of one `kind`, 0 to 3: 1 needs a large mask, 2 is seen by half.
    """
    same = 4 * rows + kind
    cuts = (np.diff(slots) != 1) | (np.diff(same) != 0)
    edges = [0, *(cuts.nonzero()[0] + 1).tolist(), len(slots)]
    groups: list[tuple[np.ndarray, bool]] = []
    short: dict[int, list[np.ndarray]] = {}
    for run in (np.arange(a, b) for a, b in pairwise(edges)):
        keys = len(run) * g.span_tokens * g.kv_heads // (1 + (kind[run[0]] > 1))
        if keys >= LONG_RUN:
            groups.append((run, True))
        else:
            short.setdefault(int(same[run[0]]), []).append(run)
    for runs in short.values():
        groups += [(run, True) for run in runs] if len(runs) <= 2 else [(np.concatenate(runs), False)]
    return groups


def additive_mask(start: np.ndarray, stop: np.ndarray, geometry: Geometry) -> Tensor:
    """0 where start <= offset < stop, else -inf: [num, 1, rows * G or 1, S] for intervals [num, rows]."""
    offset = np.arange(geometry.span_tokens)
    hidden = torch.from_numpy((offset < start[..., None]) | (offset >= stop[..., None]))     # [num, rows, S]
    mask = torch.zeros(hidden.shape, dtype=geometry.dtype).masked_fill_(hidden, float("-inf"))
    if start.shape[1] > 1 and geometry.group > 1:
        mask = mask.repeat_interleave(geometry.group, dim=1)
    return mask[:, None]


def _widen(rows: np.ndarray, width: int) -> np.ndarray:
    """Repeat the last column until there are `width`."""
    if rows.shape[1] == width:
        return rows
    return np.concatenate([rows, rows[:, -1:].repeat(width - rows.shape[1], axis=1)], axis=1)
