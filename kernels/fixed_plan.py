"""`bitwise` attention: every span alone at full width, folded in a shape that only span indices decide.

Bits never depend on batch, chunk or placement, because a pair's bits depend on its row and span alone (PairBatch with padded
rows), merge_pair is elementwise, and the order of merging is drawn in merge_partials.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.cpu_attention import Geometry, PairBatch
from kvbank.kernels.merge_partials import RUN_SPANS, Partial, fold, merge_pair
from kvbank.kernels.paged_attention import Node, Partials
from kvbank.kernels.segments import Segment, visible_pairs


class FixedPlan:
    """Nodes of every segment: one per maximal aligned piece held whole."""

    def __init__(self, segments: list[Segment], geometry: Geometry, window: int | None) -> None:
        self._geometry = geometry
        self._segments = segments
        pairs = visible_pairs(segments, geometry.span_tokens, window)
        self._batch = PairBatch(pairs, geometry, pad=True) if len(pairs) else None
        self._places: dict[tuple[int, int], Tensor] = {}             # (segment, span) -> [T] pair of each row, or P: none
        if self._batch is not None:
            sorted_pairs = self._batch.pairs
            for number, segment in enumerate(segments):
                for index, _ in segment.spans:
                    mine = np.flatnonzero((sorted_pairs.segment == number) & (sorted_pairs.span == index))
                    place = np.full(len(segment.positions), len(sorted_pairs))
                    place[sorted_pairs.row[mine] - segment.first_row] = mine
                    self._places[number, index] = torch.from_numpy(place)

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials:
        if self._batch is None:
            return Partials()
        out, lse = self._batch.run(q, kv, scale)
        out = torch.cat([out, out.new_zeros(1, *out.shape[1:])]).transpose(1, 2).flatten(1, 2)
        lse = torch.cat([lse, lse.new_full((1, *lse.shape[1:]), float("-inf"))]).transpose(1, 2).flatten(1, 2)
        nodes: dict[Node, Partial] = {}
        for number, segment in enumerate(self._segments):
            spans = {index: (out[place], lse[place]) for (n, index), place in self._places.items() if n == number}
            nodes.update({(number, *node): partial for node, partial in maximal_nodes(spans).items()})
        return Partials(nodes=nodes)


def maximal_nodes(spans: dict[int, Partial]) -> dict[tuple[int, int], Partial]:
    """Partials by span index -> the maximal aligned nodes that they make, (level, index) -> partial."""
    nodes: dict[tuple[int, int], Partial] = {}
    level: dict[int, Partial] = {}
    for run in sorted({index // RUN_SPANS for index in spans}):
        members = [i for i in range(run * RUN_SPANS, (run + 1) * RUN_SPANS) if i in spans]
        if len(members) == RUN_SPANS:
            level[run] = fold([spans[i] for i in members])
        else:
            nodes.update({(-1, i): spans[i] for i in members})
    height = 0
    while level:
        above: dict[int, Partial] = {}
        for index, partial in level.items():
            if index ^ 1 not in level:
                nodes[height, index] = partial
            elif index % 2 == 0:
                above[index // 2] = merge_pair(partial, level[index + 1])
        level, height = above, height + 1
    return nodes
