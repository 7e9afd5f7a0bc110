"""OpenAI's dialect: /v1/models, and /v1/completions with SSE; chat is in chat.py, /tokenize in tokens.py.

Beyond OpenAI's fields a request may carry top_k, job_id, deadline_s, stop_token_ids, ignore_eos, policy, cache_salt and
return_token_ids; the response carries "kvbank" with the job's id and receipt. What is not supported is refused by name,
never ignored.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvbank.cluster.fields import Fields
from kvbank.cluster.follow import Piece
from kvbank.cluster.http import chat, choices, openapi, tokens
from kvbank.cluster.http.app import Front, read_body
from kvbank.cluster.http.choices import (
    Choices,
    Wish,
    check,
    check_count,
    check_model,
    finish_reason,
    paths,
    read_wish,
    respond,
    submit,
)
from kvbank.cluster.http.logprobs import Offsets, completion_logprobs, wanted_by_completion
from kvbank.cluster.http.routes import Routes
from kvbank.cluster.job import Job
from kvbank.errors import InvalidRequest

KNOWN = frozenset({"best_of", "logprobs", "echo"})
NEUTRAL: dict[str, tuple[Any, ...]] = {**choices.NEUTRAL, "suffix": ("",)}


def routes(front: Front) -> Routes:
    """The routes of this dialect."""
    made = Routes()
    model = {
        "id": front.intake.facts.name, "object": "model", "created": front.created, "owned_by": "kvbank",
        "max_model_len": front.intake.facts.max_position,
    }

    @made.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, front.limits)
        return await respond(request, await _begin(front, body, request.state.tenant))

    chat.add_routes(made, front)

    @made.get("/v1/models")
    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @made.get("/v1/models/{name:path}")
    async def one_model(request: Request) -> Response:
        check_model(front, request.path_params["name"])
        return JSONResponse(model)

    tokens.add_routes(made, front)
    openapi.add_routes(made)
    return made


async def _begin(front: Front, body: dict[str, Any], tenant: str) -> Choices:
    """Check the request and submit its jobs: all or none."""
    fields = check(front, body, KNOWN, NEUTRAL)
    _check_best_of(front, fields)
    prompts = _prompts(body.get("prompt"))
    wish = read_wish(body, fields, len(prompts), wanted_by_completion(fields))
    echo = fields.flag("echo", False)
    if echo and wish.logprobs is not None:
        raise InvalidRequest("echo together with logprobs is not supported: the prompt's own log-probabilities are not kept",
                             param="logprobs")
    check_count(front, body, prompts)
    said = [await front.intake.prompt_text(prompt, tenant=tenant, where=where)
            for prompt, where in zip(prompts, paths(body, prompts), strict=True)] if echo else [""] * len(prompts)
    jobs = await submit(front, body, prompts, tenant, max_tokens=16, logprobs=wish.logprobs)
    echoes = [text for text in said for _ in range(len(jobs) // len(prompts))]
    return Choices(front, jobs, wish, _Text(front, echoes, wish))


class _Text:
    """choices.Shape of completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, front: Front, echoes: list[str], wish: Wish) -> None:
        """echoes: of each choice, the prompt's text that its own begins with."""
        self._pieces, self._echoes = front.intake.pieces, echoes
        self._offsets = [Offsets(self._pieces) for _ in echoes] if wish.logprobs is not None else []

    def opening(self, number: int) -> dict[str, Any] | None:
        if not (echo := self._echoes[number]):
            return None
        return {"index": number, "text": echo, "logprobs": None, "finish_reason": None}

    def choice(self, number: int, job: Job) -> dict[str, Any]:
        return {"index": number, "text": self._echoes[number] + job.output_text,
                "logprobs": self._logprobs(number, job, 0, job.ids), "finish_reason": job.finish_reason}

    def delta(self, number: int, job: Job, piece: Piece) -> dict[str, Any]:
        return {"index": number, "text": piece.text, "logprobs": self._logprobs(number, job, piece.index, piece.token_ids),
                "finish_reason": finish_reason(job, piece)}

    def _logprobs(self, number: int, job: Job, first: int, ids: list[int]) -> dict[str, Any] | None:
        if job.spec.logprobs is None or not ids:
            return None
        told = job.logprobs[first : first + len(ids)]
        return completion_logprobs(self._pieces, ids, told, self._offsets[number].take(ids))


def _check_best_of(front: Front, fields: Fields) -> None:
    n = fields.integer("n", 1, low=1, high=front.limits.choices)
    if fields.integer("best_of", n, low=1, high=front.limits.choices) != n:
        raise InvalidRequest("best_of is not supported other than equal to n", param="best_of")


def _prompts(prompt: Any) -> list[Any]:
    """One entry per prompt: OpenAI allows a string, a list of strings, a list of ids, a list of lists of ids."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if not all(isinstance(each, type(prompt[0])) for each in prompt):
            raise InvalidRequest("a list of prompts must hold strings only, or lists of token ids only", param="prompt")
        return prompt
    return [prompt]
