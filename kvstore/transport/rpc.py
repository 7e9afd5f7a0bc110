"""gRPC as every member of kvbank speaks it: one way to make a server, one way to make a channel.

Settings follow docs/promises.md: keepalive agreed by both sides, no port sharing, bounded messages, and the badge (cluster
token, role of the certificate) checked before anybody waits for a request's body. Bulk and hot methods carry raw bytes: a
handler without a serializer.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import grpc.aio

from kvbank.kvstore.transport.badge import NAME, Badge

TOKEN_KEY = "kvbank-token"
MAX_MESSAGE_BYTES = 4 << 20
RETIRED_S = 60.0                     # a channel made before a renewal is closed after that, if no call is open on it
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
_SECURE = [*_CHANNEL, ("grpc.ssl_target_name_override", NAME)]


class Doorkeeper(grpc.ServerInterceptor):
    """Refuses a call without the cluster token, or by a certificate of the wrong role, before its body is waited for.

    So both are done by handlers that take a stream. For a method that takes one message gRPC waits until it is there, in one
    of the server's threads and without a deadline, before it calls anything of ours: whoever sends headers and never a body
    would hold that thread for as long as he likes, without having shown anything.
    """

    def __init__(self, badge: Badge) -> None:
        self._badge, self._token = badge, badge.token.encode()
        self._refuse: Any = grpc.stream_unary_rpc_method_handler(_refuse)

    def intercept_service(
        self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        given = dict(details.invocation_metadata).get(TOKEN_KEY, "")
        raw = given if isinstance(given, bytes) else given.encode()
        if not hmac.compare_digest(raw, self._token):
            return self._refuse
        handler, check = continuation(details), self._badge.check(details.method)
        return handler if handler is None or check is None else _checked(handler, check)


def _refuse(_data: Iterator[bytes], context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "unauthorized: the cluster token is missing or wrong")


def _checked(handler: Any, check: Callable[[grpc.ServicerContext], None]) -> Any:
    """The same handler, with `check` before its bytes and their parser: who calls is known only in the call itself."""
    parse = handler.request_deserializer
    inner = (handler.stream_stream or handler.stream_unary) if handler.request_streaming else (
        handler.unary_stream or handler.unary_unary)

    def one(data: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        check(context)
        first = _first(data, context)
        return inner(first if parse is None else parse(first), context)

    def many(data: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        check(context)
        return inner(data if parse is None else map(parse, data), context)

    made: Any = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return made(many if handler.request_streaming else one, None, handler.response_serializer)


def _first(data: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """The message of a call that brings one. As gRPC does: a call without any is refused, and nobody looks for a second."""
    for message in data:
        return message
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "this method requires exactly one request message")
    raise AssertionError("abort raises")


def server(badge: Badge | str, *, threads: int = 32) -> grpc.Server:
    """A gRPC server that asks for the badge. Add handlers and a port, then start it."""
    made = grpc.server(
        futures.ThreadPoolExecutor(max_workers=threads, thread_name_prefix="grpc"),
        interceptors=[Doorkeeper(Badge.of(badge))],
        options=_SERVER,
    )
    _badges[made] = Badge.of(badge)
    return made


_badges: WeakKeyDictionary[grpc.Server, Badge] = WeakKeyDictionary()     # of servers not bound yet, and bound ones


def bind(made: grpc.Server, address: str) -> int:
    """Bind `host:port` (port 0: any) of a server made here, encrypted if its badge has certificates; return the port.

    Raises OSError when it cannot be had, ConfigError when the certificates cannot be read.
    """
    credentials = _badges[made].server_credentials()
    try:
        port = made.add_insecure_port(address) if credentials is None else made.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot bind {address}: {error}") from error
    if port == 0:
        raise OSError(f"cannot bind {address}: is another process listening there?")
    return int(port)


def channel(address: str, badge: Badge | str) -> grpc.Channel:
    """A channel to one peer; every call on it carries the cluster token. Raises ConfigError."""
    return _connect(address, Badge.of(badge)).channel


@dataclass(slots=True)
class _Connection:
    """A channel, the certificates that it was made with, and the calls that are open on it."""

    channel: grpc.Channel
    calls: _Calls
    stamp: tuple[int, ...]
    retired_at: float = 0.0              # when newer certificates took its place


def _connect(address: str, badge: Badge) -> _Connection:
    stamp, credentials, calls = badge.stamp(), badge.channel_credentials(), _Calls(badge.token)
    made = (grpc.insecure_channel(address, options=_CHANNEL) if credentials is None
            else grpc.secure_channel(address, credentials, options=_SECURE))
    return _Connection(grpc.intercept_channel(made, calls), calls, stamp)


class Channels:
    """Channels by address. One that was made before the certificates were renewed is used no more for anything new: what is
    open on it goes on, and it is closed when it is asked for a channel after nothing was. Thread-safe."""

    def __init__(self, badge: Badge | str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._badge, self._clock = Badge.of(badge), clock
        self._lock = Lock()
        self._made: dict[str, _Connection] = {}
        self._older: dict[str, list[_Connection]] = {}
        self._closed = False

    def to(self, address: str) -> grpc.Channel:
        """Raises ConfigError when certificates cannot be read, ValueError after `close`."""
        with self._lock:
            if self._closed:
                raise ValueError("these channels are closed")
            found, stamp = self._made.get(address), self._badge.stamp()
            if found is None or (stamp and found.stamp != stamp):
                made = _connect(address, self._badge)
                if found is not None:
                    found.retired_at = self._clock()
                    self._older.setdefault(address, []).append(found)
                found = self._made[address] = made
            over = self._over() if self._older else []
        for one in over:
            one.close()
        return found.channel

    def take(self, address: str) -> list[grpc.Channel]:
        """All to that address, for the caller to close: whoever asks from now on gets a new one."""
        with self._lock:
            ended = self._older.pop(address, [])
            if (found := self._made.pop(address, None)) is not None:
                ended.append(found)
        return [one.channel for one in ended]

    def close(self) -> None:
        """Close all; no new ones are made."""
        with self._lock:
            self._closed, addresses = True, list(self._made)
        for address in addresses:
            for one in self.take(address):
                one.close()

    def _over(self) -> list[grpc.Channel]:
        """Older ones with nothing on them; whoever got one has begun his call by now."""
        latest, over = self._clock() - RETIRED_S, []
        for address, older in list(self._older.items()):
            over += [one.channel for one in older if one.retired_at <= latest and not one.calls.open]
            self._older[address] = [one for one in older if one.channel not in over]
            if not self._older[address]:
                del self._older[address]
        return over


def aio_channel(address: str, badge: Badge | str) -> tuple[grpc.aio.Channel, tuple[tuple[str, str], ...]]:
    """The same for asyncio: a channel, and the metadata that each of its calls must carry."""
    badge = Badge.of(badge)
    credentials = badge.channel_credentials()
    made = (grpc.aio.insecure_channel(address, options=_CHANNEL) if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=_SECURE))
    return made, ((TOKEN_KEY, badge.token),)


class _Call(grpc.ClientCallDetails):
    def __init__(self, details: grpc.ClientCallDetails, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = getattr(details, "wait_for_ready", None)
        self.compression = getattr(details, "compression", None)


class _Calls(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor, grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call of a channel, and counts those that are open."""

    def __init__(self, token: str) -> None:
        self._pair = (TOKEN_KEY, token)
        self._lock = Lock()
        self.open = 0

    def _begin(self, continuation: Any, details: Any, request: Any) -> Any:
        self._count(1)
        try:
            call = continuation(_Call(details, (*(details.metadata or ()), self._pair)), request)
        except BaseException:
            self._count(-1)
            raise
        over = partial(self._count, -1)              # must not know the call: one that is dropped half read has to be collected
        if call.done() or not call.add_callback(over):
            over()
        return call

    def _count(self, more: int) -> None:
        with self._lock:
            self.open += more

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return self._begin(continuation, details, request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return self._begin(continuation, details, request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Iterator[Any]) -> Any:
        return self._begin(continuation, details, requests)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Iterator[Any]) -> Any:
        return self._begin(continuation, details, requests)
