"""The OpenAPI document, made from the routes and the fields that the code knows: docs/openapi.json, and GET /openapi.json.

    python -m kvbank.cluster.http.openapi > docs/openapi.json        after a route or a field has changed; a test compares
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import kvbank
from kvbank.cluster.http import choices, tokens
from kvbank.cluster.http.doors import OPEN, OPS, PAGES
from kvbank.cluster.http.routes import Routes
from kvbank.cluster.http.schemas import CHAT_FIELDS, COMPLETION_FIELDS, SCHEMAS, Schema, body, named
from kvbank.cluster.intake import SPEC_FIELDS
from kvbank.cluster.ops import PIN_S
from kvbank.kvstore.idle import MAX_PIN_S

_JSON, _EVENTS = "application/json", "text/event-stream"
_ERRORS = {"400": "Something in the request is not understood, not supported or too long.", "401": "The key is missing or wrong.",
           "403": "The key may not do this.", "404": "There is no such model, job or route.",
           "408": "The body did not arrive in time.",
           "413": "The body is too large.", "429": "Too many jobs; the header Retry-After says when to come back.",
           "503": "Nobody can serve this now.", "504": "The deadline passed."}


@dataclass(frozen=True)
class _Told:
    """What the document says of one route."""

    summary: str
    answer: str = ""                     # name of its schema; empty: not JSON
    request: str = ""                    # name of its body's schema
    chunk: str = ""                      # name of the schema of a stream's chunks
    status: str = "200"
    errors: tuple[str, ...] = ()
    query: dict[str, Schema] = field(default_factory=dict)


_WAIT = {"wait_s": {"type": "number", "minimum": 0, "maximum": 60, "description": "Wait so long for its end."}}
_FROM = {"from": {"type": "integer", "minimum": 0, "description": "Index of the first token to send; default 0."}}
_TERM = {"term_s": {"type": "number", "minimum": 0, "maximum": MAX_PIN_S, "default": PIN_S,
                    "description": "Seconds, rounded up; 0 ends it."}}
_WORK = ("400", "408", "413", "429", "503", "504")
_ROUTES = {
    ("GET", "/health"): _Told("Whether anybody can be served", "Health", errors=("503",)),
    ("HEAD", "/health"): _Told("Whether anybody can be served, without a word", errors=("503",)),
    ("GET", "/v1/models"): _Told("The served model", "Models"),
    ("GET", "/v1/models/{name}"): _Told("One model", "Model", errors=("404",)),
    ("POST", "/v1/completions"): _Told("Go on with a prompt", "Completion", "CompletionRequest", "Completion",
                                       errors=("404", *_WORK)),
    ("POST", "/v1/chat/completions"): _Told("Answer a chat", "ChatCompletion", "ChatRequest", "ChatCompletionChunk",
                                            errors=("404", *_WORK)),
    ("POST", "/tokenize"): _Told("The tokens of a prompt or a chat", "Tokenized", "TokenizeRequest",
                                 errors=("400", "404", "408", "413")),
    ("POST", "/detokenize"): _Told("The text of tokens", "Detokenized", "DetokenizeRequest", errors=("400", "404", "408", "413")),
    ("POST", "/v1/jobs"): _Told("Submit a job that lives without a connection", "Job", "JobRequest", status="202",
                                errors=("400", "408", "413", "429", "503")),
    ("GET", "/v1/jobs"): _Told("This tenant's jobs, oldest first", "Jobs"),
    ("GET", "/v1/jobs/{job_id}"): _Told("A job", "Job", errors=("400", "404"), query=_WAIT),
    ("GET", "/v1/jobs/{job_id}/stream"): _Told("A job's tokens from any index on, as events", errors=("400", "404"),
                                               chunk="Job", query=_FROM),
    ("DELETE", "/v1/jobs/{job_id}"): _Told("Cancel a job", "Job", status="202", errors=("404",)),
    ("POST", "/v1/jobs/{job_id}/cancel"): _Told("Cancel a job", "Job", status="202", errors=("404",)),
    ("GET", "/v1/status"): _Told("The cluster now", "Status"),
    ("GET", "/metrics"): _Told("Prometheus' text format"),
    ("GET", "/v1/ops/session"): _Told("Who this key is, and the token that changes to the cluster need", "Session"),
    ("GET", "/v1/ops/feed"): _Told("The cluster as events: one snapshot, then a delta per second", errors=("429",)),
    ("GET", "/v1/ops/workers/{member}"): _Told("One member and all that it counts", errors=("404",)),
    ("GET", "/v1/ops/jobs/{wire_id}"): _Told("One job of any tenant: timeline and receipt, no text", errors=("404",)),
    ("POST", "/v1/ops/members/{member}/{action}"): _Told("Drain, undrain, recall or clear a member",
                                                         errors=("400", "404", "503")),
    ("POST", "/v1/ops/jobs/{wire_id}/pin"): _Told("Have what a job's prompt left on its worker evicted last, for a term",
                                                  errors=("400", "404", "503"), query=_TERM),
    ("GET", "/openapi.json"): _Told("This document", "OpenAPI"),
}


def add_routes(made: Routes) -> None:
    """GET /openapi.json."""

    @made.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return JSONResponse(document(request.app))


def document(app: Starlette) -> dict[str, Any]:
    """Of an application made by build_app: every route behind its door."""
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), role in sorted(app.state.doors.items()):
        if method != "HEAD" and not path.startswith(PAGES):     # pages are for people
            path = re.sub(r":\w+}", "}", path)
            told = _ROUTES.get((method, path)) or _Told(f"{method} {path}")
            paths.setdefault(path, {})[method.lower()] = _operation(method, path, role, told)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvbank", "version": kvbank.__version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
                 "description": "OpenAI's completions and chat, jobs that live without a connection, and the cluster's state."},
        "security": [{"key": []}],
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
                       "schemas": {**_requests(), **SCHEMAS, "OpenAPI": {"type": "object", "additionalProperties": True}}},
    }


def _requests() -> dict[str, Schema]:
    from kvbank.cluster.http import chat, openai  # they know this module's routes

    shared = SPEC_FIELDS | choices.OWN | choices.HARMLESS
    completion, talk = shared | openai.KNOWN | set(openai.NEUTRAL), (shared | chat.KNOWN | set(chat.NEUTRAL)) - {"prompt"}
    either = {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    return {
        "CompletionRequest": body(completion, required=["prompt"], neutral=openai.NEUTRAL, own=COMPLETION_FIELDS),
        "ChatRequest": body(talk, required=["messages"], neutral=chat.NEUTRAL, own=CHAT_FIELDS),
        "JobRequest": body(SPEC_FIELDS, required=["prompt"]),
        "TokenizeRequest": body(tokens.TOKENIZE, required=[]) | either,
        "DetokenizeRequest": body(tokens.DETOKENIZE, required=["tokens"]),
    }


def _operation(method: str, path: str, role: str, told: _Told) -> dict[str, Any]:
    errors = (*told.errors, *(() if role == OPEN else ("401",)), *(("403",) if role == OPS else ()))
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"), "summary": told.summary,
        "responses": {told.status: {"description": told.summary, **_content(told)}} | {
            code: {"description": _ERRORS[code], "content": {_JSON: {"schema": named("Error")}}} for code in sorted(set(errors))},
    }
    if parameters := list(_parameters(path, told)):
        operation["parameters"] = parameters
    if told.request:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": named(told.request)}}}
    if role == OPEN:
        operation["security"] = []
    elif role == OPS:
        operation["description"] = "Needs a key with the role ops."
    return operation


def _content(told: _Told) -> dict[str, Any]:
    kinds = {_JSON: told.answer, _EVENTS: told.chunk}
    content = {kind: {"schema": named(name)} for kind, name in kinds.items() if name}
    return {"content": content} if content else {}


def _parameters(path: str, told: _Told) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name, schema in told.query.items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def text() -> str:
    """The committed document, from an application that serves nobody."""
    from kvbank.cluster.http.app import Front, build_app
    from kvbank.cluster.intake import Intake, ModelFacts

    gateway: Any = SimpleNamespace(observers=[], meters=None, traced=None)
    facts = ModelFacts(name="model", vocab_size=1, max_position=1)
    app = build_app(Front(gateway=gateway, intake=Intake(facts, lambda text, at_start: [])))
    return json.dumps(document(app), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
