"""gRPC as every member of kvbank speaks it: one way to make a server, one way to make a channel.

Settings follow docs/promises.md: keepalive agreed by both sides, no port sharing, bounded messages, and the cluster
token checked before a request's body is parsed. Bulk and hot methods carry raw bytes: a handler without a serializer.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio

TOKEN_KEY = "kvbank-token"
MAX_MESSAGE_BYTES = 4 << 20
PIECE_BYTES = 1 << 20                # bulk bytes per message: the best grpcio does on one stream

_COMMON = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),       # the one that newer gRPC obeys (1.85 waits a minute without it)
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER = [
    *_COMMON,
    ("grpc.so_reuseport", 0),        # on by default, and then a zombie and its successor share a port silently
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 256),
]
_CHANNEL = [
    *_COMMON,
    ("grpc.enable_retries", 0),      # callers retry by name and deadline; two layers of retry are one too many
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),    # also how long a connection may take to be made, whatever the name says
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
]


class TokenInterceptor(grpc.ServerInterceptor):
    """Refuses a call without the cluster token before its body is read."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._refuse: Any = grpc.unary_unary_rpc_method_handler(_refuse)

    def intercept_service(
        self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        given = dict(details.invocation_metadata).get(TOKEN_KEY, "")
        raw = given if isinstance(given, bytes) else given.encode()
        if hmac.compare_digest(raw, self._token):
            return continuation(details)
        return self._refuse


def _refuse(_request: Any, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "unauthorized: the cluster token is missing or wrong")


def server(token: str, *, threads: int = 32) -> grpc.Server:
    """A gRPC server that knows the cluster token. Add handlers and a port, then start it."""
    return grpc.server(
        futures.ThreadPoolExecutor(max_workers=threads, thread_name_prefix="grpc"),
        interceptors=[TokenInterceptor(token)],
        options=_SERVER,
    )


def bind(made: grpc.Server, address: str) -> int:
    """Bind `host:port` (port 0: any) and return the port. Raises OSError when it cannot be had."""
    try:
        port = made.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot bind {address}: {error}") from error
    if port == 0:
        raise OSError(f"cannot bind {address}: is another process listening there?")
    return int(port)


def channel(address: str, token: str) -> grpc.Channel:
    """A channel to one peer; every call on it carries the cluster token."""
    return grpc.intercept_channel(grpc.insecure_channel(address, options=_CHANNEL), _Token(token))


def aio_channel(address: str, token: str) -> tuple[grpc.aio.Channel, tuple[tuple[str, str], ...]]:
    """The same for asyncio: a channel, and the metadata that each of its calls must carry."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL), ((TOKEN_KEY, token),)


class _Call(grpc.ClientCallDetails):
    def __init__(self, details: grpc.ClientCallDetails, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = getattr(details, "wait_for_ready", None)
        self.compression = getattr(details, "compression", None)


class _Token(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor, grpc.StreamStreamClientInterceptor,
):
    def __init__(self, token: str) -> None:
        self._pair = (TOKEN_KEY, token)

    def _with_token(self, details: grpc.ClientCallDetails) -> _Call:
        return _Call(details, (*(details.metadata or ()), self._pair))

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Iterator[Any]) -> Any:
        return continuation(self._with_token(details), requests)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Iterator[Any]) -> Any:
        return continuation(self._with_token(details), requests)
