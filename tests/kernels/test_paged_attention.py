"""Every path of paged_attention against the dense oracle in float64."""

from __future__ import annotations

import random

import pytest
import torch

from kvbank.kernels.paged_attention import AttentionPlan, Segment, plan_attention

BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])
SCATTERED = random.Random(1).sample(range(64), 64)
ADJACENT = list(range(64))


@BOTH
@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize("slots", [ADJACENT, SCATTERED], ids=["adjacent", "scattered"])
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(2, 1, 16), (1, 8, 64), (2, 4, 80), (4, 2, 128), (1, 1, 64), (1, 3, 100)])
def test_a_mixed_batch_equals_its_oracle(
    kv_heads, group, dim, slots, window, exactness, make_step, rows_of, close
) -> None:
    rows = [
        rows_of(1500, 1, slots[0:12]),          # decode, ten spans and a tail
        rows_of(0, 1, slots[12:13]),            # a row that sees one key
        rows_of(127, 3, slots[13:15]),          # few rows over the border of a span
        rows_of(300, 70, slots[15:18]),         # a chunk that begins inside a span
        rows_of(256, 130, slots[18:22]),        # a chunk that begins at a span
        rows_of(0, 40, slots[22:23]),           # a first chunk
    ]
    step = make_step(rows, kv_heads=kv_heads, group=group, dim=dim, window=window)
    close(step.merged(exactness), step.oracle())


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_partials_are_float32_and_close(dtype, exactness, make_step, rows_of, close) -> None:
    rows = [rows_of(1000, 1, SCATTERED[:8]), rows_of(500, 90, SCATTERED[8:]), rows_of(129, 1, SCATTERED[20:])]
    step = make_step(rows, kv_heads=2, group=4, dim=64, dtype=dtype)
    close(step.merged(exactness), step.oracle(), dtype)


@BOTH
@pytest.mark.parametrize("span_tokens", [16, 48, 256])
def test_other_span_sizes_work(span_tokens, exactness, make_step, rows_of, close) -> None:
    rows = [rows_of(333, 1, SCATTERED[:30], span_tokens), rows_of(100, 60, SCATTERED[30:], span_tokens)]
    step = make_step(rows, span_tokens=span_tokens, window=77)
    close(step.merged(exactness), step.oracle())


@BOTH
@pytest.mark.parametrize("batch", [2, 3, 32])
def test_a_batch_of_decoding_sequences(batch, exactness, make_step, rows_of, close) -> None:
    rows = [rows_of(120 + 17 * b, 1, [b, b + 40, b + 80, b + 120, b + 160, b + 200]) for b in range(batch)]
    step = make_step(rows, group=4)
    close(step.merged(exactness), step.oracle())


@BOTH
@pytest.mark.parametrize("users", [2, 5])
@pytest.mark.parametrize("slots", [ADJACENT, SCATTERED], ids=["adjacent", "scattered"])
def test_sequences_may_share_the_slots_of_a_prefix(slots, users, exactness, make_step, close) -> None:
    shared = list(enumerate(slots[:5]))
    rows = [([700 + 3 * b, 701 + 3 * b][: 1 + b % 2], [*shared, (5, slots[10 + b])]) for b in range(users)]
    rows.append((list(range(650, 700)), [*shared, (5, slots[40])]))      # and a chunk that reads it too
    step = make_step(rows)
    close(step.merged(exactness), step.oracle())


@BOTH
@pytest.mark.parametrize("count", [1, 5, 60])
def test_a_holder_may_have_only_some_spans(count, exactness, make_step, close) -> None:
    first = 1000
    positions = list(range(first, first + count))
    for held in ([], [0], [3, 4], [0, 2, 6], [1, 7], [7], [8], [2, 7, 8], [9, 10]):
        step = make_step([(positions, [(index, 40 - index) for index in held])])
        close(step.merged(exactness), step.oracle())


