"""Runs the suite: every page is computed once under full attention, then every policy and budget answers on a fork of it.

    results = measure("model folder", policies=["streaming"], context=1024)
    write(results.as_json(), Path("folder"))      # results.json, table.md, needle.svg, pareto.svg

Full attention and the controls are always part of it, on the same pages, with the same seeds.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.needle import corpus, tokenizer
from bench.needle.filler import Filler
from bench.needle.sample import Speller
from bench.needle.tasks import World
from bench.quality import checkers, figures, table, tasks
from bench.quality.attention import Fork, Prefilled, Whole
from bench.quality.policies import CONTROLS, POLICIES, Full, Policy, RandomEviction
from bench.quality.score import Mark, Row, mark, row, verdict
from bench.quality.subject import Answered, Subject
from bench.quality.tasks import Cell, Page
from kvbank.errors import NotFound

BUDGETS = (1.0, 0.5, 0.25, 0.125, 0.0625)
QUICK_BUDGETS = (1.0, 0.25, 0.0625)
ANSWERS, QUICK_ANSWERS = 500, 22         # of each task
ANSWERS_PER_PAGE = 16                    # a page counts for no more, however much is asked of it: there are as many pages
SHORTEST = 128                           # tokens, of the needle's pages
STEPS, ROUNDS = 8, 3                     # of decoding, to clock it

Key = tuple[str, float]                  # a policy's name and a budget
Marks = dict[Key, list[Mark]]
Tell = Callable[[dict[str, Any]], None]


@dataclass(slots=True, kw_only=True)
class Results:
    """All that was found, in plain values."""

    config: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)             # Row.as_json: every task at the context's length
    grid: list[dict[str, Any]] = field(default_factory=list)             # the same of the needle, by length and depth
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)       # chance and verdict
    speed: dict[str, dict[str, float]] = field(default_factory=dict)     # policy -> budget -> decoded tokens per second
    identity: dict[str, float] = field(default_factory=dict)             # policy -> largest difference of a logit at 100 %

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(folder: str | Path, *, policies: Iterable[str | Policy] = (), context: int = 2048,
            budgets: Iterable[float] = BUDGETS, answers: int = ANSWERS, seed: int = 1000, quick: bool = False,
            only: Iterable[str] = (), tell: Tell = lambda line: None, world: World | None = None) -> Results:
    """The whole suite, or the tasks named by `only`. tell: called with every row when its task is done.

    policies: names of POLICIES, or objects of your own, beside the controls. world: what pages are drawn from, if not
    from this machine's corpus with the folder's tokenizer.
    """
    if quick:
        context, budgets, answers = min(context, 256), QUICK_BUDGETS, QUICK_ANSWERS
    world, text = (world, "given") if world else held_out_world(Path(folder))
    run = _Run(Subject(folder), world, _chosen(policies), budgets, seed)
    every, wanted = tasks.cells(context), set(only)
    if wanted - {cell.task for cell in every}:
        raise NotFound(f"there is no task {wanted!r}; there are: {', '.join(dict.fromkeys(cell.task for cell in every))}")
    run.results.config = {
        "context": context, "budgets": run.budgets, "answers": answers, "seed": seed, "text": text, "dtype": "float32",
        "threads": torch.get_num_threads(), "query_aware": {policy.name: policy.query_aware for policy in run.policies}}
    with torch.inference_mode():
        for name in dict.fromkeys(cell.task for cell in every if not wanted or cell.task in wanted):
            run.task([cell for cell in every if cell.task == name], answers, tell)
        for length in (context // 2, context // 4, context // 8):
            if length >= SHORTEST and (not wanted or "needle" in wanted):
                run.needle(tasks.needle(length), answers)
        run.clock(tasks.needle(context)[len(tasks.DEPTHS) // 2])
    return run.results


def held_out_world(folder: Path) -> tuple[World, str]:
    """What this machine has of held-out text, in the folder's tokens; and a digest, as other machines may have other text."""
    pieces, loaded = corpus.read_pieces(), tokenizer.load(folder / "tokenizer.json")
    return World(Speller(loaded), Filler(pieces, loaded, held_out=True), held_out=True), corpus.digest(pieces)


def _chosen(wanted: Iterable[str | Policy]) -> list[Policy]:
    found: dict[str, Policy] = {policy.name: policy for policy in (kind() for kind in (Full, *CONTROLS))}
    for each in wanted:
        if isinstance(each, str) and each not in POLICIES:
            raise NotFound(f"there is no policy {each!r}; there are: {', '.join(POLICIES)}")
        policy = POLICIES[each]() if isinstance(each, str) else each
        found[policy.name] = policy
    return list(found.values())


