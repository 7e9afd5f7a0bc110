"""Merge the partials of pairs row by row: the last stage of `fast` attention over spans. Any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.segments import runs_of_equal


class RowMerge:
    """Which pairs belong to which row, as one gather table; built once per step."""

    def __init__(self, row_of_pair: np.ndarray, device: torch.device, *, may_be_blind: bool = False) -> None:
        """row_of_pair: [P] the row of each pair. may_be_blind: a row may have nothing but pairs with lse -inf."""
        by_row = row_of_pair.argsort(kind="stable")
        rows, begins, counts = runs_of_equal(row_of_pair[by_row])
        width = int(counts.max())
        self.rows = torch.from_numpy(rows).to(device)                # [R], ascending
        self._shape = (len(rows), width)
        self._may_be_blind = may_be_blind
        self._ragged = bool((counts != width).any())
        if self._ragged:
            table = np.full(self._shape, len(by_row))                # points at a pair that saw nothing
            table[np.arange(len(rows)).repeat(counts), np.arange(len(by_row)) - begins.repeat(counts)] = by_row
            by_row = table.reshape(-1)
        in_order = len(rows) == 1 or (not self._ragged and bool((by_row == np.arange(len(by_row))).all()))
        self._table = None if in_order else torch.from_numpy(by_row).to(device)

    def run(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [P, H, d], lse [P, H] -> [R, H, d] and [R, H] for `rows`."""
        heads, dim = out.shape[1:]
        num, width = self._shape
        if self._ragged:
            out = torch.cat([out, out.new_zeros(1, heads, dim)])
            lse = torch.cat([lse, lse.new_full((1, heads), float("-inf"))])
        if self._table is not None:
            out, lse = out.index_select(0, self._table), lse.index_select(0, self._table)
        if width == 1:
            return out, lse
        out, lse = out.view(num, width, heads, dim), lse.view(num, width, heads)
        if width == 2 and not self._ragged and not self._may_be_blind:           # three ops, where a decoding row is short
            share = torch.sigmoid(lse[:, 1] - lse[:, 0])
            return torch.lerp(out[:, 0], out[:, 1], share.unsqueeze(-1)), torch.logaddexp(lse[:, 0], lse[:, 1])
        # Written out: softmax and logsumexp start their threads for a handful of numbers, which costs more than the rest.
        most = lse.amax(1, keepdim=True)
        if self._may_be_blind:
            most = most.clamp_(min=torch.finfo(torch.float32).min)
        weights = (lse - most).exp_()
        total = weights.sum(1, keepdim=True)
        weights = weights / total
        if self._may_be_blind:
            weights = weights.nan_to_num_(0.0)
        return (out * weights.unsqueeze(-1)).sum(1), (most + total.log_()).squeeze(1)
