"""The HTTP face: OpenAI's dialect with its own client, the door, the limits, the shape of errors."""

from __future__ import annotations

import json
import re
import socket
import threading
from dataclasses import replace

import httpx
import openai
import pytest

from kvbank.cluster.client import Client
from kvbank.cluster.http.server import GatewayServer
from kvbank.cluster.intake import Intake
from kvbank.errors import ConfigError, InvalidRequest, Overloaded

PROMPT = [1, 2, 3]


def events(lines: list[str]) -> list:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def stream(address: str, **body: object) -> list[str]:
    with httpx.stream("POST", f"{address}/v1/completions", json={"prompt": PROMPT, "stream": True, **body}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(answer.iter_lines())


# -- OpenAI's dialect --------------------------------------------------------------------------------------------------

def test_openais_own_client_completes_and_streams(make_worker, make_server, answer_of) -> None:
    client = openai.OpenAI(base_url=make_server(make_worker("worker-0")).address + "/v1", api_key="anything")
    assert [model.id for model in client.models.list()] == ["fake"]
    whole = client.completions.create(model="fake", prompt="hello", max_tokens=8, temperature=0)
    text = bytes(answer_of(list(b"hello"), 8)).decode()
    assert whole.choices[0].text == text and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 8, 13)
    assert whole.usage.prompt_tokens_details.cached_tokens == 2
    chunks = list(client.completions.create(model="fake", prompt="hello", max_tokens=8, temperature=0, stream=True,
                                            stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2 and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hello")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="")
    assert caught.value.code == "invalid_request"


def test_the_receipt_rides_the_response_and_the_last_chunk(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    whole = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "job_id": "mine"}).json()
    assert whole["kvbank"]["job_id"] == "mine" and whole["kvbank"]["receipt"]["computed_tokens"] == 2
    assert whole["id"] == "cmpl-mine" and whole["object"] == "text_completion"
    lines = stream(address, max_tokens=3)
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
    last = events(lines)[-1]
    assert last["choices"][0]["finish_reason"] == "length" and last["kvbank"]["receipt"]["output_tokens"] == 3


def test_several_prompts_and_n_become_choices_in_order(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "seed": 7}
    whole = httpx.post(f"{address}/v1/completions", json=body).json()
    texts = [bytes(answer_of([ord(c)], 4)).decode() for c in "aabb"]
    assert [(c["index"], c["text"]) for c in whole["choices"]] == list(enumerate(texts))
    assert whole["usage"]["prompt_tokens"] == 2 and whole["usage"]["completion_tokens"] == 16
    assert sorted(job.sampling.seed for job in worker.seen) == [7, 7, 8, 8]
    chunks = events(stream(address, prompt=["a", "b"], n=2, max_tokens=4))
    joined = {n: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == n) for n in range(4)}
    assert list(joined.values()) == texts


def test_token_ids_are_returned_when_asked_for(make_worker, make_server, answer_of) -> None:
    address = make_server(make_worker("worker-0")).address
    body = {"prompt": [PROMPT], "max_tokens": 4, "return_token_ids": True}
    assert httpx.post(f"{address}/v1/completions", json=body).json()["choices"][0]["token_ids"] == answer_of(PROMPT, 4)
    chunks = events(stream(address, max_tokens=4, return_token_ids=True))
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == answer_of(PROMPT, 4)


def test_echo_begins_each_choice_with_its_prompt(make_worker, make_server, answer_of) -> None:
    address = make_server(make_worker("worker-0")).address
    for prompt, texts in (("ab", ["ab"]), ([104, 105], ["hi"]), (["x", "y"], ["x", "y"]), ([[104, 105]], ["hi"]),
                          ([{"text": "ab"}, {"token_ids": [104, 105]}], ["abhi"])):
        body = {"prompt": prompt, "max_tokens": 3, "echo": True, "n": 2, "seed": 1}
        whole = httpx.post(f"{address}/v1/completions", json=body).json()
        wanted = [text + bytes(answer_of(list(text.encode()), 3)).decode() for text in texts for _ in range(2)]
        assert [choice["text"] for choice in whole["choices"]] == wanted
        assert whole["usage"]["prompt_tokens"] == sum(map(len, texts))
        chunks = events(stream(address, **body))
        told = {n: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == n) for n in range(len(wanted))}
        assert list(told.values()) == wanted