class _Run:
    """One call of `measure`."""

    def __init__(self, subject: Subject, world: World, policies: list[Policy], budgets: Iterable[float], seed: int) -> None:
        self.subject, self.world, self.policies, self.seed = subject, world, policies, seed
        self.budgets = sorted(budgets, reverse=True)
        self.results = Results(config={})

    def task(self, cells: list[Cell], answers: int, tell: Tell) -> None:
        """One task at the context's length: its rows and its verdict."""
        if cells[0].task == "needle":
            marks = self.needle(cells, answers)
        else:
            marks = defaultdict(list)
            for cell in cells:
                _extend(marks, self.cell(cell, answers / len(cells)))
        rows = self.rows(cells[0], {} if len(cells) > 1 else cells[0].where, marks)
        by_key = {(each.policy, each.budget): each for each in rows}
        said = verdict(cells[0].chance, by_key[Full.name, 1.0], by_key[RandomEviction.name, self.budgets[-1]])
        self.results.tasks[cells[0].task] = {
            "chance": cells[0].chance, "not_discriminative": said,
            "ceilings": {f"{each.budget:g}": each.ceiling for each in rows if each.policy == RandomEviction.name}}
        for each in rows:
            self.results.rows.append(each.as_json())
            tell({name: value for name, value in each.as_json().items() if name not in ("marks", "where")})

    def needle(self, cells: list[Cell], answers: int) -> Marks:
        """All depths at one length, each into the grid."""
        marks: Marks = defaultdict(list)
        for cell in cells:
            found = self.cell(cell, answers / len(cells))
            self.results.grid += [each.as_json() for each in self.rows(cell, cell.where, found)]
            _extend(marks, found)
        return marks

    def cell(self, cell: Cell, answers: float) -> Marks:
        """Pages until so many answers were asked, by all policies and budgets."""
        marks: Marks = defaultdict(list)
        number = 0
        while number * ANSWERS_PER_PAGE < answers or sum(len(each.right) for each in marks[Full.name, 1.0]) < answers:
            page = cell.page(self.world, self.seed, number)
            context = self.subject.prefill(page.context, f"{self.seed}/{cell.name}/{number}")
            self.page(cell, page, context, marks)
            number += 1
        return marks

    def page(self, cell: Cell, page: Page, context: Prefilled, marks: Marks) -> None:
        full = self.subject.ask(context, Whole(context), page.turns)
        needed = self.needed(cell, page)
        for policy, budget in self.columns():
            tokens = budget_tokens(budget, context.length)
            answered, forks = self.answer(policy, context, tokens, page, full)
            if budget == 1.0:
                apart = float((answered.logits - full.logits).abs().max())
                self.results.identity[policy.name] = max(apart, self.results.identity.get(policy.name, 0.0))
            marks[policy.name, budget].append(mark(
                full, answered, by_token=cell.by_token, context=context.length, kept=tokens, needed=needed,
                device_bytes=statistics.mean(fork.device_bytes for fork in forks),
                host_bytes=statistics.mean(fork.host_bytes for fork in forks)))

    def columns(self) -> Iterator[tuple[Policy, float]]:
        for policy in self.policies:
            yield from ((policy, budget) for budget in ([1.0] if isinstance(policy, Full) else self.budgets))

    def answer(self, policy: Policy, context: Prefilled, tokens: int, page: Page, full: Answered) -> tuple[Answered, list[Fork]]:
        """On one fork for all questions; a policy that sees the question has one for each."""
        if not policy.query_aware:
            fork = policy.keep(context, tokens, None)
            return self.subject.ask(context, fork, page.turns), [fork]
        forks = [policy.keep(context, tokens, full.question(number)) for number in range(len(page.turns))]
        each = [self.subject.ask(context, fork, [turn], number)
                for number, (fork, turn) in enumerate(zip(forks, page.turns, strict=True))]
        return Answered.joined(each), forks

    def needed(self, cell: Cell, page: Page) -> int:
        """Tokens of the context that answer everything which could be asked about it."""
        if cell.task not in checkers.CHECKERS:
            return 0
        solved = [checkers.solve(cell.task, self.world.speller, page.context, turn.prompt) for turn in page.turns]
        return round(statistics.mean(len(each.places) for each in solved) * cell.could_ask)

    def rows(self, cell: Cell, where: dict[str, Any], marks: Marks) -> list[Row]:
        full = marks[Full.name, 1.0]
        return [row(policy.name, policy.query_aware, budget, cell.task, cell.length, where, marks[policy.name, budget], full,
                    full if isinstance(policy, Full) else marks[RandomEviction.name, budget], by_token=cell.by_token)
                for policy, budget in self.columns()]

    def clock(self, cell: Cell) -> None:
        """Decoding steps per second on one page: medians, the forks taking turns."""
        page = cell.page(self.world, self.seed, 0)
        context = self.subject.prefill(page.context, f"{self.seed}/{cell.name}/0")
        full = self.subject.ask(context, Whole(context), page.turns)
        forks = {(policy.name, budget): policy.keep(
            context, budget_tokens(budget, context.length), full.question(0) if policy.query_aware else None)
            for policy, budget in self.columns()}
        took: dict[Key, list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            for key, fork in forks.items():
                took[key] += self.subject.decode(context, fork, page.turns[0].prompt, STEPS + 1)[1]
        for (name, budget), seconds in took.items():
            self.results.speed.setdefault(name, {})[f"{budget:g}"] = round(1 / statistics.median(seconds), 1)


def write(results: dict[str, Any], folder: Path) -> None:
    """The results, and what is drawn from them alone: give it an older results.json to draw that again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.md").write_text(table.page(results))
    (folder / "pareto.svg").write_text(figures.pareto(results))
    if results["grid"]:
        (folder / "needle.svg").write_text(figures.heat_map(results))


def budget_tokens(budget: float, length: int) -> int:
    """Rows per layer and head: the nearest whole number, at least one."""
    return min(length, max(1, int(budget * length + 0.5)))


def _extend(marks: Marks, more: Marks) -> None:
    for key, several in more.items():
        marks[key] += several
