"""Choices: what one request of OpenAI's dialects starts, follows and answers with: a job per choice.

    body --check, submit--> job, job, ...  --Shape--> one response, or chunks of all of them interleaved as they come

Shared by completions (openai.py) and chat (chat.py); a Shape says how each of them writes a choice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from kvbank.cluster.fields import Fields
from kvbank.cluster.follow import END, Piece, follow
from kvbank.cluster.http.app import Front, error_body
from kvbank.cluster.http.events import DONE, KEEP_ALIVE, EventStream, Form, event, unless_left
from kvbank.cluster.intake import SEEDS, SPEC_FIELDS, JobSpec
from kvbank.cluster.job import Job
from kvbank.cluster.prompts import MESSAGES, PROMPT
from kvbank.errors import InvalidRequest, NotFound

OWN = frozenset({"model", "stream", "stream_options", "n", "return_token_ids", "max_completion_tokens"})
HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                      "prompt_cache_retention"})        # prompt_cache_key: the keys of blocks say more than it could
NEUTRAL: dict[str, tuple[Any, ...]] = {                 # accepted only where they change nothing
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
}


class Shape(Protocol):
    """How a dialect writes a choice."""

    prefix: str                      # of the answer's id
    whole: str                       # "object" of an answer in one piece,
    chunk: str                       # and of one of a stream

    def opening(self, number: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token; None: nothing."""

    def choice(self, number: int, job: Job) -> dict[str, Any]:
        """A choice whose job is over."""

    def delta(self, number: int, job: Job, piece: Piece) -> dict[str, Any]:
        """The next piece of a choice. The last one has a finish_reason: the job is over then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How the caller wants the answer."""

    prompts: int                     # of the request; each has as many choices
    stream: bool = False
    usage: bool = False              # a last chunk that tells the usage
    ids: bool = False                # token ids beside the text
    logprobs: int | None = None      # likely tokens beside each token's log-probability; None: no log-probabilities


MAX_TOLD = 200_000                   # log-probabilities in one answer: about 130 MB while it is made


def check(front: Front, body: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]) -> Fields:
    """Refuse by name what this server does not know or do. Raises InvalidRequest, NotFound."""
    fields = Fields(body)
    fields.refuse_unknown(SPEC_FIELDS | OWN | HARMLESS | known | frozenset(neutral))
    check_model(front, fields.text("model", None))
    for name, allowed in neutral.items():
        if body.get(name) is not None and not any(body[name] == value for value in allowed):
            raise InvalidRequest(f"{name} is not supported by this server", param=name)
    fields.text("prompt_cache_key", None)
    return fields


def check_model(front: Front, name: Any) -> None:
    if name is not None and name != front.intake.facts.name:
        raise NotFound(f"this gateway serves the model {front.intake.facts.name!r}; see /v1/models", param="model")


def read_wish(body: Mapping[str, Any], fields: Fields, prompts: int, logprobs: int | None) -> Wish:
    return Wish(prompts=prompts, stream=fields.flag("stream", False), usage=_include_usage(body),
                ids=fields.flag("return_token_ids", False), logprobs=logprobs)


def check_count(front: Front, body: Mapping[str, Any], prompts: Sequence[Any]) -> int:
    """Choices per prompt; before anything is done for a single one. Raises InvalidRequest."""
    n: int = Fields(body).integer("n", 1, low=1, high=front.limits.choices)
    if len(prompts) * n > front.limits.choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts times n={n} is {len(prompts) * n} choices, at most {front.limits.choices} are served",
            param="n" if n > 1 else "prompt",
        )
    return n


def paths(body: Mapping[str, Any], prompts: Sequence[Any]) -> list[str]:
    """Where each prompt stands in the request."""
    if "messages" in body:
        return [MESSAGES]
    return [f"{PROMPT}[{number}]" for number in range(len(prompts))] if prompts is body.get("prompt") else [PROMPT]