def test_newer_names_and_salts_reach_the_worker(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    seen: list[str] = []

    def keys(key_space: str, _prompt: bytes) -> bytes:
        seen.append(key_space)
        return b""

    address = make_server(worker, block_keys=keys, api_keys={"k": "tenant-a"}).address
    bodies = [{"max_completion_tokens": 3}, {"max_tokens": 2, "max_completion_tokens": 2, "cache_salt": "s" * 256},
              {"max_tokens": 1, "cache_salt": "\0x", "prompt_cache_key": "p"}]
    for body in bodies:
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, **body}, headers={"Authorization": "Bearer k"})
        assert answer.status_code == 200, answer.text
    assert [job.max_tokens for job in worker.seen] == [3, 2, 1]
    assert [job.cache_salt for job in worker.seen] == ["", "s" * 256, "\0x"]
    assert [job.tenant for job in worker.seen] == ["tenant-a"] * 3
    assert seen == ["tenant-a", "tenant-a\0" + "s" * 256, "tenant-a\0\0x"]


def test_prompts_and_chats_are_tokenised_and_back_without_a_job(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker, max_position=8).address
    told = httpx.post(f"{address}/tokenize", json={"prompt": "much longer than the model"}).json()
    assert told == {"tokens": list(b"much longer than the model"), "count": 26, "max_model_len": 8}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "fake"}
    assert bytes(httpx.post(f"{address}/tokenize", json=chat).json()["tokens"]) == b"user:Hi\nassistant:"
    without = httpx.post(f"{address}/tokenize", json={**chat, "add_generation_prompt": False}).json()
    assert bytes(without["tokens"]) == b"user:Hi\n"
    assert httpx.post(f"{address}/detokenize", json={"tokens": told["tokens"][:8]}).json() == {"prompt": "much lon"}
    assert httpx.post(f"{address}/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert not worker.seen


@pytest.mark.parametrize(("path", "body", "status"), [
    ("tokenize", {}, 400), ("tokenize", {"prompt": "a", "messages": []}, 400), ("tokenize", {"prompt": ""}, 400),
    ("tokenize", {"messages": "x"}, 400), ("tokenize", {"prompt": "a", "x": 1}, 400), ("tokenize", {"prompt": [999]}, 400),
    ("tokenize", {"prompt": "a", "model": "other"}, 404), ("detokenize", {}, 400), ("detokenize", {"tokens": [999]}, 400),
    ("detokenize", {"tokens": "x"}, 400), ("detokenize", {"tokens": [1.5]}, 400),
    ("detokenize", {"tokens": [1], "model": "other"}, 404),
])
def test_what_cannot_be_tokenised_is_a_typed_error(make_worker, make_server, path, body, status) -> None:
    answer = httpx.post(f"{make_server(make_worker('worker-0')).address}/{path}", json=body)
    assert answer.status_code == status and answer.json()["error"]["code"] in ("invalid_request", "not_found")


def test_sampling_options_reach_the_worker_with_openais_defaults(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT})
    httpx.post(f"{address}/v1/completions", json={
        "prompt": PROMPT, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 11, "ignore_eos": True,
        "stop_token_ids": [9], "deadline_s": 60, "user": "harmless", "presence_penalty": 0, "logit_bias": {}, "n": 1})
    plain, rich = worker.seen
    assert plain.max_tokens == 16 and plain.sampling.temperature == 1.0 and plain.sampling.seed != 0
    assert rich.sampling.temperature == pytest.approx(0.5) and rich.sampling.top_p == pytest.approx(0.9)
    assert (rich.sampling.top_k, rich.sampling.seed, list(rich.stop_token_ids)) == (5, 11, [9])
    assert rich.ignore_eos and 0 < rich.deadline_ms <= 60_000


