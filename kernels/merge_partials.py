"""Attention is a merge of partials: (out, lse) over disjoint sets of keys become (out, lse) over their union.

    top = max(lse_i)     w_i = e^(lse_i - top)     out = sum(out_i * w_i) / sum(w_i)     lse = top + ln(sum(w_i))

(DistAttention, arXiv 2401.02669, in the form that ships normalised outputs.) A part that saw nothing has out 0 and lse
-inf and is skipped, never merged as zero. out: [T, H, d] float32, lse: [T, H] float32.

Merging is associative only up to rounding. Under `bitwise` its shape is therefore fixed by span indices alone:

    spans      0  1  2 ... 7 | 8 ... 15 | 16 ... 23 | 24 .. 26           level -1
    runs           0         |    1     |    2      |    3               level  0: left to right inside a run of 8
    tree             (0,1)         +        (2,3)                        level  1: node (h,i) = (h-1,2i) + (h-1,2i+1)
    root                   (1,0) + (1,1)                                 level  2

Whoever holds all spans of a node may send the node instead of its spans: same folds, same bits. The bits of a row
depend on that row alone: every step is elementwise, without fused multiply-add, and skips blind parts exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NEG_INF = float("-inf")
RUN_SPANS = 8                                # spans per aligned run: the leaves of the tree

Partial = tuple[Tensor, Tensor]


def merge_pair(a: Partial, b: Partial) -> Partial:
    """One node of the tree. Per row and head, a side with lse -inf leaves the other's bits untouched."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = torch.maximum(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    out = out_a * (weight_a / total)[..., None] + out_b * (weight_b / total)[..., None]
    lse = top + torch.log(total)
    blind_a, blind_b = lse_a == NEG_INF, lse_b == NEG_INF
    if bool((blind_a | blind_b).any()):
        out = torch.where(blind_a[..., None], out_b, torch.where(blind_b[..., None], out_a, out))
        lse = torch.where(blind_a, lse_b, torch.where(blind_b, lse_a, lse))
    return out, lse


def merge_run(spans: Sequence[Partial]) -> Partial:
    """The spans of one run of 8 that exist, in order, folded left to right under one common maximum.

    A blind part adds exact zeros, so leaving it out, for all rows or for some, gives the same bits.
    """
    lses = torch.stack([lse for _, lse in spans])
    top = lses.amax(0)
    top = top.masked_fill_(top == NEG_INF, 0.0)              # rows that nothing sees: weights 0, not e^(-inf + inf)
    weights = torch.exp(lses - top)
    total = weights[0]
    for weight in weights[1:]:                               # in order: a sum over a dimension may pair differently
        total = total + weight
    shares = (weights / total.masked_fill(total == 0.0, 1.0))[..., None]
    out = spans[0][0] * shares[0]
    out += 0.0                                               # -0 + 0 = 0: else a blind part could change a zero's sign
    term = torch.empty_like(out)                             # one buffer: fresh pages cost more than the product
    for (part, _), share in zip(spans[1:], shares[1:], strict=True):
        out += torch.mul(part, share, out=term)
    return out, top + torch.log(total)


def merge_fast(parts: Sequence[Partial]) -> Partial:
    """Merge any number of partials in few calls; the order of parts may move the last ulp.

    Rows and heads that no part saw come out as (0, -inf). Raises ValueError on an empty list.
    """
    if not parts:
        raise ValueError("nothing to merge: attention over no part at all has no value")
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.clamp(min=torch.finfo(lse.dtype).min))     # -inf - (-inf) would be NaN
    out = parts[0][0] * weights[0][..., None]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = torch.addcmul(out, part, weight[..., None])
    return out, lse


def merge_tree(nodes: Mapping[tuple[int, int], Partial], num_spans: int) -> Partial:
    """Merge the nodes of one segment, (level, index) -> partial, in the fixed shape drawn above.

    num_spans: spans of the sequence as far as its rows look; only the height of the tree follows from it. A missing
    node is built from its children; a missing side passes the other one through. Raises ValueError without any node.
    """
    num_runs = -(-num_spans // RUN_SPANS)
    merged = _subtree(nodes, max(num_runs - 1, 0).bit_length(), 0)
    if merged is None:
        raise ValueError("nothing to merge: no holder answered for any span")
    return merged


def _subtree(nodes: Mapping[tuple[int, int], Partial], level: int, index: int) -> Partial | None:
    if (level, index) in nodes:
        return nodes[level, index]
    if level == 0:
        spans = range(index * RUN_SPANS, (index + 1) * RUN_SPANS)
        held = [nodes[-1, span] for span in spans if (-1, span) in nodes]
        return merge_run(held) if held else None
    left, right = _subtree(nodes, level - 1, 2 * index), _subtree(nodes, level - 1, 2 * index + 1)
    if left is None or right is None:
        return right if left is None else left
    return merge_pair(left, right)
