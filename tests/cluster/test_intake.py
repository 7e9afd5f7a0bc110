"""Whatever a caller sends becomes a JobSpec or a typed error: tried with everything that JSON can say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbank.cluster.fields import parse_json
from kvbank.cluster.intake import SPEC_FIELDS, Intake, JobSpec, ModelFacts
from kvbank.cluster.prompts import SLOW, WIRE_TOKENS, Rendered
from kvbank.errors import InvalidRequest, TooLong

INTAKE = Intake(ModelFacts(name="fake", vocab_size=300, max_position=1000), lambda text, start: list(text.encode()))

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=10)
GOOD = {"prompt": st.just([1, 2]) | st.just("hello"), "max_tokens": st.integers(1, 50), "temperature": st.floats(0, 2)}


def spec(**body: Any) -> JobSpec:
    return asyncio.run(INTAKE.spec(body, tenant="t"))


@settings(max_examples=400, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: GOOD.get(name, st.nothing()) | ANYTHING for name in SPEC_FIELDS}))
def test_any_body_is_a_job_or_an_invalid_request(body: dict[str, Any]) -> None:
    try:
        job = spec(**body)
    except InvalidRequest as error:
        assert str(error) and len(str(error)) < 400
        return
    ids = np.frombuffer(job.prompt, "<i4")
    assert len(ids) > 0 and ids.min() >= 0 and ids.max() < 300 and len(ids) + job.max_tokens <= 1000
    assert 0 <= job.temperature <= 2 and 0 < job.top_p <= 1 and job.top_k >= 0
    assert job.seed is None or 0 <= job.seed < 2**63


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_an_invalid_request(raw: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse_json(raw), dict)


@pytest.mark.parametrize("prompt", [
    "x" * (SLOW + 1), [{"text": "x" * 40} for _ in range(SLOW // 40 + 1)], Rendered("x" * (SLOW + 1)),
    [{"token_ids": [1]}, {"text": "x" * SLOW}],
])
def test_a_long_prompt_holds_up_nobody_whatever_its_pieces(prompt: Any) -> None:
    """Its tokenizer waits for what the event loop does next."""
    goes = threading.Event()

    def encode(text: str, _at_start: bool) -> list[int]:
        assert goes.wait(20)
        return list(text.encode())

    async def play() -> None:
        made = Intake(ModelFacts(name="fake", vocab_size=300, max_position=10_000), encode)
        asked = [asyncio.ensure_future(made.spec({"prompt": prompt}, tenant="t")) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await made.spec({"prompt": [1, 2]}, tenant="t")).prompt_tokens == 2
        goes.set()
        told = await asyncio.wait_for(asyncio.gather(*asked), 20)
        assert [each.prompt_tokens for each in told] == [len(told[0].prompt) // 4] * 2 and told[0].prompt_tokens > SLOW
        with pytest.raises(TooLong):
            await made.spec({"prompt": [1] * 10_001}, tenant="t")

    asyncio.run(play())


def test_the_prompt_of_a_message_is_never_told_back() -> None:
    for body in ({"prompt": "planted " * 1000}, {"prompt": ["planted " * 10]}, {"policy": "planted " * 10, "prompt": "x"},
                 {"prompt": "x", "stop": ["planted " * 100]}, {"prompt": "x", "seed": "planted " * 10}):
        with pytest.raises(InvalidRequest) as caught:
            spec(**body)
        assert "planted" not in str(caught.value)


@pytest.mark.parametrize(("prompt", "output", "fits"), [(999, 1, True), (990, 10, True), (991, 10, False), (1000, 1, False)])
def test_the_models_limit_counts_prompt_and_output_to_the_token(prompt: int, output: int, fits: bool) -> None:
    if fits:
        assert spec(prompt=[1] * prompt, max_tokens=output).prompt_tokens == prompt
    else:
        with pytest.raises(TooLong, match=f"at most {1000 - prompt} tokens"):
            spec(prompt=[1] * prompt, max_tokens=output)


def test_a_fingerprint_covers_what_decides_the_answer_and_nothing_else() -> None:
    same = {spec(prompt=[1, 2], job_id=name, deadline_s=seconds).fingerprint for name in ("a", "b") for seconds in (1, 2)}
    assert len(same) == 1
    others = [{"max_tokens": 3}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 3}, {"seed": 1}, {"stop": "x"},
              {"stop_token_ids": [1]}, {"ignore_eos": True}, {"cache_salt": "x"}]
    found = {spec(prompt=[1, 2], **other).fingerprint for other in others} | {spec(prompt=[2, 1]).fingerprint} | same
    assert len(found) == len(others) + 2
    over = spec(prompt=[1, 2]).without_prompt()
    assert not over.prompt and {over.fingerprint} == same, "it outlives the prompt"


def test_segments_keep_their_borders() -> None:
    job = spec(prompt=[{"text": "ab"}, {"token_ids": [7, 8, 9], "reusable": False}, {"text": ""}])
    assert [(s.first, s.last, s.reusable) for s in job.segments] == [(0, 2, True), (2, 5, False), (5, 5, True)]
    assert np.frombuffer(job.prompt, "<i4").tolist() == [97, 98, 7, 8, 9]


def test_only_the_first_segment_begins_a_prompt() -> None:
    seen: list[bool] = []
    intake = Intake(INTAKE.facts, lambda text, start: seen.append(start) or [1])
    asyncio.run(intake.spec({"prompt": [{"text": "a"}, {"text": "b"}]}, tenant="t"))
    assert seen == [True, False]


def test_segments_that_are_too_long_together_for_one_message_are_refused() -> None:
    """One message over the limit would end the stream that all jobs of a worker share."""
    wide = Intake(ModelFacts(name="fake", vocab_size=300, max_position=1 << 22), lambda text, start: [])
    half = {"token_ids": [1] * (WIRE_TOKENS // 2)}
    with pytest.raises(TooLong, match=f"at most {WIRE_TOKENS}"):
        asyncio.run(wide.spec({"prompt": [half, half], "max_tokens": 1}, tenant="t"))
    assert asyncio.run(wide.spec({"prompt": [half], "max_tokens": 1}, tenant="t")).prompt_tokens == WIRE_TOKENS // 2