def test_an_error_after_the_first_chunk_travels_in_band(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    lines = stream(make_server(worker).address, max_tokens=1000, deadline_s=0.3)
    assert events(lines)[-1]["error"]["code"] == "deadline_exceeded"
    assert "data: [DONE]" not in lines


def test_a_quiet_stream_is_kept_alive_by_comments(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.3
    lines = stream(make_server(worker, http={"quiet_s": 0.05}).address, max_tokens=2)
    assert ": keep-alive" in lines


@pytest.mark.parametrize("streaming", [True, False])
def test_a_caller_who_leaves_cancels_the_job(make_worker, make_server, until, streaming) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    server = make_server(worker)
    body = {"prompt": PROMPT, "max_tokens": 2000, "stream": streaming}
    if streaming:
        with httpx.stream("POST", f"{server.address}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.address}/v1/completions", json=body, timeout=0.3)
    until(lambda: worker.cancels == ["client"])
    until(lambda: server.gateway.live == 0)


def test_completions_under_one_job_id_are_cancelled_by_the_last_to_leave(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    address = make_server(worker).address
    body = {"prompt": PROMPT, "max_tokens": 300, "stream": True, "job_id": "mine"}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as first:
        lines = first.iter_lines()                   # held: a dropped iterator closes its response
        next(lines)
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as second:
            next(second.iter_lines())
        count = httpx.get(f"{address}/v1/jobs/mine").json()["output_tokens"]
        until(lambda: httpx.get(f"{address}/v1/jobs/mine").json()["output_tokens"] > count + 5)
        assert not worker.cancels
    until(lambda: worker.cancels == ["client"])


@pytest.mark.parametrize("job_first", [True, False])
def test_a_job_that_was_handed_in_by_itself_outlives_the_completions_that_read_it(make_worker, make_server, job_first) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    address = make_server(worker).address
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "job_id": "night"}
    if job_first:
        httpx.post(f"{address}/v1/jobs", json=body)
    with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        if not job_first:
            httpx.post(f"{address}/v1/jobs", json=body)
    told = httpx.get(f"{address}/v1/jobs/night", params={"wait_s": 20}, timeout=30).json()
    assert told["state"] == "finished" and told["output_tokens"] == 60 and not worker.cancels and len(worker.seen) == 1


def test_a_completion_that_was_left_can_be_sent_again_under_its_job_id(make_worker, make_server, until, answer_of) -> None:
    """A connection that breaks is what the job_id is for."""
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    server = make_server(worker)
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "return_token_ids": True, "job_id": "mine"}
    httpx.post(f"{server.address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 1})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.address}/v1/completions", json=body, timeout=0.2)
    until(lambda: worker.cancels == ["client"])
    until(lambda: server.gateway.live == 0)
    assert httpx.get(f"{server.address}/v1/jobs/mine").json()["state"] == "cancelled"
    other = httpx.post(f"{server.address}/v1/completions", json={**body, "max_tokens": 4})
    assert other.status_code == 400 and "another request" in other.text
    again = httpx.post(f"{server.address}/v1/completions", json=body)
    assert again.status_code == 200, again.text
    assert again.json()["choices"][0]["token_ids"] == answer_of(PROMPT, 30)
    jobs = httpx.get(f"{server.address}/v1/jobs").json()["data"]
    assert [job["state"] for job in jobs] == ["finished", "finished"] and jobs[1]["id"] == "mine", "it stands there once"
    assert httpx.post(f"{server.address}/v1/completions", json=body).json() == again.json() and len(worker.seen) == 3


def test_a_job_that_still_ends_because_it_was_left_is_not_handed_out(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s, answers, ends = 0.02, worker._answers, threading.Event()
    worker._answers = lambda job, _cancelled: answers(job, ends)
    server = make_server(worker, limits={"grace_s": 30.0})
    body = {"prompt": PROMPT, "max_tokens": 1000, "job_id": "mine"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.address}/v1/completions", json=body, timeout=0.2)
    until(lambda: worker.cancels == ["client"])
    early = httpx.post(f"{server.address}/v1/completions", json=body)
    assert early.status_code == 429 and early.headers["retry-after"] == "1" and "in a moment" in early.text
    ends.set()
    until(lambda: server.gateway.live == 0)
    worker._answers = answers
    assert httpx.post(f"{server.address}/v1/completions", json={**body, "temperature": 0}).status_code == 400
    with httpx.stream("POST", f"{server.address}/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200 and server.gateway.live == 1


@pytest.mark.parametrize(("seconds", "told"), [(1.0, "1"), (1.13, "2"), (0.2, "1"), (30.0, "30")])
def test_who_waits_as_long_as_retry_after_says_has_waited_long_enough(make_worker, make_server, seconds, told) -> None:
    server = make_server(make_worker("worker-0"))

    def full(_spec) -> None:
        raise Overloaded("full", retry_after_s=seconds)

    server.gateway.submit = full
    answer = httpx.post(f"{server.address}/v1/completions", json={"prompt": PROMPT})
    assert answer.status_code == 429 and answer.headers["retry-after"] == told


def test_openais_client_does_not_send_again_what_was_cancelled_or_has_run_out_of_time(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    server = make_server(worker)
    client = openai.OpenAI(base_url=server.address + "/v1", api_key="any")
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="fake", prompt="late", max_tokens=900, extra_body={"deadline_s": 0.3})
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded" and len(worker.seen) == 1

    def cancel() -> None:
        until(lambda: len(worker.seen) == 2)
        httpx.delete(f"{server.address}/v1/jobs/mine")

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(openai.ConflictError):
        client.completions.create(model="fake", prompt="mine", max_tokens=900, extra_body={"job_id": "mine"})
    other.join()
    assert len(worker.seen) == 2


def test_who_hangs_up_while_it_sends_its_body_is_no_error_of_ours(make_worker, make_server, caplog) -> None:
    server = make_server(make_worker("worker-0"))
    host, port = server.address.removeprefix("http://").split(":")
    for sent in (b"", b'{"prompt":'):
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n" + sent)
    for _ in range(5):
        assert httpx.post(f"{server.address}/v1/completions", json={"prompt": PROMPT}).status_code == 200
    text = httpx.get(f"{server.address}/metrics").text
    assert 'code="internal"} 0.0' in text and not [r for r in caplog.records if r.exc_info]


@pytest.mark.parametrize("field", [
    {"echo": True, "logprobs": 0}, {"echo": "yes"}, {"echo": True, "prompt": None}, {"echo": True, "prompt": []},
    {"echo": True, "prompt": [{}]}, {"echo": True, "prompt": [-1]}, {"echo": True, "prompt": 5}, {"logprobs": 50},
    {"suffix": "x"}, {"best_of": 2}, {"presence_penalty": 1}, {"logit_bias": {"1": 2}},
    {"unknown": 1}, {"stream_options": 5}, {"stream_options": {"x": 1}}, {"n": 0}, {"n": 10**9}, {"n": True},
    {"prompt": ["a"] * 17}, {"prompt": ["a", 1]}, {"prompt": [[]]}, {"prompt": [[1], "a"]}, {"prompt": {}},
    {"prompt": [{"text": "a", "token_ids": [1]}]}, {"prompt": [{"x": 1}]}, {"job_id": "x", "n": 2}, {"model": 5},
    {"stream": "yes"}, {"max_tokens": "many"}, {"temperature": 3}, {"cache_salt": ""}, {"cache_salt": 5},
    {"cache_salt": "x" * 257}, {"max_tokens": 4, "max_completion_tokens": 5}, {"messages": []}, {"chat_template": "x"},
])
def test_what_is_not_supported_is_refused_by_name(make_worker, make_server, field) -> None:
    worker = make_worker("worker-0")
    answer = httpx.post(f"{make_server(worker).address}/v1/completions", json={"prompt": PROMPT, **field})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_request"
    assert answer.json()["error"]["type"] == "invalid_request_error" and not worker.seen
    assert re.match(r"[a-z_]+", answer.json()["error"]["param"])[0] in field


@pytest.mark.parametrize(("path", "body", "param"), [
    ("completions", {"prompt": [{"text": "a"}, {"text": 5}]}, "prompt[1].text"),
    ("completions", {"prompt": [{"text": "a", "reusable": "no"}]}, "prompt[0].reusable"),
    ("completions", {"prompt": [{"token_ids": [5, 10**9]}]}, "prompt[0].token_ids"),
    ("completions", {"prompt": [{"text": "\ud800"}]}, "prompt[0].text"), ("completions", {"prompt": "\ud800"}, "prompt"),
    ("completions", {"prompt": ["a", ""]}, "prompt[1]"), ("completions", {"prompt": ["a", "\ud800"], "echo": True}, "prompt[1]"),
    ("completions", {"prompt": [[1], [10**9]]}, "prompt[1]"), ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[{"text": "a"}], [{"text": 5}]]}, "prompt[1][0].text"),
    ("completions", {"prompt": ["a"] * 17}, "prompt"), ("completions", {"prompt": ["a"] * 2, "n": 9}, "n"),
    ("completions", {"stop": ["a", ""]}, "stop[1]"), ("completions", {"stop": ["\udfff"]}, "stop[0]"),
    ("completions", {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("completions", {"stream_options": {"other": 1}}, "stream_options.other"),
    ("completions", {"stop_token_ids": [-1]}, "stop_token_ids"), ("completions", {"a\ud800": 1}, None),
    ("completions", {"x" * 41: 1}, None), ("completions", {"model": "another"}, "model"),
    ("completions", {"max_tokens": 10**6}, None),           # it is the sum that is too long
    ("completions", {"prompt": [5] * 5000}, "prompt"), ("completions", {"stop": ""}, "stop"),
    ("completions", {"max_tokens": 2.0, "max_completion_tokens": 2}, "max_tokens"),
    ("completions", {"stream_options.x": 1}, None),
    ("chat/completions", {"messages": [{"role": "user", "content": "a" * 5000}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ("jobs", {"deadline_s": -1}, "deadline_s"), ("jobs", {"policy": "none"}, "policy"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "a"}]}, "messages[1].role"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages[0].name"),
    ("chat/completions", {"messages": "a"}, "messages"), ("chat/completions", {"top_logprobs": 5}, "top_logprobs"),
])
def test_an_error_names_the_field_at_fault(make_worker, make_server, path, body, param) -> None:
    address = make_server(make_worker("worker-0")).address
    given = {"messages": [{"role": "user", "content": "a"}]} if path.startswith("chat") else {"prompt": PROMPT}
    answer = httpx.post(f"{address}/v1/{path}", content=json.dumps({**given, **body}))
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize(("wrong", "param"), [
    ({"temperature": 9}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"prompt": b"x"}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"job_id": "known"}, "job_id"),
])
def test_a_client_hears_which_field_it_was(make_worker, make_server, wrong, param) -> None:
    with Client(make_server(make_worker("worker-0")).address) as client:
        client.submit([1, 2], job_id="known", max_tokens=1)
        with pytest.raises(InvalidRequest) as caught:
            client.submit(**{"prompt": PROMPT, **wrong})
    assert caught.value.param == param


def test_more_choices_than_jobs_may_run_are_refused_for_good(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0"), limits={"max_jobs": 3}).address
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "n": 4})
    assert answer.status_code == 400 and "ask for fewer" in answer.json()["error"]["message"], answer.text


