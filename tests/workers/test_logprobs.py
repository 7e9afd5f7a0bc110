"""Log-probabilities of drawn tokens: torch's log_softmax of the very logits, wherever and in whatever company they came."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvbank.workers import shard
from kvbank.workers.engine import Engine, Token
from kvbank.workers.sampler import Logprobs, SamplingParams, logprobs
from kvbank.workers.sequence import JobSpec

BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])


def oracle(logits: torch.Tensor, token: int, count: int) -> Logprobs:
    """By full sort, ties by the lower id."""
    values = torch.log_softmax(logits.float(), dim=-1).tolist()
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))[:count]
    return Logprobs(values[token], tuple(order), tuple(values[at] for at in order))


def told(engine: Engine, *jobs: JobSpec) -> tuple[dict[str, list[Token]], dict[str, list[torch.Tensor]]]:
    """Every token with what was said of it, and the logits that it was drawn from."""
    engine.keep_logits = True
    for job in jobs:
        engine.add(job)
    tokens: dict[str, list[Token]] = {job.id: [] for job in jobs}
    logits: dict[str, list[torch.Tensor]] = {job.id: [] for job in jobs}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Token):
                tokens[event.job].append(event)
                logits[event.job].append(engine.counters.last_logits[event.job])
    return tokens, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_they_are_log_softmax_exactly(dtype, count) -> None:
    logits = (torch.randn(7, 1000, generator=torch.Generator().manual_seed(count)) * 4).to(dtype)
    before, tokens = logits.clone(), [3, 999, 0, 5, -1, 17, 500]
    counts: list[int | None] = [count, None, count, 2, count, None, count]
    got = logprobs(logits, tokens, counts)
    assert torch.equal(logits, before)
    for row, (token, wanted) in enumerate(zip(tokens, counts, strict=True)):
        assert got[row] == (None if wanted is None or token < 0 else oracle(logits[row], token, wanted)), row


def test_ties_go_to_the_lowest_ids_and_a_small_vocabulary_is_told_whole() -> None:
    flat = torch.zeros(1, 50)
    assert logprobs(flat, [49], [4])[0].top_ids == (0, 1, 2, 3)
    flat[0, 40] = 1.0
    (got,) = logprobs(flat, [49], [3])
    assert got == oracle(flat[0], 49, 3) and got.top_ids == (40, 0, 1)
    (whole,) = logprobs(torch.tensor([[1.0, -math.inf, 3.0]]), [2], [20])
    assert whole.top_ids == (2, 0, 1) and whole.top[2] == -math.inf and whole.drawn == whole.top[0]


@BOTH
def test_an_engine_tells_each_token_from_its_own_logits(alone, prompt, exactness) -> None:
    hot = SamplingParams(temperature=1.3, top_p=0.9, top_k=40, seed=5)
    jobs = [JobSpec(id="a", prompt=prompt(200), max_tokens=10, ignore_eos=True, logprobs=5),
            JobSpec(id="b", prompt=prompt(90, 1), max_tokens=12, ignore_eos=True, sampling=hot, logprobs=0),
            JobSpec(id="c", prompt=prompt(50, 2), max_tokens=8, ignore_eos=True, sampling=hot)]
    tokens, logits = told(alone(exactness=exactness), *jobs)
    for job in jobs:
        assert len(tokens[job.id]) == job.max_tokens
        for event, row in zip(tokens[job.id], logits[job.id], strict=True):
            assert event.logprobs == (None if job.logprobs is None else oracle(row, event.token, job.logprobs))
    drawn = [event.logprobs.drawn for event in tokens["b"]]
    assert len(set(drawn)) > 6, "the same number again and again proves nothing"


def test_asking_changes_no_token_and_not_asking_costs_nothing(alone, prompt, monkeypatch) -> None:
    job: dict[str, Any] = {"prompt": prompt(120), "max_tokens": 12, "ignore_eos": True}
    params = SamplingParams(temperature=1.0, seed=3)
    asked, _ = told(alone(), JobSpec(id="a", sampling=params, logprobs=20, **job))

    def never(*_: object) -> Any:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(shard, "logprobs", never)
    plain, _ = told(alone(), JobSpec(id="a", sampling=params, **job))
    assert [event.token for event in plain["a"]] == [event.token for event in asked["a"]]


def test_an_attempt_that_resumes_tells_what_the_first_would_have(alone, prompt) -> None:
    job: dict[str, Any] = {"prompt": prompt(100), "max_tokens": 16, "ignore_eos": True, "logprobs": 3,
                           "sampling": SamplingParams(temperature=1.0, seed=3)}
    whole, _ = told(alone(exactness="bitwise"), JobSpec(id="a", **job))
    emitted = [event.token for event in whole["a"][:6]]
    rest, _ = told(alone(exactness="bitwise"), JobSpec(id="b", emitted=emitted, **job))
    assert [(e.index, e.token, e.logprobs) for e in rest["b"]] == [(e.index, e.token, e.logprobs) for e in whole["a"][6:]]
