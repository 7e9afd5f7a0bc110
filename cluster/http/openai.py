"""OpenAI's dialect: /v1/completions with SSE, and /v1/models.

Beyond OpenAI's fields a request may carry top_k, job_id, deadline_s, stop_token_ids, ignore_eos, policy and
return_token_ids; the response carries "kvbank" with the job's id and receipt. What is not supported is refused by name,
never ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvbank.cluster.http.app import Front, error_body, read_body
from kvbank.cluster.http.events import DONE, KEEP_ALIVE, EventStream, event, unless_left
from kvbank.cluster.intake import SPEC_FIELDS, Fields
from kvbank.cluster.job import Job, Piece
from kvbank.errors import InvalidRequest, KVBankError, NotFound

_OWN = frozenset({"model", "stream", "stream_options", "n", "best_of", "return_token_ids"})
_HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                       "prompt_cache_retention"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {                             # accepted only where they change nothing
    "echo": (False,), "logprobs": (0, False), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_END = Piece(-1, [], "")             # follows the last piece of a choice
_KNOWN = SPEC_FIELDS | _OWN | _HARMLESS | frozenset(_NEUTRAL)


def routes(front: Front) -> APIRouter:
    """The routes of this dialect."""
    router = APIRouter(prefix="/v1")
    model = {
        "id": front.intake.facts.name, "object": "model", "created": front.created, "owned_by": "kvbank",
        "max_model_len": front.intake.facts.max_position,
    }

    @router.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> Response:
        _check_model(front, name)
        return JSONResponse(model)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, front.limits)
        call = await _Completion.begin(front, body, request.state.tenant)
        if call.stream:
            return EventStream(call.events(), on_leave=call.cancel)
        if not await unless_left(request, call.settled(), call.cancel):
            return Response(status_code=499)         # nobody reads it: the caller has left
        return JSONResponse(call.answer())

    return router


def _check_model(front: Front, name: Any) -> None:
    if name is not None and name != front.intake.facts.name:
        raise NotFound(f"this gateway serves the model {front.intake.facts.name!r}; see /v1/models")


class _Completion:
    """One request: a job per choice, in the order of prompts and then of n."""

    def __init__(self, front: Front, jobs: list[Job], options: dict[str, Any]) -> None:
        self._front = front
        self._jobs = jobs
        self.stream: bool = options["stream"]
        self._usage_chunk: bool = options["usage"]
        self._with_ids: bool = options["ids"]
        self._prompts: int = options["prompts"]
        for job in jobs:
            job.readers += 1

    @classmethod
    async def begin(cls, front: Front, body: dict[str, Any], tenant: str) -> _Completion:
        """Check the request and submit its jobs: all or none."""
        fields = Fields(body)
        fields.refuse_unknown(_KNOWN)
        _check_model(front, fields.text("model", None))
        for name, allowed in _NEUTRAL.items():
            if body.get(name) is not None and body[name] not in allowed:
                raise InvalidRequest(f"{name} is not supported by this server")
        n = fields.integer("n", 1, low=1, high=front.limits.choices)
        if fields.integer("best_of", n, low=1, high=front.limits.choices) != n:
            raise InvalidRequest("best_of is not supported other than equal to n")
        prompts = _prompts(body.get("prompt"))
        if len(prompts) * n > front.limits.choices:
            raise InvalidRequest(
                f"{len(prompts)} prompts times n={n} is {len(prompts) * n} choices, at most {front.limits.choices} are "
                "served"
            )
        if body.get("job_id") is not None and len(prompts) * n > 1:
            raise InvalidRequest("job_id names one job: send one prompt and n=1")
        options = {"stream": fields.flag("stream", False), "usage": _include_usage(body), "prompts": len(prompts),
                   "ids": fields.flag("return_token_ids", False)}
        common = {name: body[name] for name in SPEC_FIELDS if name in body}
        specs = [
            await front.intake.spec({**common, "prompt": prompt, **_seed(body, copy)}, tenant=tenant, temperature=1.0)
            for prompt in prompts for copy in range(n)
        ]
        jobs: list[Job] = []
        try:
            for spec in specs:
                jobs.append(front.gateway.submit(spec))
        except KVBankError:
            for job in jobs:
                front.gateway.cancel(job)
            raise
        return cls(front, jobs, options)

    def cancel(self) -> None:
        """The caller left: jobs that no other completion reads are cancelled."""
        for job in self._jobs:
            job.readers -= 1
            if not job.readers:
                self._front.gateway.cancel(job)

    async def settled(self) -> None:
        await asyncio.gather(*(job.settled() for job in self._jobs))

    def answer(self) -> dict[str, Any]:
        """The whole response. Raises the error of the first job that failed."""
        for job in self._jobs:
            if job.error is not None:
                raise job.error
        choices = [self._choice(n, job.output_text, job.ids, job.finish_reason) for n, job in enumerate(self._jobs)]
        return {**self._head(), "choices": choices, "usage": self._usage(), "kvbank": self._extra(self._jobs)}

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks, of several choices interleaved as they come; errors travel in band."""
        news: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue(maxsize=64)
        readers = [asyncio.ensure_future(self._read(number, job, news)) for number, job in enumerate(self._jobs)]
        try:
            running = len(readers)
            while running:
                number, piece = await news.get()
                if piece is _END:
                    running -= 1
                    if (error := self._jobs[number].error) is not None:
                        yield event(error_body(error))
                        return
                    yield event(self._last_chunk(number))
                elif piece is None:
                    yield KEEP_ALIVE
                else:
                    yield event({**self._head(), "choices": [self._choice(number, piece.text, piece.token_ids, None)]})
            if self._usage_chunk:
                yield event({**self._head(), "choices": [], "usage": self._usage()})
            yield DONE
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _read(self, number: int, job: Job, news: asyncio.Queue[tuple[int, Piece | None]]) -> None:
        async for piece in job.follow(quiet_s=self._front.limits.quiet_s):
            if piece is None or piece.text or self._with_ids:
                await news.put((number, piece))
        await news.put((number, _END))

    def _last_chunk(self, number: int) -> dict[str, Any]:
        job = self._jobs[number]
        choice = self._choice(number, "", [], job.finish_reason)
        return {**self._head(), "choices": [choice], "kvbank": self._extra([job])}

    def _head(self) -> dict[str, Any]:
        first = self._jobs[0]
        return {"id": f"cmpl-{first.id}", "object": "text_completion", "created": int(first.created),
                "model": self._front.intake.facts.name}

    def _choice(self, number: int, text: str, ids: list[int], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": number, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**choice, "token_ids": ids} if self._with_ids else choice

    def _usage(self) -> dict[str, Any]:
        # A prompt counts once however many choices it has; so do the tokens it found in the cache.
        each = max(1, len(self._jobs) // self._prompts)
        prompts = self._jobs[::each]
        prompt = sum(job.prompt_tokens for job in prompts)
        cached = sum(sum(job.receipt.get("reused", {}).values()) for job in prompts)
        output = sum(len(job.ids) for job in self._jobs)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def _extra(self, jobs: list[Job]) -> dict[str, Any]:
        told = [{"job_id": job.id, "receipt": job.receipt} for job in jobs]
        return told[0] if len(told) == 1 else {"jobs": told}


def _prompts(prompt: Any) -> list[Any]:
    """One entry per prompt: OpenAI allows a string, a list of strings, a list of ids, a list of lists of ids."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if not all(isinstance(each, type(prompt[0])) for each in prompt):
            raise InvalidRequest("a list of prompts must hold strings only, or lists of token ids only")
        return prompt
    return [prompt]


def _seed(body: dict[str, Any], copy: int) -> dict[str, Any]:
    seed = body.get("seed")
    return {"seed": seed + copy} if type(seed) is int and copy else {}


def _include_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options must be an object")
    fields = Fields(options)
    fields.refuse_unknown(frozenset({"include_usage", "include_obfuscation"}))
    return fields.flag("include_usage", False)
