"""`bitwise` attention: every span alone at full width, folded in a shape that only span indices decide.

Bits never depend on batch, chunk or placement: a pair's bits depend on its row and span alone (PairBatch with padded
rows), folds are elementwise, and their order is drawn in merge_partials.py. So this file is free to batch as it likes:

    stage      whole aligned runs (units) until their partials fill 64 MiB:   pairs -> runs, all units in one fold
    levels     left and right children of all segments side by side:          runs -> pairs of runs -> ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels import dispatch
from kvbank.kernels.merge_partials import RUN_SPANS, Partial, merge_pair, merge_run
from kvbank.kernels.segments import Geometry, Node, Pairs, Partials, Segment, visible_pairs

STAGE_ELEMENTS = 16 << 20                    # float32 elements of partials held at once (d taken as 128)


class FixedPlan:
    """Nodes of every segment: one per maximal aligned piece held whole, unless no row sees any of it."""

    def __init__(self, segments: list[Segment], geometry: Geometry, window: int | None) -> None:
        pairs = visible_pairs(segments, geometry.span_tokens, window)
        units = list(_units(segments, pairs))
        self._device = geometry.device
        self._stages = [Stage(batch, pairs, segments, geometry) for batch in _filled(units, geometry)]
        runs = [unit for stage in self._stages for unit in stage.whole]
        self._levels = _levels(segments, runs, geometry.device)

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials:
        nodes: dict[Node, Partial] = {}
        runs: list[Partial] = []
        for stage in self._stages:
            folded = stage.run(q, kv, scale, nodes)
            if folded is not None:
                runs.append(folded)
        if runs:
            rows = runs[0] if len(runs) == 1 else (torch.cat([o for o, _ in runs]), torch.cat([s for _, s in runs]))
            for level in self._levels:
                if level.left is not None and level.right is not None:
                    rows = merge_pair(level.left.pick(rows), level.right.pick(rows))
                nodes.update((node, (rows[0][part], rows[1][part])) for node, part in level.nodes)
        return Partials(nodes=nodes)


@dataclass(frozen=True, slots=True)
class Unit:
    """What one segment holds of one aligned run."""

    segment: int
    run: int
    whole: bool                              # all 8 are held
    pairs: np.ndarray                        # indices into Pairs, ordered by span, row
    num_rows: int


class Pick:
    """Chosen rows of a partial; -1 gives a row that saw nothing. A plain slice when that is enough."""

    def __init__(self, index: np.ndarray, device: torch.device) -> None:
        start, absent = int(index[0]), index < 0
        self._slice: slice | None = None
        self._absent: Tensor | None = None
        if bool((index == np.arange(start, start + len(index))).all()) and start >= 0:
            self._slice = slice(start, start + len(index))
        elif absent.any():
            self._absent = torch.from_numpy(absent).to(device)
        self._index = torch.from_numpy(np.maximum(index, 0)).to(device)

    def pick(self, rows: Partial) -> Partial:
        out, lse = rows
        if self._slice is not None:
            return out[self._slice], lse[self._slice]
        out, lse = out.index_select(0, self._index), lse.index_select(0, self._index)
        if self._absent is not None:
            out.masked_fill_(self._absent[:, None, None], 0.0)
            lse.masked_fill_(self._absent[:, None], float("-inf"))
        return out, lse


class Stage:
    """Some units: their pairs computed together, their whole runs folded together."""

    def __init__(self, units: list[Unit], pairs: Pairs, segments: list[Segment], geometry: Geometry) -> None:
        mine = np.concatenate([unit.pairs for unit in units])
        self._batch = dispatch.pair_batch(geometry.device)(pairs.take(mine), geometry, pad=True)
        self.whole = [unit for unit in units if unit.whole]
        place = np.full(len(pairs), -1)
        place[mine[self._batch.order]] = np.arange(len(mine))            # where each pair's partial will be
        grids = [_grid(unit, pairs, place, segments[unit.segment].first_row) for unit in units]
        whole = [grid for unit, grid in zip(units, grids, strict=True) if unit.whole]
        members = np.concatenate(whole, axis=1) if whole else np.empty((0, 0))           # [8, rows of all whole runs]
        self._members = [Pick(column, geometry.device) for column in members if column.max() >= 0]
        self._singles = [((unit.segment, -1, unit.run * RUN_SPANS + i), Pick(column, geometry.device))
                         for unit, grid in zip(units, grids, strict=True) if not unit.whole
                         for i, column in enumerate(grid) if column.max() >= 0]

    def run(self, q: Tensor, kv: Tensor, scale: float, nodes: dict[Node, Partial]) -> Partial | None:
        """Adds single spans to `nodes`; returns the whole runs' rows, unit after unit, [rows, H, d]."""
        rows = self._batch.run(q, kv, scale)
        nodes.update((node, pick.pick(rows)) for node, pick in self._singles)
        return merge_run([pick.pick(rows) for pick in self._members]) if self.whole else None


