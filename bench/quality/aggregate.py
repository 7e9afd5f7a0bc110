"""The suite's own task: what a page says most often. Nobody is trained on it.

Each of three names is told seven times, spread over the page: four times with one value, twice with another, once with a
third. Asked is the name's value; right is the one told most often. No single sentence holds the answer.
"""

from __future__ import annotations

from random import Random

from bench.needle.sample import Asked, Sample
from bench.needle.tasks import World
from bench.needle.words import ATTRIBUTES, draw_keys, draw_value

NAMES, TOLD = 3, (4, 2, 1)
CHANCE = max(TOLD) / sum(TOLD)           # whoever reads one of the sentences and no more


def aggregate(world: World, rng: Random, length: int, *, names: int = NAMES) -> Sample:
    told, asked = [], []
    for key in draw_keys(rng, names, world.held_out):
        attribute = rng.choice(ATTRIBUTES)
        values: dict[str, None] = {}
        while len(values) < len(TOLD):
            values[draw_value(rng, world.held_out)] = None
        for value, times in zip(values, TOLD, strict=True):
            told += [f" The {attribute} of {key} is {value}."] * times
        asked.append(Asked(f"what is the {attribute} of {key}?", (f" {key} is {next(iter(values))}.",)))
    return world.page("aggregate", rng, length, told, asked)
