"""Sampling: what is drawn, from what, and that nothing but the row itself decides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbank.errors import InvalidRequest, ModelError
from kvbank.workers.sampler import BadLogits, SamplingParams, gumbel_noise, sample

GREEDY = SamplingParams()
GOLDEN_NOISE = [1.0042730569839478, -0.047042571008205414, 0.2949655055999756, -0.7709376215934753]


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def drawn(logits: torch.Tensor, count: int, **params: Any) -> list[int]:
    """Tokens for positions 0 .. count-1 of one row."""
    return sample(logits.expand(count, -1), [SamplingParams(seed=3, **params)] * count, list(range(count)))


def test_greedy_takes_the_largest_and_on_a_tie_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 1.0, 2.0, 2.0]])
    assert sample(logits, [GREEDY] * 2, [0, 9]) == [1, 0]
    wide = torch.zeros(1, 32_000)
    wide[0, [77, 31_999]] = 1.0
    assert sample(wide, [GREEDY], [0]) == [77]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 8), [], []) == []


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 5), st.sampled_from([
    {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.5}]))
def test_a_rows_token_is_the_same_alone_and_in_any_batch(seed: int, position: int, place: int, how: dict) -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(seed % 1000)) * 3
    params = SamplingParams(seed=seed, **how)
    (alone,) = sample(logits[place : place + 1], [params], [position])
    others = [SamplingParams(temperature=1.0, seed=n) if n % 2 else GREEDY for n in range(6)]
    others[place] = params
    positions = [7 * n for n in range(6)]
    positions[place] = position
    assert sample(logits, others, positions)[place] == alone


def test_noise_depends_on_seed_and_position_and_on_nothing_else() -> None:
    assert np.array_equal(gumbel_noise(1, 2, 100), gumbel_noise(1, 2, 100))
    assert np.array_equal(gumbel_noise(1, 2, 101)[:100], gumbel_noise(1, 2, 100)), "nor on the vocabulary"
    assert np.array_equal(gumbel_noise(1, 2, 100, np.array([3, 99])), gumbel_noise(1, 2, 100)[[3, 99]])
    noises = [gumbel_noise(seed, position, 50) for seed in (0, 1, 2**63 - 1) for position in (0, 1, 10**6)]
    assert len({noise.tobytes() for noise in noises}) == 9


def test_noise_of_a_known_seed_never_changes() -> None:
    """Golden: a job that resumes on a worker of another release must go on with the same noise. Up to an ulp of what the
    logarithm is taken of: near zero that is a larger share of the result, and processors differ there."""
    assert gumbel_noise(42, 7, 4).tolist() == pytest.approx(GOLDEN_NOISE, rel=1e-6, abs=3e-7)


def test_noise_is_gumbel_distributed() -> None:
    noise = np.concatenate([gumbel_noise(11, position, 10_000) for position in range(20)])
    euler = 0.5772156649
    assert noise.mean() == pytest.approx(euler, abs=0.01)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert (noise < 0).mean() == pytest.approx(math.exp(-1), abs=0.005)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = row(2.0, 1.0, 0.5, 0.0, -1.0, -math.inf)
    count = 6000
    expected = (logits[0] / temperature).softmax(0).numpy() * count
    found = np.bincount(drawn(logits, count, temperature=temperature), minlength=6)
    assert found[5] == 0, "a masked token is never drawn"
    chi_square = ((found - expected)[:5] ** 2 / expected[:5]).sum()
    assert chi_square < 18.5, "four degrees of freedom: one run in a thousand is above, and the seed is fixed"


def test_top_k_leaves_k_tokens_and_those_that_tie_with_the_last() -> None:
    assert set(drawn(row(3, 2, 1, 0), 300, temperature=5.0, top_k=2)) == {0, 1}
    assert set(drawn(row(3, 1, 1, 0), 300, temperature=5.0, top_k=2)) == {0, 1, 2}
    assert set(drawn(row(3, 2, 1, 0), 50, temperature=5.0, top_k=1)) == {0}
    assert set(drawn(row(3, 2, 1, 0), 300, temperature=5.0, top_k=4)) == {0, 1, 2, 3}
    assert set(drawn(row(3, 2, 1, 0), 300, temperature=5.0, top_k=2**31 - 1)) == {0, 1, 2, 3}


def test_top_p_leaves_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    def kept(top_p: float) -> set[int]:
        return set(drawn(logits, 400, temperature=1.0, top_p=top_p))
    assert kept(1e-9) == kept(0.4) == {0}
    assert kept(0.6) == kept(0.79) == {0, 1}
    assert kept(0.9) == {0, 1, 2}
    assert kept(1.0) == {0, 1, 2, 3}
    assert set(drawn(row(1, 1, 1, 0), 300, temperature=1.0, top_p=0.1)) == {0, 1, 2}, "equals stay together"


def test_top_p_counts_among_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert set(drawn(logits, 300, temperature=1.0, top_k=2, top_p=0.5)) == {0}      # 0.4 of 0.7 is more than a half
    assert set(drawn(logits, 300, temperature=1.0, top_p=0.5)) == {0, 1}


@pytest.mark.parametrize("size", [1023, 1024, 1025, 5000])
def test_top_p_over_a_flat_vocabulary_takes_its_share(size: int) -> None:
    ramp = torch.linspace(0, -1e-3, size)[None]          # nearly uniform, no ties: the first look is not enough
    tokens = drawn(ramp, 400, temperature=1.0, top_p=0.5)
    assert 0.45 * size < max(tokens) <= 0.51 * size


def test_top_p_that_rounding_puts_out_of_reach_keeps_all() -> None:
    assert len(set(drawn(torch.zeros(1, 3), 300, temperature=1.0, top_p=1 - 1e-16))) == 3


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow() -> None:
    assert set(drawn(row(1.0, 1.5, -1e30, 1e4), 50, temperature=1e-9)) == {3}
    assert set(drawn(row(1.0, 1.5, -3e38, 2.0), 50, temperature=100)) == {0, 1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9)])
def test_unusable_logits_are_an_error_of_their_own_row_only(bad: float, params: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [bad, bad, bad], [3.0, 1.0, 2.0]])
    with pytest.raises(BadLogits, match=r"1 of 3 rows: \[1\]") as caught:
        sample(logits, [GREEDY, params, GREEDY], [0, 0, 0])
    assert caught.value.rows == (1,)
    assert caught.value.tokens == [2, None, 0], "the other rows have their tokens"
    assert isinstance(caught.value, ModelError)


def test_one_nan_spoils_its_row() -> None:
    with pytest.raises(BadLogits):
        sample(row(1.0, math.nan, 2.0), [GREEDY], [0])


def test_masked_tokens_beside_finite_ones_are_fine() -> None:
    assert sample(row(-math.inf, -3.0, -math.inf), [GREEDY], [0]) == [1]


def test_the_largest_seed_is_a_seed_like_any_other() -> None:
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in (2**63 - 1, 2**63 - 2, 0)]
    assert len(set(sample(torch.zeros(3, 1000), params, [0] * 3))) == 3


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    sample(logits, [SamplingParams(temperature=0.8, top_k=5, top_p=0.5)] * 3, [1, 2, 3])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
    ("temperature", 10**400), ("top_k", 10**400),
    ("temperature", True), ("temperature", None), ("top_p", 0), ("top_p", 1.1), ("top_p", -1), ("top_p", math.nan),
    ("top_k", -1), ("top_k", 2.5), ("top_k", 2**31), ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", None),
])
def test_a_parameter_out_of_range_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is"):
        SamplingParams(**{field: value})
