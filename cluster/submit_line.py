"""SubmitLine: this gateway's Submit stream to one worker, with a lane for each attempt of a job.

    attempts --write--> outbox --_write--> | SubmitRequests | --> worker
    attempts <--hear--- lanes <--_read---- | SubmitReplies  | <--

One task at a time writes and one reads, so that an attempt that is given up leaves the stream whole for all others. The one
that reads calls each attempt in turn: a step brings words for many, and none of them needs a task to be woken for its own.
When the stream ends, every lane does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from itertools import count
from typing import Any, Protocol

import grpc.aio

from kvbank.kvstore.transport.rpc import MAX_MESSAGE_BYTES
from kvbank.proto import jobs_pb2 as pb

log = logging.getLogger(__name__)

ENVELOPE_BYTES = 8                           # around a request in a message, at most
MESSAGE_BYTES = MAX_MESSAGE_BYTES - 1024     # for requests; one has to hold a whole job
_UNTOLD = 'Failed "execute_batch"'            # grpc.aio's words when a call ended while something was written to it
_LAST_WORDS = frozenset({"done", "failed", "lost"})


class Listener(Protocol):
    """Who has a lane. Called on the event loop: be quick, never raise."""

    def hear(self, reply: pb.SubmitReply) -> None:
        """What the worker says next, up to its last word."""

    def lane_lost(self, reason: str) -> None:
        """The lane ended without a last word, or was left. `reason`: a word for logs and metrics."""


class Lane:
    """One attempt's part of the stream."""

    def __init__(self, line: SubmitLine, number: int) -> None:
        self._line, self._number = line, number
        self._listener: Listener | None = None
        self._lost = ""

    @property
    def someone_there(self) -> bool:
        """The worker has answered on this stream."""
        return self._line.heard

    def begin(self, job: pb.Job, listener: Listener) -> None:
        """Send the job; from now on `listener` hears what becomes of it."""
        self._listener = listener
        self.write(pb.SubmitRequest(job=job))
        if self._lost:
            listener.lane_lost(self._lost)

    def write(self, request: pb.SubmitRequest) -> None:
        """Send it; that it could not be sent is told to the listener."""
        request.lane = self._number
        self._line.send(request)

    def leave(self) -> None:
        """Nobody listens any more: the worker ends the job if it runs. Safe to repeat, and after a last word."""
        if self._line.forget(self._number):
            self.write(pb.SubmitRequest(leave=pb.Leave()))
            self.end("left")

    def hear(self, reply: pb.SubmitReply) -> None:
        if self._listener is not None:
            self._listener.hear(reply)

    def end(self, reason: str) -> None:
        if not self._lost:
            self._lost = reason
            if self._listener is not None:
                self._listener.lane_lost(reason)


class SubmitLine:
    """On the gateway's event loop."""

    def __init__(self, call: Any, *, channel: Any) -> None:
        """call: a Submit stream on `channel`, nothing written yet."""
        self.channel = channel
        self._call = call
        self._numbers = count(1)
        self._lanes: dict[int, Lane] = {}
        self._outbox: deque[pb.SubmitRequest] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._lost, self._retired = "", False
        self.heard = False                           # anything at all
        self._reading = asyncio.create_task(self._read())

    @property
    def over(self) -> bool:
        return bool(self._lost)

    def lane(self) -> Lane:
        """A fresh one; `begin` it first."""
        number = next(self._numbers)
        lane = self._lanes[number] = Lane(self, number)
        if self._lost:                               # it ended since somebody looked
            self._lanes.clear()
            lane.end(self._lost)
        return lane

    def send(self, request: pb.SubmitRequest) -> None:
        if self._lost:
            return
        self._outbox.append(request)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def forget(self, number: int) -> bool:
        """True: it was open until now."""
        known = self._lanes.pop(number, None) is not None
        self._close_when_idle()
        return known

    def retire(self) -> None:
        """Nothing new comes: it closes with its last lane."""
        self._retired = True
        self._close_when_idle()

    def close(self) -> None:
        self._end("closed")

    async def _read(self) -> None:
        lost = "stream_ended"
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self.heard = True
                for reply in message.replies:
                    self._hand_out(reply)
        except grpc.aio.AioRpcError as error:
            told = (error.debug_error_string() or "").startswith(_UNTOLD)
            lost = "stream_ended" if told else error.code().name.lower()
        except asyncio.CancelledError:               # the call was cancelled, or this task: the line is over either way
            lost = "call_cancelled"
        except Exception:                            # without its reader the line would be silent for ever
            log.exception("submit_line_failed")
            lost = "bad_message"
        self._end(lost)

    def _hand_out(self, reply: pb.SubmitReply) -> None:
        lane = self._lanes.get(reply.lane)
        if lane is None:
            return                                   # it was left in the meantime
        if reply.WhichOneof("kind") in _LAST_WORDS:
            self.forget(reply.lane)
        lane.hear(reply)

    async def _write(self) -> None:
        try:
            while self._outbox:
                await self._call.write(self._next_message())
            self._writing = None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            pass                                     # the reader knows more of why

    def _next_message(self) -> pb.SubmitRequests:
        """All that waits, as far as one message holds it."""
        message, left = pb.SubmitRequests(), MESSAGE_BYTES
        while self._outbox and (not message.requests or self._outbox[0].ByteSize() + ENVELOPE_BYTES <= left):
            request = self._outbox.popleft()
            left -= request.ByteSize() + ENVELOPE_BYTES
            message.requests.append(request)
        return message

    def _close_when_idle(self) -> None:
        if self._retired and not self._lanes:
            self._end("retired")

    def _end(self, reason: str) -> None:
        if self._lost:
            return
        self._lost = reason
        self._outbox.clear()
        self._call.cancel()
        for task in (self._reading, self._writing):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        lanes = list(self._lanes.values())
        self._lanes.clear()
        for lane in lanes:
            lane.end(reason)
