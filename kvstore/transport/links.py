"""Links: this member's connections to its peers: a session and a hot stream each, opened when first needed.

    session   envelopes both ways; the borrower opens it, the lender answers and calls back on it
    hot       raw queries and partials; engine thread writes and reads, with the deadlines of loans.md

Sending never waits and never fails loudly: the protocol assumes that messages get lost, and retries by name.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from kvbank.kvstore.layout import Boot
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge

log = logging.getLogger(__name__)

BOOT_KEY = "kvbank-boot"                     # metadata: hex of the caller's boot
PROBE_KEY = "kvbank-probe"                   # metadata: this session only asks who lives here
SESSION, PUT, FETCH, ATTEND = (f"/kvbank.Bank/{name}" for name in ("Session", "Put", "Fetch", "Attend"))
QUEUE_LIMIT = 1024                           # envelopes waiting for one peer; more are dropped like lost ones


class Outbox:
    """A bounded queue that a stream drains: iterating ends after `close`."""

    def __init__(self, limit: int = QUEUE_LIMIT) -> None:
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._limit = limit
        self.closed = False

    def put(self, message: bytes) -> bool:
        """False: dropped, because the stream ended or does not keep up."""
        if self.closed or self._queue.qsize() >= self._limit:
            return False
        self._queue.put(message)
        return True

    def close(self) -> None:
        self.closed = True
        self._queue.put(None)

    def __iter__(self) -> Iterator[bytes]:
        while (message := self._queue.get()) is not None:
            yield message


class Session:
    """Our end of one session that we opened. Ends by itself when the peer goes; then a new one is made."""

    def __init__(self, call: Callable[..., Any], boot: Boot, on_message: Callable[[bytes], None],
                 on_end: Callable[[], None]) -> None:
        self.outbox = Outbox()
        self._on_message, self._on_end = on_message, on_end
        self._call = call(iter(self.outbox), metadata=[(BOOT_KEY, boot.hex())])
        threading.Thread(target=self._read, name="session", daemon=True).start()

    def _read(self) -> None:
        try:
            for data in self._call:
                self._on_message(data)
        except grpc.RpcError as error:
            log.debug("session ended code=%s", error.code() if isinstance(error, grpc.Call) else "?")
        finally:
            self.outbox.close()
            self._on_end()

    def close(self) -> None:
        self.outbox.close()
        self._call.cancel()


class HotEnded(Exception):
    """The hot stream broke, or the lender stayed silent. reason: gone | silent | refused."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HotLink:
    """Our end of one hot stream. One thread sends and receives."""

    def __init__(
        self, call: Callable[..., Any], boot: Boot, *, slow_s: float, lost_s: float, on_slow: Callable[[], None]
    ) -> None:
        """slow_s: then on_slow is called once; lost_s: then HotEnded('silent')."""
        self._outbox = Outbox(limit=1 << 20)
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._slow_s, self._lost_s, self._on_slow = slow_s, lost_s, on_slow
        self.ended = False
        self._call = call(iter(self._outbox), metadata=[(BOOT_KEY, boot.hex())])
        threading.Thread(target=self._read, name="hot", daemon=True).start()

    def send(self, message: bytes) -> None:
        if self.ended or not self._outbox.put(message):
            raise HotEnded("gone")

    def receive(self) -> bytes:
        """The next message. Raises HotEnded."""
        started = time.monotonic()
        try:
            data = self._inbox.get(timeout=self._slow_s)
        except queue.Empty:
            self._on_slow()
            try:
                data = self._inbox.get(timeout=max(0.0, self._lost_s - (time.monotonic() - started)))
            except queue.Empty:
                self.close()
                raise HotEnded("silent") from None
        if data is None:
            raise HotEnded("gone")
        return data

    def close(self) -> None:
        self.ended = True
        self._outbox.close()
        self._call.cancel()

    def _read(self) -> None:
        try:
            for data in self._call:
                self._inbox.put(data)
        except grpc.RpcError as error:
            log.debug("hot stream ended code=%s", error.code() if isinstance(error, grpc.Call) else "?")
        finally:
            self.ended = True
            self._inbox.put(None)
            self._outbox.close()


class Links:
    """All connections of one member. Thread-safe."""

    def __init__(self, boot: Boot, badge: Badge | str) -> None:
        self.boot, self._badge = boot, badge
        self._lock = threading.Lock()
        self._address: dict[Boot, str] = {}
        self._channels = rpc.Channels(badge)
        self._sessions: dict[Boot, Session] = {}
        self._hot: dict[Boot, HotLink] = {}

    def know(self, boot: Boot, address: str) -> None:
        """Where that life of a peer listens, from membership only."""
        with self._lock:
            self._address[boot] = address

    def knows(self, boot: Boot) -> bool:
        return boot in self._address

    def session(
        self, boot: Boot, on_message: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> tuple[Session | None, bool]:
        """The session to that peer and whether it is new; None when its address is unknown."""
        with self._lock:
            session = self._sessions.get(boot)
            if session is not None and not session.outbox.closed:
                return session, False
            if boot not in self._address:
                return None, False
            session = Session(self._method(boot, SESSION), self.boot, on_message, on_end)
            self._sessions[boot] = session
            return session, True

    def hot(self, boot: Boot, *, slow_s: float, lost_s: float, on_slow: Callable[[], None]) -> HotLink:
        """The hot stream to that peer. Raises HotEnded('refused') when its address is unknown."""
        with self._lock:
            link = self._hot.get(boot)
            if link is None or link.ended:
                if boot not in self._address:
                    raise HotEnded("refused")
                link = HotLink(self._method(boot, ATTEND), self.boot, slow_s=slow_s, lost_s=lost_s, on_slow=on_slow)
                self._hot[boot] = link
            return link

    def bulk(self, boot: Boot, method: str) -> Callable[..., Any]:
        """The raw PUT or FETCH callable to that peer; call it with metadata `self.metadata`. Raises KeyError."""
        with self._lock:
            channel = self._channels.to(self._address[boot])
        if method == PUT:
            return channel.stream_unary(PUT)
        return channel.unary_stream(FETCH)

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return ((BOOT_KEY, self.boot.hex()),)

    def drop(self, boot: Boot) -> None:
        """That peer is gone: close what we have to it."""
        with self._lock:
            ended = [self._sessions.pop(boot, None), self._hot.pop(boot, None)]
            address = self._address.pop(boot, None)
            unused = address is not None and address not in self._address.values()
            channels = self._channels.take(address) if unused and address is not None else []
        for link in ended:
            if link is not None:
                link.close()
        for channel in channels:
            channel.close()

    def close(self) -> None:
        with self._lock:
            boots = list(self._address)
        for boot in boots:
            self.drop(boot)

    def fresh_channel(self, boot: Boot) -> grpc.Channel | None:
        """A second connection, for a probe; the caller closes it."""
        address = self._address.get(boot)
        return None if address is None else rpc.channel(address, self._badge)

    def _method(self, boot: Boot, name: str) -> Callable[..., Any]:
        return self._channels.to(self._address[boot]).stream_stream(name)
