"""Connection: one client's, and how long it may take over what it does. Knows HTTP's framing and no routes.

  the client leaves undone                         after        then
  a request's head, the first or a later one       HEADERS_S    the connection is closed
  the rest of a body whose answer is out           REST_S       closed
  reading what was sent to it                      UNREAD_S     cut off, and what it did not read thrown away

All this needs no key. A body that a route waits for is bounded where it is read (app.py), silence between two requests by
uvicorn. Nothing here runs but on an event of the connection; an ordinary request costs a cancelled timer at most.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0                     # from a head's first byte to its last; for the first one, from the connection on
REST_S = 5.0                         # for a body that is only dropped, so that an honest client hears why
UNREAD_S = 120.0                     # without one byte taken; noticed within twice that. A system tells its peer of room that
                                     # was made only when it is worth it, so that some 300 bytes/s can look like none
HEAD, REST, NEXT = "head", "rest", "next"
MALFORMED = (b'{"error":{"message":"the request is malformed","type":"invalid_request_error","param":null,'
             b'"code":"invalid_request"}}')


class Connection(H11Protocol):
    """uvicorn's protocol, with an end to everything that a client may leave undone."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._transports = (transport, _below_tls(transport))
        self._unread_clock: asyncio.TimerHandle | None = None
        self._owed: str | None = HEAD
        self._debt_clock: asyncio.TimerHandle | None = self.loop.call_later(HEADERS_S, transport.close)
        for each in self._transports:                # whatever waits is told of, not only much of it; at once, if TLS has some
            each.set_write_buffer_limits(high=1, low=0)

    def connection_lost(self, exc: Exception | None) -> None:
        for clock in (self._debt_clock, self._unread_clock):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    # -- what the client owes ----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_debt()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_debt()
        self._watch_unread()

    def _watch_debt(self) -> None:
        """One debt has one clock: bytes that come do not wind it up again."""
        owes = self._owes()
        if owes == self._owed:
            return
        self._owed = owes
        if self._debt_clock is not None:
            self._debt_clock.cancel()
            self._debt_clock = None
        if owes is not None:
            bounds = {HEAD: HEADERS_S, REST: REST_S, NEXT: self.timeout_keep_alive}
            self._debt_clock = self.loop.call_later(bounds[owes], self.transport.close)

    def _owes(self) -> str | None:
        theirs = self.conn.their_state
        if theirs is h11.SEND_BODY:
            return REST if self.cycle.response_complete else None
        if theirs is not h11.IDLE:
            return None
        if self.conn.trailing_data[0]:
            return HEAD
        # uvicorn begins to wait for the next request when an answer is out, and forgets to when a rest came after it
        return NEXT if self.timeout_keep_alive_task is None else None

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's: nothing was asked for a while. But who still reads is not idle, and closing would cut TLS off in the end."""
        if any(each.get_write_buffer_size() for each in self._transports):
            self._wait_for_next()
        else:
            super().timeout_keep_alive_handler()

    def _wait_for_next(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):     # else an answer is out or under way, and stays the only one
            head_only = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(MALFORMED))), ("Connection", "close")]
            self.transport.write(self.conn.send(h11.Response(status_code=400, headers=headers, reason=b"Bad Request")))
            if not head_only:
                self.transport.write(self.conn.send(h11.Data(data=MALFORMED)))
        self.transport.close()
        if self.cycle is not None:
            self.cycle.disconnected = True           # nor may the route, which may not have begun, answer as well

    # -- what the client does not read -------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_unread()
        if self.timeout_keep_alive_task is not None:     # silence counts from here on
            self.timeout_keep_alive_task.cancel()
            self._wait_for_next()

    def _watch_unread(self) -> None:
        """Begins the clock anew if something waits. Called only when all that waited before was taken: nothing more is
        written until then."""
        if self._unread_clock is not None:
            self._unread_clock.cancel()
            self._unread_clock = None
        if self._transports[1].get_write_buffer_size():
            self._unread_clock = self.loop.call_later(UNREAD_S, self._end_unread, self._unread())

    def _end_unread(self, before: int) -> None:
        if self._unread() < before:
            self._watch_unread()
            return
        # without lingering, or the system would go on offering what it holds
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _unread(self) -> int:
        """A number that falls when the client takes a byte, while nothing is written."""
        waiting: int = sum(each.get_write_buffer_size() for each in self._transports)
        return waiting + _unacknowledged(self.transport.get_extra_info("socket"))


def _below_tls(transport: Any) -> Any:
    """The socket's own transport: what a client does not take waits there. asyncio has no public name for it under TLS."""
    tls = getattr(transport, "_ssl_protocol", None)
    return transport if tls is None else tls._transport


def _unacknowledged(sock: Any) -> int:
    """Bytes in the system's own buffer, which takes more in such large gulps that of a slow reader's progress nothing is seen
    above it for minutes. 0 where the system does not tell."""
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):                    # ValueError: it was closed a moment ago
        return 0
