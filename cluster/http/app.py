"""The HTTP application: who may call, how much is read, and how an error looks. The routes are in the sibling files.

Every route stands behind a door of doors.py, which is passed before a byte of the body is read. Errors carry a stable code
and a message for people, never a path, an address or an exception's text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from kvbank.cluster.fields import parse_json
from kvbank.cluster.gateway import Gateway
from kvbank.cluster.http.doors import LOOPBACK, OPEN, OPS, USER, Door, Doorman, OriginGuard
from kvbank.cluster.http.routes import Routes
from kvbank.cluster.intake import Intake
from kvbank.cluster.ops import Ops
from kvbank.cluster.traced import IncomingTrace
from kvbank.errors import Cancelled, DeadlineExceeded, InvalidRequest, KVBankError, NotFound, Overloaded, Unauthorized

log = logging.getLogger(__name__)

_DIGITS = re.compile("[0-9]{1,10}")

_TYPES = {**dict.fromkeys((400, 405, 408, 413, 431), "invalid_request_error"), 401: "authentication_error",
          403: "permission_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error", 504: "timeout_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one request may cost before it is a job."""

    body_bytes: int = 8 << 20        # long prompts are the point of this service
    body_s: float = 30.0             # to send the whole body
    quiet_s: float = 5.0             # a stream without news gets a comment that often
    choices: int = 16                # jobs that one completion request may start


@dataclass(frozen=True, kw_only=True)
class Front:
    """What the routes share."""

    gateway: Gateway
    intake: Intake
    limits: HttpLimits = field(default_factory=HttpLimits)
    api_keys: Mapping[str, str] | Callable[[], Mapping[str, str]] = field(default_factory=dict)     # as Doorman takes them
    hosts: tuple[str, ...] = LOOPBACK                                # Host names answered to while no keys are set, or `named`
    named: bool = False                                              # the operator said which names this gateway has
    created: int = 0                                                 # unix time, for /v1/models
    status: Callable[[], Awaitable[dict[str, Any]]] | None = None    # members, loans and tiers, for /v1/status
    borrowed: Callable[[], Mapping[str, int]] = dict                 # blocks read at lenders, by a job's name on the wire
    ops: Ops | None = None                                           # drain, recall, clear, pin


def build_app(front: Front) -> Starlette:
    """The application with all routes."""
    from kvbank.cluster.http import dashboard_routes, jobs, openai, ops_routes, status

    app = Starlette()
    app.router.redirect_slashes = False
    doorman = Doorman(front.api_keys)
    feed = app.state.feed = ops_routes.build_feed(front)
    rooms: list[tuple[str, Routes]] = [                 # one door each; looked through in this order
        (USER, openai.routes(front)), (USER, jobs.routes(front)), (USER, status.routes(front)),
        (OPEN, status.open_routes(front)), (OPEN, dashboard_routes.routes(front)),
        (OPS, status.ops_routes(front, doorman)), (OPS, ops_routes.routes(front, feed)),
    ]
    app.state.meters, app.state.doors = front.gateway.meters, {}
    for role, made in rooms:
        for method, route in made.behind(Door(doorman, role)):
            app.router.routes.append(route)
            app.state.doors[method, route.path] = role
    app.add_exception_handler(KVBankError, _answer_error)            # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _answer_http_error)     # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unknown_error)
    open_house = not callable(front.api_keys) and not front.api_keys
    app.add_middleware(OriginGuard, hosts=front.hosts if open_house or front.named else None,
                       refused=lambda code: front.gateway.meters.refused(code))
    if front.gateway.traced is not None:
        app.add_middleware(IncomingTrace)
    return app


async def read_body(request: Request, limits: HttpLimits) -> dict[str, Any]:
    """The request's JSON object, read within its limits. Raises InvalidRequest."""
    declared = request.headers.get("content-length", "0")
    too_big = declared.isdigit() and int(declared) > limits.body_bytes
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_s):
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                if too_big or size > limits.body_bytes:
                    too_big, parts = True, []        # read on and drop, so that the caller can hear the answer
                    more = more and size <= 4 * limits.body_bytes
                else:
                    parts.append(part)
    except TimeoutError:
        raise BodyTooLate(f"the body did not arrive within {limits.body_s:g} s") from None
    if too_big:
        raise BodyTooLarge(
            f"the body is larger than {limits.body_bytes} bytes; send a shorter prompt, or raise http.max_body_bytes"
        )
    return parse_json(b"".join(parts))


def query_number(request: Request, name: str, default: float, high: float) -> float:
    """A number from 0 to `high` in the address. Raises InvalidRequest."""
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        raise InvalidRequest(f"{name} must be a number", param=name) from None
    if not 0 <= value <= high:
        raise InvalidRequest(f"{name} must be from 0 to {high:g}", param=name)
    return value


def query_integer(request: Request, name: str, default: int, high: int) -> int:
    """As query_number."""
    given = request.query_params.get(name)
    if given is None:
        return default
    if not _DIGITS.fullmatch(given) or int(given) > high:
        raise InvalidRequest(f"{name} must be an integer from 0 to {high}", param=name)
    return int(given)


class BodyTooLate(InvalidRequest):
    """The request body did not arrive in time."""

    http_status = 408


class BodyTooLarge(InvalidRequest):
    """The request body exceeds its limit."""

    http_status = 413


def error_body(error: KVBankError) -> dict[str, Any]:
    """An error as OpenAI's clients know it."""
    kind = _TYPES.get(error.http_status, "server_error")
    body: dict[str, Any] = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    if isinstance(error, Overloaded):
        body["retry_after_s"] = error.retry_after_s
    return {"error": body}


async def _answer_error(request: Request, error: KVBankError) -> Response:
    request.app.state.meters.refused(error.code)
    error.__traceback__ = None           # a job keeps its error, and that would keep the frames of this request
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, (Cancelled, DeadlineExceeded)):             # OpenAI's clients send a 409 and a 504 again
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    known = {404: NotFound("there is no such route"), 405: InvalidRequest("this route does not take that method")}
    said = known.get(error.status_code, InvalidRequest("the request is malformed"))
    request.app.state.meters.refused(said.code)
    body = error_body(said)
    body["error"]["type"] = _TYPES.get(error.status_code, body["error"]["type"])
    headers = dict(error.headers or {})
    if error.status_code == 405:         # each route has one method, and Starlette names that of the first
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _methods(request: Request) -> set[str]:
    """What the path of this request takes."""
    routes = [route for route in request.app.router.routes if isinstance(route, Route)]
    return {method for route in routes if route.matches(request.scope)[0] is not Match.NONE for method in route.methods or ()}


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)     # it left while it sent its body


async def _answer_unknown_error(request: Request, _error: Exception) -> Response:
    request.app.state.meters.refused(KVBankError.code)
    request_id = request.state.request_id
    log.error("request_failed request_id=%s", request_id)            # the server logs the error itself
    said = KVBankError(f"an internal error; the gateway's log has it, beside the request_id {request_id}")
    return JSONResponse(error_body(said), status_code=500, headers={"x-request-id": request_id})
