"""/health for probes, /v1/status for people and `client.status()`, /metrics for Prometheus, /v1/ops/session for pages."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

import kvbank
from kvbank.cluster.http.app import Front
from kvbank.cluster.http.doors import Doorman
from kvbank.cluster.http.jobs import job_body


def open_routes(front: Front) -> APIRouter:
    """Routes that need no key: whether anybody can be served, and nothing else."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        workers = len(front.gateway.workers())
        body = {"status": "ok" if workers else "unavailable", "workers": workers, "version": kvbank.__version__}
        return JSONResponse(body, status_code=200 if workers else 503)

    return router


def routes(front: Front) -> APIRouter:
    """Routes for clients."""
    router = APIRouter()

    @router.get("/v1/status")
    async def status(request: Request) -> Response:
        told = await front.status() if front.status is not None else {"workers": [], "loans": [], "tiers": []}
        jobs = [job_body(job, brief=True) for job in front.gateway.jobs(request.state.tenant) if not job.over]
        return JSONResponse({**told, "jobs": jobs})

    return router


def ops_routes(front: Front, doorman: Doorman) -> APIRouter:
    """Routes for who runs the cluster."""
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        if front.status is not None:
            gateway = front.gateway
            gateway.meters.observe(live=gateway.live, waiting=gateway.waiting, status=await front.status())
        return Response(generate_latest(front.gateway.meters.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/ops/session")
    async def session(request: Request) -> Response:
        caller = request.state.caller
        return JSONResponse({"name": caller.name, "tenant": caller.tenant, "role": caller.role,
                             "csrf": doorman.csrf_token(caller)})

    return router
