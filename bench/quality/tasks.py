"""What is asked, at which sizes: a context that is compressed once, and questions about it that are asked one by one.

The pages are those of bench/needle/tasks.py (and aggregate.py), drawn from held-out keys, values and texts. A page of N
tokens holds its questions; here it is cut where the first one begins:

    <s> filler fact filler ... | \\n Question: ...? \\n Answer: | ... </s> | \\n Question: ...
    '-------- context -------'  '-------- prompt ---------'  '- answer -'  '- the next turn: never sees this one

`cells(context)` is the whole suite at one length; a cell's pages depend on the seed and their number only, so a longer
run contains a shorter one and every policy gets the same pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from bench.needle import tasks
from bench.needle.sample import Sample
from bench.needle.tasks import World
from bench.quality import aggregate
from bench.quality.subject import Turn

DEPTHS = tuple(tenth / 10 for tenth in range(11))
HOPS = (1, 2, 4)
ASKED = 16                               # questions of one page, where a task has as many
TAIL = 256                               # tokens of a text that are predicted, at most
QUESTION, LISTING, COPY = "\nQuestion:", "\nCodes:", "\nCopy:"


@dataclass(frozen=True, slots=True)
class Page:
    task: str
    context: list[int]
    turns: list[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One task at one length and one setting."""

    task: str
    length: int                          # of the page, questions included
    draw: Callable[[World, Random], Page]
    where: dict[str, Any]                # the setting, for people: {"depth": 0.3}
    could_ask: int = 1                   # answers that the context holds, asked or not
    chance: float = 0.0                  # of a right answer without the cache
    by_token: bool = False               # each token of an answer is counted for itself

    @property
    def name(self) -> str:
        return "/".join([self.task, str(self.length), *(f"{name}={value}" for name, value in self.where.items())])

    def page(self, world: World, seed: int, number: int) -> Page:
        return self.draw(world, Random(f"{seed}/{self.name}/{number}"))


def cells(length: int) -> list[Cell]:
    """All tasks at this length."""
    return [*needle(length), multi_key(length), recall(length), compare(length), *track(length), aggregated(length), copy(length),
            text(length)]


def needle(length: int) -> list[Cell]:
    """One fact, asked, at eleven depths."""
    def draw(depth: float) -> Callable[[World, Random], Page]:
        return lambda world, rng: cut(world, tasks.needle(world, rng, length, depth=depth), QUESTION)

    return [Cell(task="needle", length=length, draw=draw(depth), where={"depth": depth}) for depth in DEPTHS]


def multi_key(length: int) -> Cell:
    """One fact in every 32 tokens, 64 at most."""
    facts = min(64, length // 32)

    def draw(world: World, rng: Random) -> Page:
        return cut(world, tasks.needle(world, rng, length, facts=facts, asked=min(ASKED, facts)), QUESTION, "multi-key")

    return Cell(task="multi-key", length=length, draw=draw, where={"facts": facts}, could_ask=facts)


def recall(length: int) -> Cell:
    """A list of pairs; each question begins the list again with one of its keys."""
    pairs = min(64, length // 16)

    def draw(world: World, rng: Random) -> Page:
        page = cut(world, tasks.recall(world, rng, length, pairs=pairs), LISTING)
        return Page(page.task, page.context, page.turns[:ASKED])

    return Cell(task="recall", length=length, draw=draw, where={"pairs": pairs}, could_ask=pairs)


def compare(length: int) -> Cell:
    """Eight scores in at least two documents, four questions about two of them."""
    def draw(world: World, rng: Random) -> Page:
        return cut(world, tasks.compare(world, rng, length, entities=8, asked=4), QUESTION)

    return Cell(task="compare", length=length, draw=draw, where={"entities": 8}, could_ask=4)


def track(length: int) -> list[Cell]:
    """Two chains of names."""
    def draw(hops: int) -> Callable[[World, Random], Page]:
        return lambda world, rng: cut(world, tasks.track(world, rng, length, chains=2, hops=hops), QUESTION)

    return [Cell(task="track", length=length, draw=draw(hops), where={"hops": hops}, could_ask=2) for hops in HOPS]


def aggregated(length: int) -> Cell:
    def draw(world: World, rng: Random) -> Page:
        return cut(world, aggregate.aggregate(world, rng, length), QUESTION)

    return Cell(task="aggregate", length=length, draw=draw, where={"told": sum(aggregate.TOLD)},
                could_ask=aggregate.NAMES, chance=aggregate.CHANCE)


def copy(length: int) -> Cell:
    """Words, tokens or text said again, counted by the token."""
    tokens = min(200, length // 3)

    def draw(world: World, rng: Random) -> Page:
        sample = tasks.copy(world, rng, length, tokens=tokens)
        page = cut(world, sample, COPY)
        again = [token for turn in page.turns for token in turn.answer]
        return Page(page.task, page.context, [Turn(page.turns[0].prompt, again)])

    return Cell(task="copy", length=length, draw=draw, where={"tokens": tokens}, by_token=True)


def text(length: int) -> Cell:
    """The end of held-out text, given what stands before it."""
    tail = min(TAIL, length // 4)

    def draw(world: World, rng: Random) -> Page:
        ids = tasks.text(world, rng, length).ids[:length]
        return Page("text", ids[:-tail - 1], [Turn(ids[-tail - 1:-tail], ids[-tail:])])

    return Cell(task="text", length=length, draw=draw, where={"tokens": tail}, by_token=True)


def cut(world: World, sample: Sample, header: str, task: str | None = None) -> Page:
    """The sample's context, and each of its answers as a turn that begins with `header`."""
    begins, ends = _spans(sample)
    opens = world.speller.ids(header)
    begin = last_place(sample.ids[:begins[0]], opens)
    turns = []
    for at, (start, end) in enumerate(zip(begins, ends, strict=True)):
        prompt = sample.ids[begin if at == 0 else ends[at - 1]:start]
        if prompt[:len(opens)] != opens:                     # a list's next pair: ` ;` becomes the beginning of the list
            prompt = opens + prompt[1:]
        turns.append(Turn(prompt, sample.ids[start:end]))
    return Page(task or sample.task, sample.ids[:begin], turns)


def last_place(ids: list[int], wanted: list[int]) -> int:
    """Where `wanted` begins for the last time."""
    for at in range(len(ids) - len(wanted), -1, -1):
        if ids[at:at + len(wanted)] == wanted:
            return at
    raise ValueError(f"{len(ids)} tokens do not hold the {len(wanted)} that are looked for")


def places_of(ids: list[int], wanted: list[int]) -> list[int]:
    """Everywhere that `wanted` begins."""
    return [at for at in range(len(ids) - len(wanted) + 1) if ids[at] == wanted[0] and ids[at:at + len(wanted)] == wanted]


def _spans(sample: Sample) -> tuple[list[int], list[int]]:
    """First token and end of every answer, in order."""
    begins, ends = [], []
    for at, number in enumerate(sample.answer):
        if number and number != (sample.answer[at - 1] if at else 0):
            begins.append(at)
        if number and (at + 1 == len(sample.answer) or sample.answer[at + 1] != number):
            ends.append(at + 1)
    return begins, ends


