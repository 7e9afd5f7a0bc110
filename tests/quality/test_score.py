"""Shares, intervals and gates against numbers that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bench.needle.evaluate import wilson
from bench.quality.score import Mark, Row, interval, mark, row, verdict
from bench.quality.subject import Answered
from bench.quality.table import footprint

MARK = Mark(right=[True, False], kl=0.5, agree=0.5, nll=1.0, output_error=[0.25, 0.5], tokens=8, context=100,
            kept=25, needed=50, device_bytes=400.0, host_bytes=0.0)


@pytest.mark.parametrize(("right", "of", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),    # Newcombe 1998
    (29, 29, 0.8830, 1.0), (5, 10, 0.2366, 0.7634),
])
def test_wilson_against_published_values(right: int, of: int, low: float, high: float) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=1e-4)


def test_an_interval_of_pages_with_one_answer_each_is_wilsons() -> None:
    counts = [(int(number % 4 == 0), 1) for number in range(100)]
    share, low, high = interval(counts)
    assert share == 0.25 and (low, high) == pytest.approx(wilson(25, 100), abs=2e-3)


def test_answers_that_share_a_page_count_for_less() -> None:
    apart = [(5, 10)] * 20                                               # every page alike: 200 answers
    together = [(0, 10), (10, 10)] * 10                                  # a page is right or wrong: 20 answers
    assert interval(apart) == pytest.approx((0.5, *wilson(100, 200)), abs=1e-3)
    assert interval(together) == pytest.approx((0.5, *wilson(10, 20)), abs=0.02)


def test_tokens_that_are_all_right_count_as_their_pages() -> None:
    assert interval([(200, 200)] * 32, by_token=True)[1] == pytest.approx(wilson(32, 32)[0])
    assert interval([(16, 16)] * 32)[1] == pytest.approx(wilson(512, 512)[0])


def answered(logits: torch.Tensor, attended: torch.Tensor | None = None) -> Answered:
    """Two turns, of two tokens and of one, that should be 0, 1 and 2."""
    return Answered(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]),
                    torch.ones(2, 3, 4) if attended is None else attended, [], torch.tensor([]))


def test_a_mark_is_right_by_whole_answers_and_counts_distance_by_token() -> None:
    good = torch.eye(3) * 5
    other = good.clone()
    other[1] = torch.tensor([5.0, 0.0, 0.0])
    facts = {"context": 9, "kept": 9, "needed": 0, "device_bytes": 1.0, "host_bytes": 0.0}
    same = mark(answered(good), answered(good), by_token=False, **facts)
    assert same.right == [True, True] and same.kl == 0.0 and same.agree == 1.0
    missed = mark(answered(good), answered(other), by_token=False, **facts)
    assert missed.right == [False, True] and missed.agree == pytest.approx(2 / 3)
    large = math.exp(5) / (math.exp(5) + 2)
    assert missed.kl == pytest.approx((large * 5 - (1 - large) / 2 * 5) / 3, rel=1e-4)
    assert missed.nll == pytest.approx((-2 * math.log(large) - math.log((1 - large) / 2)) / 3, rel=1e-4)
    assert mark(answered(good), answered(other), by_token=True, **facts).right == [True, False, True]


def test_the_output_error_is_relative_and_told_layer_by_layer() -> None:
    logits, full = torch.eye(3), torch.ones(2, 3, 4)
    other = full.clone()
    other[0, 2] = 0.0                                                    # all of one token in the first layer
    other[1, :, 0] = 2.0                                                 # in the second one coordinate of four, of every token
    found = mark(answered(logits, full), answered(logits, other), by_token=False, context=9, kept=9, needed=0,
                 device_bytes=1.0, host_bytes=0.0)
    assert found.output_error == pytest.approx([1 / 3, 1 / 2])
    assert made([MARK, replace(MARK, output_error=[0.5, 0.0], tokens=24)], [MARK] * 2).output_error == pytest.approx(
        [(0.25 + 3 * 0.5) / 4, 0.125])


def made(marks: list[Mark], random: list[Mark], task: str = "recall") -> Row:
    full = [replace(MARK, right=[True, True], nll=0.5)] * len(marks)
    return row("mine", False, 0.25, task, 128, {}, marks, full, random, by_token=False)


def test_a_row_is_placed_between_random_and_the_ceiling() -> None:
    found = made([MARK] * 10, [replace(MARK, right=[False, False])] * 5 + [replace(MARK, right=[True, False])] * 5)
    assert found.ceiling == 0.5 and found.lift == pytest.approx((0.5 - 0.25) / (0.5 - 0.25))
    assert found.share == 0.5 and found.of == 20 and found.marks == "10" * 10
    assert found.device_bytes_per_token == 4.0
    assert found.ppl_ratio == pytest.approx(math.exp(0.5)) and found.ppl_low == pytest.approx(found.ppl_high)
    assert made([MARK] * 10, [MARK] * 10).lift is None


def test_a_task_tells_only_with_full_attention_able_and_random_eviction_not() -> None:
    full = replace(made([MARK], [MARK]), share=0.96)
    assert verdict(0.0, full, replace(full, share=0.2)) == ""
    assert "full attention reaches 94.0%" in verdict(0.0, replace(full, share=0.94), replace(full, share=0.0))
    assert "still reaches 21.0%" in verdict(0.0, full, replace(full, share=0.21))
    assert verdict(4 / 7, full, replace(full, share=0.6)) == "", "a little above chance is nothing"
    text = replace(full, task="text", ppl_ratio=1.0)
    assert verdict(0.0, text, replace(text, ppl_ratio=1.5, ppl_low=1.2)) == ""
    assert "1.010" in verdict(0.0, text, replace(text, ppl_ratio=1.01, ppl_low=1.005))
    assert "1.500" in verdict(0.0, text, replace(text, ppl_ratio=1.5, ppl_low=0.9)), "too few pages to say"


@pytest.mark.parametrize(("held", "answer"), [(1.0, 0.5), (0.25, 1 / 8), (0.0625, 1.0), (0.5, 3.0)])
def test_the_footprint_is_the_sum_over_all_steps(held: float, answer: float) -> None:
    context = 4000
    computed = sum(range(context))
    whole = computed + sum(context + step for step in range(round(answer * context)))
    kept = computed + sum(held * context + step for step in range(round(answer * context)))
    assert footprint(held, answer) == pytest.approx(kept / whole, abs=1e-3)
