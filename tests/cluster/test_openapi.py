"""docs/openapi.json is what the code makes, every route is in it, and real requests and answers are as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from kvbank.cluster.http import openapi
from kvbank.cluster.http.schemas import FIELDS

COMMITTED = Path(__file__).resolve().parents[2] / "docs/openapi.json"
DOCUMENT = json.loads(openapi.text())
PROMPT = [1, 2, 3]
CHAT = [{"role": "user", "content": "Hello"}]


def faults(schema: str, value: Any) -> list[str]:
    """What in `value` is not as the schema of this name says."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    return [error.message for error in Draft202012Validator(whole).iter_errors(value)]


def test_the_committed_document_is_what_the_code_makes() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == openapi.text(), \
        "run: python -m kvbank.cluster.http.openapi > docs/openapi.json"


def test_every_reference_leads_somewhere_and_every_schema_is_one() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert used == set(schemas)
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    names = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names)) > 12


def test_every_route_has_words_of_its_own() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"] != f"{method.upper()} {path}", "add it to cluster/http/openapi.py"


def test_it_is_served_behind_the_door(make_server) -> None:
    address = make_server(api_keys={"k": "t"}).address
    assert httpx.get(f"{address}/openapi.json").status_code == 401
    assert httpx.get(f"{address}/openapi.json", headers={"Authorization": "Bearer k"}).json() == DOCUMENT


def test_real_answers_are_as_it_says(make_worker, make_server) -> None:
    async def status() -> dict[str, Any]:
        return {"workers": [], "loans": [], "tiers": []}

    address = make_server(make_worker("worker-0"), status=status).address

    def post(path: str, **body: Any) -> Any:
        return httpx.post(address + path, json=body, timeout=30).json()

    def chunks(path: str, **body: Any) -> list[Any]:
        answer = httpx.post(address + path, json={"stream": True, "stream_options": {"include_usage": True}, **body}, timeout=30)
        return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]

    completion: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 3, "logprobs": 2}
    chat: dict[str, Any] = {"messages": CHAT, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    told = [("Completion", post("/v1/completions", **completion)), ("ChatCompletion", post("/v1/chat/completions", **chat)),
            *[("Completion", chunk) for chunk in chunks("/v1/completions", **completion)],
            *[("ChatCompletionChunk", chunk) for chunk in chunks("/v1/chat/completions", **chat)],
            ("Tokenized", post("/tokenize", prompt="x")), ("Detokenized", post("/detokenize", tokens=PROMPT)),
            ("Error", post("/v1/completions")), ("Job", post("/v1/jobs", prompt=PROMPT)),
            *[(name, httpx.get(address + path).json()) for name, path in (
                ("Jobs", "/v1/jobs"), ("Models", "/v1/models"), ("Model", "/v1/models/fake"), ("Health", "/health"),
                ("Status", "/v1/status"))]]
    assert [(name, faults(name, value)) for name, value in told if faults(name, value)] == []
    assert faults("Completion", {"object": "nonsense"}), "a schema that fits everything proves nothing"


@pytest.mark.parametrize(("path", "schema", "start"), [
    ("/v1/completions", "CompletionRequest", {"prompt": PROMPT}), ("/v1/chat/completions", "ChatRequest", {"messages": CHAT}),
    ("/v1/jobs", "JobRequest", {"prompt": PROMPT}),
])
def test_what_it_forbids_is_refused_and_what_it_allows_is_taken(make_worker, make_server, path, schema, start) -> None:
    address = make_server(make_worker("worker-0")).address
    changes: list[dict[str, Any]] = [
        {}, {"max_tokens": 0}, {"max_tokens": 1}, {"temperature": 2}, {"temperature": 2.1}, {"top_p": 0}, {"top_p": 1},
        {"top_k": -2}, {"top_k": 4}, {"seed": -5}, {"stop": "x"}, {"stop": [""]}, {"stop": ["x"] * 17}, {"cache_salt": "s"},
        {"cache_salt": ""}, {"job_id": "a b"}, {"job_id": "ab"}, {"policy": "exact"}, {"policy": "other"}, {"deadline_s": 0},
        {"deadline_s": 20}, {"nonsense": 1}, {"stop_token_ids": [5]}, {"ignore_eos": True}, {"ignore_eos": 1},
        {"n": 2}, {"n": 17}, {"stream_options": {}}, {"stream_options": {"x": 1}}, {"logprobs": 5}, {"logprobs": True},
        {"logit_bias": {}}, {"logit_bias": {"1": 1}}, {"presence_penalty": 0}, {"presence_penalty": 1}, {"echo": True},
        {"logprobs": False}, {"job_id": "."}, *({name: None} for name in (*FIELDS, "nonsense") if name not in start),
        {"user": "u"}, {"tools": []}, {"tools": [{}]}, {"response_format": {"type": "text"}}, {"response_format": {"type": "x"}},
    ]
    if path == "/v1/completions":
        changes += [{"prompt": prompt} for prompt in ("a", ["a", "b"], [[1], [2, 3]], [], ["a", 1], [[1], "a"], [[-1]], 5,
                                                      [{"text": "a"}, {"token_ids": [1]}])]
    for change in changes:
        request = {"max_tokens": 2, **start, **change}
        status = httpx.post(address + path, json=request, timeout=30).status_code
        assert (status == 400) == bool(faults(schema, request)), (change, status, faults(schema, request))
