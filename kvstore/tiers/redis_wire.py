"""One connection to Redis, on which no exchange can outlast its deadline, whatever the server does.

Why not a client library: their timeouts count per `recv`, so a server that drips bytes, or one behind a throttled link,
holds a 2 MiB reply for minutes without ever "timing out"; their defaults retry; and each copies a value two or three
times. Here one absolute deadline covers an exchange, silence has a bound of its own, and bulk bytes land in the buffer
they stay in. RESP2, pipelined; a connection that missed a deadline is closed, so no reply can be taken for another's.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from typing import Union

from kvbank.kvstore.frame import Buffer
from kvbank.kvstore.tiers.redis_address import RedisAddress

_MAX_SKIP_BYTES = 64 << 20                     # a longer value is not read past: the connection ends
_MAX_LINE = 32 << 10
_MAX_ITEMS = 1 << 20
_READ_AHEAD = 64 << 10
_JOIN_BELOW = 32 << 10                         # smaller buffers travel together

Command = Sequence[Buffer | str | int]


class RedisRefused(Exception):
    """The server answered with an error. `code` is its first word: OOM, NOAUTH, LOADING, READONLY, WRONGTYPE, …"""

    def __init__(self, text: str) -> None:
        self.code = text.split(" ", 1)[0][:32]
        super().__init__(self.code)            # the rest may repeat arguments


class RedisSilent(Exception):
    """No answer within the deadline. The connection is closed."""


class RedisLost(Exception):
    """No connection, or it broke, or the other end does not speak RESP. The connection is closed."""


Reply = Union[memoryview, int, str, None, RedisRefused, list["Reply"]]      # noqa: UP007 (it names itself)


class RedisConnection:
    """Used by one thread at a time. Broken once, broken for good: ask `alive` and make a new one."""

    def __init__(self, address: RedisAddress, *, connect_s: float, silence_s: float,
                 max_bulk_bytes: int = 1 << 20) -> None:
        """Connect within `connect_s`, log in and PING within `silence_s`; RedisLost, RedisSilent or RedisRefused else.

        silence_s: how long the server may say nothing at all while an answer is due. max_bulk_bytes: a longer value is
        not ours; no memory is taken for it, it is read past and stands as an empty one.
        """
        self._silence_s, self._max_bulk_bytes = silence_s, max_bulk_bytes
        self._tls = address.tls is not None
        self._ahead = bytearray(_READ_AHEAD)
        self._start = self._end = 0            # what is read of _ahead and not yet used
        self._socket: socket.socket | None = None
        try:
            self._socket = _open(address, connect_s)
            hello: list[Command] = []
            if address.password is not None:
                hello.append(("AUTH", *((address.user,) if address.user else ()), address.password))
            if address.db:
                hello.append(("SELECT", address.db))
            for reply in self.exchange([*hello, ("PING",)], within_s=silence_s):
                if isinstance(reply, RedisRefused):
                    raise reply
        except TimeoutError:
            self.close()
            raise RedisSilent from None
        except OSError as error:
            self.close()
            raise RedisLost(error.strerror or type(error).__name__) from None
        except RedisRefused:
            self.close()
            raise

    def exchange(self, commands: Sequence[Command], *, within_s: float) -> list[Reply]:
        """Send all, read one reply each, within `within_s` in all. Values come in memory of their own.

        An error reply is a value (RedisRefused) in its place. Raises RedisSilent or RedisLost; the connection is then
        closed.
        """
        if self._socket is None:
            raise RedisLost("closed")
        self._deadline = time.monotonic() + within_s
        try:
            self._send(commands)
            return [self._reply() for _ in commands]
        except TimeoutError:
            self.close()
            raise RedisSilent from None
        except OSError as error:
            self.close()
            raise RedisLost(error.strerror or type(error).__name__) from None
        except RedisLost:
            self.close()
            raise
        except BaseException:
            self.close()                       # half an exchange: what comes next on the wire belongs to nobody
            raise

    @property
    def alive(self) -> bool:
        """False once it was closed by either end. Costs one system call and no round trip."""
        if self._socket is None:
            return False
        if self._start != self._end:
            return False                       # a byte nobody asked for: not a peer to be trusted
        if self._tls:
            return True                        # TLS has traffic of its own; a dead one shows at its next use
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLHUP | select.POLLERR)
        if poll.poll(0):                       # idle, so it can only be the end, or such a byte
            self.close()
            return False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # -- the wire ------------------------------------------------------------------------------------------------------

    def _send(self, commands: Sequence[Command]) -> None:
        small = bytearray()
        for command in commands:
            small += b"*%d\r\n" % len(command)
            for word in command:
                data = str(word).encode() if isinstance(word, (str, int)) else word
                size = memoryview(data).nbytes
                small += b"$%d\r\n" % size
                if size < _JOIN_BELOW:
                    small += data
                else:
                    self._send_all(small)
                    self._send_all(data)
                    small = bytearray()
                small += b"\r\n"
        self._send_all(small)

    def _send_all(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        assert self._socket is not None
        while view:
            self._socket.settimeout(self._patience())
            view = view[self._socket.send(view):]

    def _reply(self, depth: int = 0) -> Reply:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode("utf-8", "replace")
        if kind == b"-":
            return RedisRefused(rest.decode("utf-8", "replace"))
        if kind == b":":
            return _number(rest)
        if kind == b"$":
            return self._bulk(_number(rest))
        if kind == b"*" and (size := _number(rest)) <= _MAX_ITEMS and depth < 3:
            return [self._reply(depth + 1) for _ in range(size)] if size >= 0 else None
        raise RedisLost("the other end does not speak RESP")

    def _bulk(self, size: int) -> memoryview | None:
        if size == -1:
            return None
        if not 0 <= size <= _MAX_SKIP_BYTES:
            raise RedisLost("a value longer than any frame")
        ready = min(size, self._end - self._start)
        if size <= self._max_bulk_bytes:       # looked at before memory is taken for it
            value = memoryview(bytearray(size))
            value[:ready] = memoryview(self._ahead)[self._start:self._start + ready]
        else:
            value, scratch = memoryview(b""), memoryview(bytearray(_READ_AHEAD))
        self._start += ready
        while ready < size:
            ready += self._receive(value[ready:] if value else scratch[:size - ready])
        if self._take(2) != b"\r\n":
            raise RedisLost("the other end does not speak RESP")
        return value

    def _line(self) -> bytes:
        while (at := self._ahead.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > _MAX_LINE:
                raise RedisLost("the other end does not speak RESP")
            self._fill()
        line = bytes(self._ahead[self._start:at])
        self._start = at + 2
        return line

    def _take(self, size: int) -> bytes:
        while self._end - self._start < size:
            self._fill()
        self._start += size
        return bytes(self._ahead[self._start - size:self._start])

    def _fill(self) -> None:
        if self._start:
            rest = self._ahead[self._start:self._end]
            self._ahead[:len(rest)] = rest
            self._start, self._end = 0, len(rest)
        self._end += self._receive(memoryview(self._ahead)[self._end:])

    def _receive(self, into: memoryview) -> int:
        assert self._socket is not None
        self._socket.settimeout(self._patience())
        if not (count := self._socket.recv_into(into)):
            raise RedisLost("closed by the other end")
        return count

    def _patience(self) -> float:
        """How long one system call may wait: what is left of the deadline, never longer than the bound of silence."""
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError
        return min(left, self._silence_s)


def _open(address: RedisAddress, connect_s: float) -> socket.socket:
    if address.path:
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            raw.settimeout(connect_s)
            raw.connect(address.path)
        except BaseException:
            raw.close()
            raise
        return raw
    raw = socket.create_connection((address.numeric or address.host, address.port), timeout=connect_s)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if address.tls is None:
        return raw
    try:
        return address.tls.wrap_socket(raw, server_hostname=address.host)
    except BaseException:
        raw.close()
        raise


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise RedisLost("the other end does not speak RESP") from None