@dataclass(slots=True)
class Level:
    """How the rows of one level of the tree come from the level below, and which of them are answers."""

    left: Pick | None = None                 # None: the level of runs itself
    right: Pick | None = None
    nodes: list[tuple[Node, slice]] = field(default_factory=list)


def _units(segments: list[Segment], pairs: Pairs) -> Iterator[Unit]:
    """Units with something to see, by segment and run."""
    if not len(pairs):
        return
    key = pairs.segment * (int(pairs.span.max()) + RUN_SPANS) + pairs.span // RUN_SPANS
    edges = [0, *((np.diff(key) != 0).nonzero()[0] + 1).tolist(), len(key)]
    for a, b in pairwise(edges):
        number, run = int(pairs.segment[a]), int(pairs.span[a]) // RUN_SPANS
        held = [index for index, _ in segments[number].spans if index // RUN_SPANS == run]
        yield Unit(number, run, len(held) == RUN_SPANS, np.arange(a, b),
                   len(segments[number].positions))


def _grid(unit: Unit, pairs: Pairs, place: np.ndarray, first_row: int) -> np.ndarray:
    """[8, rows]: where the partial of each span of the run and each row is, -1 where there is none."""
    grid = np.full((RUN_SPANS, unit.num_rows), -1)
    grid[pairs.span[unit.pairs] % RUN_SPANS, pairs.row[unit.pairs] - first_row] = place[unit.pairs]
    return grid


def _filled(units: list[Unit], geometry: Geometry) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    size = 0
    for unit in units:
        need = len(unit.pairs) * geometry.heads * 128
        if batch and size + need > STAGE_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += need
    if batch:
        yield batch


def _levels(segments: list[Segment], runs: list[Unit], device: torch.device) -> list[Level]:
    """The trees of all segments, level by level. A run that is held but blind counts as held."""
    held = {number: _whole_runs(segment) for number, segment in enumerate(segments)}
    place: dict[tuple[int, int], slice] = {}             # (segment, index at this level) -> its rows, if any sees it
    at = 0
    for unit in runs:
        place[unit.segment, unit.run] = slice(at, at + unit.num_rows)
        at += unit.num_rows
    levels: list[Level] = []
    left: list[int] = []
    right: list[int] = []
    height = 0
    while any(held.values()):
        level = Level()
        if height:
            level.left, level.right = Pick(np.array(left), device), Pick(np.array(right), device)
        left, right = [], []
        above: dict[tuple[int, int], slice] = {}
        parents = {number: {i // 2 for i in indices if i ^ 1 in indices} for number, indices in held.items()}
        for (number, index), part in sorted(place.items(), key=lambda item: item[0]):
            if index // 2 not in parents[number]:
                level.nodes.append(((number, height, index), part))
            elif (number, index // 2) not in above:
                rows = part.stop - part.start
                above[number, index // 2] = slice(len(left), len(left) + rows)
                for side, child in ((left, 2 * (index // 2)), (right, 2 * (index // 2) + 1)):
                    seen = place.get((number, child))
                    side.extend(range(seen.start, seen.stop) if seen else [-1] * rows)
        levels.append(level)
        held, place, height = parents, above, height + 1
        if not place:
            break
    return levels


def _whole_runs(segment: Segment) -> set[int]:
    indices = {index for index, _ in segment.spans}
    runs = {index // RUN_SPANS for index in indices}
    return {run for run in runs if all(run * RUN_SPANS + i in indices for i in range(RUN_SPANS))}
