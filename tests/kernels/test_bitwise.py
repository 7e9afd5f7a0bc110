"""`bitwise`: the same bytes whoever holds which span, however the rows are cut, batched or threaded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvbank.kernels import cpu_attention
from kvbank.kernels.merge_partials import merge_tree
from kvbank.kernels.paged_attention import Segment, paged_attention, plan_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "span_tokens"),
    [(2, 2, 16, 128), (1, 1, 64, 128), (1, 1, 16, 16), (2, 3, 80, 128), (1, 4, 128, 16), (4, 1, 64, 32)])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Equal bytes; unlike torch.equal this tells 0 from -0."""
    return all(bytes_of(x).equal(bytes_of(y)) for x, y in zip(a, b, strict=True))


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def nodes_of(step, segment: Segment, rows: slice) -> dict:
    """Nodes of some rows of a segment, as one holder would answer them: only these rows in its q."""
    cut = Segment(0, segment.positions[rows], segment.spans)
    q = step.q[segment.first_row :][rows]
    plan = plan_attention([cut], num_rows=len(q), span_tokens=step.span_tokens, heads=step.heads,
                          kv_heads=step.arena.shape[3], window=step.window, exactness="bitwise", device="cpu",
                          dtype=q.dtype)
    partials = paged_attention(q, step.kv, plan, step.scale)
    return {(level, index): p for (_, level, index), p in partials.nodes.items()}


