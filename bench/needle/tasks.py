"""The tasks: what is told, what is asked, and the one right answer. Names are of words.py, so nothing can be guessed.

    needle     "The code of amber falcon is 4821."   asked: "what is the code of amber falcon?"
    recall     "Codes: amber falcon is 4821; ..."    then all keys again, in another order
    compare    "Score: amber falcon 42."             asked of two, told in different places: "who scored more, ...?"
    track      "Set amber falcon = pale cedar."      asked: "what is the value of amber falcon?", over 1 to 4 steps
    copy       "Text: ..."                           and the same again
    stream     keys and values that come back        the value is predictable from the second time on
    text       ordinary text

An answer repeats the end of the sentence that holds it ("amber falcon is 4821."): each token is then one look back at
what stood behind the same words, which is what attention learns first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from bench.needle.filler import Filler
from bench.needle.sample import Asked, Sample, Speller, page
from bench.needle.words import ATTRIBUTES, draw_keys, draw_value

TEXT_WEIGHT, COPY_WEIGHT, LIST_WEIGHT = 0.03, 0.15, 0.5     # per token: texts, copies and lists have many, answers have ten
COPY_OF_TEXT = 0.4                       # of the copies; the others are of random words or random tokens


@dataclass(frozen=True, slots=True)
class World:
    """What a task draws from. held_out: the keys, values and texts kept for evaluation."""

    speller: Speller
    filler: Filler
    held_out: bool = False

    def page(self, task: str, rng: Random, length: int, facts: list[str], asked: list[Asked], **more: float | None) -> Sample:
        return page(task, rng, self.speller, self.filler, length=length, facts=facts, asked=asked, **more)  # type: ignore[arg-type]


def needle(world: World, rng: Random, length: int, *, facts: int = 1, asked: int = 1, depth: float | None = None) -> Sample:
    """`facts` sentences in filler, `asked` of them asked. With `depth`, the first fact stands there and is asked first."""
    told, questions = [], []
    for key in draw_keys(rng, facts, world.held_out):
        attribute, value = rng.choice(ATTRIBUTES), draw_value(rng, world.held_out)
        told.append(f" The {attribute} of {key} is {value}.")
        questions.append(Asked(f"what is the {attribute} of {key}?", (f" {key} is {value}.",)))
    if depth is None:
        rng.shuffle(questions)
    return world.page("needle", rng, length, told, questions[:asked], depth=depth)


def recall(world: World, rng: Random, length: int, *, pairs: int) -> Sample:
    """A list of pairs, filler, and all the keys again: each value is asked for once."""
    spell = world.speller.ids
    said = [(f" {key} is", f" {draw_value(rng, world.held_out)}") for key in draw_keys(rng, pairs, world.held_out)]
    sample = Sample("recall")
    sample.add([world.speller.bos])
    size = sum(len(spell(key)) + len(spell(value)) + 1 for key, value in said) + 2
    room = length - 1 - 2 * size - 2
    before = rng.randrange(room + 1) if room > 0 else 0
    _filler(sample, world, rng, before)
    _listing(sample, world, said, "Codes:", 0)
    _filler(sample, world, rng, max(0, room - before))
    sample.add(spell("\n"))
    rng.shuffle(said)
    _listing(sample, world, said, "Codes:", LIST_WEIGHT)
    return sample


def stream(world: World, rng: Random, length: int, *, pairs: int) -> Sample:
    """Pairs that come back at random: the value counts from the second time on."""
    spell = world.speller.ids
    said = [(f" {key} is", f" {draw_value(rng, world.held_out)}") for key in draw_keys(rng, pairs, world.held_out)]
    sample, seen, number = Sample("stream"), set(), 0
    sample.add([world.speller.bos, *spell("Codes:")])
    while len(sample.ids) < length - 6:
        key, value = rng.choice(said)
        sample.add(spell(key))
        number += key in seen
        sample.add(spell(value), LIST_WEIGHT * (key in seen), number if key in seen else 0)
        sample.add(spell(";"))
        seen.add(key)
    return sample


def compare(world: World, rng: Random, length: int, *, entities: int = 2, asked: int = 1) -> Sample:
    """Scores told one by one; each question names two of them, and its answer tells both, decides and names one."""
    keys = draw_keys(rng, entities, world.held_out)
    scores = rng.sample(range(10, 100), entities)
    told = [f" Score: {key} {score}." for key, score in zip(keys, scores, strict=True)]
    questions = []
    for _ in range(asked):
        one, other = rng.sample(range(entities), 2)
        judged, best = (" more", other) if scores[other] > scores[one] else (" less", one)
        questions.append(Asked(f"who scored more, {keys[one]} or {keys[other]}?", (
            f" {keys[one]} {scores[one]}, {keys[other]} {scores[other]}", judged, ":", f" {keys[best]}.")))
    return world.page("compare", rng, length, told, questions, documents=max(2, rng.randrange(2, 7)))


def track(world: World, rng: Random, length: int, *, chains: int = 2, hops: int = 2) -> Sample:
    """Names set to names, the last one to a value; asked for the first name of each chain, the answer walks it."""
    names = iter(draw_keys(rng, chains * hops, world.held_out))
    told, questions = [], []
    for _ in range(chains):
        chain = [next(names) for _ in range(hops)]
        links = [*chain, draw_value(rng, world.held_out)]
        told += [f" Set {left} = {right}." for left, right in pairwise(links)]
        questions.append(Asked(f"what is the value of {chain[0]}?", (f" {' = '.join(links)}.",)))
    return world.page("track", rng, length, told, questions)


def copy(world: World, rng: Random, length: int, *, tokens: int) -> Sample:
    """Something, and the same again. Counted token by token."""
    spell, sample = world.speller.ids, Sample("copy")
    if rng.random() < COPY_OF_TEXT:
        body = [int(token) for line in world.filler.draw(rng, tokens) for token in line]
    elif rng.random() < 0.5:
        body = rng.choices(world.speller.words, k=tokens)
    else:
        first, size = world.speller.first_word, world.speller.tokenizer.get_vocab_size()
        body = [rng.randrange(first, size) for _ in range(tokens)]
    sample.add([world.speller.bos])
    room = length - 2 * tokens - 8
    _filler(sample, world, rng, rng.randrange(room + 1) if room > 0 else 0)
    sample.add([*spell("\nText:"), *body, *spell("\nCopy:")])
    for number, token in enumerate(body, 1):
        sample.add([token], COPY_WEIGHT, number)
    return sample


def text(world: World, rng: Random, length: int) -> Sample:
    """Documents of ordinary text, every token learned a little."""
    sample, documents = Sample("text"), rng.choice((1, 1, 2, 4))
    for _ in range(documents):
        sample.add([world.speller.bos])
        for line in world.filler.draw(rng, length // documents - 1):
            sample.add(line, TEXT_WEIGHT)
    return sample


TASKS: dict[str, Callable[..., Sample]] = {
    "needle": needle, "recall": recall, "stream": stream, "compare": compare, "track": track, "copy": copy, "text": text,
}


def _filler(sample: Sample, world: World, rng: Random, tokens: int) -> None:
    for line in world.filler.draw(rng, tokens):
        sample.add(line)


def _listing(sample: Sample, world: World, said: list[tuple[str, str]], title: str, weight: float) -> None:
    """Title, then every pair; with a weight, each value is an answer of its own."""
    sample.add(world.speller.ids(title))
    for number, (key, value) in enumerate(said, 1):
        sample.add(world.speller.ids(key))
        sample.add(world.speller.ids(value), weight, number if weight else 0)
        sample.add(world.speller.ids(";"))
