"""Who sees what: the words and the geometry of one step, before any q or kv exists.

A row (one query token at a position) and a span (keys i*S .. i*S+S-1) make a *pair*. What the row sees of the span is
one interval of token offsets, because causality cuts it on the right and a window on the left:

    span i     i*S |------[start ======== stop)------| i*S + S
                   too old for     seen      in the future
                   the window

A pair with an empty interval does not exist: nothing downstream ever meets a fully masked row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

Node = tuple[int, int, int]                  # (segment number, level, index), see merge_partials.py


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in one step, and the spans of it that one kv tensor holds."""

    first_row: int                           # its rows are first_row .. first_row + len(positions) - 1 of q
    positions: Tensor                        # [T] int64, ascending, usually consecutive; on the CPU for any device
    spans: tuple[tuple[int, int], ...]       # (span index, slot), ascending by index; gaps and () are fine


@dataclass(frozen=True, slots=True)
class Partials:
    """What the keys of one kv tensor say.

    "fast": `whole` = (out [T, H, d], lse [T, H]) over all rows of q; rows that see nothing have out 0, lse -inf.
    "bitwise": `nodes` = {(segment number, level, index): (out [rows, H, d], lse [rows, H])}, one entry per maximal
    aligned piece held whole: level -1 a span, level 0 a run of 8 spans, level h a subtree of 2^h runs
    (merge_partials.py). A piece of which no row sees anything is left out: missing and blind merge to the same bits.
    All float32, and the caller's to keep.
    """

    whole: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    nodes: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all layers of a step share."""

    num_rows: int                            # of q, padding included
    span_tokens: int                         # S
    heads: int                               # H
    kv_heads: int                            # Hk
    dtype: torch.dtype                       # of q and kv
    device: torch.device

    @property
    def group(self) -> int:
        """G: query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Pairs:
    """All (row, span) pairs with something to see, by segment, span index, row. int64 arrays of equal length."""

    row: np.ndarray                          # row of q
    slot: np.ndarray                         # slot of kv
    start: np.ndarray                        # first visible token of the span ...
    stop: np.ndarray                         # ... and the one after the last
    segment: np.ndarray                      # index in the list of segments
    span: np.ndarray                         # span index in its sequence

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: np.ndarray) -> Pairs:
        """The chosen pairs, in the order of `which` (indices or a bool mask)."""
        return Pairs(self.row[which], self.slot[which], self.start[which], self.stop[which], self.segment[which],
                     self.span[which])


def visible_pairs(segments: Sequence[Segment], span_tokens: int, window: int | None) -> Pairs:
    """Every pair of the step. Vectorised: 32 sequences of 32 spans cost well under a millisecond."""
    num_rows = np.array([len(s.positions) for s in segments], dtype=np.int64)
    num_spans = np.array([len(s.spans) for s in segments], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(s.spans for s in segments)), dtype=np.int64)
    span_of, slot_of = flat[0::2], flat[1::2]
    segment_of = np.arange(len(segments)).repeat(num_spans)              # per span
    rows_of = num_rows[segment_of]                                       # pairs that each span makes
    each = np.arange(len(span_of)).repeat(rows_of)                       # per pair: its span
    nth = np.arange(len(each)) - (rows_of.cumsum() - rows_of).repeat(rows_of)
    segment = segment_of[each]
    positions = _positions(segments)
    position = positions[(num_rows.cumsum() - num_rows)[segment] + nth]
    first_row = np.array([s.first_row for s in segments], dtype=np.int64)
    seen = position - span_of[each] * span_tokens + 1                    # keys of the span up to the row's own
    stop = np.minimum(seen, span_tokens)
    start = np.zeros_like(stop) if window is None else np.maximum(seen - window, 0)
    pairs = Pairs(first_row[segment] + nth, slot_of[each], start, stop, segment, span_of[each])
    exists = start < stop
    return pairs if exists.all() else pairs.take(exists)


def _positions(segments: Sequence[Segment]) -> np.ndarray:
    if not segments:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([s.positions.cpu().numpy() for s in segments])


def runs_of_equal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbouring equal values as one: (the values, where each run begins, how long it is). Not for empty arrays."""
    begins = np.concatenate([[0], (np.diff(values) != 0).nonzero()[0] + 1])
    return values[begins], begins, np.diff(begins, append=len(values))
