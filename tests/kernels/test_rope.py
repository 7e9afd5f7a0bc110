"""Rotary embedding: against float64, and the law that rotations compose."""

from __future__ import annotations

import pytest
import torch

from kvbank.kernels import reference
from kvbank.kernels.rope import apply_rope, rerotate, rope_tables


def frequencies(dim: int, theta: float = 10_000.0) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (80, 80), (16, 16), (80, 32)])
def test_apply_rope_equals_its_oracle(head_dim, rotary, dtype, tolerance) -> None:
    positions = torch.tensor([0, 1, 2, 511, 4096, 32_767])
    inv_freq = frequencies(rotary)
    x = torch.randn(6, 3, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = apply_rope(x, *rope_tables(positions, inv_freq, 1.1))
    expected = reference.rotate(x, positions, inv_freq, 1.1)
    assert turned.dtype == dtype and turned.shape == x.shape
    assert (turned.double() - expected.double()).abs().max() < tolerance * x.abs().max()
    assert torch.equal(turned[..., rotary:], x[..., rotary:])


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(1, 2, 16)
    assert torch.equal(apply_rope(x, *rope_tables(torch.tensor([0]), frequencies(16))), x)


def test_the_pairs_are_llamas() -> None:
    x = torch.zeros(1, 1, 8)
    x[..., 1] = 1.0                                          # dimension 1 turns into dimension 1 + 8/2
    turned = apply_rope(x, *rope_tables(torch.tensor([1]), torch.full((4,), torch.pi / 2)))
    assert turned.flatten().tolist() == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0], abs=1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 64, generator=generator)
    inv_freq = frequencies(64)
    scores = [
        (apply_rope(q, *rope_tables(torch.tensor([p + 7]), inv_freq))
         * apply_rope(k, *rope_tables(torch.tensor([p]), inv_freq))).sum().item()
        for p in (0, 100, 3000)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-3)


@pytest.mark.parametrize("delta", [0, 1, -300, 4096, 20_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-3), (torch.bfloat16, 2e-2)])
def test_rerotated_keys_are_keys_rotated_at_the_new_position(dtype, tolerance, delta) -> None:
    positions = torch.arange(400, 420)
    inv_freq = frequencies(64)
    k = torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    moved = rerotate(apply_rope(k, *rope_tables(positions, inv_freq)), delta, inv_freq)
    expected = reference.rotate(k, positions + delta, inv_freq)
    assert (moved.double() - expected.double()).norm() < tolerance * expected.double().norm()
    each = rerotate(apply_rope(k, *rope_tables(positions, inv_freq)), torch.full((20,), delta), inv_freq)
    assert torch.equal(each, moved)
