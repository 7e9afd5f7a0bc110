"""kvbank's own dialect: a job is submitted once and read as often, as late and from wherever one likes.

POST /v1/jobs · GET /v1/jobs · GET /v1/jobs/ID?wait_s= · GET /v1/jobs/ID/stream?from=
DELETE /v1/jobs/ID, or POST /v1/jobs/ID/cancel
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvbank.cluster.follow import END, follow
from kvbank.cluster.http.app import Front, error_body, query_integer, query_number, read_body
from kvbank.cluster.http.events import KEEP_ALIVE, EventStream, event, unless_left
from kvbank.cluster.http.routes import Routes
from kvbank.cluster.job import Job
from kvbank.errors import InvalidRequest

MAX_WAIT_S = 60.0
_INDEX = re.compile("[0-9]{1,10}")


def routes(front: Front) -> Routes:
    """The routes of this dialect."""
    made = Routes("/v1/jobs")
    gateway = front.gateway

    def job_of(request: Request) -> Job:
        return gateway.get(request.state.tenant, request.path_params["job_id"])

    @made.post("")
    async def submit(request: Request) -> Response:
        body = await read_body(request, front.limits)
        spec = await front.intake.spec(body, tenant=request.state.tenant)
        job = gateway.submit(spec)
        job.readers += 1                             # it outlives every completion that reads it
        return JSONResponse(job_body(job), status_code=202)

    @made.get("")
    async def jobs(request: Request) -> Response:
        told = [job_body(job, brief=True) for job in gateway.jobs(request.state.tenant)]
        return JSONResponse({"object": "list", "data": told})

    @made.get("/{job_id}")
    async def one(request: Request) -> Response:
        job = job_of(request)
        wait_s = query_number(request, "wait_s", 0.0, MAX_WAIT_S)
        if wait_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await unless_left(request, job.settled(), lambda: None)
        return JSONResponse(job_body(job))

    @made.get("/{job_id}/stream")
    async def stream(request: Request) -> Response:
        job = job_of(request)
        last = request.headers.get("last-event-id", "")
        first = query_integer(request, "from", int(last) if _INDEX.fullmatch(last) else 0, 2**31)
        if first > len(job.ids):
            raise InvalidRequest(f"the job has {len(job.ids)} tokens so far, there is no token {first}",
                                 param="from" if "from" in request.query_params else None)
        return EventStream(_events(job, first, front.limits.quiet_s))

    @made.delete("/{job_id}")
    @made.post("/{job_id}/cancel")
    async def cancel(request: Request) -> Response:
        job = job_of(request)
        gateway.cancel(job)
        return JSONResponse(job_body(job, brief=True), status_code=202)

    return made


async def _events(job: Job, first: int, quiet_s: float) -> AsyncIterator[bytes]:
    told: Any = None
    async with aclosing(follow([job], first, quiet_s=quiet_s)) as news:
        async for said in news:
            for _, piece in said:
                if piece is not END:
                    data = {"index": piece.index, "token_ids": piece.token_ids, "text": piece.text}
                    yield event(data, name="delta", number=piece.index + len(piece.token_ids))
            if not said and (progress := _progress(job)) != told:
                told = progress
                yield event(progress, name="progress")
            elif not said:
                yield KEEP_ALIVE
    yield event(job_body(job), name="done")


def job_body(job: Job, *, brief: bool = False) -> dict[str, Any]:
    """A job as JSON; `brief` leaves its output out."""
    body: dict[str, Any] = {
        "id": job.id, "object": "job", "state": job.state, "created": job.created, "attempt": job.attempt,
        "worker": job.worker, "prompt_tokens": job.prompt_tokens, "output_tokens": len(job.ids),
        "seed": job.seed, "progress": _progress(job),
    }
    if not job.over or brief:
        return body
    body["receipt"] = job.receipt
    if job.error is not None:
        return {**body, **error_body(job.error)}
    body["result"] = {
        "text": job.output_text, "token_ids": job.ids, "finish_reason": job.finish_reason, "receipt": job.receipt,
    }
    return body


def _progress(job: Job) -> dict[str, Any]:
    told = {"state": job.progress.state, "computed": job.progress.computed, "total": job.progress.total,
            "waits_for": job.progress.waits_for}
    return told | {"state": "", "waits_for": ""} if job.over else told
