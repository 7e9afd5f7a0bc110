"""Doors: who a request speaks for, what that caller may do, and which pages may not speak at all.

    request --OriginGuard: Host, Origin--> --Door(role): key -> Caller--> the route reads its first byte

A key proves a tenant and a role. `user` sends jobs and sees its own; `ops` sees and changes the cluster as well. Every
route stands behind exactly one Door, `open` ones too, and `app.state.doors` tells which: tests walk it. Keys are kept and
compared as digests.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from kvbank.errors import Unauthorized

OPEN, USER, OPS = "open", "user", "ops"
DEFAULT_TENANT = "default"
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
CSRF_HEADER = "x-kvbank-csrf"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
API_CSP = b"default-src 'none'; frame-ancestors 'none'"
PAGE_CSP = (b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            b"font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_API_HEADERS = [*_HEADERS, (b"content-security-policy", API_CSP)]
_PAGE_HEADERS = [*_HEADERS, (b"content-security-policy", PAGE_CSP)]
PAGES = "/dashboard"
HEALTH = "/health"                           # for probes, which speak to an address of their choice; holds nothing


class Forbidden(Unauthorized):
    """The key is valid and may not do this."""

    code = "forbidden"
    http_status = 403


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request speaks for. `name` tells callers apart in the audit trail and gives no key away."""

    tenant: str = DEFAULT_TENANT
    role: str = USER
    name: str = "local"

    @classmethod
    def of_setting(cls, key: str, value: str) -> Caller:
        """From `key: tenant` or `key: tenant:ops` of http.api_keys."""
        tenant, _, role = value.partition(":")
        return cls(tenant, role or USER, f"key-{_digest(key).hex()[:8]}")


class Doorman:
    """Knows the keys. Without any, everybody on this machine is the default tenant and may do everything."""

    def __init__(self, api_keys: Callable[[], Mapping[str, str]] | Mapping[str, str]) -> None:
        """api_keys: {key: tenant or tenant:role}, or a function that says which are valid now: asked on every request."""
        fixed: Mapping[str, str] = {} if callable(api_keys) else api_keys
        self._current: Callable[[], Mapping[str, str]] = api_keys if callable(api_keys) else lambda: fixed
        self._read: Mapping[str, str] | None = None
        self._callers: dict[bytes, Caller] = {}
        self._csrf = secrets.token_bytes(32)

    def caller(self, request: Request) -> Caller:
        """Raises Unauthorized."""
        callers = self._known()
        if not callers:
            return Caller(role=OPS)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized("an API key is needed: send the header `Authorization: Bearer <key>`")
        caller = callers.get(_digest(given.strip()))
        if caller is None:
            raise Unauthorized("the API key is not valid here")
        return caller

    def csrf_token(self, caller: Caller) -> str:
        """What a page must send along with everything that changes the cluster, in the header `x-kvbank-csrf`."""
        return hmac.new(self._csrf, f"{caller.tenant} {caller.role} {caller.name}".encode(), "sha256").hexdigest()

    def _known(self) -> dict[bytes, Caller]:
        current = self._current()
        if current is not self._read:
            self._callers = {_digest(key): Caller.of_setting(key, value) for key, value in current.items()}
            self._read = current
        return self._callers


@dataclass(frozen=True)
class Door:
    """Lets through who has the role, and leaves a Caller, and itself, in `request.state`. Before the body is read."""

    doorman: Doorman
    role: str

    def __call__(self, request: Request) -> None:
        """Raises Unauthorized, Forbidden."""
        if self.role == OPEN:
            return
        caller = self.doorman.caller(request)
        if self.role == OPS:
            if caller.role != OPS:
                raise Forbidden("this key may send jobs and not run the cluster: that takes a key with the role ops")
            if request.method not in _SAFE_METHODS and not hmac.compare_digest(
                    request.headers.get(CSRF_HEADER, "").encode(), self.doorman.csrf_token(caller).encode()):
                raise Forbidden(f"the header {CSRF_HEADER} is missing or wrong: GET /v1/ops/session tells it")
        request.state.caller, request.state.tenant, request.state.door = caller, caller.tenant, self

    def still_open_for(self, request: Request) -> bool:
        """Whether a key of a request that came through is valid still and says the same. For answers that do not end."""
        try:
            return bool(self.doorman.caller(request) == request.state.caller)
        except Unauthorized:
            return False


class OriginGuard:
    """Keeps foreign web pages away, on every method and route, and says on every answer what a page of ours may do.
    Gives every request an id, so that its caller can name it: OpenAI's client shows x-request-id.

    A page can make a browser post to 127.0.0.1, and DNS rebinding makes that page's own name point there. hosts: the names
    that are answered to, and whose pages may ask; None where keys are asked for and no name was configured: a page has no key
    of somebody else's, and must come from the very host that it talks to.
    """

    def __init__(self, app: Any, *, hosts: tuple[str, ...] | None, refused: Callable[[str], None]) -> None:
        """refused: hears the code of each refusal."""
        self._app = app
        self._hosts, self._refused = hosts, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        extra = [*(_PAGE_HEADERS if scope["path"].startswith(PAGES) else _API_HEADERS), (b"x-request-id", request_id.encode())]

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        if scope["path"] != HEALTH and self._foreign(dict(scope["headers"])):
            self._refused("forbidden")
            body = {"error": {"message": "this gateway does not answer to pages and names of other sites",
                              "type": "permission_error", "param": None, "code": "forbidden"}}
            await JSONResponse(body, status_code=403)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _foreign(self, headers: Mapping[bytes, bytes]) -> bool:
        host, origin = headers.get(b"host", b"").decode("latin-1").lower(), headers.get(b"origin")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            return True
        if origin is None:
            return False
        named = origin.decode("latin-1").lower().partition("://")[2]
        return _host_name(named) not in self._hosts if self._hosts is not None else named != host


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """`name` of `name:port`, brackets of IPv6 kept."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
