"""store_kv puts rows where the mapping says and nowhere else."""

from __future__ import annotations

import pytest
import torch

from kvbank.kernels import reference
from kvbank.kernels.store_kv import store_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [
    [], [37], [-1], [0, 1, 2, 3], [5, -1, 130], [-1, -1], list(range(100, 164)),
    [3 * 32 + 7, 0, 2 * 32 + 31, -1, 64], list(range(31, 0, -1)),
])
def test_store_kv_equals_its_oracle(places, dtype) -> None:
    arena = torch.randn(6, 3, 2, 2, 32, 24).to(dtype)
    expected = arena.clone()
    k, v = torch.randn(2, len(places), 2, 24).to(dtype)
    mapping = torch.tensor(places, dtype=torch.int64)
    store_kv(arena[:, 1], k, v, mapping)
    reference.store_kv(expected[:, 1], k, v, mapping)
    assert torch.equal(arena, expected)


def test_rows_may_be_views_of_a_fused_projection() -> None:
    arena = torch.zeros(3, 2, 2, 2, 16, 8)
    expected = arena.clone()
    qkv = torch.randn(5, 8, 8)
    mapping = torch.tensor([0, 17, 18, 19, 40])
    store_kv(arena[:, 0], qkv[:, 4:6], qkv[:, 6:], mapping)
    reference.store_kv(expected[:, 0], qkv[:, 4:6], qkv[:, 6:], mapping)
    assert torch.equal(arena, expected)


def test_slots_of_an_unusual_layout_are_written_too() -> None:
    arena = torch.zeros(3, 2, 16, 2, 8).transpose(2, 3)                  # [slots, 2, heads, tokens, dim], tokens before heads
    k, v = torch.randn(2, 4, 2, 8)
    mapping = torch.tensor([0, 40, 17, -1])
    expected = arena.contiguous()
    store_kv(arena, k, v, mapping)
    reference.store_kv(expected, k, v, mapping)
    assert torch.equal(arena, expected)
