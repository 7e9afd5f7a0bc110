"""What is learned when: the stages, and what one step's batch is drawn from. A batch is a function of (seed, step).

Short and dense first: copying heads must exist before filler and questions mean anything, or nothing is learned at all.
Every later length needs steps of its own; the shorter ones stay in the mixture because they are cheap and dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from bench.needle import tasks
from bench.needle.sample import Sample
from bench.needle.tasks import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One length. shares: how often each task is drawn, in percent."""

    name: str
    length: int
    tokens: int                          # seen in this stage before the next begins
    lr: float
    step_tokens: int = 4096
    shares: dict[str, int]
    shorter: float = 0.0                 # of the steps have half or a quarter of the length


HEADS = {"copy": 40, "stream": 25, "recall": 25, "text": 10}
FIRST_PAGES = {"copy": 20, "stream": 10, "recall": 20, "needle": 20, "compare": 12, "track": 10, "text": 8}
PAGES = {"copy": 8, "recall": 16, "needle": 20, "compare": 38, "track": 12, "text": 6}
ALL = {"copy": 5, "recall": 16, "needle": 24, "compare": 34, "track": 16, "text": 5}

STAGES = (
    Stage(name="heads", length=256, tokens=800_000, lr=2e-3, step_tokens=2048, shares=HEADS),
    Stage(name="pages-256", length=256, tokens=1_200_000, lr=2e-3, step_tokens=2048, shares=FIRST_PAGES),
    Stage(name="pages-512", length=512, tokens=1_200_000, lr=2e-3, step_tokens=2048, shares=PAGES, shorter=0.2),
    Stage(name="pages-1k", length=1024, tokens=2_000_000, lr=2e-3, shares=PAGES, shorter=0.2),
    Stage(name="pages-2k", length=2048, tokens=4_300_000, lr=1.5e-3, shares=PAGES, shorter=0.6),
    Stage(name="pages-4k", length=4096, tokens=1_300_000, lr=1.2e-3, shares=PAGES, shorter=0.5),
    Stage(name="all", length=4096, tokens=8_000_000, lr=1.5e-3, shares=ALL, shorter=0.75),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens [B, T]; the rest one per supervised position: where it is in the flattened [B * T] and what follows it."""

    tokens: Tensor
    at: Tensor
    target: Tensor
    weight: Tensor
    answer: Tensor                       # which answer of the whole batch the target belongs to; 0: none
    task_of: list[str]                   # by answer, from 1 on


def draw_batch(world: World, stage: Stage, seed: int, step: int) -> Batch:
    rng = Random(f"{seed}/{step}/{stage.name}")
    length = stage.length
    if rng.random() < stage.shorter:
        length //= rng.choice((2, 4))
    samples = [draw_sample(world, rng, stage.shares, length) for _ in range(max(1, stage.step_tokens // length))]
    return collate(samples, length, world.speller.eos)


def draw_sample(world: World, rng: Random, shares: dict[str, int], length: int) -> Sample:
    task = rng.choices(list(shares), list(shares.values()))[0]
    sample = _DRAW[task](world, rng, length)
    sample.cut(length)
    return sample


def _needle(world: World, rng: Random, length: int) -> Sample:
    most = max(2, min(64, length // 32))
    facts = rng.choice((1, 2, 4, most // 2, most)) if rng.random() < 0.5 else rng.randint(1, most)
    return tasks.needle(world, rng, length, facts=min(facts, most), asked=16)


def _compare(world: World, rng: Random, length: int) -> Sample:
    most = max(2, min(24, length // 32))
    return tasks.compare(world, rng, length, entities=rng.randint(2, most), asked=max(2, min(24, length // 48)))


def _track(world: World, rng: Random, length: int) -> Sample:
    hops = rng.randint(1, 4)
    return tasks.track(world, rng, length, chains=rng.randint(1, max(1, min(8, length // (40 * hops)))), hops=hops)


def _recall(world: World, rng: Random, length: int) -> Sample:
    return tasks.recall(world, rng, length, pairs=rng.randint(2, max(4, min(64, length // 14))))


def _stream(world: World, rng: Random, length: int) -> Sample:
    return tasks.stream(world, rng, length, pairs=rng.randint(3, max(8, length // 16)))


def _copy(world: World, rng: Random, length: int) -> Sample:
    return tasks.copy(world, rng, length, tokens=rng.randint(12, min(300, length // 2 - 8)))


_DRAW = {"needle": _needle, "compare": _compare, "track": _track, "recall": _recall, "stream": _stream, "copy": _copy,
         "text": tasks.text}


def collate(samples: list[Sample], length: int, pad: int) -> Batch:
    rows, at, target, weight, answer, task_of = [], [], [], [], [], []
    for row, sample in enumerate(samples):
        ids = sample.ids + [pad] * (length - len(sample.ids))
        rows.append(ids)
        first = len(task_of)
        for place in range(1, len(sample.ids)):
            if sample.weight[place]:
                at.append(row * length + place - 1)
                target.append(ids[place])
                weight.append(sample.weight[place])
                number = sample.answer[place]
                answer.append(first + number if number else 0)
        task_of += [sample.task] * max(sample.answer, default=0)
    return Batch(torch.tensor(rows), torch.tensor(at), torch.tensor(target), torch.tensor(weight), torch.tensor(answer), task_of)


def answers_right(batch: Batch, predicted: Tensor) -> dict[str, tuple[int, int]]:
    """By task, how many answers are right in every token, of how many."""
    wrong = set(batch.answer[predicted != batch.target].tolist())
    seen = set(batch.answer.tolist()) - {0}
    found: dict[str, tuple[int, int]] = {}
    for number in seen:
        task = batch.task_of[number - 1]
        right, of = found.get(task, (0, 0))
        found[task] = (right + (number not in wrong), of + 1)
    return found
