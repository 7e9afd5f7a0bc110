"""/health for probes, /v1/status for people and `client.status()`, /metrics for Prometheus, /v1/ops/session for pages."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import kvbank
from kvbank.cluster.http.app import Front
from kvbank.cluster.http.doors import Doorman
from kvbank.cluster.http.jobs import job_body
from kvbank.cluster.http.routes import Routes


def open_routes(front: Front) -> Routes:
    """Routes that need no key: whether anybody can be served, and nothing else."""
    made = Routes()

    @made.head("/health")
    @made.get("/health")
    async def health(_request: Request) -> Response:
        workers = sum(not worker.draining for worker in front.gateway.workers())
        body = {"status": "ok" if workers else "unavailable", "workers": workers, "version": kvbank.__version__}
        return JSONResponse(body, status_code=200 if workers else 503)

    return made


def routes(front: Front) -> Routes:
    """Routes for clients."""
    made = Routes()

    @made.get("/v1/status")
    async def status(request: Request) -> Response:
        told = await front.status() if front.status is not None else {"workers": [], "loans": [], "tiers": []}
        jobs = [job_body(job, brief=True) for job in front.gateway.jobs(request.state.tenant) if not job.over]
        return JSONResponse({**told, "jobs": jobs})

    return made


def ops_routes(front: Front, doorman: Doorman) -> Routes:
    """Routes for who runs the cluster."""
    made = Routes()

    @made.get("/metrics")
    async def metrics(_request: Request) -> Response:
        if front.status is not None:
            gateway = front.gateway
            gateway.meters.observe(live=gateway.live, waiting=gateway.waiting, status=await front.status())
        return Response(front.gateway.meters.page(), media_type=CONTENT_TYPE_LATEST)

    @made.get("/v1/ops/session")
    async def session(request: Request) -> Response:
        caller = request.state.caller
        return JSONResponse({"name": caller.name, "tenant": caller.tenant, "role": caller.role,
                             "csrf": doorman.csrf_token(caller)})

    return made
