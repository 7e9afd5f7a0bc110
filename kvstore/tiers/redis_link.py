"""RedisLink: a bounded pool of connections to one Redis behind a circuit breaker.

    request ──> breaker not ok? ──> TierUnavailable at once, no system call
        └──> one pipelined exchange under one deadline ──> replies, or the connection is dropped and the breaker told

Knows nothing of frames. Nobody waits for a reconnect but the one request that needs it, nor for a name to be resolved:
that is done by probes.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from kvbank.kvstore.tiers.breaker import CircuitBreaker
from kvbank.kvstore.tiers.redis_address import RedisAddress
from kvbank.kvstore.tiers.redis_wire import Command, RedisConnection, RedisLost, RedisRefused, RedisSilent, Reply
from kvbank.kvstore.tiers.tier import TierUnavailable

_log = logging.getLogger(__name__)


class RedisLink:
    """Thread-safe; no lock is held over I/O.

    read_s: the longest silence while an answer is due. connect_s: for TCP and TLS; then read_s for the log-in.
    """

    def __init__(self, address: RedisAddress, *, connect_s: float, read_s: float, max_bulk_bytes: int,
                 max_connections: int) -> None:
        self._address, self._connect_s, self._read_s = address, connect_s, read_s
        self._max_bulk_bytes = max_bulk_bytes
        self._lock = threading.Lock()          # of the few lines that touch the fields below
        self._idle: list[RedisConnection] = []
        self._permits = threading.BoundedSemaphore(max_connections)
        self._breaker = CircuitBreaker()
        self._counters: Counter[str] = Counter()
        self._epoch = 0                        # raised when a connection was lost: the server may be another one now
        self._bulk_fails = False               # the last exchange that should have brought values did not
        self._closed = False
        self.wake = threading.Event()          # set when a probe is due at once
        if not self._answers():
            self._breaker.trip(now=time.monotonic())

    def request(self, commands: Sequence[Command], *, within_s: float, bulk: bool = False) -> list[Reply]:
        """One exchange on a pooled connection; `bulk` when it brings values. Raises TierUnavailable.

        An error reply is a value, and counted.
        """
        self.check()
        if not self._permits.acquire(timeout=self._read_s):
            self.count(no_connection_free=1)
            raise TierUnavailable("timeout")
        try:
            with self.judged(bulk=bulk):
                connection = self._take()
                replies = connection.exchange(commands, within_s=within_s)
        finally:
            self._permits.release()
        self._give_back(connection)
        self.count_refusals(replies)
        return replies

    def check(self) -> None:
        """Raise TierUnavailable unless requests are let through now. Costs no system call."""
        with self._lock:
            if not self._breaker.allows or self._closed:
                self._counters["not_asked"] += 1
                raise TierUnavailable("tier_down")

    @contextmanager
    def judged(self, *, bulk: bool = False) -> Iterator[None]:
        """Tell the breaker how the block went, and turn every way of not answering into TierUnavailable."""
        try:
            yield
        except (RedisSilent, RedisLost, RedisRefused) as error:
            self._failed(error, bulk)
            raise TierUnavailable("timeout" if isinstance(error, RedisSilent) else "tier_down") from None
        with self._lock:
            # On a line too slow for values small answers still come: they are no sign that it is well again.
            if bulk or not self._bulk_fails:
                self._bulk_fails = False
                self._breaker.succeeded()

    def connect(self, silence_s: float) -> RedisConnection:
        """A connection for the caller alone, outside the pool. Raises RedisSilent, RedisLost or RedisRefused."""
        self.count(connects=1)
        return RedisConnection(self._address, connect_s=self._connect_s, silence_s=silence_s,
                               max_bulk_bytes=self._max_bulk_bytes)

    def probe_if_due(self) -> None:
        """Called again and again by one background thread: find out whether it is back."""
        with self._lock:
            if self._closed or not self._breaker.take_probe(now=time.monotonic()):
                return
            was = self._breaker.state
        answered = self._answers()
        with self._lock:
            self._breaker.probed(answered, now=time.monotonic())
            state = self._breaker.state
        _log.log(logging.INFO if answered else logging.DEBUG, "redis_probe address=%s was=%s is=%s",
                 self._address.shown, was, state)

    def probe_due_in(self) -> float:
        with self._lock:
            return self._breaker.wake_at() - time.monotonic()

    def count(self, **amounts: int) -> None:
        with self._lock:
            self._counters.update(amounts)

    def count_refusals(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, RedisRefused):
                self.count(**{f"refused_{reply.code.lower()}": 1})

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {**self._counters, "breaker_opened": self._breaker.times_opened}

    @property
    def state(self) -> str:
        with self._lock:
            return self._breaker.state

    @property
    def epoch(self) -> int:
        with self._lock:
            return self._epoch

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._drop_idle()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception, bulk: bool) -> None:
        silent = isinstance(error, RedisSilent)
        with self._lock:
            self._bulk_fails |= bulk
            self._counters["timeouts" if silent else "lost"] += 1
            self._breaker.failed(now=time.monotonic(), silent=silent)
            self._epoch += not silent
            state = self._breaker.state
        # What else is open leads to the same place: after a restart nobody should fail on each in turn.
        self._drop_idle()
        if state != "ok":
            self.wake.set()
            _log.warning("redis_not_answering address=%s breaker=%s why=%s", self._address.shown, state,
                         "silent" if silent else error)

    def _take(self) -> RedisConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self.connect(self._read_s)
            if connection.alive:
                return connection
            with self._lock:
                self._epoch += 1

    def _give_back(self, connection: RedisConnection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _answers(self) -> bool:
        """Resolve, connect, log in and PING; the connection is kept when it answers."""
        try:
            self._address = _resolved(self._address)
            self._give_back(self.connect(self._read_s))
        except (RedisSilent, RedisLost, RedisRefused):
            return False
        return True


def _resolved(address: RedisAddress) -> RedisAddress:
    """With the numeric address beside the name. Raises RedisLost."""
    if address.path:
        return address
    try:
        ipaddress.ip_address(address.host)
        return address
    except ValueError:
        pass
    try:
        (_, _, _, _, found), *_ = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RedisLost(error.strerror or "unknown host") from None
    return replace(address, numeric=str(found[0]))
