"""One exchange on the wire: every answer told apart, and no server can hold it longer than its deadline."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.kvstore.tiers.redis_address import parse
from kvbank.kvstore.tiers.redis_wire import RedisConnection, RedisLost, RedisRefused, RedisSilent

PONG = b"+PONG\r\n"


class Liar:
    """A server that greets like Redis and then does what the test says."""

    def __init__(self, act: Callable[[socket.socket], None], greeting: bytes = PONG) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(act, greeting), daemon=True)
        self._thread.start()

    def _serve(self, act: Callable[[socket.socket], None], greeting: bytes) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(1000)
            try:
                connection.sendall(greeting)
                if greeting:
                    connection.recv(1000)
                act(connection)
            except OSError:
                pass
            self.over.wait(10)

    def close(self) -> None:
        self.over.set()
        self._listener.close()


@pytest.fixture
def liar() -> Iterator[Callable[..., RedisConnection]]:
    liars: list[Liar] = []

    def start(act: Callable[[socket.socket], None], greeting: bytes = PONG, **settings: float) -> RedisConnection:
        liars.append(Liar(act, greeting))
        return RedisConnection(parse(liars[-1].url), **{"connect_s": 1.0, "silence_s": 0.2, **settings})  # type: ignore[arg-type]
    yield start
    for one in liars:
        one.close()


def test_every_kind_of_reply_is_told_apart(redis_server: EmbeddedRedis) -> None:
    connection = RedisConnection(parse(redis_server.url), connect_s=1.0, silence_s=1.0)
    big = bytes(range(256)) * 4000
    replies = connection.exchange([("SET", b"wire:a", memoryview(big)), ("GET", b"wire:a"), ("GET", b"wire:none"),
                                   ("SET", b"wire:e", b""), ("GET", b"wire:e"), ("EXISTS", b"wire:a"), ("NOSUCH",),
                                   ("ZRANGE", b"wire:none", 0, -1), ("LPUSH", b"wire:l", b"x"), ("GET", b"wire:l"),
                                   ("DEL", b"wire:a", b"wire:e", b"wire:l")], within_s=2.0)
    assert replies[:6] == ["OK", big, None, "OK", b"", 1] and replies[7:9] == [[], 1]
    assert isinstance(replies[6], RedisRefused) and replies[6].code == "ERR"
    assert isinstance(replies[9], RedisRefused) and replies[9].code == "WRONGTYPE"
    assert connection.alive
    connection.close()
    assert not connection.alive
    with pytest.raises(RedisLost):
        connection.exchange([("PING",)], within_s=1.0)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 1 << 20])
def test_values_around_the_read_ahead_come_back_whole(redis_server: EmbeddedRedis, size: int) -> None:
    connection = RedisConnection(parse(redis_server.url), connect_s=1.0, silence_s=1.0, max_bulk_bytes=1 << 20)
    data = bytes([7]) * size
    got = connection.exchange([("SET", b"wire:s", data), *[("GET", b"wire:s")] * 3, ("PING",)], within_s=2.0)
    assert got == ["OK", data, data, data, "PONG"]
    connection.close()


def test_a_value_that_is_too_long_is_read_past_without_memory_for_it(redis_server: EmbeddedRedis) -> None:
    connection = RedisConnection(parse(redis_server.url), connect_s=1.0, silence_s=1.0, max_bulk_bytes=1000)
    got = connection.exchange([("SET", b"wire:b", bytes(5 << 20)), ("GET", b"wire:b"), ("PING",), ("DEL", b"wire:b")],
                              within_s=2.0)
    assert got == ["OK", b"", "PONG", 1]
    connection.close()


@pytest.mark.parametrize("junk", [b"hello\r\n", b"$abc\r\n", b"$-2\r\n", b"$99999999999\r\n", b":x\r\n", b"$3\r\nabcde",
                                  b"*99999999\r\n", b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n", b"x" * 70_000, b"\r\n"],
                         ids=lambda junk: repr(junk[:20]))
def test_what_is_no_resp_ends_the_connection(liar: Callable[..., RedisConnection], junk: bytes) -> None:
    connection = liar(lambda other: other.sendall(junk))
    with pytest.raises(RedisLost):
        connection.exchange([("GET", b"a")], within_s=1.0)
    assert not connection.alive


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 50, 103, 104, 105])
def test_a_reply_that_is_cut_ends_the_connection(liar: Callable[..., RedisConnection], cut: int) -> None:
    reply = b"$100\r\n" + bytes(100) + b"\r\n"

    def act(other: socket.socket) -> None:
        other.sendall(reply[:cut])
        other.shutdown(socket.SHUT_RDWR)
    connection = liar(act)
    with pytest.raises(RedisLost):
        connection.exchange([("GET", b"a")], within_s=1.0)
    assert not connection.alive


def test_silence_ends_an_exchange_long_before_its_deadline(liar: Callable[..., RedisConnection]) -> None:
    connection = liar(lambda other: other.sendall(b"$100\r\nabc"))
    started = time.monotonic()
    with pytest.raises(RedisSilent):
        connection.exchange([("GET", b"a")], within_s=30.0)
    assert time.monotonic() - started < 10.0 and not connection.alive


def test_a_server_that_drips_bytes_is_held_to_the_deadline(liar: Callable[..., RedisConnection]) -> None:
    def drip(other: socket.socket) -> None:
        other.sendall(b"$1000000\r\n")
        while True:
            other.sendall(b"x")
            time.sleep(0.02)                   # never silent for long, never done
    connection = liar(drip)
    started = time.monotonic()
    with pytest.raises(RedisSilent):
        connection.exchange([("GET", b"a")], within_s=0.3)
    assert 0.3 <= time.monotonic() - started < 5.0


def test_a_server_that_reads_nothing_is_held_to_the_deadline(liar: Callable[..., RedisConnection]) -> None:
    connection = liar(lambda other: threading.Event().wait(5))
    with pytest.raises(RedisSilent):
        connection.exchange([("SET", b"a", bytes(64 << 20))], within_s=0.3)


def test_a_wrong_greeting_a_silent_one_and_no_server_are_told_apart(liar: Callable[..., RedisConnection]) -> None:
    with pytest.raises(RedisRefused, match="NOAUTH"):
        liar(lambda other: None, b"-NOAUTH Authentication required, not SECRET.\r\n")
    with pytest.raises(RedisLost):
        liar(lambda other: None, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(RedisSilent):
        liar(lambda other: None, b"")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RedisLost):
        RedisConnection(parse(f"redis://127.0.0.1:{port}"), connect_s=1.0, silence_s=1.0)
    with pytest.raises(RedisLost):
        RedisConnection(parse("unix:///nowhere/redis.sock"), connect_s=1.0, silence_s=1.0)


def test_a_byte_nobody_asked_for_makes_a_connection_useless(liar: Callable[..., RedisConnection]) -> None:
    """The reply that a cancelled request left behind must never be taken for the next one's."""
    connection = liar(lambda other: other.sendall(b"+OK\r\n+LATE\r\n"))
    assert connection.exchange([("PING",)], within_s=1.0) == ["OK"]
    deadline = time.monotonic() + 5
    while connection.alive and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not connection.alive
