"""A caller that sends the headers of its calls and never a body, as any program that reaches a port can."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc


class Mute:
    """Calls on one channel that are begun and say nothing more. Leaving the context lets go of them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel, self._over = channel, threading.Event()
        self._calls: list[grpc.Future] = []

    def __enter__(self) -> Mute:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for call in self._calls:
            call.cancel()
        self._channel.close()

    def call(self, method: str, *, within_s: float = 10.0) -> grpc.Future:
        """How the server declares the method makes no difference: it sees headers only."""
        self._calls.append(self._channel.stream_unary(f"/{method}").future(self._nothing(), timeout=within_s))
        return self._calls[-1]

    def _nothing(self) -> Iterator[bytes]:
        self._over.wait()
        yield from ()
