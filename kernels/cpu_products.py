"""Attention of many rows as plain matrix products: oneDNN computes them at twice the rate of the fused op's (float32).

The softmax disappears into the products. Local keys first, by the fused op, give every row a reference: its log-sum-exp
over them, or the best score among the sequence's first keys, to which many heads turn when they look at nothing. All
other keys are then weighed against that, not against the row's maximum:

    [q * scale | -(reference + SHIFT)] x [k | 1]^T     =  score - reference - SHIFT
    sigmoid of it, on the product's way out            =  e^(score - reference) * e^-SHIFT       since it is far below 0
    weights x [v | 1]                                  =  numerator | denominator, summed over tiles without rescaling

sigmoid(x) = e^x / (1 + e^x): its relative error as an exponential is e^x, hence SHIFT. A row whose other keys outweigh
the reference by more than e^(SHIFT - 12.4) = 1e5 is out of range; that is seen in the denominator, and the caller then
computes the segment with the fused op. Smaller than e^-63 of the reference becomes 0, far below rounding.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

SHIFT = 24.0
LARGEST = 4e-6                               # of a denominator: bounds the sigmoid's relative error
KEY_TILE = 256                               # keys at once: with ROW_TILE, scores that stay in the cores' own caches
ROW_TILE = 1024                              # rows at once, each query head counted


class ExpSums:
    """Numerators and denominators of one segment's rows, over all the tiles that `add` is given."""

    def __init__(self, query: Tensor, reference: Tensor, scale: float) -> None:
        """query [Hk, G, T, d] (any strides); reference [Hk, G, T], at least the local keys' log-sum-exp."""
        self._reference = reference
        heads, group, rows, dim = query.shape
        self._group = group
        turned = query.new_empty((heads, rows, group, dim + 1))          # by rows: later rows are the end of it
        torch.mul(query.transpose(1, 2), scale, out=turned[..., :dim])
        torch.sub(-SHIFT, reference.transpose(1, 2), out=turned[..., dim])
        self._query = turned.view(heads, rows * group, dim + 1)
        self._sums: Tensor = query.new_zeros((heads, rows * group, dim + 1))
        self._keys = query.new_ones((KEY_TILE, dim + 1))
        self._values = query.new_ones(((dim + 1) * KEY_TILE,))
        self._product = torch.ops.mkldnn._linear_pointwise

    def add(self, keys: Tensor, values: Tensor, first_row: int = 0) -> None:
        """keys, values [Hk, n, d], all of them seen by rows first_row ... and not among these rows' local keys."""
        heads, num, dim = keys.shape
        first = first_row * self._group
        for start in range(0, num, KEY_TILE):
            size = min(KEY_TILE, num - start)
            tile, turned = self._keys[:size], self._values[: (dim + 1) * size].view(dim + 1, size)
            turned[dim].fill_(1.0)
            for head in range(heads):
                tile[:, :dim].copy_(keys[head, start : start + size])
                turned[:dim].copy_(values[head, start : start + size].t())
                for row in range(first, self._query.shape[1], ROW_TILE):
                    rows = slice(row, row + ROW_TILE)
                    weights = self._product(self._query[head, rows], tile, None, "sigmoid", [], "")
                    self._sums[head, rows] += self._product(weights, turned, None, "none", [], "")

    def join(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | None:
        """With the local partial (out [Hk, G, T, d], lse [Hk, G, T]) over all keys; None: out of range."""
        heads, group, rows, dim = out.shape
        sums = self._sums.view(heads, rows, group, dim + 1).transpose(1, 2)
        weight = sums[..., dim]
        if float(weight.amax()) > LARGEST:
            return None
        local = torch.exp(lse - self._reference)
        total = torch.add(local, weight, alpha=math.exp(SHIFT))
        joined = (out * local[..., None]).add_(sums[..., :dim], alpha=math.exp(SHIFT)).div_(total[..., None])
        return joined, self._reference + torch.log(total)


@cache
def has_products() -> bool:
    """Whether this build has them: oneDNN may be absent."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            ones = torch.ones((16, 17))
            return bool((torch.ops.mkldnn._linear_pointwise(ones, ones, None, "sigmoid", [], "") > 0.999).all())
    except (RuntimeError, AttributeError):
        return False
