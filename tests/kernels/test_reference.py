"""The oracle itself, against PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvbank.kernels import reference


@pytest.mark.parametrize("window", [None, 3, 10])
def test_dense_attention_agrees_with_pytorch(window) -> None:
    q, k, v = torch.randn(9, 6, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    seen = reference.visible(torch.arange(11, 20), torch.arange(20), window)
    out, lse = reference.dense_attention(q, k, v, seen, 0.3)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=seen, scale=0.3, enable_gqa=True)
    assert torch.allclose(out, expected.transpose(0, 1), atol=1e-5)
    scores = torch.einsum("thd,nhd->thn", q, k.repeat_interleave(3, 1)) * 0.3
    assert torch.allclose(lse, scores.masked_fill(~seen[:, None], float("-inf")).exp().sum(-1).log(), atol=1e-5)


def test_a_row_sees_itself_and_the_last_keys_of_its_window() -> None:
    seen = reference.visible(torch.tensor([4]), torch.arange(8), 3)
    assert seen.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0]]


def test_a_row_that_sees_nothing_gets_zero_and_minus_infinity() -> None:
    q, k, v = torch.randn(2, 1, 4), torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    seen = torch.tensor([[False] * 3, [True] * 3])
    out, lse = reference.dense_attention(q, k, v, seen, 1.0)
    assert not out[0].any() and lse[0].item() == float("-inf") and lse[1].isfinite().all()
