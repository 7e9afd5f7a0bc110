"""Every page can be solved from its tokens alone, and the solver really reads them."""

from __future__ import annotations

import pytest

from bench.needle.tasks import World
from bench.quality.checkers import CHECKERS, solve
from bench.quality.tasks import Cell, cells, places_of

CELLS = [cell for length in (256, 640) for cell in cells(length)]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.task in CHECKERS], ids=lambda cell: cell.name)
def test_a_checker_solves_every_question(cell: Cell, world: World) -> None:
    for number in range(8):
        page = cell.page(world, 7, number)
        assert page.task == cell.task and page.turns and len(page.context) < cell.length
        for turn in page.turns:
            solved = solve(page.task, world.speller, page.context, turn.prompt)
            assert solved.answer == turn.answer
            assert 0 < len(solved.places) <= len(page.context) and max(solved.places) < len(page.context)


@pytest.mark.parametrize("cell", [cell for cell in cells(256) if cell.task in CHECKERS], ids=lambda cell: cell.name)
def test_where_a_checker_reads_is_all_that_it_needs(cell: Cell, world: World) -> None:
    """Everything else may be wiped; without one of these places the answer is not found."""
    page = cell.page(world, 7, 0)
    turn = page.turns[-1]
    places = solve(page.task, world.speller, page.context, turn.prompt).places
    if cell.task != "copy":                                              # which finds its text by the words before it
        wiped = [token if at in places else world.speller.eos for at, token in enumerate(page.context)]
        assert solve(page.task, world.speller, wiped, turn.prompt).answer == turn.answer
    gone = [world.speller.eos if at in places else token for at, token in enumerate(page.context)]
    assert answer_or_nothing(cell.task, world, gone, turn.prompt) != turn.answer


def answer_or_nothing(task: str, world: World, context: list[int], prompt: list[int]) -> list[int]:
    try:
        return solve(task, world.speller, context, prompt).answer
    except (ValueError, IndexError):
        return []


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_page_depends_on_its_name_only_and_fits_its_length(cell: Cell, world: World) -> None:
    page, again, other = cell.page(world, 7, 3), cell.page(world, 7, 3), cell.page(world, 8, 3)
    assert page == again and page.context != other.context
    for turn in page.turns:
        assert turn.answer and turn.prompt and len(page.context) + len(turn.prompt) + len(turn.answer) <= cell.length


def test_questions_of_a_page_begin_alike_and_never_hold_the_answer_of_another(world: World) -> None:
    for cell in cells(640):
        page = cell.page(world, 7, 0)
        assert len({tuple(turn.prompt[:2]) for turn in page.turns}) == 1
        assert all(world.speller.eos not in turn.prompt for turn in page.turns) or cell.task == "text"


def test_the_most_frequent_value_wins(world: World) -> None:
    (cell,) = (cell for cell in cells(640) if cell.task == "aggregate")
    page = cell.page(world, 7, 1)
    turn = page.turns[0]
    ending = turn.answer[:-1]                                            # ` K is V.`; an answer ends in </s>, a sentence does not
    told = places_of(page.context, ending)
    assert len(told) == 4
    assert len(solve("aggregate", world.speller, page.context, turn.prompt).places) == 7 * (len(ending) + 3)
    for at in told[:3]:                                                  # told once more only, it loses
        page.context[at:at + len(ending)] = [world.speller.eos] * len(ending)
    assert solve("aggregate", world.speller, page.context, turn.prompt).answer != turn.answer