def test_a_gateway_on_all_addresses_tells_one_that_can_be_called(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0"), host="0.0.0.0", api_keys={"k": "t"}).address
    assert address.startswith("http://127.0.0.1:") and httpx.get(f"{address}/health").status_code == 200


def test_every_request_has_an_id_that_its_caller_can_name(make_worker, make_server, caplog) -> None:
    async def broken() -> dict:
        raise RuntimeError("a bug")

    address = make_server(make_worker("worker-0"), status=broken).address
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="anything", max_retries=0)
    done = client.completions.with_raw_response.create(model="fake", prompt="a", max_tokens=1)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake", prompt="a", n=17)
    failed = httpx.get(f"{address}/v1/status")
    ids = [done.request_id, refused.value.request_id, failed.headers["x-request-id"]]
    assert len(set(ids)) == 3 and all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)
    assert failed.status_code == 500 and ids[2] in failed.json()["error"]["message"] and f"request_id={ids[2]}" in caplog.text


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("PUT", "/v1/jobs", "GET, POST"), ("PUT", "/v1/jobs/x", "DELETE, GET"), ("POST", "/health", "GET, HEAD"),
    ("GET", "/v1/completions", "POST"),
])
def test_a_405_names_every_method_of_its_path(make_server, method, path, allow) -> None:
    answer = httpx.request(method, make_server().address + path)
    assert answer.status_code == 405 and answer.headers.get_list("allow") == [allow]


