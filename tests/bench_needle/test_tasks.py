"""Every task's samples can be solved from their tokens alone, and what is held out is never trained on."""

from __future__ import annotations

from random import Random

import pytest

from bench.needle import curriculum, tasks
from bench.needle.tasks import World
from bench.needle.words import draw_keys, draw_value, is_held_out
from tests.bench_needle.checker import marked, solve


@pytest.mark.parametrize("length", [256, 1024, 2048])
@pytest.mark.parametrize("task", ["needle", "recall", "stream", "compare", "track", "copy"])
def test_a_checker_that_sees_only_tokens_gives_the_marked_answers(task: str, length: int, world: World) -> None:
    tokenizer = world.speller.tokenizer
    for seed in range(20):
        sample = curriculum.draw_sample(world, Random(seed), {task: 1}, length)
        answers = marked(tokenizer, sample)
        assert answers and len(sample.ids) <= length
        if task == "copy":
            counted = [token for token, number in zip(sample.ids, sample.answer, strict=True) if number]
            assert sample.ids[-2 * len(counted) - 3: -len(counted) - 3] == counted
        else:
            assert solve(tokenizer, sample) == answers


def test_a_wrong_answer_is_seen_by_the_checker(world: World) -> None:
    sample = tasks.needle(world, Random(1), 256)
    place = sample.answer.index(1) + 3
    sample.ids[place] = world.speller.ids(" 77")[0]
    assert solve(world.speller.tokenizer, sample) != marked(world.speller.tokenizer, sample)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_where_it_was_asked_to_lie(depth: float, world: World) -> None:
    for seed in range(10):
        sample = tasks.needle(world, Random(seed), 1024, depth=depth)
        text = world.speller.tokenizer.decode(sample.ids)
        (answer,) = marked(world.speller.tokenizer, sample)
        assert abs(text.index(answer.removesuffix("</s>")) / text.index("\nQuestion:") - depth) < 0.25    # lines differ in length


def test_answers_are_the_only_tokens_that_count_outside_of_text(world: World) -> None:
    for task in ("needle", "recall", "stream", "compare", "track", "copy"):
        sample = curriculum.draw_sample(world, Random(5), {task: 1}, 512)
        assert [bool(weight) for weight in sample.weight] == [bool(number) for number in sample.answer]
    text = tasks.text(world, Random(5), 512)
    assert not any(text.answer) and sum(map(bool, text.weight)) > 500


def test_keys_and_values_are_of_the_side_that_was_asked_for() -> None:
    for held_out in (False, True):
        rng = Random(0)
        assert all(is_held_out(key) == held_out for key in draw_keys(rng, 50, held_out))
        assert all(is_held_out(draw_value(rng, held_out)) == held_out for _ in range(50))


def test_a_batch_is_a_function_of_seed_and_step(world: World) -> None:
    stage = curriculum.STAGES[1]
    one, again, next_one = (curriculum.draw_batch(world, stage, 3, step) for step in (7, 7, 8))
    assert one.tokens.tolist() == again.tokens.tolist() != next_one.tokens.tolist()
    assert one.target.tolist() == one.tokens.flatten()[one.at + 1].tolist()
