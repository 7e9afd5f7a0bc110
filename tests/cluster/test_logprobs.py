"""Log-probabilities over HTTP in both of OpenAI's shapes: whole, streamed, and across a worker's death."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

PROMPT = [1, 2, 3]
CHAT = [{"role": "user", "content": "Hello"}]


def chunks(address: str, path: str, **body: Any) -> list[dict]:
    with httpx.stream("POST", address + path, json={"stream": True, "temperature": 0, **body}, timeout=30) as answer:
        return [json.loads(line[6:])["choices"][0] for line in answer.iter_lines() if line.startswith("data: {")]


def test_a_completion_has_four_lists_side_by_side(make_worker, make_server, answer_of, likely_of) -> None:
    client = openai.OpenAI(base_url=make_server(make_worker("worker-0")).address + "/v1", api_key="anything")
    told = client.completions.create(model="fake", prompt=PROMPT, max_tokens=6, logprobs=2, temperature=0).choices[0].logprobs
    ids = answer_of(PROMPT, 6)
    assert told.tokens == [chr(token) for token in ids] and told.text_offset == list(range(6))
    assert told.token_logprobs == [likely_of(at, token, 2)[0] for at, token in enumerate(ids)]
    wanted = [{chr(other): value for other, value in likely_of(at, token, 2)[1]} | {chr(token): likely_of(at, token, 2)[0]}
              for at, token in enumerate(ids)]
    assert told.top_logprobs == wanted and {len(each) for each in wanted} == {2, 3}


def test_a_chat_has_a_list_of_objects(make_worker, make_server, answer_of, likely_of) -> None:
    client = openai.OpenAI(base_url=make_server(make_worker("worker-0")).address + "/v1", api_key="anything")
    choice = client.chat.completions.create(model="fake", messages=CHAT, max_tokens=6, logprobs=True, top_logprobs=3).choices[0]
    ids = answer_of(list(b"user:Hello\nassistant:"), 6)
    assert len(choice.logprobs.content) == 6
    for at, (entry, token) in enumerate(zip(choice.logprobs.content, ids, strict=True)):
        drawn, likely = likely_of(at, token, 3)
        assert (entry.token, entry.bytes, entry.logprob) == (chr(token), [token], drawn)
        assert [(other.bytes, other.logprob) for other in entry.top_logprobs] == [([i], value) for i, value in likely]
    plain = client.chat.completions.create(model="fake", messages=CHAT, max_tokens=6, logprobs=True).choices[0]
    assert [entry.top_logprobs for entry in plain.logprobs.content] == [[]] * 6


def test_a_stream_tells_each_token_once_with_its_own(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    whole = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 9, "logprobs": 1}).json()
    parts = [c["logprobs"] for c in chunks(address, "/v1/completions", prompt=PROMPT, max_tokens=9, logprobs=1) if c["logprobs"]]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for part in parts for value in part[name]] == values, name
    body = {"messages": CHAT, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    whole = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    parts = [c["logprobs"]["content"] for c in chunks(address, "/v1/chat/completions", **body) if c["logprobs"]]
    assert [entry for part in parts for entry in part] == whole["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("stop", [None, "zz", "k"])
def test_held_back_text_keeps_its_tokens_log_probabilities(make_worker, make_server, stop) -> None:
    address = make_server(make_worker("worker-0")).address
    body = {"prompt": PROMPT, "max_tokens": 12, "logprobs": 0, "stop": stop}
    whole = httpx.post(f"{address}/v1/completions", json=body).json()
    count = whole["usage"]["completion_tokens"]
    parts = [c["logprobs"] for c in chunks(address, "/v1/completions", **body) if c["logprobs"]]
    assert count == len(whole["choices"][0]["logprobs"]["tokens"]) == sum(len(part["tokens"]) for part in parts)
    assert count == (12 if stop != "k" else "gnubipwdkryf".index("k") + 1), whole["choices"][0]["text"]


def test_a_job_that_went_on_elsewhere_keeps_those_of_its_first_worker(make_worker, make_server, answer_of, likely_of) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.die_at = 4
    first.repeat = second.repeat = True
    second.bias = 10.0
    server = make_server(first, second, choose=lambda workers, held, tokens: workers[0].id)
    answer = httpx.post(f"{server.address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 9, "logprobs": 2}, timeout=30)
    told = answer.json()["choices"][0]["logprobs"]
    ids = answer_of(PROMPT, 9)
    assert second.seen and told["tokens"] == [chr(token) for token in ids]
    assert told["token_logprobs"] == [likely_of(at, token, 2, 0.0 if at < 4 else 10.0)[0] for at, token in enumerate(ids)]
    assert second.seen[0].logprobs == 2


def test_nothing_is_asked_of_the_worker_unless_the_caller_asks(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    for body in ({}, {"logprobs": None}, {"logprobs": False}):
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, **body}).json()
        assert answer["choices"][0]["logprobs"] is None
    httpx.post(f"{address}/v1/chat/completions", json={"messages": CHAT, "max_tokens": 2, "logprobs": False, "top_logprobs": 0})
    assert [job.HasField("logprobs") for job in worker.seen] == [False] * 4
    httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "logprobs": 0})
    assert worker.seen[-1].HasField("logprobs") and worker.seen[-1].logprobs == 0


def test_a_token_without_probability_is_a_number_that_json_knows(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.bias = float("inf")                       # all but the first are told as minus infinity
    address = make_server(worker).address
    told = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "logprobs": 1}).json()
    assert told["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0] * 2


def test_a_worker_that_tells_nothing_leaves_gaps_and_no_error(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.mute = True
    address = make_server(worker).address
    told = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "logprobs": 1}).json()
    assert told["choices"][0]["logprobs"]["token_logprobs"] == [None, None]
    told = httpx.post(f"{address}/v1/chat/completions", json={"messages": CHAT, "max_tokens": 2, "logprobs": True}).json()
    assert told["choices"][0]["logprobs"] == {"content": [], "refusal": None}


@pytest.mark.parametrize(("path", "field"), [
    ("completions", {"logprobs": 21}), ("completions", {"logprobs": -1}), ("completions", {"logprobs": True}),
    ("completions", {"logprobs": 1.5}), ("completions", {"top_logprobs": 1}), ("chat/completions", {"logprobs": 2}),
    ("chat/completions", {"top_logprobs": 2}), ("chat/completions", {"logprobs": True, "top_logprobs": 21}),
    ("chat/completions", {"logprobs": False, "top_logprobs": 1}),
])
def test_what_cannot_be_told_is_refused(make_worker, make_server, path, field) -> None:
    address = make_server(make_worker("worker-0")).address
    start = {"prompt": PROMPT} if path == "completions" else {"messages": CHAT}
    answer = httpx.post(f"{address}/v1/{path}", json={**start, **field})
    assert answer.status_code == 400 and "logprobs" in answer.json()["error"]["message"], answer.text


def test_offsets_count_characters_not_bytes() -> None:
    from kvbank.cluster.http.logprobs import Offsets, completion_logprobs
    from kvbank.cluster.job import Logprob

    class Bytes:
        def piece(self, token: int) -> bytes:
            return bytes([token])

        def shown(self, token: int, *, first: bool) -> bytes:
            return bytes([token])

    ids = list("é!".encode())
    offsets = Offsets(Bytes())
    found = offsets.take(ids[:1]) + offsets.take(ids[1:])
    assert found == [0, 0, 1]
    told = completion_logprobs(Bytes(), ids, [Logprob(-1.0)] * 3, found)
    assert told["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"] and told["top_logprobs"][0] == {"bytes:\\xc3": -1.0}
