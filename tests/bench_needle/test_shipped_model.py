"""The model folder in the repository: transformers and kvbank decode the same tokens, and the answers are right."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import pytest
import torch
import transformers

from bench.needle import export, tasks
from bench.needle.model import Llama
from bench.needle.sample import Sample
from bench.needle.tasks import World
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.models.tokenizer import load_tokenizer
from kvbank.workers.sequence import JobSpec
from tests.bench_needle.conftest import MODEL
from tests.workers.conftest import run

PROMPTS = 50
ANSWER = 24


class Prompt(NamedTuple):
    ids: torch.Tensor
    answer: list[int]


class Shipped(NamedTuple):
    theirs: transformers.PreTrainedModel
    trained: Llama


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return Shipped(theirs, export.read_model(MODEL))


@pytest.fixture(scope="module")
def prompts(world: World) -> list[Prompt]:
    """One question each, over pages of 100 to 700 tokens."""
    drawn = []
    for number in range(PROMPTS):
        rng, length = Random(number), 100 + 12 * number
        task = (one_needle, one_comparison, one_chain)[number % 3]
        sample = task(world, rng, length)
        begin = sample.answer.index(1)
        drawn.append(Prompt(torch.tensor(sample.ids[:begin]), sample.ids[begin:]))
    return drawn


@pytest.fixture(scope="module")
def answers(shipped: Shipped, prompts: list[Prompt]) -> list[list[int]]:
    """What transformers generates."""
    return [shipped.theirs.generate(prompt.ids[None], max_new_tokens=ANSWER, do_sample=False)[0, len(prompt.ids):].tolist()
            for prompt in prompts]


def one_needle(world: World, rng: Random, length: int) -> Sample:
    return tasks.needle(world, rng, length, facts=3)


def one_comparison(world: World, rng: Random, length: int) -> Sample:
    return tasks.compare(world, rng, length, entities=3)


def one_chain(world: World, rng: Random, length: int) -> Sample:
    return tasks.track(world, rng, length, chains=1, hops=2)


def test_greedy_tokens_of_fifty_prompts_are_those_of_transformers(
    prompts: list[Prompt], answers: list[list[int]]
) -> None:
    """All fifty at once through the engine, to the end of each answer."""
    engine = build_engine(WorkerConfig(model=str(MODEL), device_blocks=4096))
    ran = run(engine, *(JobSpec(id=str(number), prompt=prompt.ids.tolist(), max_tokens=ANSWER)
                        for number, prompt in enumerate(prompts)))
    assert not ran.errors
    assert [ran.tokens[str(number)] for number in range(len(prompts))] == answers


def test_the_answers_are_right(prompts: list[Prompt], answers: list[list[int]]) -> None:
    right = sum(answer == prompt.answer for answer, prompt in zip(answers, prompts, strict=True))
    assert right >= 0.9 * len(prompts)


@torch.inference_mode()
def test_the_training_code_computes_the_same_logits(shipped: Shipped, prompts: list[Prompt]) -> None:
    ids = prompts[-1].ids[None]
    assert (shipped.trained.logits(shipped.trained(ids)) - shipped.theirs(ids).logits).abs().max() < 1e-3


def test_a_text_has_the_same_ids_in_transformers_and_kvbank() -> None:
    text = "A page.\n\n    The code of amber falcon is 4821.\nQuestion: what is the code of amber falcon?\nAnswer:"
    ours = load_tokenizer(MODEL)
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert ours.encode(text).ids == theirs(text).input_ids
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert ours.encode(text).tokens[0] == "<s>"


def test_the_chat_template_asks_as_training_did() -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "system", "content": "A page."}, {"role": "user", "content": "what is the code of amber falcon?"}]
    asked = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == "<s>A page.\nQuestion: what is the code of amber falcon?\nAnswer:"


def test_the_folder_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 20_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
            "loss.svg"} <= {path.name for path in MODEL.iterdir()}
