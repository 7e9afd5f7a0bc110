"""Server-sent events: an endless response that notices at once when its reader has left."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def event(data: Any, *, name: str | None = None, number: int | None = None) -> bytes:
    """One event; `number` becomes its id, which a reconnecting reader sends back."""
    head = f"event: {name}\n" if name else ""
    if number is not None:
        head += f"id: {number}\n"
    return f"{head}data: {_ENCODER.encode(data)}\n\n".encode()


class Form:
    """An event of which a text and token ids differ from time to time: all else is written once."""

    def __init__(self, data: Callable[[str, list[int]], Any]) -> None:
        """data: of the event with this text and, somewhere after it, these ids; it may leave the ids out."""
        mark, number = secrets.token_hex(16), secrets.randbits(62)
        self._begin, rest = event(data(mark, [number])).split(f'"{mark}"'.encode())
        self._between, *end = rest.split(str(number).encode())
        self._end = end[0] if end else None

    def filled(self, text: str, ids: list[int]) -> bytes:
        """As `event` would write it."""
        told = self._begin + _ENCODER.encode(text).encode() + self._between
        return told if self._end is None else told + ",".join(map(str, ids)).encode() + self._end


class EventStream(Response):
    """Sends events as they come. `on_leave` runs when the reader disconnects before the end, or is cut off because it takes
    nothing (connection.py)."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, on_leave: Callable[[], None] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_leave = on_leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pump = asyncio.ensure_future(self._pump(send))
        left = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done() and self._on_leave is not None:
                self._on_leave()
        finally:
            left.cancel()
            if not pump.done():
                pump.cancel()
            await asyncio.gather(pump, left, return_exceptions=True)
        if not pump.cancelled() and pump.exception() is not None:
            raise pump.exception()                   # type: ignore[misc]

    async def _pump(self, send: Any) -> None:
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, wait: Any, on_leave: Callable[[], None]) -> bool:
    """Await `wait`; False, after calling `on_leave`, when the caller disconnected first."""
    work = asyncio.ensure_future(wait)
    left = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        on_leave()
        return False
    finally:
        left.cancel()
        work.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
