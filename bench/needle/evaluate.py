"""How many answers are right, by task, length and depth: python -m bench.needle.evaluate MODEL_FOLDER [--lengths 2048 4096]

Keys, values and filler are the held-out ones. An answer counts when every token of it is the model's first choice given
the right ones before it, which is the same as greedy decoding of the whole answer. Prints JSON lines; writes them to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.needle import corpus, export, tasks
from bench.needle.curriculum import answers_right, collate
from bench.needle.model import Llama
from bench.needle.sample import Sample
from bench.needle.tasks import World
from bench.needle.train import open_world

DEPTHS = tuple(tenth / 10 for tenth in range(11))
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ASKED = 16                               # questions on one page, where a task has several


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.needle.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--answers", type=int, default=500, help="per task and length, at least")
    parser.add_argument("--tasks", nargs="+", choices=[*CELLS], default=[*CELLS])
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    world, model = open_world(args.folder, corpus.read_pieces(), held_out=True), export.read_model(args.folder)
    for length in args.lengths:
        for name in args.tasks:
            for line in CELLS[name](model, world, length, args.answers, args.seed):
                text = json.dumps({"task": name, "length": length, **line})
                print(text, flush=True)
                if args.out:
                    with args.out.open("a") as out:
                        out.write(text + "\n")
    return 0


@torch.inference_mode()
def right_of(model: Llama, sample: Sample) -> tuple[int, int]:
    """Answers right, and answers asked, of one sample."""
    batch = collate([sample], len(sample.ids), 0)
    hidden = model(batch.tokens)[0]
    predicted = model.logits(hidden[batch.at]).argmax(-1)
    return answers_right(batch, predicted)[sample.task]


def measure(model: Llama, draw: Callable[[Random], Sample], answers: int, seed: str) -> dict[str, Any]:
    """Draws samples until `answers` were asked. Each sample has its own seed, so a longer run contains a shorter one."""
    right = of = samples = 0
    while of < answers:
        good, asked = right_of(model, draw(Random(f"{seed}/{samples}")))
        right, of, samples = right + good, of + asked, samples + 1
    low, high = wilson(right, of)
    return {"right": right, "of": of, "pages": samples, "share": round(right / of, 4), "low": low, "high": high}


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, spread = right / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + spread / of / 4) / (1 + spread)
    return round(middle - half, 4), round(middle + half, 4)


def _needle(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    """One fact, one question, at eleven depths."""
    for depth in DEPTHS:
        yield {"depth": depth, **measure(
            model, lambda rng, depth=depth: tasks.needle(world, rng, length, depth=depth),  # type: ignore[misc]
            math.ceil(answers / len(DEPTHS)), f"{seed}/needle/{length}/{depth}")}


def _multi_key(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    """One fact in every 32 tokens of the page, 64 at most, up to 16 of them asked."""
    facts = min(64, length // 32)
    yield {"facts": facts, **measure(model, lambda rng: tasks.needle(world, rng, length, facts=facts, asked=ASKED), answers,
                                     f"{seed}/multi-key/{length}")}


def _recall(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    pairs = min(64, length // 16)
    yield {"pairs": pairs, **measure(model, lambda rng: tasks.recall(world, rng, length, pairs=pairs), answers,
                                     f"{seed}/recall/{length}")}


def _compare(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    """Two documents or more, a score of each of eight in filler; up to eight questions about two of them."""
    yield {"entities": 8, **measure(model, lambda rng: tasks.compare(world, rng, length, entities=8, asked=8), answers,
                                    f"{seed}/compare/{length}")}


def _track(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    chains = 2 if length < 512 else 4
    for hops in (1, 2, 4):
        yield {"hops": hops, **measure(
            model, lambda rng, hops=hops: tasks.track(world, rng, length, chains=chains, hops=hops),  # type: ignore[misc]
            math.ceil(answers / 3), f"{seed}/track/{length}/{hops}")}


def _copy(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    """Counted by the token."""
    yield measure(model, lambda rng: tasks.copy(world, rng, length, tokens=min(200, length // 3)), answers * 4,
                  f"{seed}/copy/{length}")


@torch.inference_mode()
def _text(model: Llama, world: World, length: int, answers: int, seed: int) -> Iterator[dict[str, Any]]:
    """Bits per token of ordinary text, one document per page."""
    total, count = 0.0, 0
    for page in range(max(2, 40_000 // length)):
        sample = tasks.text(world, Random(f"{seed}/text/{length}/{page}"), length)
        tokens = torch.tensor([sample.ids])
        logits = model.logits(model(tokens)[0, :-1]).log_softmax(-1)
        total -= float(logits.gather(1, tokens[0, 1:, None]).sum())
        count += tokens.shape[1] - 1
    yield {"bits_per_token": round(total / count / math.log(2), 3), "tokens": count}


CELLS: dict[str, Callable[[Llama, World, int, int, int], Iterator[dict[str, Any]]]] = {
    "needle": _needle, "multi-key": _multi_key, "recall": _recall, "compare": _compare, "track": _track, "copy": _copy,
    "text": _text,
}

if __name__ == "__main__":
    sys.exit(main())
