"""RedisBudget: our bytes in one Redis stay within one cap, whoever of the cluster writes them, also after restarts.

The server may be somebody's own and hold other data, so its `maxmemory` is not ours to set, and several workers write.
The account therefore lives in that Redis, as one sorted set:

    kvb:index    ""                     total bytes charged (0 ..)
                 size ‖ physical key    in flight: ms since 1970          charged before its SET is sent
                 size ‖ physical key    settled:   ms since 1970 − 2^50   SET was acknowledged; the lowest is the oldest

Every change is one transaction (WATCH, MULTI, EXEC), so at every instant the total is the sum of the members and within
the cap. A value is charged before it is written and deleted together with its charge, so the total is never less than
what is there; a crash in between, an expired frame or one that the server evicted leaves it too high until `sweep`. An
index that is gone (FLUSHALL, evicted by the server) is rebuilt from the keys themselves before anything is written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from kvbank.kvstore.tiers.redis_wire import Command, RedisLost, RedisRefused, Reply

PREFIX = b"kvb:"
INDEX = b"kvb:index"
ENTRY_OVERHEAD = 256                           # charged beside a value: its key, its entry here, the server's books
_TOTAL = b""
_SETTLED = 2**50
_FORGOTTEN_MS = 60_000                         # a writer that has not settled by then is dead
_SIZE = struct.Struct(">Q")
_TRIES = 8                                     # for one change, while others change the index
_ROUNDS = 64                                   # of making room for one batch

Ask = Callable[[Sequence[Command]], list[Reply]]


class OverLimit(Exception):
    """There is no room for this within the cap."""


class RedisBudget:
    """One writer's view of the shared account.

    `ask` does one pipelined exchange, always on the same connection within a call; it raises when Redis is not there.
    Methods raise RedisRefused when the server answers with an error, or others kept changing the index (CONTENDED).
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.total = 0                         # as last heard
        self.entries = 0                       # as of the last sweep
        self.released = 0                      # frames this writer deleted to make room

    def reserve(self, ask: Ask, sizes: dict[bytes, int], *, now_ms: int) -> set[bytes]:
        """Delete the oldest frames until values of these sizes fit within the cap, and charge them to physical keys.

        The keys that the caller may write now: those that nobody else is writing. Raises OverLimit, and nothing is
        charged, when they exceed the cap by themselves, or what is in flight leaves no room for them.
        """
        members = [_member(key, size) for key, size in sizes.items()]
        if sum(map(_charge, members)) > self.limit_bytes:
            raise OverLimit
        (score,) = ask([("ZSCORE", INDEX, _TOTAL)])
        if score is None:
            self._rebuild(ask, now_ms=now_ms)
        for _ in range(_ROUNDS):
            mine, over = self._enter(ask, members, score=now_ms, now_ms=now_ms, limit=self.limit_bytes)
            if over <= 0:
                return set(map(_key, mine))
            if not self._drop_oldest(ask, over, now_ms=now_ms):
                raise OverLimit
        raise RedisRefused("CONTENDED")        # others took the room that we made, again and again

    def settle_commands(self, sizes: dict[bytes, int], *, now_ms: int) -> list[Command]:
        """To send by the writer right behind its SETs."""
        return [("ZADD", INDEX, "XX", now_ms - _SETTLED, _member(key, size)) for key, size in sizes.items()]

    def touch_commands(self, sizes: dict[bytes, int], *, now_ms: int) -> list[Command]:
        """To send some time after a read: these keys are recent. GT (Redis 6.2): what is in flight stays in flight."""
        return [("ZADD", INDEX, "XX", "GT", now_ms - _SETTLED, _member(key, size)) for key, size in sizes.items()]

    def refund(self, ask: Ask, sizes: dict[bytes, int]) -> None:
        """These were reserved and their SET was refused: uncharge them, and delete what may lie there all the same."""
        members = [_member(key, size) for key, size in sizes.items()]

        def removal(scores: list[Reply]) -> list[Command]:
            return _removal([member for member, known in zip(members, scores, strict=True) if known is not None])
        self._change(ask, [("ZSCORE", INDEX, member) for member in members], removal)

    def sweep(self, ask: Ask, *, now_ms: int, count: int = 64) -> None:
        """Look at the oldest entries and stop charging for those that expired or that the server evicted."""
        entries, score, oldest = ask([("ZCARD", INDEX), ("ZSCORE", INDEX, _TOTAL),
                                      ("ZRANGE", INDEX, 0, count - 1, "WITHSCORES")])
        self.entries = max(0, entries - 1) if isinstance(entries, int) else 0
        self.total = _number(score)
        old = _evictable(oldest, now_ms)
        there = ask([("EXISTS", _key(member)) for member in old])
        gone = [member for member, found in zip(old, there, strict=True) if found == 0]
        if not gone:
            return

        def still_gone(replies: list[Reply]) -> list[Command]:      # one may just be coming back
            again, rows = replies[:-1], _evictable(replies[-1], now_ms)
            return _removal([member for member, found in zip(gone, again, strict=True)
                             if found == 0 and member in rows])
        self._change(ask, [*(("EXISTS", _key(member)) for member in gone),
                           ("ZRANGE", INDEX, 0, count - 1, "WITHSCORES")], still_gone)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _rebuild(self, ask: Ask, *, now_ms: int) -> None:
        """Charge what lies there already: the index was lost and its frames were not."""
        cursor = b"0"
        while True:
            (page,) = ask([("SCAN", cursor, "MATCH", PREFIX + b"*", "COUNT", 1000)])
            at, found = _list(page)
            cursor = _bytes(at)
            keys = [key for key in map(_bytes, _list(found)) if key != INDEX]
            lengths = ask([("STRLEN", key) for key in keys])
            self._enter(ask, [_member(key, length) for key, length in zip(keys, lengths, strict=True)
                              if isinstance(length, int)], score=now_ms - _SETTLED, now_ms=now_ms, limit=2**52)
            if cursor == b"0":
                return

    def _enter(self, ask: Ask, members: list[bytes], *, score: int, now_ms: int, limit: int) -> tuple[list[bytes], int]:
        """Put members into the index if the total stays within `limit`; else nothing changes.

        Returns those that are now the caller's, and by how much they would have exceeded the limit. One that is settled
        is charged already (it expired, and comes back). One in flight belongs to another writer.
        """
        mine: list[bytes] = []
        over = 0

        def charge(replies: list[Reply]) -> list[Command]:
            nonlocal over
            known = dict(zip(members, replies[1:], strict=True))
            mine[:] = [member for member, at in known.items()
                       if at is None or _may_go(float(_bytes(at)), now_ms)]
            new = sum(_charge(member) for member in mine if known[member] is None)
            over = _number(replies[0]) + new - limit
            if over > 0 or not mine:
                return []
            return [*(("ZADD", INDEX, score, member) for member in mine), ("ZINCRBY", INDEX, new, _TOTAL)]
        self._change(ask, [("ZSCORE", INDEX, _TOTAL), *(("ZSCORE", INDEX, member) for member in members)], charge)
        return mine, over

    def _drop_oldest(self, ask: Ask, need: int, *, now_ms: int) -> bool:
        """Delete the oldest frames, `need` bytes of them but at most 16 at a time; False when none may go."""
        chosen: list[bytes] = []

        def choose(replies: list[Reply]) -> list[Command]:
            chosen.clear()
            for member in _evictable(replies[0], now_ms):
                if sum(map(_charge, chosen)) < need:
                    chosen.append(member)
            return _removal(chosen)
        self._change(ask, [("ZRANGE", INDEX, 0, 15, "WITHSCORES")], choose)
        self.released += len(chosen)
        return bool(chosen)

    def _change(self, ask: Ask, read: list[Command], decide: Callable[[list[Reply]], list[Command]]) -> None:
        """Read, decide, and apply in one transaction that happens only if nobody changed the index in between.

        The last command decided is the ZINCRBY of the total.
        """
        for _ in range(_TRIES):
            _, *replies = ask([("WATCH", INDEX), *read])
            commands = decide(replies)
            if not commands:
                ask([("UNWATCH",)])
                return
            *_, done = ask([("MULTI",), *commands, ("EXEC",)])
            if done is not None:
                self.total = _number(_list(done)[-1])
                return
        raise RedisRefused("CONTENDED")