# -- malformed bodies --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": NaN}', b'{"a":' * 100_000,
    b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}', b'{"prompt": [' + b"9" * 400 + b"]}",
    b'{"prompt": [1e400]}', b'{"prompt": "a", "seed": 1e5}',
], ids=lambda raw: repr(raw[:16]))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/jobs"])
def test_malformed_bodies_are_typed_and_leave_the_server_unharmed(make_worker, make_server, raw, path) -> None:
    address = make_server(make_worker("worker-0")).address
    answer = httpx.post(address + path, content=raw)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request"
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_body_over_the_limit_is_refused_before_it_is_a_job(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker, http={"body_bytes": 10_000}).address

    def pieces(count: int):
        yield from [b'{"prompt": "', *[b"x" * 1000] * count, b'"}']

    for content in (b"x" * 20_000, b"x" * 2_000_000, pieces(20), pieces(2000)):
        answer = httpx.post(f"{address}/v1/completions", content=content)
        assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]["message"]
    assert httpx.post(f"{address}/v1/completions", content=pieces(2)).status_code == 200 and len(worker.seen) == 1


def test_deep_json_is_refused_and_wide_json_is_not(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    for depth, status in ((31, 200), (32, 400), (500, 400)):
        deep: object = {}
        for _ in range(depth - 2):
            deep = [deep]
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 1, "metadata": {"a": deep}})
        assert answer.status_code == status, (depth, answer.text)
    wide = {"metadata": {"a": [{"b": []}] * 5000}, "prompt": [1] * 4000, "max_tokens": 1}
    assert httpx.post(f"{address}/v1/completions", json=wide).status_code == 200


@pytest.mark.parametrize("headers", [{"X-Big": "x" * 40_000}, {f"X-{n}": "x" for n in range(101)}], ids=["long", "many"])
def test_headers_are_bounded(make_worker, make_server, headers) -> None:
    address = make_server(make_worker("worker-0")).address
    assert httpx.get(f"{address}/v1/models", headers={"X-Big": "x" * 10_000}).status_code == 200
    answer = httpx.get(f"{address}/v1/models", headers=headers)
    assert answer.status_code == 431 and answer.json()["error"]["code"] == "invalid_request"
    assert 'kvbank_requests_refused_total{code="invalid_request"} 1.0' in httpx.get(f"{address}/metrics").text
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as endless:
        endless.settimeout(10)
        with pytest.raises(OSError):                 # 400 and closed, well before the kernel's buffers are full
            while True:
                endless.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20))
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_jobs_tokens_are_bounded_by_the_operator_in_every_dialect(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker, max_job_tokens=10).address
    for path, body in (("v1/completions", {"prompt": PROMPT}), ("v1/jobs", {"prompt": PROMPT}),
                       ("v1/chat/completions", {"messages": [{"role": "user", "content": ""}]})):
        answer = httpx.post(f"{address}/{path}", json={**body, "max_tokens": 8})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "too_long"
        assert "http.max_job_tokens" in answer.json()["error"]["message"]
    assert httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 7}).status_code == 200
    assert len(worker.seen) == 1