async def submit(
    front: Front, body: Mapping[str, Any], prompts: Sequence[Any], tenant: str, *, max_tokens: int,
    fitting: bool = False, logprobs: int | None,
) -> list[Job]:
    """Check each prompt and submit n jobs of it: all or none. max_tokens, fitting: see Intake.spec. Raises InvalidRequest,
    Overloaded."""
    n = check_count(front, body, prompts)
    if body.get("job_id") is not None and len(prompts) * n > 1:
        raise InvalidRequest("job_id names one job: send one prompt and n=1", param="job_id")
    common = {name: body[name] for name in SPEC_FIELDS if name in body} | _max_tokens(body)
    specs: list[JobSpec] = []
    if fitting and logprobs is not None:             # a limit that nobody asked for refuses nothing
        max_tokens = min(max_tokens, MAX_TOLD // (len(prompts) * n * (1 + logprobs)))
    for prompt, where in zip(prompts, paths(body, prompts), strict=True):
        spec = await front.intake.spec({**common, "prompt": prompt}, tenant=tenant, temperature=1.0, max_tokens=max_tokens,
                                       fitting=fitting, logprobs=logprobs, where=where)
        specs += [spec if not copy or spec.seed is None else replace(spec, seed=(spec.seed + copy) % SEEDS)
                  for copy in range(n)]
    if logprobs is not None and (told := sum(spec.max_tokens for spec in specs) * (1 + logprobs)) > MAX_TOLD:
        raise InvalidRequest(f"choices x max_tokens x (1 + likely tokens) is {told}, at most {MAX_TOLD} log-probabilities are "
                             "told in one answer; ask for fewer tokens, choices or likely tokens")
    return [front.gateway.submit(specs[0])] if len(specs) == 1 else front.gateway.submit_all(specs)


async def respond(request: Request, choices: Choices) -> Response:
    """The answer in one piece or as a stream; a caller who leaves ends its jobs."""
    if choices.wish.stream:
        for _ in range(2):                           # turns of the loop: the jobs set off before the head of the answer does
            await asyncio.sleep(0)
        return EventStream(choices.events(), on_leave=choices.cancel)
    if not await unless_left(request, choices.settled(), choices.cancel):
        return Response(status_code=499)             # nobody reads it: the caller has left
    # With log-probabilities an answer has megabytes, and seconds are no time for an event loop; its jobs change no more.
    made = await asyncio.to_thread(choices.rendered) if choices.wish.logprobs is not None else choices.rendered()
    return Response(made, media_type="application/json")


class Choices:
    """The jobs of one request, in the order of prompts and then of n."""

    def __init__(self, front: Front, jobs: list[Job], wish: Wish, shape: Shape) -> None:
        self.wish = wish
        self._front, self._jobs, self._shape = front, jobs, shape
        self._forms: dict[int, Form] = {}            # by choice: of its chunks between the first and the last
        for job in jobs:
            job.readers += 1

    def cancel(self) -> None:
        """The caller left: jobs that no other request reads are cancelled."""
        for job in self._jobs:
            self._front.gateway.leave(job)

    async def settled(self) -> None:
        """Until all jobs are over, or one failed: what the others would say is not told then, and they are cancelled."""
        waits = {asyncio.ensure_future(job.settled()) for job in self._jobs}
        try:
            while waits and all(job.error is None for job in self._jobs):
                _, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if any(job.error is not None for job in self._jobs):
            self.cancel()

    def rendered(self) -> bytes:
        """The whole response as JSON. Raises as `answer`."""
        return json.dumps(self.answer(), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

    def answer(self) -> dict[str, Any]:
        """The whole response. Raises the error of the first job that failed."""
        for job in self._jobs:
            if job.error is not None:
                raise job.error
        choices = [self._with_ids(self._shape.choice(n, job), job.ids) for n, job in enumerate(self._jobs)]
        return {**self._head(self._shape.whole), "choices": choices, "usage": self._usage(), "kvbank": self._extra(self._jobs)}

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks, of several choices interleaved as they come; errors travel in band."""
        for number in range(len(self._jobs)):
            if (opening := self._shape.opening(number)) is not None:
                yield self._chunk(opening, [])
        silent = not self.wish.ids and self.wish.logprobs is None        # of tokens that release no text
        quiet_s, clock = self._front.limits.quiet_s, asyncio.get_running_loop().time
        said_at = clock()
        async with aclosing(follow(self._jobs, quiet_s=quiet_s)) as steps:
            async for said in steps:
                parts: list[bytes] = []
                for number, piece in said:
                    if piece is END and (error := self._jobs[number].error) is not None:
                        self.cancel()
                        yield b"".join([*parts, event(error_body(error))])
                        return
                    if piece is END or piece.text or not silent:
                        parts.append(self._piece(number, piece))
                if parts or not said or clock() >= said_at + quiet_s:
                    said_at = clock()
                    yield b"".join(parts) or KEEP_ALIVE
        if self.wish.usage:
            yield event({**self._head(self._shape.chunk), "choices": [], "usage": self._usage()})
        yield DONE

    def _piece(self, number: int, piece: Piece) -> bytes:
        job = self._jobs[number]
        if piece is END:
            return self._chunk(self._shape.delta(number, job, piece), [], kvbank=self._extra([job]))
        if self.wish.logprobs is not None:
            return self._chunk(self._shape.delta(number, job, piece), piece.token_ids)
        if (form := self._forms.get(number)) is None:
            form = self._forms[number] = Form(
                lambda text, ids: self._chunk_data(self._shape.delta(number, job, Piece(0, ids, text)), ids))
        return form.filled(piece.text, piece.token_ids)

    def _chunk(self, choice: dict[str, Any], ids: list[int], **more: Any) -> bytes:
        return event(self._chunk_data(choice, ids, **more))

    def _chunk_data(self, choice: dict[str, Any], ids: list[int], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self.wish.usage else {}           # of the whole answer: in a chunk of its own
        return {**self._head(self._shape.chunk), "choices": [self._with_ids(choice, ids)], **usage, **more}

    def _head(self, kind: str) -> dict[str, Any]:
        first = self._jobs[0]
        return {"id": f"{self._shape.prefix}-{first.id}", "object": kind, "created": int(first.created),
                "model": self._front.intake.facts.name}

    def _with_ids(self, choice: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        return {**choice, "token_ids": ids} if self.wish.ids else choice

    def _usage(self) -> dict[str, Any]:
        # A prompt counts once however many choices it has; so do the tokens it found in the cache.
        each = max(1, len(self._jobs) // self.wish.prompts)
        prompts = self._jobs[::each]
        prompt = sum(job.prompt_tokens for job in prompts)
        cached = sum(sum(job.receipt.get("reused", {}).values()) for job in prompts)
        output = sum(len(job.ids) for job in self._jobs)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def _extra(self, jobs: list[Job]) -> dict[str, Any]:
        told = [{"job_id": job.id, "receipt": job.receipt} for job in jobs]
        return told[0] if len(told) == 1 else {"jobs": told}


def finish_reason(job: Job, piece: Piece) -> str | None:
    """Of a chunk with this piece: None unless it is the last one."""
    return job.finish_reason if piece is END else None


def _max_tokens(body: Mapping[str, Any]) -> dict[str, Any]:
    """max_completion_tokens is the newer name of max_tokens. Raises InvalidRequest when they differ."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if new is None:
        return {}
    fields = Fields(body)
    for name in ("max_tokens", "max_completion_tokens"):
        fields.integer(name, None, low=1, high=2**31 - 1)
    if old is not None and old != new:
        raise InvalidRequest("max_tokens and max_completion_tokens are two names of one limit: send one of them",
                             param="max_completion_tokens")
    return {"max_tokens": new}


def _include_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    fields = Fields(options, "stream_options")
    fields.refuse_unknown(frozenset({"include_usage", "include_obfuscation"}))
    return fields.flag("include_usage", False)
