"""Traced jobs at the gateway: from the caller's traceparent to the worker's, one span for the job and one for each attempt.

    HTTP header traceparent --IncomingTrace--> (context of the request) --admitted--> gateway.job
                                                       Job.trace on the wire <--attempt-- gateway.attempt

Exists only where tracing is on. Knows neither routes nor workers. What a span says of a job are our own ids and counts.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from kvbank.cluster.job import Job
from kvbank.kvstore.traces import Trace, Traces

_LONGEST = 64                        # a traceparent has 55 characters
_incoming: ContextVar[str] = ContextVar("traceparent", default="")


class IncomingTrace:
    """ASGI middleware: remembers the caller's traceparent for as long as its request is served."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"traceparent", b"")
        told = _incoming.set(given.decode("latin-1").strip() if len(given) <= _LONGEST else "")
        try:
            await self._app(scope, receive, send)
        finally:
            _incoming.reset(told)


class TracedJobs:
    """The open spans of one gateway's jobs. On the gateway's event loop."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._open: dict[str, Trace] = {}

    def admitted(self, job: Job) -> None:
        self._open[job.wire_id] = self._traces.begin("gateway.job", _incoming.get(), job=job.wire_id,
                                                     tenant=job.spec.tenant, prompt_tokens=job.prompt_tokens)

    def attempt(self, job: Job, worker: str) -> Trace:
        """Begin the span of the attempt that `job.attempt` counts; its `parent` goes to the worker."""
        above = self._open.get(job.wire_id)
        return self._traces.begin("gateway.attempt", above.parent if above is not None else "", job=job.wire_id,
                                  attempt=job.attempt, worker=worker)

    def over(self, job: Job) -> None:
        above = self._open.pop(job.wire_id, None)
        if above is not None:
            outcome = job.finish_reason if job.error is None else job.error.code
            above.end(outcome=outcome, output_tokens=len(job.ids), attempts=job.attempt)

    def close(self) -> None:
        self._traces.close()
