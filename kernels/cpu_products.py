"""Attention of many rows as plain matrix products: oneDNN computes them at twice the rate of the fused op's (float32).

The softmax disappears into the products. Every row has a reference: its log-sum-exp over its local keys, computed by
the fused op, or the best score among a sample of the others, if that is more. All other keys are weighed against it:

    [q * scale | -(reference + SHIFT)] x [k | 1]^T     =  score - reference - SHIFT
    sigmoid of it, on the product's way out            =  e^(score - reference) * e^-SHIFT       since it is far below 0
    weights x [v | 1]                                  =  numerator | denominator, summed over tiles without rescaling

sigmoid(x) = e^x / (1 + e^x): its relative error as an exponential is e^x, hence SHIFT. A row whose other keys outweigh
the reference by more than e^(SHIFT - 12.4) = 1e5 is out of range. That is seen in the denominator, and the caller then
looks at every score first, which costs one more product and a pass for the maximum. Smaller than e^-63 of the reference
becomes 0, far below rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        heads, group, rows, dim = query.shape
        self._group, self._dim = group, dim
        turned = query.new_zeros((heads, rows, group, dim + 1))          # by rows: later rows are the end of it
        torch.mul(query.transpose(1, 2), scale, out=turned[..., :dim])
        self._query = turned.view(heads, rows * group, dim + 1)
        self._reference = reference.transpose(1, 2).reshape(heads, rows * group).clone()
        self._sums: Tensor = torch.zeros_like(self._query)
        self._keys = query.new_ones((KEY_TILE, dim + 1))
        self._values = query.new_ones(((dim + 1) * KEY_TILE,))
        self._product = torch.ops.mkldnn._linear_pointwise

    def look(self, keys: Tensor, first_row: int = 0) -> None:
        """Raise the reference of rows first_row ... to their best score among keys [Hk, n, d]. Before `add`."""
        for head, rows, _, tile in self._tiles(keys, first_row):
            best = self._product(self._query[head, rows], tile, None, "none", [], "").amax(-1)
            torch.maximum(self._reference[head, rows], best, out=self._reference[head, rows])

    def weigh(self) -> None:
        """The reference stands from here on."""
        torch.sub(-SHIFT, self._reference, out=self._query[..., self._dim])

    def add(self, keys: Tensor, values: Tensor, first_row: int = 0) -> None:
        """keys, values [Hk, n, d], all of them seen by rows first_row ... and not among these rows' local keys."""
        turned, at = self._values, (-1, -1)
        for head, rows, start, tile in self._tiles(keys, first_row):
            if at != (head, start):
                at, size = (head, start), len(tile)
                turned = self._values[: (self._dim + 1) * size].view(self._dim + 1, size)
                turned[: self._dim].copy_(values[head, start : start + size].t())
                turned[self._dim].fill_(1.0)
            weights = self._product(self._query[head, rows], tile, None, "sigmoid", [], "")
            self._sums[head, rows] += self._product(weights, turned, None, "none", [], "")

    def _tiles(self, keys: Tensor, first_row: int) -> Iterator[tuple[int, slice, int, Tensor]]:
        """(head, rows, first key, those keys with a one behind each), until the next."""
        heads, num, dim = keys.shape
        for start in range(0, num, KEY_TILE):
            tile = self._keys[: min(KEY_TILE, num - start)]
            for head in range(heads):
                tile[:, :dim].copy_(keys[head, start : start + KEY_TILE])
                for row in range(first_row * self._group, self._query.shape[1], ROW_TILE):
                    yield head, slice(row, row + ROW_TILE), start, tile

    def join(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | None:
        """With the local partial (out [Hk, G, T, d], lse [Hk, G, T]) over all keys; None: out of range."""
        heads, group, rows, dim = out.shape
        sums = self._sums.view(heads, rows, group, dim + 1).transpose(1, 2)
        weight = sums[..., dim]
        if float(weight.amax()) > LARGEST:
            return None
        reference = self._reference.view(heads, rows, group).transpose(1, 2)
        local = torch.exp(lse - reference)
        total = torch.add(local, weight, alpha=math.exp(SHIFT))
        joined = (out * local[..., None]).add_(sums[..., :dim], alpha=math.exp(SHIFT)).div_(total[..., None])
        return joined, reference + torch.log(total)


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