def test_a_request_can_be_repeated_under_the_id_that_it_was_given(make_worker, make_server) -> None:
    address, body = make_server(worker := make_worker("worker-0")).address, {"prompt": PROMPT, "max_tokens": 4}
    given = httpx.post(f"{address}/v1/jobs", json=body).json()["id"]
    for _ in range(2):                               # while it runs, and when its prompt is let go
        again = httpx.post(f"{address}/v1/jobs", json={**body, "job_id": given})
        assert again.status_code == 202 and again.json()["id"] == given, again.text
        other = httpx.post(f"{address}/v1/jobs", json={**body, "max_tokens": 5, "job_id": given})
        assert other.status_code == 400 and "another request" in other.text
        httpx.get(f"{address}/v1/jobs/{given}", params={"wait_s": 10})
    assert len(worker.seen) == 1


def test_a_client_that_would_rather_speak_http_2_is_answered(make_worker, make_server) -> None:
    """Java's own asks so in its first request. Parsers are known that lose the body then."""
    address = make_server(make_worker("worker-0")).address
    asks = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 3}, headers=asks)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


def test_a_body_that_never_ends_is_given_up(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0"), http={"body_s": 0.2}).address
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as slow:
        slow.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        slow.settimeout(10)
        assert b"408" in slow.recv(65536).split(b"\r\n")[0]


# -- the door ----------------------------------------------------------------------------------------------------------

KEYS = {"key-a": "tenant-a", "key-b": "tenant-b"}
ROLES = {"key-a": "tenant-a", "key-b": "tenant-b", "key-ops": "tenant-a:ops"}
WRONG = [None, "Bearer wrong", "Basic key-a", "Bearer", "key-a", "Bearer key-a key-b"]


def _rooms(server) -> dict[tuple[str, str], str]:
    """(method, path) -> role, as declared; compared with what the application really routes."""
    from kvbank.cluster.http.app import build_app
    app = build_app(_front_of(server))
    found = set()

    def walk(routes: list) -> None:
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            if inner:
                walk(inner)
            else:
                found.update((method, route.path) for method in route.methods)

    walk(app.routes)
    assert found == set(app.state.doors), "a route without a declared role"
    return {(method, path.replace("{job_id}", "x").replace("{name:path}", "fake")): role
            for (method, path), role in app.state.doors.items()}


@pytest.mark.parametrize("header", WRONG)
def test_without_a_valid_key_every_route_is_shut_before_its_body_is_read(make_server, header) -> None:
    server = make_server(api_keys=ROLES)
    headers = {"Authorization": header} if header else {}
    rooms = _rooms(server)
    assert len(rooms) >= 12 and sorted(path for (_, path), role in rooms.items() if role == "open") == [
        "/dashboard", "/dashboard/", "/dashboard/door", "/dashboard/{name}", "/health", "/health"]
    with httpx.Client(base_url=server.address, headers=headers) as client:
        for (method, path), role in rooms.items():
            if role != "open":
                answer = client.request(method, path, content=b"not json" if method == "POST" else None)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "unauthorized", (method, path)


def test_a_user_may_not_run_the_cluster_and_who_runs_it_must_show_that_the_page_is_ours(make_server) -> None:
    server = make_server(api_keys=ROLES)
    ops = [room for room, role in _rooms(server).items() if role == "ops"]
    assert ("GET", "/metrics") in ops and ("GET", "/v1/ops/session") in ops
    with httpx.Client(base_url=server.address) as client:
        for method, path in ops:
            answer = client.request(method, path, headers={"Authorization": "Bearer key-a"}, content=b"not json")
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden", (method, path)
        session = client.get("/v1/ops/session", headers={"Authorization": "Bearer key-ops"}).json()
        assert session["role"] == "ops" and session["tenant"] == "tenant-a" and "key-ops" not in str(session)
        for method, path in ops:
            for token in (None, "", session["csrf"][:-1] + "x"):
                given = {"Authorization": "Bearer key-ops", **({} if token is None else {"x-kvbank-csrf": token})}
                if method != "GET":
                    assert client.request(method, path, headers=given, content=b"not json").status_code == 403, (method, path)
        assert client.get("/metrics", headers={"Authorization": "Bearer key-ops"}).status_code == 200


def test_keys_come_and_go_without_a_restart(make_server) -> None:
    keys = [{"old": "t"}]
    address = make_server(api_keys=lambda: keys[0]).address

    def status(key: str) -> int:
        return httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert (status("old"), status("new")) == (200, 401)
    keys[0] = {"new": "t"}
    assert (status("old"), status("new")) == (401, 200)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"])
def test_with_keys_a_page_of_another_site_is_refused_whatever_the_method(make_server, method) -> None:
    address = make_server(api_keys=ROLES).address
    headers = {"Authorization": "Bearer key-a", "Origin": "http://evil.example"}
    assert httpx.request(method, f"{address}/v1/jobs", headers=headers).status_code == 403
    own = httpx.get(f"{address}/v1/jobs", headers={**headers, "Origin": address})
    assert own.status_code == 200
    assert own.headers["content-security-policy"].startswith("default-src 'none'") and own.headers["x-content-type-options"]


def _front_of(server):
    from kvbank.cluster.http.app import Front
    from kvbank.cluster.intake import Intake, ModelFacts
    facts = ModelFacts(name="fake", vocab_size=8, max_position=8)
    return Front(gateway=server.gateway, intake=Intake(facts, lambda text, start: [1]), api_keys=ROLES)


def test_a_key_proves_its_tenant_and_tenants_do_not_see_each_other(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker, api_keys=KEYS).address
    a, b = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    assert httpx.get(f"{address}/health").status_code == 200
    for headers in (a, b):
        made = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "job_id": "same"}, headers=headers)
        assert made.status_code == 202
    httpx.get(f"{address}/v1/jobs/same", params={"wait_s": 10}, headers=a)
    assert sorted(job.tenant for job in worker.seen) == ["tenant-a", "tenant-b"]
    assert len({job.id for job in worker.seen}) == 2
    httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "job_id": "only-a"}, headers=a)
    assert httpx.get(f"{address}/v1/jobs/only-a", headers=b).status_code == 404
    assert [job["id"] for job in httpx.get(f"{address}/v1/jobs", headers=b).json()["data"]] == ["same"]


