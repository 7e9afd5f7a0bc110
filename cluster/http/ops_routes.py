"""Routes for who runs the cluster: the feed that the dashboard lives on, one member, one job, and the ops actions.

GET /v1/ops/feed · GET /v1/ops/workers/ID · GET /v1/ops/jobs/NAME_ON_THE_WIRE
POST /v1/ops/members/ID/ACTION · POST /v1/ops/jobs/NAME_ON_THE_WIRE/pin?term_s=
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import kvbank
from kvbank.cluster.feed import Feed, job_row
from kvbank.cluster.http.app import Front, query_number
from kvbank.cluster.http.events import EventStream
from kvbank.cluster.http.routes import Routes
from kvbank.cluster.ops import PIN_S, Ops
from kvbank.errors import NotFound, Unavailable
from kvbank.kvstore.idle import MAX_PIN_S


def build_feed(front: Front) -> Feed:
    """The feed of this gateway; it asks nobody before somebody watches."""
    async def nobody() -> dict[str, Any]:
        return {"workers": [], "loans": [], "tiers": []}

    facts = {"version": kvbank.__version__, "model": front.intake.facts.name, "started": front.created,
             "actions": front.ops is not None}
    feed = Feed(front.gateway, front.status or nobody, borrowed=front.borrowed, facts=facts)
    if front.ops is not None:
        ops = front.ops
        ops.on_act, feed.audit = feed.acted, lambda: list(ops.audit)
    return feed


def routes(front: Front, feed: Feed) -> Routes:
    """All behind the ops door."""
    made = Routes("/v1/ops")

    def ops() -> Ops:
        if front.ops is None:
            raise Unavailable("this gateway cannot reach members")
        return front.ops

    @made.get("/feed")
    async def watch(request: Request) -> Response:
        feed.check_room()
        return EventStream(_events(feed, request))

    @made.get("/workers/{member}")
    async def worker(request: Request) -> Response:
        told = await feed.worker(request.path_params["member"])
        if told is None:
            raise NotFound("there is no such member: it left, or never was")
        return JSONResponse(told)

    @made.get("/jobs/{wire_id}")
    async def job(request: Request) -> Response:
        found = feed.job(request.path_params["wire_id"])
        if found is None:
            raise NotFound("there is no such job: it never was, or it ended too long ago")
        return JSONResponse({**job_row(found, 0), "timeline": found.timeline.told(), "receipt": found.receipt,
                             "age_s": feed.age_of(found)})

    @made.post("/members/{member}/{action}")
    async def act(request: Request) -> Response:
        caller, member, action = request.state.caller, request.path_params["member"], request.path_params["action"]
        return JSONResponse(await ops().act(member, action, who=caller.name, tenant=caller.tenant))

    @made.post("/jobs/{wire_id}/pin")
    async def pin(request: Request) -> Response:
        caller, wire_id = request.state.caller, request.path_params["wire_id"]
        term_s = query_number(request, "term_s", PIN_S, MAX_PIN_S)
        return JSONResponse(await ops().pin(wire_id, feed.job(wire_id), term_s, who=caller.name, tenant=caller.tenant))

    return made


async def _events(feed: Feed, request: Request) -> AsyncIterator[bytes]:
    """Until the request's key is taken back: a feed has no end of its own."""
    async with contextlib.aclosing(feed.watch()) as messages:
        async for name, data in messages:
            if not request.state.door.still_open_for(request):
                return
            yield f"event: {name}\ndata: {data}\n\n".encode()
