"""The whole suite on a model that knows nothing: every number is there, the same again, and files come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from torch import Tensor

from bench.needle.tasks import World
from bench.quality.attention import Evicted, Fork, Prefilled
from bench.quality.policies import RecentWindow, index_of
from bench.quality.suite import Results, budget_tokens, measure, write
from kvbank.errors import NotFound

CONTROLS = ["full", "random-eviction", "random-selection", "recent-window", "streaming"]
TASKS = ["needle", "multi-key", "recall", "compare", "track", "aggregate", "copy", "text"]


class LastTokens(RecentWindow):
    """A control under another name."""

    name = "last-tokens"


class Peeking:
    """Keeps what the question attends to."""

    name, query_aware = "peeking", True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def keep(self, context: Prefilled, tokens: int, asked: list[Tensor] | None) -> Fork:
        assert asked is not None
        self.asked.append(len(asked[0]))

        def best(layer: int, head: int) -> Tensor:
            scores = asked[layer][:, 2 * head:2 * head + 2] @ context.keys[layer][head].T
            return scores.amax((0, 1)).topk(tokens).indices.sort().values

        return Evicted(context, index_of(context, best))


@pytest.fixture(scope="module")
def results(folder: Path, world: World) -> Results:
    return small(folder, world, policies=[LastTokens(), Peeking()])


def small(folder: Path, world: World, **more: Any) -> Results:
    return measure(folder, world=world, context=256, budgets=[1.0, 0.1], answers=11, seed=3, **more)


def test_there_is_a_row_for_every_task_policy_and_budget(results: Results) -> None:
    names = [*CONTROLS, "last-tokens", "peeking"]
    columns = {(name, budget) for name in names for budget in (1.0, 0.1)} - {("full", 0.1)}
    wanted = {(task, *column) for task in TASKS for column in columns}
    assert {(row["task"], row["policy"], row["budget"]) for row in results.rows} == wanted and len(results.rows) == len(wanted)
    assert {row["of"] >= 11 and 0 <= row["low"] <= row["share"] <= row["high"] <= 1 for row in results.rows} == {True}
    assert set(results.speed) == set(names) and all(speed > 0 for of in results.speed.values() for speed in of.values())
    assert list(results.tasks) == TASKS
    assert {(cell["length"], cell["where"]["depth"]) for cell in results.grid} == {
        (length, tenth / 10) for length in (256, 128) for tenth in range(11)}


def test_all_policies_get_the_same_pages_and_equal_ones_the_same_numbers(results: Results) -> None:
    rows = {(row["task"], row["policy"], row["budget"]): row for row in results.rows}
    for (task, name, budget), row in rows.items():
        full = rows[task, "full", 1.0]
        assert (row["of"], row["pages"], row["context"]) == (full["of"], full["pages"], full["context"])
        if budget == 1.0:
            assert row["kl"] == 0.0 and row["agree"] == 1.0 and row["marks"] == full["marks"] and max(row["output_error"]) < 1e-4
        else:
            assert row["kl"] > 1e-4 and max(row["output_error"]) > 1e-4, "something is missing, and that is seen"
        if name == "last-tokens":
            assert row | {"policy": "recent-window"} == rows[task, "recent-window", budget]
    for name, apart in results.identity.items():
        assert apart <= (1e-4 if name == "peeking" else 0.0), "questions that are asked one by one have other last bits"


def test_a_policy_that_sees_the_question_is_told_apart(folder: Path, world: World) -> None:
    peeking = Peeking()
    results = small(folder, world, policies=[peeking], only=["recall"])
    assert set(peeking.asked) == {6, 14}, "a question's tokens, of recall and of the needle that is clocked, and no answer's"
    assert results.config["query_aware"]["peeking"]
    assert {row["policy"] for row in results.rows if row["query_aware"]} == {"peeking"}


def test_an_untrained_model_makes_no_task_discriminative(results: Results) -> None:
    said = [results.tasks[task]["not_discriminative"] for task in TASKS if task != "text"]
    assert all("full attention reaches" in why for why in said)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(folder: Path, world: World) -> None:
    once, again = (small(folder, world, only=["multi-key", "text"]) for _ in range(2))
    assert once.rows == again.rows and once.identity == again.identity
    other = measure(folder, world=world, context=256, budgets=[1.0, 0.1], answers=11, seed=4, only=["multi-key", "text"])
    assert [row["kl"] for row in other.rows] != [row["kl"] for row in once.rows]


def test_a_longer_run_contains_a_shorter_one(folder: Path, world: World) -> None:
    short = small(folder, world, only=["track"])
    long = measure(folder, world=world, context=256, budgets=[1.0, 0.1], answers=22, seed=3, only=["track"])
    assert long.rows[0]["of"] > short.rows[0]["of"] and long.rows[0]["length"] == 256


def test_results_are_written_as_json_a_table_and_two_figures(results: Results, tmp_path: Path) -> None:
    write(results.as_json(), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results.rows
    for name in ("needle.svg", "pareto.svg"):
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")
    table = (tmp_path / "table.md").read_text()
    blind, aware = table.split("## ")[1:]
    assert blind.count("| streaming |") == 2 and "peeking" not in blind
    assert "| peeking |" in aware and "streaming" not in aware
    assert table.count("not discriminative: full attention") == len(TASKS) - 1


def test_what_does_not_exist_is_refused_by_name(folder: Path, world: World) -> None:
    with pytest.raises(NotFound, match=r"no policy 'nothing'.*streaming"):
        measure(folder, world=world, policies=["nothing"])
    with pytest.raises(NotFound, match=r"no task.*recall"):
        measure(folder, world=world, only=["nothing"])


@pytest.mark.parametrize(("budget", "length", "tokens"), [(1.0, 77, 77), (0.5, 77, 39), (0.0625, 77, 5), (0.0625, 3, 1)])
def test_a_budget_is_a_whole_number_of_tokens(budget: float, length: int, tokens: int) -> None:
    assert budget_tokens(budget, length) == tokens
