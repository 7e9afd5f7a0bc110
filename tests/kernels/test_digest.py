"""The digest against its oracle in plain integers, and against every way to get a byte wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbank.kernels import reference
from kvbank.kernels.digest import from_limbs, merge_digest, to_limbs, token_hashes
from kvbank.kernels.paged_attention import Segment, paged_attention, plan_attention

SPAN, SLOTS = 8, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_bytes(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Any bytes that are finite numbers, NaN and infinity left out, as the canary's are."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    raw[..., dtype.itemsize - 1 :: dtype.itemsize] &= 0xBF
    return raw.view(dtype)


def queries(rows: int, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(0, 256, (rows, heads, 16), generator=torch.Generator().manual_seed(rows)).to(dtype)


def run(
    q: Tensor, kv: Tensor, segments: list[Segment], window: int | None = None
) -> tuple[Tensor, Tensor]:
    plan = plan_attention(segments, num_rows=len(q), span_tokens=SPAN, heads=q.shape[1], kv_heads=kv.shape[2], window=window,
                          exactness="digest", device="cpu", dtype=q.dtype)
    return paged_attention(q, kv, plan, 0.25).whole


TWO = [Segment(0, torch.tensor([9, 10, 11]), ((0, 4), (1, 2))), Segment(3, torch.tensor([30]), ((1, 2), (2, 0), (3, 5)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 12])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_the_digest_is_what_plain_integers_say(dtype, window, heads) -> None:
    q, kv = queries(5, heads[0], dtype), random_bytes(3, SLOTS, 2, heads[1], SPAN, 16, dtype=dtype)   # row 4 is padding
    out, lse = run(q, kv, TWO, window)
    want = reference.digest(q, kv, TWO, span_tokens=SPAN, window=window)
    got = from_limbs(out)
    assert [[tuple(map(int, lanes)) for lanes in row] for row in got] == want
    assert out.dtype == torch.float32 and lse.shape == (5, heads[0])


def test_parts_merge_to_the_whole_in_any_order_and_grouping() -> None:
    q, kv = queries(4, 2), random_bytes(4, SLOTS, 2, 2, SPAN, 16)
    places = ((0, 4), (1, 2), (2, 0), (3, 5))
    rows = torch.tensor([28, 29, 30, 31])
    whole = run(q, kv, [Segment(0, rows, places)])
    parts = [run(q, kv, [Segment(0, rows, (place,))]) for place in places]
    rng = random.Random(0)
    for _ in range(10):
        rng.shuffle(parts)
        left, right = merge_digest(parts[:2]), merge_digest(parts[2:])
        assert torch.equal(merge_digest([left, right])[0], whole[0])
    assert not torch.equal(merge_digest(parts[:3])[0], whole[0])
    assert not torch.equal(merge_digest([*parts, parts[0]])[0], whole[0])


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in DTYPES[1:])], ids=str)
def test_every_single_bit_of_every_visible_byte_counts_and_no_other(dtype) -> None:
    kv = random_bytes(5, 2, 2, 1, SPAN, 16, dtype=dtype)
    segments = [Segment(0, torch.tensor([SPAN + 2]), ((0, 1), (1, 0)))]
    q = queries(1, 1, dtype)
    before = run(q, kv, segments)[0]
    raw = kv.view(torch.uint8)
    for slot, which, token, byte, bit in np.ndindex(2, 2, SPAN, 16 * dtype.itemsize, 8):
        raw[slot, which, 0, token, byte] ^= 1 << bit
        seen = slot == 1 or token <= 2
        assert torch.equal(run(q, kv, segments)[0], before) != seen
        raw[slot, which, 0, token, byte] ^= 1 << bit


def test_the_same_bytes_at_other_places_are_another_sum() -> None:
    q, kv = queries(1, 2), random_bytes(6, SLOTS, 2, 2, SPAN, 16)
    row = torch.tensor([15])
    before = run(q, kv, [Segment(0, row, ((0, 4), (1, 2)))])[0]
    changed = {
        "two spans swapped": [((0, 2), (1, 4)), kv],
        "one span for both": [((0, 4), (1, 4)), kv],
        "a span left out": [((0, 4),), kv],
        "two tokens swapped": [((0, 4), (1, 2)), kv[:, :, :, [1, 0, *range(2, SPAN)]]],
        "shifted by one": [((0, 4), (1, 2)), kv.roll(1, 3)],
        "keys for values": [((0, 4), (1, 2)), kv.flip(1)],
        "heads swapped": [((0, 4), (1, 2)), kv.flip(2)],
    }
    for what, (spans, memory) in changed.items():
        assert not torch.equal(run(q, memory.contiguous(), [Segment(0, row, spans)])[0], before), what


def test_limbs_carry_all_128_bits_in_every_dtype() -> None:
    lanes = np.array([[0, 2**64 - 1], [2**63 + 12345, 0x0123456789ABCDEF]], dtype=np.uint64)
    for dtype in DTYPES:
        assert (from_limbs(to_limbs(lanes, dtype)) == lanes).all()


def test_hashes_of_one_token_differ_in_about_half_their_bits_when_one_bit_changes() -> None:
    rng = np.random.default_rng(0)
    k, v = rng.integers(0, 2**64, (64, 8), dtype=np.uint64), rng.integers(0, 2**64, (64, 8), dtype=np.uint64)
    before = token_hashes(k, v, np.arange(64))
    k[:, 3] ^= np.uint64(1) << np.arange(64, dtype=np.uint64)
    changed = np.bitwise_count(before ^ token_hashes(k, v, np.arange(64))) if hasattr(np, "bitwise_count") else np.array(
        [[bin(int(word)).count("1") for word in row] for row in before ^ token_hashes(k, v, np.arange(64))])
    assert 28 < changed.mean() < 36 and changed.min() > 8


def test_heads_of_another_size_and_other_devices_are_refused() -> None:
    q, kv = torch.zeros(1, 1, 8), torch.zeros(1, 2, 1, SPAN, 8)
    with pytest.raises(ValueError, match="8 elements"):
        run(q, kv, [Segment(0, torch.tensor([0]), ((0, 0),))])
    with pytest.raises(ValueError, match="digest"):
        plan_attention([], num_rows=0, span_tokens=SPAN, heads=1, kv_heads=1, window=None, exactness="digest", device="meta",
                       dtype=torch.float32)