def _removal(members: list[bytes]) -> list[Command]:
    if not members:
        return []
    return [("DEL", *map(_key, members)), ("ZREM", INDEX, *members),
            ("ZINCRBY", INDEX, -sum(map(_charge, members)), _TOTAL)]


def _evictable(rows: Reply, now_ms: int) -> list[bytes]:
    """Of a ZRANGE WITHSCORES the members that may go: settled, or left behind by a writer that died."""
    flat = list(map(_bytes, _list(rows)))
    return [member for member, score in zip(flat[::2], flat[1::2], strict=True)
            if _ours(member) and _may_go(float(score), now_ms)]


def _may_go(score: float, now_ms: int) -> bool:
    """Settled, or in flight for so long that its writer must be dead."""
    return score < 0 or score < now_ms - _FORGOTTEN_MS


def _member(key: bytes, size: int) -> bytes:
    return _SIZE.pack(size + ENTRY_OVERHEAD) + key


def _charge(member: bytes) -> int:
    return int(_SIZE.unpack_from(member)[0])


def _key(member: bytes) -> bytes:
    return member[_SIZE.size:]


def _ours(member: bytes) -> bool:
    """Whatever somebody writes into the index, only frames are ever deleted."""
    return len(member) > _SIZE.size and _key(member).startswith(PREFIX) and _key(member) != INDEX


def _bytes(reply: Reply) -> bytes:
    if isinstance(reply, RedisRefused):
        raise reply
    if not isinstance(reply, memoryview):
        raise RedisLost("an answer of another kind than was asked for")
    return bytes(reply)


def _number(score: Reply) -> int:
    return 0 if score is None else int(float(_bytes(score)))


def _list(reply: Reply) -> list[Reply]:
    if isinstance(reply, RedisRefused):
        raise reply
    if not isinstance(reply, list):
        raise RedisLost("an answer of another kind than was asked for")
    return reply
