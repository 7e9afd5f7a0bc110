"""`fast` attention: few rows per sequence go together as pairs, long chunks each in their own calls."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbank.kernels.cpu_attention import PairBatch
from kvbank.kernels.cpu_prefill import ChunkAttention, Staging
from kvbank.kernels.row_merge import RowMerge
from kvbank.kernels.segments import Geometry, Partials, Segment, visible_pairs

FEW_ROWS = 8                                 # rows of a segment up to which one partial per span is cheaper


class FastPlan:
    """One partial per row over everything held here. CPU."""

    def __init__(self, segments: list[Segment], geometry: Geometry, window: int | None) -> None:
        self._num_rows = geometry.num_rows
        few = [s for s in segments if 0 < len(s.positions) <= FEW_ROWS and s.spans]
        many = [s for s in segments if len(s.positions) > FEW_ROWS and s.spans]
        pairs = visible_pairs(few, geometry.span_tokens, window)
        self._batch = PairBatch(pairs, geometry, pad=False) if len(pairs) else None
        self._merge = RowMerge(pairs.row[self._batch.order], geometry.device) if self._batch else None
        staging = Staging()
        chunks = [ChunkAttention(s, geometry, window, staging) for s in many]
        self._chunks = [chunk for chunk in chunks if not chunk.sees_nothing]

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials:
        parts: list[tuple[Tensor | slice, Tensor, Tensor]] = []
        if self._batch is not None and self._merge is not None:
            out, lse = self._merge.run(*self._batch.run(q, kv, scale))
            parts.append((self._merge.rows, out, lse))
        parts += [(chunk.rows, *chunk.run(q, kv, scale)) for chunk in self._chunks]
        if len(parts) == 1 and len(parts[0][1]) == self._num_rows:           # one part for all rows, in order
            return Partials(whole=parts[0][1:])
        out = torch.zeros(q.shape, dtype=torch.float32)
        lse = torch.full(q.shape[:2], float("-inf"))
        for rows, part_out, part_lse in parts:
            out[rows], lse[rows] = part_out, part_lse
        return Partials(whole=(out, lse))
