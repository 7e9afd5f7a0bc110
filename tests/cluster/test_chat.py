"""/v1/chat/completions with OpenAI's own client: messages become a prompt, tokens become a message or deltas."""

from __future__ import annotations

import json
import re

import httpx
import openai
import pytest

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
PROMPT = "system:Be brief.\nuser:Hello\nassistant:"


def events(answer: httpx.Response) -> list:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.fixture
def address(make_worker, make_server) -> str:
    return make_server(make_worker("worker-0")).address


def test_openais_client_chats_and_streams(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    client = openai.OpenAI(base_url=make_server(worker).address + "/v1", api_key="anything")
    text = bytes(answer_of(list(PROMPT.encode()), 8)).decode()
    whole = client.chat.completions.create(model="fake", messages=CHAT, max_completion_tokens=8, temperature=0)
    assert bytes(worker.seen[0].prompt)[::4] == PROMPT.encode()
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert whole.usage.prompt_tokens == len(PROMPT) and whole.usage.prompt_tokens_details.cached_tokens == len(PROMPT) // 2
    chunks = list(client.chat.completions.create(model="fake", messages=CHAT, max_tokens=8, temperature=0, stream=True,
                                                 stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == text and chunks[0].object == "chat.completion.chunk"
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 8


def test_with_usage_every_chunk_but_the_last_says_that_it_has_none(address) -> None:
    body = {"messages": CHAT, "max_tokens": 4, "stream": True}
    chunks = events(httpx.post(f"{address}/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["usage"]["completion_tokens"] == 4
    assert not any("usage" in chunk for chunk in events(httpx.post(f"{address}/v1/chat/completions", json=body)))


def test_an_answer_comes_back_as_history(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": [], "audio": None}
    for said in (answer, {"role": "assistant", "content": "x"}):
        body = {"messages": [*CHAT, said, CHAT[1]], "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    assert worker.seen[0].prompt == worker.seen[1].prompt
    refused = httpx.post(f"{address}/v1/chat/completions", json={"messages": [{**answer, "tool_calls": [{}]}]})
    assert refused.status_code == 400 and "tool_calls" in refused.json()["error"]["message"]


def test_log_probabilities_shorten_a_limit_that_nobody_asked_for(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker, max_position=9999).address
    body = {"messages": CHAT, "n": 10, "logprobs": True, "top_logprobs": 5, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        until(lambda: len(worker.seen) == 10)
    assert {job.max_tokens for job in worker.seen} == {200_000 // 60}
    asked = httpx.post(f"{address}/v1/chat/completions", json={**body, "max_tokens": 4096})
    assert asked.status_code == 400 and "ask for fewer" in asked.json()["error"]["message"]


def test_n_gives_choices_with_seeds_of_their_own(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    body = {"messages": CHAT, "max_tokens": 4, "n": 3, "seed": 2**63 - 1}
    whole = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert sorted(job.sampling.seed for job in worker.seen) == [0, 1, 2**63 - 1]
    chunks = events(httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": True}))
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:3]] == ["assistant"] * 3
    assert {c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]} == {0, 1, 2}


def test_without_a_limit_the_answer_has_4096_tokens_or_what_fits(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    stream = {"messages": CHAT, "stream": True}
    with httpx.stream("POST", f"{make_server(worker, max_position=9999).address}/v1/chat/completions", json=stream):
        until(lambda: worker.seen)
    assert worker.seen[-1].max_tokens == 4096
    for options, room in (({"max_position": 100}, 100), ({"capacity_tokens": 80}, 80), ({"max_job_tokens": 60}, 60)):
        whole = httpx.post(f"{make_server(worker, **options).address}/v1/chat/completions", json={"messages": CHAT}).json()
        assert whole["usage"]["total_tokens"] == room
    answer = httpx.post(f"{make_server(worker, max_job_tokens=38).address}/v1/chat/completions", json={"messages": CHAT})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "too_long", answer.text


def test_parts_of_text_become_lines_and_a_developer_is_the_system(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = [{"role": "developer", "content": "D"}, {"role": "user", "content": parts, "name": "Ann"},
            {"role": "assistant", "content": "c", "tool_calls": None}]
    httpx.post(f"{make_server(worker).address}/v1/chat/completions", json={"messages": chat, "max_tokens": 1})
    assert bytes(worker.seen[0].prompt)[::4] == b"system:D\nuser:a\nb\nassistant:c\nassistant:"


@pytest.mark.parametrize(("field", "named"), [
    ({"tools": [{"type": "function"}]}, "tools"), ({"functions": [{}]}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"), ({"audio": {}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"presence_penalty": 1}, "presence_penalty"), ({"logit_bias": {"1": 1}}, "logit_bias"), ({"prompt": "x"}, "prompt"),
    ({"nonsense": 1}, "nonsense"), ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"n": 17}, "n must be"), ({"stream_options": 1}, "stream_options"),
    ({"best_of": 1}, "best_of"), ({"model": 1}, "model"), ({"prompt_cache_key": 5}, "prompt_cache_key"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"temperature": 3}, "temperature"),
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, r"messages\[0\]"), ({"messages": [{"role": "user"}]}, "content is missing"),
    ({"messages": [{"content": "x"}]}, "role"), ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "role"), ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "user", "content": []}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text part"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "text only"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "name"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "4097 messages"),
])
def test_what_is_not_supported_is_refused_by_name(address, field, named) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", content=json.dumps({"messages": CHAT, **field}))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "invalid_request", answer.text
    assert re.search(named, error["message"]), error["message"]


def test_harmless_fields_are_taken(address) -> None:
    body = {"messages": CHAT, "max_tokens": 1, "user": "u", "metadata": {"a": "b"}, "store": False, "tools": [],
            "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "parallel_tool_calls": True,
            "prompt_cache_key": "k", "stop": ["x"], "top_p": 0.5, "top_k": 3, "seed": 1, "modalities": ["text"]}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200


def test_a_model_without_a_template_says_what_to_do(make_worker, make_server) -> None:
    from kvbank.cluster.intake import no_template

    address = make_server(make_worker("worker-0"), render=no_template).address
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": CHAT})
    assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]


def test_a_slow_template_holds_up_nobody_else(make_worker, make_server) -> None:
    import threading

    begun, go_on = threading.Event(), threading.Event()

    def slow(messages: object, ask: bool) -> str:
        begun.set()
        go_on.wait(30)
        return "late"

    address = make_server(make_worker("worker-0"), render=slow).address
    told: list[int] = []
    waiting = threading.Thread(target=lambda: told.append(httpx.post(
        f"{address}/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}, timeout=60).status_code))
    waiting.start()
    assert begun.wait(30)
    assert httpx.post(f"{address}/v1/completions", json={"prompt": [1], "max_tokens": 2}).status_code == 200
    assert not told
    go_on.set()
    waiting.join(30)
    assert told == [200]
