"""Links: the gateway's gRPC channels to members, one per address and purpose, all on the gateway's event loop.

The Submit stream to a worker lives as long as both (submit_line.py), and Status must never queue behind it, so the two
travel on separate connections.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from kvbank.cluster.submit_line import Lane, SubmitLine
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.proto import control_pb2, jobs_pb2, ops_pb2

Reply = TypeVar("Reply", bound=Message)


@dataclass(frozen=True, slots=True)
class _Older:
    """A channel that was made before the certificates were renewed, and the line that jobs may still be on."""

    channel: Any
    line: SubmitLine | None
    retired_at: float


class Links:
    """Opens calls to members. A peer is addressed as membership gave it, never as a request did."""

    def __init__(self, badge: Badge | str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._badge, self._clock = Badge.of(badge), clock
        self._channels: dict[tuple[str, str], Any] = {}
        self._stamps: dict[tuple[str, str], tuple[int, ...]] = {}    # of the certificates that each was made with
        self._older: dict[tuple[str, str], list[_Older]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._lines: dict[str, SubmitLine] = {}

    def submit(self, address: str) -> Lane:
        """A lane to a worker, for one attempt; the caller begins it and leaves when it no longer listens."""
        channel, metadata = self._channel(address, "submit")
        line = self._lines.get(address)
        if line is None or line.over or line.channel is not channel:
            if line is not None:
                line.retire()
            method = channel.stream_stream(
                "/kvbank.Jobs/Submit", request_serializer=jobs_pb2.SubmitRequests.SerializeToString,
                response_deserializer=jobs_pb2.SubmitReplies.FromString,
            )
            line = self._lines[address] = SubmitLine(method(metadata=metadata), channel=channel)
        return line.lane()

    async def status(self, address: str, *, timeout_s: float) -> jobs_pb2.WorkerStatus:
        """What one member says of itself. Raises grpc.aio.AioRpcError."""
        request = jobs_pb2.StatusRequest()
        return await self._unary(address, "/kvbank.Jobs/Status", request, jobs_pb2.WorkerStatus, timeout_s)

    async def snapshot(self, address: str, *, timeout_s: float) -> control_pb2.SnapshotReply:
        """Who is alive, as the control plane knows it."""
        request = control_pb2.SnapshotRequest()
        return await self._unary(address, "/kvbank.Control/Snapshot", request, control_pb2.SnapshotReply, timeout_s)

    async def locate(self, address: str, keys: bytes, *, timeout_s: float) -> control_pb2.LocateReply:
        """Who holds the longest prefix of these block keys."""
        request = control_pb2.LocateRequest(keys=keys)
        return await self._unary(address, "/kvbank.Control/Locate", request, control_pb2.LocateReply, timeout_s)

    async def act(self, address: str, request: ops_pb2.OpsRequest, *, timeout_s: float) -> ops_pb2.OpsReply:
        """Have one member drain, recall, clear or pin. Raises grpc.aio.AioRpcError."""
        return await self._unary(address, "/kvbank.Ops/Act", request, ops_pb2.OpsReply, timeout_s)

    async def _unary(self, address: str, method: str, request: Message, reply: type[Reply], timeout_s: float) -> Reply:
        channel, metadata = self._channel(address, "unary")
        call = channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
        )
        answer: Reply = await call(request, metadata=metadata, timeout=timeout_s)
        return answer

    def _channel(self, address: str, purpose: str) -> Any:
        """One that was made before the certificates were renewed is used for nothing new; what is open on it goes on, and
        the first call after that closes it."""
        if self._older:
            self._close_unused()
        key, stamp = (address, purpose), self._badge.stamp()
        if key in self._channels and stamp and self._stamps[key] != stamp:
            line = self._lines.get(address) if purpose == "submit" else None
            self._older.setdefault(key, []).append(_Older(self._channels.pop(key)[0], line, self._clock()))
        if key not in self._channels:
            self._channels[key], self._stamps[key] = rpc.aio_channel(address, self._badge), stamp
        return self._channels[key]

    def _close_unused(self) -> None:
        """Of the older ones. Other calls than Submit have deadlines, and are over long before."""
        latest = self._clock() - rpc.RETIRED_S
        for key, older in list(self._older.items()):
            kept = [one for one in older if one.retired_at > latest or (one.line is not None and not one.line.over)]
            for one in older:
                if one not in kept:
                    task = asyncio.ensure_future(one.channel.close())
                    self._closing.add(task)
                    task.add_done_callback(self._closing.discard)
            self._older[key] = kept
            if not kept:
                del self._older[key]

    async def forget(self, alive: set[str], *, purpose: str | None = None) -> None:
        """Close the channels (of one purpose, or all) to addresses that nobody uses any more."""
        gone = [key for key in self._channels if key[0] not in alive and purpose in (None, key[1])]
        for address in [address for address in self._lines if (address, "submit") in gone]:
            self._lines.pop(address).close()
        for key in gone:
            channel, _ = self._channels.pop(key)
            del self._stamps[key]
            for each in (channel, *(one.channel for one in self._older.pop(key, ()))):
                await each.close()

    async def close(self) -> None:
        await self.forget(set())
        for older in self._older.values():           # their successors could not be made
            for one in older:
                await one.channel.close()
        await asyncio.gather(*self._closing, return_exceptions=True)