def test_without_keys_on_loopback_any_key_is_the_default_tenant(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    for headers in ({}, {"Authorization": "Bearer whatever"}):
        httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT}, headers=headers)
    assert [job.tenant for job in worker.seen] == ["default", "default"]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"},
                                     {"Host": "127.0.0.1.evil.example:80"}, {"Origin": "null"}])
def test_without_keys_web_pages_are_kept_out(make_server, headers) -> None:
    address = make_server().address
    assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 403
    assert httpx.get(f"{address}/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200
    assert 'kvbank_requests_refused_total{code="forbidden"} 1.0' in httpx.get(f"{address}/metrics").text


def test_a_public_bind_without_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="not loopback"):
        GatewayServer(lambda: None, host="0.0.0.0", port=0, open_door=True)


def test_a_port_in_use_is_a_config_error_that_names_it(make_server) -> None:
    port = int(make_server().address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=str(port)):
        make_server(port=port)


# -- errors, health and metrics ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/nowhere", 404, "not_found"), ("PUT", "/v1/jobs", 405, "invalid_request"),
    ("GET", "/v1/jobs/none", 404, "not_found"), ("GET", "/v1/models/none", 404, "not_found"),
    ("GET", "/v1/completions", 405, "invalid_request"), ("GET", "/docs", 404, "not_found"),
])
def test_errors_have_one_shape(make_server, method, path, status, code) -> None:
    answer = httpx.request(method, make_server().address + path)
    assert answer.status_code == status and answer.json()["error"]["code"] == code
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("query", ["from=5", "from=-1", "from=x", "from=nan", "from=0.5", "from=9999999999"])
def test_a_stream_from_nowhere_is_refused(make_worker, make_server, query) -> None:
    address = make_server(make_worker("worker-0")).address
    job = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 2}).json()
    httpx.get(f"{address}/v1/jobs/{job['id']}", params={"wait_s": 10})
    assert httpx.get(f"{address}/v1/jobs/{job['id']}/stream?{query}").status_code == 400
    lines = httpx.get(f"{address}/v1/jobs/{job['id']}/stream?from=1").text.splitlines()
    assert events(lines)[0]["index"] == 1 and len(events(lines)[0]["token_ids"]) == 1
    for odd in ("²", "9" * 400, "-1", "x"):
        headers = {b"Last-Event-ID": odd.encode()}
        assert httpx.get(f"{address}/v1/jobs/{job['id']}/stream", headers=headers).status_code in (200, 400), odd
    resumed = httpx.get(f"{address}/v1/jobs/{job['id']}/stream", headers={"Last-Event-ID": "1"}).text
    assert resumed.splitlines() == lines


def test_a_bug_in_a_route_tells_the_caller_nothing(make_worker, make_server) -> None:
    async def broken() -> dict:
        raise RuntimeError("/secret/path")

    address = make_server(make_worker("worker-0"), status=broken).address
    answer = httpx.get(f"{address}/v1/status")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal" and "secret" not in answer.text
    assert httpx.get(f"{address}/health").status_code == 200


