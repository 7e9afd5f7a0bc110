"""The hot stream's bytes: queries to a lender, partials back. Fixed headers and raw tensors, no protobuf.

    PLAN     which rows read which refs; sent once per change      -> (no answer)
    ATTEND   one layer's queries for the rows of a plan            -> PARTIAL
    PARTIAL  per row (out, lse) over all the lender holds, or under `bitwise` one per maximal aligned piece;
             stale items are listed in it and never poison the others
    WANT     one layer's K and V of the spans of a plan            -> LAYER      (where that is fewer bytes)
    LAYER    those that are not stale, in the plan's order

Knows the format; knows nothing of streams, slots or ledgers. All integers little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack
import numpy as np

PLAN, ATTEND, PARTIAL, WANT, LAYER = 1, 2, 3, 4, 5
_HEAD = struct.Struct("<BxHiQQI")            # kind, layer, window (-1: none), plan, step, count
_NODE = np.dtype("<i4")


class HotFormatError(Exception):
    """A message of the hot stream that no version of us sends. The stream is closed."""


@dataclass(frozen=True, slots=True)
class PlanItem:
    """Some rows of one sequence, and the refs they read."""

    num_rows: int
    refs: tuple[tuple[int, int, int, int], ...]      # (span index, loan, slot, gen)


@dataclass(frozen=True, slots=True)
class HotPlan:
    """What the lender must know beside the queries."""

    plan: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    exactness: str
    items: tuple[PlanItem, ...]

    @property
    def num_rows(self) -> int:
        return sum(item.num_rows for item in self.items)

    def pack(self) -> bytes:
        body = [self.heads, self.kv_heads, self.head_dim, self.scale, self.exactness,
                [(item.num_rows, item.refs) for item in self.items]]
        return _HEAD.pack(PLAN, 0, -1, self.plan, 0, len(self.items)) + bytes(msgpack.packb(body))


@dataclass(frozen=True, slots=True)
class Attend:
    """One layer's queries. `q` is raw, [rows, heads, head_dim] in the model's dtype."""

    plan: int
    step: int
    layer: int
    window: int | None
    positions: np.ndarray                            # int64 [rows]
    q: memoryview | bytes

    def pack(self) -> bytes:
        window = -1 if self.window is None else self.window
        head = _HEAD.pack(ATTEND, self.layer, window, self.plan, self.step, len(self.positions))
        return b"".join((head, self.positions.tobytes(), self.q))


@dataclass(frozen=True, slots=True)
class Partial:
    """The answer. nodes int32 [n, 4]: item, level, index, rows; none under `fast`, where out covers all rows of the plan.

    out float32 [rows, heads, head_dim] and lse float32 [rows, heads], nodes one after the other.
    stale int32 [m, 2]: item, span index.
    """

    plan: int
    step: int
    layer: int
    nodes: np.ndarray
    stale: np.ndarray
    out: memoryview | bytes
    lse: memoryview | bytes

    def pack(self) -> bytes:
        head = _HEAD.pack(PARTIAL, self.layer, len(self.stale), self.plan, self.step, len(self.nodes))
        return b"".join((head, self.nodes.astype(_NODE).tobytes(), self.stale.astype(_NODE).tobytes(), self.lse, self.out))


@dataclass(frozen=True, slots=True)
class Want:
    """Send me this layer of the plan's spans."""

    plan: int
    step: int
    layer: int

    def pack(self) -> bytes:
        return _HEAD.pack(WANT, self.layer, -1, self.plan, self.step, 0)


@dataclass(frozen=True, slots=True)
class Layer:
    """The answer. stale int32 [m, 2]: item, span index. data: `[spans, 2, kv_heads, span_tokens, head_dim]`, raw."""

    plan: int
    step: int
    layer: int
    stale: np.ndarray
    data: memoryview | bytes

    def pack(self) -> bytes:
        head = _HEAD.pack(LAYER, self.layer, len(self.stale), self.plan, self.step, 0)
        return b"".join((head, self.stale.astype(_NODE).tobytes(), self.data))


HotMessage = HotPlan | Attend | Partial | Want | Layer


def unpack(data: bytes, *, lse_per_row: int | None = None, out_per_row: int | None = None) -> HotMessage:
    """One message. For a PARTIAL give the float counts per row (heads, and heads * head_dim) to split lse from out.

    Raises HotFormatError.
    """
    if len(data) < _HEAD.size:
        raise HotFormatError(f"{len(data)} bytes are shorter than a header")
    kind, layer, window, plan, step, count = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    try:
        if kind == PLAN:
            return _unpack_plan(plan, body)
        if kind == ATTEND:
            positions = np.frombuffer(body[: 8 * count], dtype="<i8")
            if len(positions) != count:
                raise ValueError("positions are cut short")
            return Attend(plan, step, layer, None if window < 0 else window, positions, body[8 * count :])
        if kind == WANT:
            return Want(plan, step, layer)
        if kind == LAYER:
            stale = np.frombuffer(body[: 8 * window], dtype=_NODE).reshape(window, 2)
            return Layer(plan, step, layer, stale, body[8 * window :])
        if kind == PARTIAL and lse_per_row and out_per_row:
            return _unpack_partial(plan, step, layer, count, window, body, lse_per_row, out_per_row)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise HotFormatError(str(error)) from error
    raise HotFormatError(f"unknown kind {kind}")


def _unpack_plan(plan: int, body: memoryview) -> HotPlan:
    heads, kv_heads, head_dim, scale, exactness, items = msgpack.unpackb(body, use_list=False)
    return HotPlan(plan, heads, kv_heads, head_dim, scale, exactness,
                   tuple(PlanItem(rows, tuple(tuple(ref) for ref in refs)) for rows, refs in items))


def _unpack_partial(
    plan: int, step: int, layer: int, num_nodes: int, num_stale: int, body: memoryview, lse_per_row: int, out_per_row: int
) -> Partial:
    nodes = np.frombuffer(body[: 16 * num_nodes], dtype=_NODE).reshape(num_nodes, 4)
    stale = np.frombuffer(body[16 * num_nodes : 16 * num_nodes + 8 * num_stale], dtype=_NODE).reshape(num_stale, 2)
    rest = body[16 * num_nodes + 8 * num_stale :]
    rows, odd = divmod(len(rest), 4 * (lse_per_row + out_per_row))
    if odd:
        raise ValueError("partials are cut short")
    cut = 4 * rows * lse_per_row
    return Partial(plan, step, layer, nodes, stale, rest[cut:], rest[:cut])
