"""Connection: one client's, and how long it may take over what it does. Knows HTTP's framing and no routes."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0                     # a connection must send its first request's headers within this


class Connection(H11Protocol):
    """uvicorn's protocol, but a connection that never sends a whole request head is closed."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADERS_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