def test_health_follows_the_workers(make_worker, make_server) -> None:
    server = make_server()
    assert httpx.get(f"{server.address}/health").status_code == 503
    workers = [make_worker(name).view() for name in ("worker-0", "worker-1")]
    for serving in ([workers[0]], workers, [workers[0], replace(workers[1], draining=True)]):
        server.roster.alive = serving
        told = httpx.get(f"{server.address}/health")
        assert told.status_code == 200 and told.json()["workers"] == sum(not worker.draining for worker in serving)
    assert httpx.head(f"{server.address}/health").status_code == 200
    server.roster.alive = [replace(worker, draining=True) for worker in workers]
    assert httpx.get(f"{server.address}/health").status_code == httpx.head(f"{server.address}/health").status_code == 503


def test_metrics_count_what_happened_and_never_who_said_what(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    httpx.post(f"{address}/v1/completions", json={"prompt": "planted canary", "max_tokens": 5, "job_id": "canary-id"})
    text = httpx.get(f"{address}/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert 'kvbank_output_tokens_total{model="",tenant="default"} 5.0' in text.text
    assert 'kvbank_jobs_ended_total{model="",outcome="length",tenant="default"} 1.0' in text.text
    assert 'kvbank_reused_tokens_total{model="",source="device",tenant="default"} 7.0' in text.text
    assert 'kvbank_ttft_seconds_count{model=""} 1.0' in text.text and "canary" not in text.text


def test_prompts_and_keys_stay_out_of_logs(make_worker, make_server, caplog) -> None:
    worker = make_worker("worker-0")
    worker.die_at = 1
    caplog.set_level("DEBUG")
    address = make_server(worker, api_keys={"planted-key": "tenant-a"}).address
    headers = {"Authorization": "Bearer planted-key"}
    httpx.post(f"{address}/v1/completions", json={"prompt": "planted prompt", "job_id": "planted-id"}, headers=headers)
    assert "attempt_lost" in caplog.text
    assert "planted" not in "\n".join(line for line in caplog.text.splitlines() if "kvbank" in line)


def test_a_slow_reader_costs_no_other_anything(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as slow:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 3000, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        slow.sendall(head + body)
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "max_tokens": 50})
        assert answer.json()["choices"][0]["text"] == bytes(answer_of(PROMPT, 50)).decode()


def test_many_callers_at_once_all_get_their_own_answer(make_worker, make_server, answer_of) -> None:
    address = make_server(make_worker("worker-0"), make_worker("worker-1")).address
    wrong: list[int] = []

    def one(n: int) -> None:
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": [n], "max_tokens": 6}, timeout=60).json()
        if answer["choices"][0]["text"] != bytes(answer_of([n], 6)).decode():
            wrong.append(n)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_first_token_is_not_delayed_by_the_edge(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    with httpx.Client(base_url=address) as client:
        body = {"prompt": [1] * 4000, "max_tokens": 1}
        receipts = [client.post("/v1/completions", json=body).json() for _ in range(5)]
    assert min(answer["kvbank"]["receipt"]["ttft_s"] for answer in receipts) < 1.0


# -- what fresh eyes found ---------------------------------------------------------------------------------------------

def test_a_choice_that_fails_ends_its_siblings(make_worker, make_server, until) -> None:
    for stream in (False, True):
        worker = make_worker("worker-0")
        worker.token_s = 0.5
        server = make_server(worker)
        with httpx.Client(base_url=server.address, timeout=30) as client:
            asked = threading.Thread(target=lambda client=client, stream=stream: client.post(
                "/v1/completions", json={"prompt": PROMPT, "n": 4, "max_tokens": 200, "stream": stream}))
            asked.start()
            until(lambda server=server: len([job for job in server.gateway.jobs("default") if job.ids]) == 4)
            client.post(f"/v1/jobs/{server.gateway.jobs('default')[2].id}/cancel")
            asked.join(20)
            assert not asked.is_alive()
            until(lambda server=server: server.gateway.live == 0)


def test_more_log_probabilities_than_an_answer_may_have_are_refused_with_numbers(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    body = {"prompt": PROMPT, "max_tokens": 4000, "n": 16, "logprobs": 5}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 400 and "384000" in answer.json()["error"]["message"]


def test_probes_may_call_this_gateway_what_they_like_and_nobody_else(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    headers = {"Host": "10.1.2.3:8080"}
    assert httpx.get(f"{address}/health", headers=headers).status_code == 200
    assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 403


def test_too_many_prompts_are_refused_before_one_is_read(make_worker, make_server, monkeypatch) -> None:
    """Each would be tokenised for its echo: minutes of the gateway for a body of 8 MiB."""
    address = make_server(make_worker("worker-0")).address
    read: list[object] = []
    real = Intake.prompt_text

    async def prompt_text(intake: Intake, prompt: object, **named: str) -> str:
        read.append(prompt)
        return await real(intake, prompt, **named)

    monkeypatch.setattr(Intake, "prompt_text", prompt_text)
    for prompts, status in ((["a"] * 17, 400), (["a"] * 2, 200)):
        body = {"prompt": prompts, "echo": True, "max_tokens": 2}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == status
    assert read == ["a", "a"]
