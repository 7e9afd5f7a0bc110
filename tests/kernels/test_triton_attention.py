"""The GPU kernel against the oracle: on a GPU where there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import random
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: it exists for Linux only", allow_module_level=True)
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was loaded before its interpreter was asked for: run it alone", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"                     # read by Triton's decorators, so before the first import

from kvbank.kernels import triton_attention  # noqa: E402
from kvbank.kernels.cpu_attention import PairBatch  # noqa: E402
from kvbank.kernels.merge_partials import merge_tree  # noqa: E402
from kvbank.kernels.segments import Geometry, visible_pairs  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SHAPES = pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "span_tokens"), [(2, 1, 16, 32), (1, 8, 64, 128), (1, 3, 80, 48), (2, 4, 32, 16)])


def geometry(step) -> Geometry:
    return Geometry(len(step.q), step.span_tokens, step.heads, step.arena.shape[3], step.q.dtype, DEVICE)


def attend(step) -> tuple[torch.Tensor, torch.Tensor]:
    plan = triton_attention.TritonPlan(step.segments, geometry(step), step.window)
    out, lse = plan.run(step.q.to(DEVICE), step.arena.to(DEVICE)[:, 1], step.scale).whole
    return out.cpu(), lse.cpu()


@SHAPES
@pytest.mark.parametrize("window", [None, 50])
def test_a_mixed_batch_equals_its_oracle(window, kv_heads, group, dim, span_tokens, make_step, rows_of, close) -> None:
    slots = random.Random(0).sample(range(64), 64)
    rows = [
        rows_of(170, 1, slots, span_tokens), rows_of(0, 1, slots[12:], span_tokens),
        rows_of(60, 21, slots[20:], span_tokens), ([3, 90, 100], [(0, 50), (5, 51), (6, 52)]), ([5], []),
        ([1], [(4, 53)]),
    ]
    step = make_step(rows, kv_heads=kv_heads, group=group, dim=dim, span_tokens=span_tokens, window=window, pad_rows=2)
    close(attend(step), step.oracle())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype, make_step, rows_of, close) -> None:
    step = make_step([rows_of(300, 1, [4, 1, 7]), rows_of(100, 9, [3])], group=4, dim=64, dtype=dtype)
    close(attend(step), step.oracle(), dtype)


def test_nan_behind_the_last_visible_key_is_not_read(make_step, rows_of, close) -> None:
    step = make_step([rows_of(200, 1, [5, 2])])
    want = step.oracle()
    step.arena[2, ..., 200 - 128 + 1 :, :] = float("nan")
    close(attend(step), want)


def test_splitting_a_sequence_over_programs_changes_only_rounding(make_step, rows_of, close, monkeypatch) -> None:
    step = make_step([rows_of(900, 1, list(range(40)), 32), rows_of(500, 3, list(range(40)), 32)], span_tokens=32)
    close(attend(step), step.oracle())
    monkeypatch.setattr(triton_attention, "ITEMS_WANTED", 6)
    close(attend(step), step.oracle())


def test_a_step_that_sees_nothing_launches_nothing(make_step) -> None:
    out, lse = attend(make_step([([3], [(2, 0)])], pad_rows=1))
    assert not out.any() and (lse == float("-inf")).all()


def pair_partials(step, rows: slice | None = None):
    """{(row, span index): (out [H, d], lse [H])} by the Triton kernel."""
    pairs = visible_pairs(step.segments, step.span_tokens, step.window)
    batch = triton_attention.TritonPairs(pairs, geometry(step), pad=True)
    out, lse = batch.run(step.q.to(DEVICE), step.arena.to(DEVICE)[:, 1], step.scale)
    mine = pairs.take(batch.order)
    keys = zip(mine.row.tolist(), mine.span.tolist(), strict=True)
    return {key: (out[i].cpu(), lse[i].cpu()) for i, key in enumerate(keys)}


@SHAPES
def test_single_pairs_agree_with_the_cpu_and_do_not_depend_on_their_batch(
    kv_heads, group, dim, span_tokens, make_step, rows_of, close
) -> None:
    shared = list(range(8))
    rows = [rows_of(5 * span_tokens, 20, shared, span_tokens), rows_of(4 * span_tokens, 1, shared, span_tokens),
            rows_of(2 * span_tokens + 3, 2, [10, 11, 12, 13], span_tokens)]
    step = make_step(rows, kv_heads=kv_heads, group=group, dim=dim, span_tokens=span_tokens)
    together = pair_partials(step)
    pairs = visible_pairs(step.segments, span_tokens, None)
    cpu = PairBatch(pairs, Geometry(len(step.q), span_tokens, step.heads, kv_heads, step.q.dtype, torch.device("cpu")),
                    pad=True)
    out, lse = cpu.run(step.q, step.kv, step.scale)
    mine = pairs.take(cpu.order)
    for i, key in enumerate(zip(mine.row.tolist(), mine.span.tolist(), strict=True)):
        close(tuple(x[None] for x in together[key]), (out[i : i + 1], lse[i : i + 1]))
    alone = pair_partials(step.with_segments(rows[:1]))
    assert all(torch.equal(alone[key][0], together[key][0]) for key in alone)


def test_the_bitwise_plan_works_over_the_kernel(make_step, rows_of, close, monkeypatch) -> None:
    from kvbank.kernels import dispatch, fixed_plan

    monkeypatch.setattr(dispatch, "pair_batch", lambda device: triton_attention.TritonPairs)
    step = make_step([rows_of(16 * 19 + 2, 3, list(range(30, 60)), 16)], span_tokens=16)
    nodes = fixed_plan.FixedPlan(step.segments, geometry(step), None)
    partials = nodes.run(step.q.to(DEVICE), step.arena.to(DEVICE)[:, 1], step.scale).nodes
    assert partials.keys() == {(0, 1, 0), (0, -1, 16), (0, -1, 17), (0, -1, 18), (0, -1, 19)}
    out, lse = merge_tree({node[1:]: partial for node, partial in partials.items()}, 20)
    close((out.cpu(), lse.cpu()), step.oracle())