@DTYPES
@SHAPES
@pytest.mark.parametrize("window", [None, 700])
def test_placement_never_changes_a_bit(window, kv_heads, group, dim, span_tokens, dtype, make_step) -> None:
    rng = random.Random(7)
    num_spans = 37
    last = num_spans * span_tokens - 5
    slots = rng.sample(range(64), num_spans)
    for positions in ([last], list(range(last - 20, last + 1))):
        step = make_step([(positions, list(enumerate(slots)))], kv_heads=kv_heads, group=group, dim=dim,
                         span_tokens=span_tokens, dtype=dtype, window=window)
        local = step.merged("bitwise")
        for cut in (0.5, 0.1, 0.95):
            holders: list[list[tuple[int, int]]] = [[], [], []]
            run_of_holder: dict[int, int] = {}
            for index, slot in step.segments[0].spans:
                owner = run_of_holder.setdefault(index // 8, rng.randrange(3))       # whole runs, some spans astray
                holders[owner if rng.random() < cut else rng.randrange(3)].append((index, slot))
            nodes: dict = {}
            for spans in holders:
                answer = nodes_of(step, Segment(0, step.segments[0].positions, tuple(spans)), slice(None))
                assert not nodes.keys() & answer.keys()
                nodes.update(answer)
            assert same(merge_tree(nodes, num_spans), local)


@DTYPES
@SHAPES
@pytest.mark.parametrize("num_threads", [1, 2])
def test_chunking_never_changes_a_bit(
    num_threads, kv_heads, group, dim, span_tokens, dtype, make_step, rows_of
) -> None:
    torch.set_num_threads(num_threads)
    rng = random.Random(8)
    count = 150
    first = 9 * span_tokens + 3
    step = make_step([rows_of(first, count, rng.sample(range(64), 25), span_tokens)], kv_heads=kv_heads, group=group,
                     dim=dim, span_tokens=span_tokens, dtype=dtype, window=5 * span_tokens + 1)
    whole = step.merged("bitwise")
    segment = step.segments[0]
    cuts = [0, 1, 3, *sorted(rng.sample(range(4, count), 6)), count]
    for a, b in pairwise(cuts):
        part = merge_tree(nodes_of(step, segment, slice(a, b)), len(segment.spans))
        assert same(part, (whole[0][a:b], whole[1][a:b])), (a, b)


@DTYPES
@SHAPES
def test_batching_threads_and_sharing_never_change_a_bit(kv_heads, group, dim, span_tokens, dtype, make_step) -> None:
    rng = random.Random(9)
    prefix = [(i, i + 2) for i in range(10)]
    rows = []
    for b in range(9):
        first = 10 * span_tokens + rng.randrange(span_tokens)
        count = rng.choice([1, 1, 2, 30])
        own = [(10 + i, 20 + 3 * b + i) for i in range(3)]
        if b % 3 == 0:                                       # a sequence that also sees only a part of the prefix
            rows.append((list(range(5 * span_tokens, 5 * span_tokens + count)), prefix))
        else:
            rows.append((list(range(first, first + count)), prefix + own))
    step = make_step(rows, kv_heads=kv_heads, group=group, dim=dim, span_tokens=span_tokens, dtype=dtype)
    torch.set_num_threads(1)
    together = step.merged("bitwise")
    torch.set_num_threads(2)
    assert same(step.merged("bitwise"), together)
    for segment in step.segments:
        rows_here = slice(segment.first_row, segment.first_row + len(segment.positions))
        alone = merge_tree(nodes_of(step, segment, slice(None)), 1 + segment.spans[-1][0])
        assert same(alone, (together[0][rows_here], together[1][rows_here]))


@DTYPES
@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
def test_reading_in_place_or_copied_gives_the_same_bits(exactness, dtype, make_step, rows_of, monkeypatch) -> None:
    slots = [*range(20), *range(21, 40, 2), *range(60, 80)]
    step = make_step([rows_of(128 * 45 + 9, 1, slots), rows_of(128 * 45 + 9, 5, slots)], group=4, dim=64, dtype=dtype)
    torch.set_num_threads(1)
    answers = []
    for long_run, tile_bytes in ((1, 1), (1 << 20, 1 << 24), (1 << 20, 1 << 18), (4096, 8 << 20)):
        monkeypatch.setattr(cpu_attention, "LONG_RUN", long_run)
        monkeypatch.setattr(cpu_attention, "TILE_BYTES", tile_bytes)
        answers.append(step.merged(exactness))
    if exactness == "bitwise":
        assert all(same(answer, answers[0]) for answer in answers)
    else:
        assert all(torch.allclose(answer[0], answers[0][0], atol=1e-5) for answer in answers)


def test_nodes_are_the_maximal_aligned_pieces(make_step) -> None:
    held = [*range(3, 8), *range(8, 24), *range(32, 64), 70]
    step = make_step([([128 * 71 - 1], [(i, i) for i in held])])
    assert step.run("bitwise").nodes.keys() == {
        *((0, -1, i) for i in range(3, 8)), (0, 0, 1), (0, 0, 2), (0, 2, 1), (0, -1, 70)}


def test_nodes_follow_what_is_held_and_leave_out_what_no_row_sees(make_step) -> None:
    step = make_step([([128 * 40 - 1], list(enumerate(range(40))))], window=128 * 10)
    assert step.run("bitwise").nodes.keys() == {(0, 2, 0), (0, 0, 4)}            # runs 0..2 blind, 3 and 4 seen
    step = make_step([([128 * 40 - 1], list(enumerate(range(40))))], window=128 * 3)
    assert step.run("bitwise").nodes.keys() == {(0, 0, 4)}
    step = make_step([([50], list(enumerate(range(8))))])                        # 7 spans lie in the row's future
    assert step.run("bitwise").nodes.keys() == {(0, 0, 0)}


def test_a_blind_row_in_a_chunk_takes_nothing_from_its_neighbours(make_step, close) -> None:
    positions = list(range(0, 128 * 3, 9))                                       # early rows see no late span
    step = make_step([(positions, [(0, 4), (1, 5), (2, 6)])])
    for (_, _, index), (out, lse) in step.run("bitwise").nodes.items():
        blind = step.segments[0].positions < index * 128
        assert torch.equal(lse == float("-inf"), blind[:, None].expand_as(lse))
        assert not out[blind].any() and not out.isnan().any()
    close(step.merged("bitwise"), step.oracle())


def test_stages_are_bounded_and_change_no_bit(make_step, rows_of, monkeypatch) -> None:
    from kvbank.kernels import fixed_plan

    rows = [rows_of(128 * 20, 40, list(range(40, 80))), rows_of(128 * 30, 2, list(range(40)))]
    step = make_step(rows, window=128 * 12)
    whole = step.merged("bitwise")
    monkeypatch.setattr(fixed_plan, "STAGE_ELEMENTS", 50_000)
    assert same(step.merged("bitwise"), whole)
