"""Solves every sample from its tokens alone: the proof that an answer is in its context, and where.

Written without the generators: a checker sees the context's ids and the question's, finds the sentences that the question
names, and spells the answer. The places that it read are what a cache must keep for this question and nothing else, from
which the reports' ceiling is computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.needle.sample import Speller
from bench.quality.tasks import COPY, LISTING, last_place, places_of

Context = list[int]


@dataclass(slots=True)
class Solved:
    answer: list[int] = field(default_factory=list)
    places: set[int] = field(default_factory=set)            # in the context, of the sentences that were read


def solve(task: str, speller: Speller, context: Context, prompt: list[int]) -> Solved:
    return CHECKERS[task](speller, context, prompt)


def _asked(speller: Speller, prompt: list[int], pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, speller.tokenizer.decode(prompt))
    assert found is not None, "the question has another form"
    return found.groups()


def _values(speller: Speller, context: Context, said: str, stop: str, read: set[int]) -> list[str]:
    """What stands between `said` and `stop`, at every place where it is said."""
    opens, ends = speller.ids(said), set(speller.ids(stop))
    found = []
    for at in places_of(context, opens):
        begin = end = at + len(opens)
        while context[end] not in ends:
            end += 1
        read.update(range(at, end + 1))
        found.append(speller.tokenizer.decode(context[begin:end]))
    return found


def _needle(speller: Speller, context: Context, prompt: list[int]) -> Solved:
    """The value told most often; where it is told once, that one."""
    attribute, key = _asked(speller, prompt, r"what is the (\w+) of (\w+ \w+)\?")
    solved = Solved()
    values = _values(speller, context, f" The {attribute} of {key} is", ".", solved.places)
    value = Counter(values).most_common(1)[0][0]
    solved.answer = [*speller.ids(f" {key} is{value}."), speller.eos]
    return solved


def _recall(speller: Speller, context: Context, prompt: list[int]) -> Solved:
    solved, pair = Solved(), speller.tokenizer.decode(prompt[len(speller.ids(LISTING)):])
    (value,) = _values(speller, context, pair, ";", solved.places)
    solved.answer = speller.ids(value)
    return solved


def _compare(speller: Speller, context: Context, prompt: list[int]) -> Solved:
    one, other = _asked(speller, prompt, r"who scored more, (\w+ \w+) or (\w+ \w+)\?")
    solved = Solved()
    ((left,), (right,)) = (_values(speller, context, f" Score: {key}", ".", solved.places) for key in (one, other))
    said, best = ("less", one) if int(left) > int(right) else ("more", other)
    solved.answer = [*speller.ids(f" {one}{left}, {other}{right} {said}: {best}."), speller.eos]
    return solved


def _track(speller: Speller, context: Context, prompt: list[int]) -> Solved:
    (name,) = _asked(speller, prompt, r"what is the value of (\w+ \w+)\?")
    solved, walk = Solved(), f" {name}"
    while not name.isdigit():
        (right,) = _values(speller, context, f" Set {name} =", ".", solved.places)
        name, walk = right.strip(), f"{walk} ={right}"
    solved.answer = [*speller.ids(f"{walk}."), speller.eos]
    return solved


def _copy(speller: Speller, context: Context, prompt: list[int]) -> Solved:
    assert prompt == speller.ids(COPY)
    opens = speller.ids("\nText:")
    begin = last_place(context, opens) + len(opens)
    return Solved(context[begin:], set(range(begin, len(context))))


CHECKERS: dict[str, Callable[[Speller, Context, list[int]], Solved]] = {
    "needle": _needle, "multi-key": _needle, "aggregate": _needle, "recall": _recall, "compare": _compare, "track": _track,
    "copy": _copy,
}
