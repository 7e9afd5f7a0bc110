"""Frames in Redis, where every worker of the cluster finds them.

Redis that is down, slow, full, evicting or lying is a miss and a counter, never an error or a stall: redis_link.py
decides how long anybody waits. This tier stores what it is given and believes nothing it reads: frames are sealed and
verified by kvstore/store.py. One thread of its own probes, refreshes times of use and TTLs, and keeps the account
(redis_budget.py).

Commands used, for an ACL: AUTH SELECT PING GET SET DEL EXISTS EXPIRE STRLEN SCAN MULTI EXEC WATCH UNWATCH ZADD ZREM
ZRANGE ZSCORE ZCARD ZINCRBY, on keys `kvb:*`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from kvbank.errors import ConfigError
from kvbank.kvstore.frame import Buffer
from kvbank.kvstore.tiers import redis_address
from kvbank.kvstore.tiers.redis_budget import PREFIX, OverLimit, RedisBudget
from kvbank.kvstore.tiers.redis_link import RedisLink
from kvbank.kvstore.tiers.redis_wire import Command, RedisConnection, RedisLost, RedisRefused, RedisSilent, Reply
from kvbank.kvstore.tiers.tier import TierStatus, TierUnavailable

_KNOWN_KEYS = 1 << 16                          # keys remembered as being in Redis
_TOUCHES = 1 << 14                             # reads remembered between two turns of our own thread
_UPKEEP_EVERY_S = 1.0


class RedisTier:
    """One Redis as a shelf, for the frames of one shard's layers. Thread-safe; readers wait for no lock held over I/O.

    layers:       e.g. "0-8", the range of this shard: part of the physical key, `kvb:<32-byte key>:<layers>`
    limit_bytes:  cap on our bytes in that Redis over all writers
    value_bytes:  the longest value that can be ours; anything longer is foreign
    ttl_s:        a value not read for this long is forgotten by the server
    read_s:       the longest silence while an answer is due, and the whole deadline of a lookup. A batch of values has
                  read_s + its bytes / floor_bytes_per_s: a stopped server costs read_s, a slow link a bounded time
    write_s:      the same silence for writes, which no request waits for
    An unreachable server does not fail the constructor: the state is then "open" (`probe` is for who wants an error).
    """

    name = "redis"

    def __init__(self, url: str, *, limit_bytes: int, layers: str, value_bytes: int, ttl_s: float = 86_400.0,
                 connect_s: float = 0.1, read_s: float = 0.05, write_s: float = 0.5, floor_bytes_per_s: float = 50e6,
                 round_trip_bytes: int = 4 << 20, max_connections: int = 4) -> None:
        self.limit_bytes = limit_bytes
        self._suffix = b":" + layers.encode()
        self._value_bytes, self._ttl_s = value_bytes, max(1, round(ttl_s))
        self._read_s, self._write_s = read_s, write_s
        self._floor, self._round_trip_bytes = floor_bytes_per_s, round_trip_bytes
        self._link = RedisLink(redis_address.parse(url), connect_s=connect_s, read_s=read_s, max_bulk_bytes=value_bytes,
                               max_connections=max_connections)
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._known_epoch = self._link.epoch
        self._touched: deque[tuple[bytes, int]] = deque(maxlen=_TOUCHES)
        self._writing = threading.Lock()       # of the account and its connection: one batch at a time
        self._budget = RedisBudget(limit_bytes)
        self._writer: RedisConnection | None = None
        self._closed = threading.Event()
        self._upkeep = threading.Thread(target=self._run_upkeep, name="kvbank-redis-upkeep", daemon=True)
        self._upkeep.start()

    # -- the Tier protocol ---------------------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes]) -> dict[bytes, memoryview]:
        """The values that are here, each in memory of its own. Raises TierUnavailable, with those found until then."""
        found: dict[bytes, memoryview] = {}
        per_trip = max(1, self._round_trip_bytes // self._value_bytes)
        for first in range(0, len(keys), per_trip):
            part = keys[first:first + per_trip]
            within_s = self._read_s + len(part) * self._value_bytes / self._floor
            try:
                replies = self._link.request([("GET", self._physical(key)) for key in part], within_s=within_s, bulk=True)
            except TierUnavailable as error:
                raise TierUnavailable(error.reason, found) from None
            here = {key: reply for key, reply in zip(part, replies, strict=True) if isinstance(reply, memoryview)}
            found |= here
            self._touched.extend((key, len(reply)) for key, reply in here.items())
            self._learn(here, (key for key in part if key not in here))
            self._link.count(hits=len(here), misses=len(part) - len(here), bytes_got=sum(map(len, here.values())))
        return found

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which keys are here, in one round trip. Raises TierUnavailable."""
        if not keys:
            return set()
        replies = self._link.request([("EXISTS", self._physical(key)) for key in keys], within_s=self._read_s)
        here = {key for key, reply in zip(keys, replies, strict=True) if reply == 1}
        self._learn(here, (key for key in keys if key not in here))
        return here

    def put(self, frames: dict[bytes, Sequence[Buffer]]) -> set[bytes]:
        """Store values; the keys that were acknowledged, or were here already. For a thread that nobody waits for.

        Raises TierUnavailable; what was acknowledged until then is known to `knows`.
        """
        stored: set[bytes] = set()
        batch: dict[bytes, Sequence[Buffer]] = {}
        most = min(self._round_trip_bytes, self.limit_bytes // 4)       # a batch that is too much is refused as a whole
        with self._writing:
            for key, parts in frames.items():
                if batch and _bytes_of(batch) + _bytes_of({key: parts}) > most:
                    stored |= self._put_batch(batch)
                    batch = {}
                batch[key] = parts
            return stored | (self._put_batch(batch) if batch else set())

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove values: they were found to be lies, or are not wanted any more. Raises TierUnavailable."""
        if keys:
            self._link.request([("DEL", self._physical(key)) for key in keys], within_s=self._read_s)
            self._learn((), keys)
            self._link.count(deleted=len(keys))

    def status(self) -> TierStatus:
        """As last heard (at most a second ago while it is up). Does no I/O."""
        counters = {**self._link.counters(), "released_for_room": self._budget.released}
        return TierStatus(name=self.name, bytes_used=self._budget.total, bytes_limit=self.limit_bytes,
                          frames=self._budget.entries, state=self._link.state, counters=counters)

    def close(self) -> None:
        """End the thread and the connections. What is stored stays."""
        self._closed.set()
        self._link.wake.set()
        self._upkeep.join(timeout=2 * self._write_s + 1)
        self._link.close()
        with self._writing:
            if self._writer is not None:
                self._writer.close()

    def knows(self, key: bytes) -> bool:
        """Whether this key was acknowledged or seen here and not missed since. Costs nothing; may be out of date."""
        with self._lock:
            self._forget_if_lost()
            return key in self._known

    @property
    def state(self) -> str:
        """ok | open | half_open"""
        return self._link.state

    # -- inside --------------------------------------------------------------------------------------------------------

    def _physical(self, key: bytes) -> bytes:
        return PREFIX + key + self._suffix

    def _learn(self, here: Iterable[bytes], absent: Iterable[bytes]) -> None:
        with self._lock:
            self._forget_if_lost()
            for key in here:
                self._known[key] = None
                self._known.move_to_end(key)
            for key in absent:
                self._known.pop(key, None)
            while len(self._known) > _KNOWN_KEYS:
                self._known.popitem(last=False)

    def _forget_if_lost(self) -> None:
        """After a lost connection the server may have come back empty."""
        if self._known_epoch != (epoch := self._link.epoch):
            self._known.clear()
            self._known_epoch = epoch

    def _put_batch(self, frames: dict[bytes, Sequence[Buffer]]) -> set[bytes]:
        self._link.check()
        with self._link.judged():
            there = self._ask([("EXISTS", self._physical(key)) for key in frames])
            stored = {key for key, reply in zip(frames, there, strict=True) if reply == 1}
            self._touched.extend((key, _bytes_of({key: frames[key]})) for key in stored)
            absent = {key: parts for key, parts in frames.items() if key not in stored}
            if absent:
                try:
                    stored |= self._set(absent)
                except RedisRefused as error:  # OOM, READONLY, WRONGTYPE, NOPERM: it did answer
                    self._link.count(**{f"refused_{error.code.lower()}": len(absent)})
        self._learn(stored, (key for key in frames if key not in stored))
        return stored

    def _set(self, frames: dict[bytes, Sequence[Buffer]]) -> set[bytes]:
        """Charge, write, and settle what was acknowledged."""
        sizes = {self._physical(key): _bytes_of({key: parts}) for key, parts in frames.items()}
        try:
            ours = self._budget.reserve(self._ask, sizes, now_ms=_now_ms())
        except OverLimit:
            self._link.count(refused_over_limit=len(frames))
            return set()
        frames = {key: parts for key, parts in frames.items() if self._physical(key) in ours}
        sizes = {name: size for name, size in sizes.items() if name in ours}
        sets: list[Command] = [("SET", self._physical(key), _joined(parts), "EX", self._ttl_s)
                               for key, parts in frames.items()]
        replies = self._ask(sets, total=sum(sizes.values()))
        self._link.count_refusals(replies)
        stored = {key for key, reply in zip(frames, replies, strict=True) if reply == "OK"}
        written = {self._physical(key): sizes[self._physical(key)] for key in stored}
        self._link.count(puts=len(stored), bytes_put=sum(written.values()))
        self._ask(self._budget.settle_commands(written, now_ms=_now_ms()))
        if len(stored) < len(frames):
            self._budget.refund(self._ask, {key: size for key, size in sizes.items() if key not in written})
        return stored

    def _ask(self, commands: Sequence[Command], total: int = 0) -> list[Reply]:
        """One exchange on the writing connection, under `_writing` and within `judged`."""
        if not commands:
            return []
        if self._writer is None or not self._writer.alive:
            self._writer = self._link.connect(self._write_s)
        return self._writer.exchange(commands, within_s=self._write_s + total / self._floor)

    def _run_upkeep(self) -> None:
        while not self._closed.is_set():
            self._link.wake.wait(min(max(self._link.probe_due_in(), 0.0), _UPKEEP_EVERY_S))
            self._link.wake.clear()
            if not self._closed.is_set():
                self._link.probe_if_due()
                if self._link.state == "ok":
                    self._tidy()

    def _tidy(self) -> None:
        """Report what was read (for the order of eviction and the TTL), and stop charging for what is gone."""
        touched = dict(self._touched.popleft() for _ in range(len(self._touched)))
        commands: list[Command] = [("EXPIRE", self._physical(key), self._ttl_s) for key in touched]
        commands += self._budget.touch_commands({self._physical(key): size for key, size in touched.items()},
                                                now_ms=_now_ms())
        try:
            with self._writing, self._link.judged():
                for first in range(0, len(commands), 1024):
                    self._ask(commands[first:first + 1024])
                try:
                    self._budget.sweep(self._ask, now_ms=_now_ms())
                except RedisRefused as error:
                    self._link.count(**{f"refused_{error.code.lower()}": 1})
        except TierUnavailable:
            pass                               # counted, and the breaker knows


def probe(url: str, *, within_s: float = 1.0) -> None:
    """Check at start whether this Redis answers. Raises ConfigError with the remedy, and never with a password."""
    address = redis_address.parse(url)
    remedy = "start it or correct the URL, or set redis to 'embedded' for a private one, or to none"
    try:
        RedisConnection(address, connect_s=within_s, silence_s=within_s).close()
    except RedisSilent:
        raise ConfigError(f"Redis at {address.shown} gave no answer within {within_s:g} s: {remedy}") from None
    except RedisLost as error:
        raise ConfigError(f"Redis at {address.shown} cannot be reached ({error}): {remedy}") from None
    except RedisRefused as error:
        raise ConfigError(f"Redis at {address.shown} refused us with {error.code}: check user, password and database "
                          f"of the URL; {remedy}") from None


def _joined(parts: Sequence[Buffer]) -> Buffer:
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _bytes_of(frames: dict[bytes, Sequence[Buffer]]) -> int:
    return sum(memoryview(part).nbytes for parts in frames.values() for part in parts)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
