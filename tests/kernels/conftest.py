"""A random step: sequences with their keys laid out in slots of an arena, and queries for some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from kvbank.kernels import reference
from kvbank.kernels.merge_partials import merge_tree
from kvbank.kernels.paged_attention import Partials, Segment, paged_attention, plan_attention

Rows = tuple[list[int], list[tuple[int, int]]]               # (positions, spans) of one segment


@dataclass
class Step:
    """q, one layer's kv and the segments; everything that is asked of paged_attention in one place."""

    q: Tensor
    arena: Tensor                                            # [num_slots, layers, 2, Hk, S, d]
    segments: list[Segment]
    window: int | None = None
    scale: float = 0.25
    heads: int = 4
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def kv(self) -> Tensor:
        return self.arena[:, 1]

    @property
    def span_tokens(self) -> int:
        return self.arena.shape[4]

    def run(self, exactness: str) -> Partials:
        plan = plan_attention(
            self.segments, num_rows=len(self.q), span_tokens=self.span_tokens, heads=self.heads,
            kv_heads=self.arena.shape[3], window=self.window, exactness=exactness, device=self.q.device,
            dtype=self.q.dtype)
        return paged_attention(self.q, self.kv, plan, self.scale)

    def merged(self, exactness: str) -> tuple[Tensor, Tensor]:
        """out and lse of all rows, float32, whatever the exactness."""
        partials = self.run(exactness)
        if exactness == "fast":
            return partials.whole
        out = torch.zeros(self.q.shape)
        lse = torch.full(self.q.shape[:2], float("-inf"))
        for number, segment in enumerate(self.segments):
            nodes = {(level, index): p for (n, level, index), p in partials.nodes.items() if n == number}
            if nodes:
                rows = slice(segment.first_row, segment.first_row + len(segment.positions))
                out[rows], lse[rows] = merge_tree(nodes, 1 + max(index for index, _ in segment.spans))
        return out, lse

    def oracle(self) -> tuple[Tensor, Tensor]:
        """The same in float64."""
        return reference.paged_attention(
            self.q.double(), self.kv.double(), self.segments, span_tokens=self.span_tokens, window=self.window,
            scale=self.scale)

    def with_segments(self, rows: list[Rows]) -> Step:
        """The same memory and queries, other segments."""
        return replace(self, segments=as_segments(rows))


def as_segments(rows: list[Rows]) -> list[Segment]:
    segments, first = [], 0
    for positions, spans in rows:
        segments.append(Segment(first, torch.tensor(positions, dtype=torch.int64), tuple(spans)))
        first += len(positions)
    return segments


@pytest.fixture
def make_step() -> Callable[..., Step]:
    """make_step(rows, ...): random keys in every slot that `rows` name, NaN in all others."""

    def make(
        rows: list[Rows], *, kv_heads: int = 2, group: int = 2, dim: int = 16, span_tokens: int = 128,
        window: int | None = None, dtype: torch.dtype = torch.float32, pad_rows: int = 0, seed: int = 0,
    ) -> Step:
        generator = torch.Generator().manual_seed(seed)
        segments = as_segments(rows)
        named = sorted({slot for segment in segments for _, slot in segment.spans})
        num_slots = 2 + max(named, default=0)
        arena = torch.full((num_slots, 3, 2, kv_heads, span_tokens, dim), float("nan"), dtype=dtype)
        for slot in named:
            arena[slot] = torch.randn(arena.shape[1:], generator=generator).to(dtype)
        num_rows = sum(len(positions) for positions, _ in rows) + pad_rows
        q = torch.randn((num_rows, kv_heads * group, dim), generator=generator).to(dtype)
        return Step(q, arena, segments, window, 2.0 * dim**-0.5, kv_heads * group)

    return make


@pytest.fixture
def rows_of() -> Callable[..., Rows]:
    """rows_of(first, count, slots): consecutive positions, and all spans up to the last of them in these slots."""

    def rows(first: int, count: int, slots: list[int], span_tokens: int = 128) -> Rows:
        num_spans = (first + count - 1) // span_tokens + 1
        assert len(slots) >= num_spans, "a test names too few slots"
        return list(range(first, first + count)), list(enumerate(slots[:num_spans]))

    return rows


@pytest.fixture
def close() -> Callable[..., None]:
    """close(got, want, dtype): out and lse agree within what the dtype allows; blind rows agree exactly."""

    def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> None:
        out_tolerance, lse_tolerance = {torch.float32: (5e-6, 1e-5)}.get(dtype, (3e-2, 2e-2))
        assert got[0].dtype == got[1].dtype == torch.float32
        blind = want[1] == float("-inf")
        assert torch.equal(got[1] == float("-inf"), blind)
        assert not got[0][blind].any()
        assert (got[0] - want[0]).abs().max() <= out_tolerance
        assert (got[1] - want[1])[~blind].abs().max() <= lse_tolerance if (~blind).any() else True

    return check


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """torch_threads(n) for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
