"""`fast` attention on the CPU: few rows per sequence go together in pairs, long chunks each in their own calls."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.cpu_attention import Geometry, PairBatch
from kvbank.kernels.cpu_prefill import ChunkAttention, Staging
from kvbank.kernels.paged_attention import Partials
from kvbank.kernels.segments import Segment, visible_pairs

FEW_ROWS = 16                                # rows of a segment up to which one partial per span is cheaper


class FastPlan:
    """One partial per row over everything held here."""

    def __init__(self, segments: list[Segment], geometry: Geometry, window: int | None) -> None:
        self._geometry = geometry
        few = [s for s in segments if 0 < len(s.positions) <= FEW_ROWS and s.spans]
        many = [s for s in segments if len(s.positions) > FEW_ROWS and s.spans]
        pairs = visible_pairs(few, geometry.span_tokens, window)
        self._batch = PairBatch(pairs, geometry, pad=False) if len(pairs) else None
        self._merge = RowMerge(self._batch.pairs.row) if self._batch else None
        staging = Staging()
        chunks = [ChunkAttention(s, geometry, window, staging) for s in many]
        self._chunks = [chunk for chunk in chunks if not chunk.sees_nothing]

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials:
        everything = slice(0, self._geometry.num_rows)
        if self._batch is not None and self._merge is not None:
            out, lse = self._merge.run(*self._batch.run(q, kv, scale))
            if not self._chunks and self._merge.all_rows(self._geometry.num_rows):
                return Partials(whole=(out, lse))
        elif len(self._chunks) == 1 and self._chunks[0].rows == everything:
            return Partials(whole=self._chunks[0].run(q, kv, scale))
        all_out = torch.zeros((q.shape[0], *q.shape[1:]), dtype=torch.float32)
        all_lse = torch.full(q.shape[:2], float("-inf"))
        if self._merge is not None:
            all_out.index_copy_(0, self._merge.rows, out)
            all_lse.index_copy_(0, self._merge.rows, lse)
        for chunk in self._chunks:
            all_out[chunk.rows], all_lse[chunk.rows] = chunk.run(q, kv, scale)
        return Partials(whole=(all_out, all_lse))


class RowMerge:
    """Merge the partials of pairs row by row."""

    def __init__(self, row_of_pair: np.ndarray) -> None:
        """row_of_pair: [P] the row of each pair."""
        rows, counts = np.unique(row_of_pair, return_counts=True)
        self.rows = torch.from_numpy(rows)
        width = int(counts.max())
        self._shape = (len(rows), width)
        by_row = np.argsort(row_of_pair, kind="stable")
        table = np.full(self._shape, len(row_of_pair))               # points at a pair that saw nothing
        nth = np.arange(len(by_row)) - np.repeat(np.cumsum(counts) - counts, counts)
        table[np.repeat(np.arange(len(rows)), counts), nth] = by_row
        flat = table.reshape(-1)
        self._ragged = bool((counts != width).any())
        self._in_order = np.array_equal(flat, np.arange(len(row_of_pair)))
        self._table = torch.from_numpy(flat)

    def all_rows(self, num_rows: int) -> bool:
        return len(self.rows) == num_rows

    def run(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [P, G, Hk, d], lse [P, G, Hk] -> [R, H, d] and [R, H] for `rows`, heads in q's order."""
        if self._ragged:
            out = torch.cat([out, out.new_zeros(1, *out.shape[1:])])
            lse = torch.cat([lse, lse.new_full((1, *lse.shape[1:]), float("-inf"))])
        if not self._in_order:
            out, lse = out.index_select(0, self._table), lse.index_select(0, self._table)
        out, lse = out.unflatten(0, self._shape), lse.unflatten(0, self._shape)
        if self._shape[1] == 1:
            merged, total = out.squeeze(1), lse.squeeze(1)
        else:
            total = torch.logsumexp(lse, dim=1)                      # finite: every row here has a pair
            weights = torch.exp(lse - total[:, None])
            merged = (out * weights[..., None]).sum(1)
        return merged.transpose(1, 2).flatten(1, 2), total.transpose(1, 2).flatten(1, 2)
