"""The two streams of a chain as their callers hold them: Lead to one follower, Activate to the next shard.

A broken stream is never mended: the chain is made anew, because what the other side did last cannot be known.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from torch import Tensor

from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.kvstore.transport.links import Outbox
from kvbank.workers.chain_frames import (
    ACTIVATE,
    CHAIN_KEY,
    LEAD,
    ChainFormatError,
    Events,
    Failed,
    Found,
    Hello,
    Message,
    Ready,
    pack,
    pack_hidden,
    unpack,
    unpack_event,
)
from kvbank.workers.seams import BankEvent

log = logging.getLogger(__name__)

OUTBOX_LIMIT = 1 << 16                       # messages waiting for one shard; a shard so far behind is broken


class LinkBroken(Exception):
    """The stream ended, or the other side did not answer in time."""


class LeadLink:
    """Shard 0's stream to one other shard. Engine thread only, except the reader.

        open (Hello, Ready) --begin--> what was sent before goes out first      open failed --again--> a new one
    """

    def __init__(self, shard: int, *, wake: Callable[[], None], backlog: list[bytes] | None = None) -> None:
        """wake: called from the reader when there is something to poll: events, or the end of the stream."""
        self.shard, self._wake = shard, wake
        self.broken = ""                     # why, once it is
        self.parkable = 0                    # as the shard last said
        self._backlog = backlog or []
        self._begun = False
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._events: list[tuple[int, BankEvent]] = []
        self._found: list[Found] = []
        self._lock = threading.Lock()
        self._outbox: Outbox | None = None
        self._channel: grpc.Channel | None = None
        self._call: Any = None

    def open(self, address: str, badge: Badge | str, hello: Hello, *, timeout_s: float) -> None:
        """Connect and wait until the shard is ready. Raises LinkBroken; then this link is of no use any more."""
        self._outbox = Outbox(OUTBOX_LIMIT)
        self._outbox.put(pack(hello))
        self._channel = rpc.channel(address, badge)
        self._call = self._channel.stream_stream(LEAD)(iter(self._outbox))     # type: ignore[arg-type]
        threading.Thread(target=self._read, args=(self._call,), name=f"lead-{self.shard}", daemon=True).start()
        ready = self.answer(Ready, timeout_s=timeout_s)
        self.parkable = ready.parkable

    def begin(self) -> None:
        """All shards are ready: send what was said so far, in order."""
        self._begun = True
        for data in self._backlog:
            self._put(data)
        self._backlog.clear()

    def again(self) -> LeadLink:
        """Close this one; a fresh one that still has to say all that this one never said."""
        assert not self._begun
        self.close()
        return LeadLink(self.shard, wake=self._wake, backlog=self._backlog)

    def send(self, message: Message) -> None:
        """Queue one message. Never waits and never fails: a broken link shows at the next `answer`."""
        data = pack(message)
        if self._begun:
            self._put(data)
        else:
            self._backlog.append(data)

    def answer(self, kind: type[Any], *, timeout_s: float) -> Any:
        """The next answer of that kind; others belong to a question that was given up. Raises LinkBroken."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                message = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LinkBroken(f"shard {self.shard} did not answer within {timeout_s:.3g} s") from None
            if message is None:
                raise LinkBroken(self.broken)
            if isinstance(message, Failed):
                self.broken = f"shard {self.shard}: {message.reason}"
                raise LinkBroken(self.broken)
            if isinstance(message, kind):
                return message

    def take_events(self) -> list[tuple[int, BankEvent]]:
        """(attempt, event) of what that shard's bank told since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def take_found(self) -> list[Found]:
        """What that shard found in its tiers, or did not, since the last call."""
        with self._lock:
            found, self._found = self._found, []
        return found

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.close()
        if self._call is not None:
            self._call.cancel()
        if self._channel is not None:
            self._channel.close()

    def _put(self, data: bytes) -> None:
        assert self._outbox is not None
        if not self._outbox.put(data) and not self.broken:
            self.broken = f"shard {self.shard} does not keep up, or its stream ended"

    def _read(self, call: Any) -> None:
        """Own thread: sorts what comes, and says so when nothing more will."""
        reason = "its stream ended"
        try:
            for data in call:
                self._arrived(unpack(data))
        except grpc.RpcError as error:
            reason = f"its stream broke ({error.code().name})" if isinstance(error, grpc.Call) else "its stream broke"
        except ChainFormatError as error:
            reason = str(error)
        self.broken = self.broken or f"shard {self.shard}: {reason}"
        log.info("chain_link_ended shard=%d reason=%s", self.shard, reason)
        self._answers.put(None)
        self._wake()

    def _arrived(self, message: Any) -> None:
        if isinstance(message, Events):
            events = [unpack_event(values) for values in message.events]
            with self._lock:
                self._events += events
            self._wake()
        elif isinstance(message, Found):
            with self._lock:
                self._found.append(message)
            self._wake()
        else:
            self._answers.put(message)


class Onward:
    """A shard's stream to the next one: hidden states, one way."""

    def __init__(self, address: str, badge: Badge | str, chain: bytes, *, on_end: Callable[[], None]) -> None:
        """on_end: called once from a thread of its own when the stream ended, whoever ended it."""
        self._outbox = Outbox(OUTBOX_LIMIT)
        self._on_end = on_end
        self.broken = False
        self._channel = rpc.channel(address, badge)
        self._call: Any = self._channel.stream_stream(ACTIVATE)(
            iter(self._outbox), metadata=((CHAIN_KEY, chain.hex()),))          # type: ignore[arg-type]
        threading.Thread(target=self._read, name="activate-out", daemon=True).start()

    def send(self, step: int, hidden: Tensor) -> None:
        """hidden [T, D] of one step. Raises LinkBroken."""
        for piece in pack_hidden(step, hidden):
            if self.broken or not self._outbox.put(piece):
                raise LinkBroken("the stream of hidden states to the next shard ended")

    def close(self) -> None:
        self._outbox.close()
        self._call.cancel()
        self._channel.close()

    def _read(self) -> None:
        try:
            for _ in self._call:
                pass                         # nothing is ever said on this way back; its end is the message
        except grpc.RpcError as error:
            log.debug("activate ended code=%s", error.code() if isinstance(error, grpc.Call) else "?")
        self.broken = True
        self._on_end()
