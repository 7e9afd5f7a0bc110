"""Links: the gateway's gRPC channels to members, one per address and purpose, all on the gateway's event loop.

Submit streams live long and Status must never queue behind them, so the two travel on separate connections.
"""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import Message

from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.proto import control_pb2, jobs_pb2, ops_pb2

Reply = TypeVar("Reply", bound=Message)


class Links:
    """Opens calls to members. A peer is addressed as membership gave it, never as a request did."""

    def __init__(self, badge: Badge | str) -> None:
        self._badge = badge
        self._channels: dict[tuple[str, str], Any] = {}

    def submit(self, address: str) -> Any:
        """A fresh Submit stream; the caller writes the job first and cancels the call when it leaves."""
        channel, metadata = self._channel(address, "submit")
        method = channel.stream_stream(
            "/kvbank.Jobs/Submit",
            request_serializer=jobs_pb2.SubmitRequest.SerializeToString,
            response_deserializer=jobs_pb2.SubmitReply.FromString,
        )
        return method(metadata=metadata)

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
        """Have one member drain, recall or clear. Raises grpc.aio.AioRpcError."""
        return await self._unary(address, "/kvbank.Ops/Act", request, ops_pb2.OpsReply, timeout_s)

    async def _unary(self, address: str, method: str, request: Message, reply: type[Reply], timeout_s: float) -> Reply:
        channel, metadata = self._channel(address, "unary")
        call = channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
        )
        answer: Reply = await call(request, metadata=metadata, timeout=timeout_s)
        return answer

    def _channel(self, address: str, purpose: str) -> Any:
        pair = self._channels.get((address, purpose))
        if pair is None:
            pair = self._channels[(address, purpose)] = rpc.aio_channel(address, self._badge)
        return pair

    async def forget(self, alive: set[str], *, purpose: str | None = None) -> None:
        """Close the channels (of one purpose, or all) to addresses that nobody uses any more."""
        gone = [key for key in self._channels if key[0] not in alive and purpose in (None, key[1])]
        for key in gone:
            channel, _ = self._channels.pop(key)
            await channel.close()

    async def close(self) -> None:
        await self.forget(set())
