"""Bounds: what is refused before anything looks into a request: a head that is too long, one connection too many.

The parser bounds only heads that come in pieces. Knows no routes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from kvbank.cluster.http.app import error_body
from kvbank.errors import InvalidRequest, KVBankError, Unavailable

HEADERS = 100                        # of one request
HEADER_BYTES = 32 << 10              # of them and its address; an endless head is hung up on, a long one answered 431


class HeadTooLarge(InvalidRequest):
    """A request has too many headers, or too long ones."""

    http_status = 431


class Bounds:
    """ASGI middleware, outside of all other."""

    def __init__(self, app: Any, *, served: Callable[[], int], limit: int, refused: Callable[[str], None]) -> None:
        """served: connections now, this one too, or requests if there are more: who left may have one. limit: of them. refused:
        hears the code of each refusal."""
        self._app, self._served, self._limit, self._refused = app, served, limit, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := self._error(scope)) is not None:
            self._refused(error.code)
            headers = {"Connection": "close", "Retry-After": "1"} if isinstance(error, Unavailable) else {}
            await JSONResponse(error_body(error), status_code=error.http_status, headers=headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _error(self, scope: Any) -> KVBankError | None:
        if self._served() > self._limit:
            return Unavailable(f"more than {self._limit} connections are open, this gateway serves no more; retry later")
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers) + len(scope["raw_path"]) + len(scope["query_string"])
        if len(headers) > HEADERS or size > HEADER_BYTES:
            return HeadTooLarge(f"a request may have {HEADERS} headers and {HEADER_BYTES} bytes of them and its address")
        return None