@BOTH
@pytest.mark.parametrize("window", [None, 90])
def test_rows_need_not_be_consecutive(window, exactness, make_step, close) -> None:
    spans = [(i, 3 * i + 1) for i in range(9)]
    rows = [([5, 130, 131, 700, 1100], spans), (sorted(random.Random(3).sample(range(1152), 50)), spans)]
    step = make_step(rows, window=window)
    close(step.merged(exactness), step.oracle())


@BOTH
def test_a_window_hides_whole_spans_and_cuts_one(exactness, make_step, rows_of, close) -> None:
    step = make_step([rows_of(1023, 1, ADJACENT), rows_of(2000, 33, ADJACENT[8:])], window=200)
    close(step.merged(exactness), step.oracle())
    for segment in step.segments:                            # spans that the window hides are not even read
        for index, slot in segment.spans:
            if (index + 1) * 128 <= int(segment.positions[0]) + 1 - 200:
                step.arena[slot] = float("nan")
    close(step.merged(exactness), step.oracle())


@BOTH
def test_a_segment_that_sees_nothing_has_no_partial(exactness, make_step, rows_of, close) -> None:
    future = ([10, 11], [(3, 5), (4, 6)])
    step = make_step([rows_of(200, 1, ADJACENT), future, ([900], []), (list(range(40)), [(7, 9)])], window=64)
    close(step.merged(exactness), step.oracle())
    if exactness == "bitwise":
        assert {segment for segment, _, _ in step.run("bitwise").nodes} == {0}


@BOTH
def test_rows_of_no_segment_are_padding(exactness, make_step, rows_of, close) -> None:
    step = make_step([rows_of(200, 3, ADJACENT)], pad_rows=5)
    out, lse = step.merged(exactness)
    close((out, lse), step.oracle())
    assert out.shape[0] == 8 and (lse[3:] == float("-inf")).all()


@BOTH
def test_finite_garbage_behind_the_last_key_changes_no_bit(exactness, make_step, rows_of) -> None:
    step = make_step([rows_of(200, 1, ADJACENT), rows_of(300, 30, ADJACENT[2:])])
    clean = step.merged(exactness)
    step.arena[1, ..., 200 - 128 + 1 :, :] = 1e4
    step.arena[4, ..., 330 - 256 :, :] = -1e4
    again = step.merged(exactness)
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])


@BOTH
def test_a_plan_serves_every_layer_whatever_its_strides(exactness, make_step, rows_of) -> None:
    step = make_step([rows_of(1100, 1, SCATTERED), rows_of(300, 30, SCATTERED[20:])])

    def plan() -> AttentionPlan:
        return plan_attention(step.segments, num_rows=len(step.q), span_tokens=128, heads=4, kv_heads=2, window=None,
                              exactness=exactness, device="cpu", dtype=torch.float32)

    used = plan()
    wide = torch.zeros((*step.kv.shape[:-1], 19))            # keys that do not lie one after the other
    wide[..., :16] = step.kv
    for kv in (step.arena[:, 0], step.arena[:, 2], step.kv.contiguous(), wide[..., :16], step.kv):
        again, fresh = used.run(step.q, kv, 0.3), plan().run(step.q, kv, 0.3)
        assert torch.equal(again.whole[0], fresh.whole[0])
        assert all(torch.equal(again.nodes[node][0], fresh.nodes[node][0]) for node in fresh.nodes)


@BOTH
def test_long_scattered_contexts_are_copied_in_tiles(exactness, make_step, rows_of, close) -> None:
    slots = random.Random(5).sample(range(200), 150)
    step = make_step([rows_of(128 * 150 - 5, 1, slots)], kv_heads=4, dim=32)
    close(step.merged(exactness), step.oracle())


def test_a_chunk_with_a_past_longer_than_the_staging_buffer(make_step, rows_of, close) -> None:
    slots = random.Random(6).sample(range(200), 150)
    step = make_step([rows_of(128 * 140 + 3, 30, slots)], kv_heads=1, dim=16)
    close(step.merged("fast"), step.oracle())


