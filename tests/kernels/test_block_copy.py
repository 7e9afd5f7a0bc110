"""block_copy moves a token range of all layers and leaves the rest alone."""

from __future__ import annotations

import pytest
import torch

from kvbank.kernels import reference
from kvbank.kernels.block_copy import block_copy


@pytest.mark.parametrize(("token_from", "token_to"), [(0, 16), (16, 48), (5, 6), (7, 7), (0, 64)])
def test_block_copy_equals_its_oracle(token_from, token_to) -> None:
    flat = torch.randn(4, 3 * 2 * 2 * 64 * 24 + 10)                      # slots with a gap behind them
    arena = flat[:, : 3 * 2 * 2 * 64 * 24].unflatten(1, (3, 2, 2, 64, 24))
    expected = arena.clone()
    block_copy(arena, 2, 0, token_from, token_to)
    reference.block_copy(expected, 2, 0, token_from, token_to)
    assert torch.equal(arena, expected)


def test_a_range_outside_the_span_is_a_bug_of_the_caller() -> None:
    arena = torch.zeros(2, 1, 2, 1, 16, 8)
    for token_from, token_to in ((0, 17), (5, 4), (-1, 3)):
        with pytest.raises(AssertionError):
            block_copy(arena, 0, 1, token_from, token_to)
