"""Who sees what: the geometry of one step, as index arrays, before any tensor of q or kv exists.

A row (one query token at a position) and a span (keys i*S .. i*S+S-1) make a *pair*. What the row sees of the span is one
interval of token offsets, because causality cuts it on the right and a window on the left:

    span i     i*S |------[start ======== stop)------| i*S + S
                   too old for     seen      in the future
                   the window

A pair with an empty interval does not exist: nothing downstream ever meets a fully masked row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in one step, and the spans of it that one kv tensor holds."""

    first_row: int                           # its rows are first_row .. first_row + len(positions) - 1 of q
    positions: Tensor                        # [T] int64, ascending, usually consecutive; best on the CPU
    spans: tuple[tuple[int, int], ...]       # (span index, slot), ascending by index; gaps and () are fine


@dataclass(frozen=True, slots=True)
class Pairs:
    """All (row, span) pairs with something to see, ordered by segment, span index, row. Arrays of equal length, int64."""

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
    """Every pair of the step. Vectorised: a batch of 32 sequences with 32 spans costs well under a millisecond."""
    num_rows = np.array([len(s.positions) for s in segments], dtype=np.int64)
    num_spans = np.array([len(s.spans) for s in segments], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(s.spans for s in segments)), dtype=np.int64)
    span_of, slot_of = flat[0::2], flat[1::2]
    segment_of = np.repeat(np.arange(len(segments)), num_spans)          # per span
    rows_of = num_rows[segment_of]                                       # pairs that each span makes
    each = np.repeat(np.arange(len(span_of)), rows_of)                   # per pair: its span
    nth = np.arange(len(each)) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
    segment = segment_of[each]
    first_position = np.cumsum(num_rows) - num_rows
    positions = torch.cat([s.positions for s in segments]).cpu().numpy() if segments else np.empty(0, dtype=np.int64)
    position = positions[first_position[segment] + nth]
    first_row = np.array([s.first_row for s in segments], dtype=np.int64)
    span = span_of[each]
    seen = position - span * span_tokens + 1                             # keys of the span up to the row's own
    stop = np.minimum(seen, span_tokens)
    start = np.zeros_like(stop) if window is None else np.maximum(seen - window, 0)
    pairs = Pairs(first_row[segment] + nth, slot_of[each], start, stop, segment, span)
    exists = start < stop
    return pairs if exists.all() else pairs.take(exists)