def test_a_step_without_rows_or_segments_is_legal(make_step) -> None:
    step = make_step([], pad_rows=2)
    assert (step.run("fast").whole[1] == float("-inf")).all()
    assert step.run("bitwise").nodes == {}


def test_heads_must_divide_and_exactness_must_be_known() -> None:
    segment = Segment(0, torch.tensor([0]), ((0, 0),))
    common = {"num_rows": 1, "span_tokens": 128, "window": None, "dtype": torch.float32}
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        plan_attention([segment], heads=3, kv_heads=2, exactness="fast", device="cpu", **common)
    with pytest.raises(ValueError, match="'exact'"):
        plan_attention([segment], heads=2, kv_heads=2, exactness="exact", device="cpu", **common)
    with pytest.raises(ValueError, match="meta"):
        plan_attention([segment], heads=2, kv_heads=2, exactness="fast", device="meta", **common)


@pytest.mark.parametrize("seed", range(12))
def test_random_steps(seed, make_step, close) -> None:
    rng = random.Random(seed)
    kv_heads, group, dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4]), rng.choice([16, 24, 64])
    size = rng.choice([16, 32, 128])
    rows, slots = [], rng.sample(range(120), 100)
    for _ in range(rng.randint(1, 6)):
        count = rng.choice([1, 1, 2, 7, 16, 17, 50])
        first = rng.randint(0, 10 * size)
        positions = list(range(first, first + count))
        if rng.random() < 0.3:
            positions = sorted(rng.sample(range(first, first + 3 * count), count))
        spans = [(i, slots[i] if rng.random() < 0.3 else slots.pop()) for i in range(positions[-1] // size + 2)
                 if rng.random() < 0.85]
        rows.append((positions, spans))
    window = rng.choice([None, None, 1, size // 2, size, 3 * size + 1])
    step = make_step(rows, kv_heads=kv_heads, group=group, dim=dim, span_tokens=size, window=window, seed=seed)
    for exactness in ("fast", "bitwise"):
        close(step.merged(exactness), step.oracle())


@BOTH
def test_queries_may_be_a_view_of_a_fused_projection(exactness, make_step, rows_of) -> None:
    for rows in ([rows_of(700, 1, SCATTERED)], [rows_of(90, 1, [3]), rows_of(40, 1, [7])], [rows_of(300, 20, SCATTERED)]):
        step = make_step(rows, group=3)
        plain = step.merged(exactness)
        step.q = torch.cat([step.q, torch.zeros_like(step.q)], dim=1)[:, : step.heads]
        assert not step.q.is_contiguous() or len(step.q) == 1
        again = step.merged(exactness)
        assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


@BOTH
@pytest.mark.parametrize("key", [1.0, 4.0])
def test_a_far_key_may_outweigh_all_near_ones(key, exactness, make_step, rows_of, close) -> None:
    step = make_step([rows_of(700, 200, SCATTERED)])
    step.q.mul_(0.1).add_(1.0)
    step.arena[step.segments[0].spans[2][1], 1, 0, :, 5] = key           # a score of 8 * key, where others have about 2
    close(step.merged(exactness), step.oracle())


@BOTH
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("slots", [range(200), random.Random(2).sample(range(200), 200)], ids=["adjacent", "scattered"])
def test_many_short_tails_and_full_spans(slots, threads, exactness, make_step, rows_of, close, torch_threads) -> None:
    torch_threads(threads)
    for stop in (130, 190, 250):
        rows = [rows_of(stop + b % 3, 1, [slots[3 * b], slots[3 * b + 1]]) for b in range(40)]
        step = make_step(rows, group=2)
        close(step.merged(exactness), step.oracle())
        if exactness == "fast" and stop == 130:                          # what nobody sees is not even read
            for b in range(40):
                step.arena[slots[3 * b + 1], ..., 16:, :] = float("nan")
            close(step.merged(exactness), step.oracle())
