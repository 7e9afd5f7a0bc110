"""One training or evaluation sample: a page of documents, then questions and their answers, as token ids.

    <s> filler fact filler ... <s> filler fact ... \n Question: ...? \n Answer: ... </s> \n Question: ...
    '-------- documents, shuffled --------'         '--------- asked one after another ---------'

Every answer token is supervised and counted: an answer is right when each of its tokens is the model's first choice,
which is the same as greedy decoding of the whole answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from tokenizers import Tokenizer

from bench.needle.filler import Filler
from bench.needle.tokenizer import BOS, EOS, SPECIALS
from bench.needle.words import whole_words

DECISION_WEIGHT = 4.0
IN_LINE = 0.3                            # of the facts follow a line's text; the others are lines of their own


@dataclass(slots=True)
class Sample:
    """Token ids with, for each, how much its prediction counts in the loss and which answer it belongs to."""

    task: str
    ids: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)        # 0: not predictable, not learned
    answer: list[int] = field(default_factory=list)          # 1, 2, ...: the answer this token belongs to; 0: none

    def add(self, ids: list[int] | np.ndarray, weight: float = 0.0, answer: int = 0) -> None:
        self.ids.extend(int(token) for token in ids)
        self.weight.extend([weight] * len(ids))
        self.answer.extend([answer] * len(ids))

    def cut(self, length: int) -> None:
        """Drop what is beyond `length` tokens."""
        del self.ids[length:], self.weight[length:], self.answer[length:]


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: how it is put, and the only answer that counts, in parts (it begins with a space, ends with a stop).

    Every second part was not told anywhere but follows from what was: a decision, which weighs more in the loss.
    """

    question: str
    answer: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"\nQuestion: {self.question}\nAnswer:"


class Speller:
    """Text to ids, remembering the short pieces that tasks are made of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        self.first_word = len(SPECIALS)
        self.words = [self.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in whole_words()]
        self._ids = lru_cache(maxsize=1 << 16)(self._encode)

    def ids(self, text: str) -> list[int]:
        return list(self._ids(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)


def page(task: str, rng: Random, speller: Speller, filler: Filler, *, length: int, facts: list[str], asked: list[Asked],
         depth: float | None = None, documents: int | None = None) -> Sample:
    """A sample of exactly `length` tokens or a little less: filler with the facts at random places, then the questions.

    facts:  sentences; their order is drawn. depth: where the first of them stands, 0 (begin) to 1 (end); else anywhere.
    """
    turns = [(speller.ids(each.prompt), _weighed(each, speller)) for each in asked]
    while turns and sum(len(prompt) + len(answer) for prompt, answer in turns) > length * 0.6:
        turns.pop()
    told = [speller.ids(fact) for fact in facts]
    documents = documents or rng.choice((1, 1, 2, 3, 4, 6))
    asking = sum(len(prompt) + len(answer) for prompt, answer in turns)
    room = length - documents - asking - sum(len(fact) + 1 for fact in told)
    lines: list[list[int]] = [line.tolist() for line in filler.draw(rng, room)] if room > 0 else [[]]
    places = sorted(rng.randrange(len(lines) + 1) for _ in told)
    rng.shuffle(told)
    if depth is not None and told:
        places = [_place_at(lines, depth), *(rng.randrange(len(lines) + 1) for _ in told[1:])]
        first = speller.ids(facts[0])
        told = [first, *(fact for fact in told if fact != first)]
    for place, fact in sorted(zip(places, told, strict=True), key=lambda pair: -pair[0]):
        _insert(lines, place, fact, rng, speller)
    sample = Sample(task)
    begins = {0, *(rng.randrange(len(lines)) for _ in range(documents - 1))}
    for at, line in enumerate(lines):
        if at in begins:
            sample.add([speller.bos])
        sample.add(line)
    for number, (prompt, answer) in enumerate(turns, 1):
        sample.add(prompt)
        for token, weight in answer:
            sample.add([token], weight, number)
    return sample


def _weighed(asked: Asked, speller: Speller) -> list[tuple[int, float]]:
    """The answer's tokens and what each counts."""
    weighed = [(token, DECISION_WEIGHT if at % 2 else 1.0) for at, part in enumerate(asked.answer) for token in speller.ids(part)]
    return [*weighed, (speller.eos, 1.0)]


def _insert(lines: list[list[int]], place: int, fact: list[int], rng: Random, speller: Speller) -> None:
    """Before line `place`: as a line of its own, or after the text of the line before it."""
    (newline,) = speller.ids("\n")
    if place and rng.random() < IN_LINE and len(lines[place - 1]) > 1 and lines[place - 1][-1] == newline:
        lines[place - 1] = [*lines[place - 1][:-1], *fact, newline]
    else:
        lines.insert(place, [*fact, newline])


def _place_at(lines: list[list[int]], depth: float) -> int:
    """The line before which `depth` of all tokens lie."""
    ends = np.cumsum([0, *(len(line) for line in lines)])
    return int(np.searchsorted(ends, depth * ends[-1]))
