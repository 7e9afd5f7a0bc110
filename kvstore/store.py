"""BlockStore: one front over the shelves below the device. Correct or a miss, and never an error or a stall.

    put   ──CRC──> host ──(driven out, and Redis lacks it)──┐          get: host, then Redis in batched round trips;
      └───────────────────────────────────────────────────> queue ──seal──> Redis        every byte verified

Knows keys, frames and tiers; knows nothing of torch, sequences or engines, so another engine can use it alone. Span
frames are keyed by their last block's key; single blocks (a tail) by their own.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.frame import (
    PRIVATE,
    SEAL_BYTES,
    Buffer,
    FrameHeader,
    FrameInvalid,
    decode,
    encode,
    frame_bytes,
    is_private,
)
from kvbank.kvstore.hashing import TokenIds
from kvbank.kvstore.layout import Layout
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.tiers.redis_tier import RedisTier
from kvbank.kvstore.tiers.tier import Tier, TierStatus, TierUnavailable
from kvbank.kvstore.tiers.write_behind import WriteBehind

MISS_REASONS = ("never_seen", "evicted", "integrity", "timeout", "tier_down", "over_limit")
_OF_EACH_TIER = (("integrity", "integrity"), ("lookups", "lookups"), ("found", "hits"), ("reads", "reads"),
                 ("read_us", "read_us"))       # a shelf's counter, and its beginning in ours
_REMEMBERED = 1 << 16                          # keys whose fate is known, so that a miss has a reason


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A frame that was found, every byte of it checked. `payload` is the caller's own memory."""

    source: str                                # host | redis
    header: FrameHeader
    payload: memoryview                        # [layers, 2, kv_heads, tokens, head_dim], little-endian


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch brought, and why it did not bring the rest."""

    frames: dict[bytes, StoredFrame] = field(default_factory=dict)
    missed: dict[bytes, str] = field(default_factory=dict)          # key -> one of MISS_REASONS


class BlockStore:
    """Thread-safe. No lock is held over I/O or over a copy of a frame.

    secret: what Redis holds is sealed with; without it a Redis cannot be used. host and redis may each be None.
    """

    def __init__(self, layout: Layout, *, host: HostTier | None, redis: RedisTier | None, secret: bytes,
                 write_behind_bytes: int = 64 << 20) -> None:
        self.layout = layout
        self._host, self._redis, self._secret = host, redis, secret
        self._tiers: list[Tier] = [tier for tier in (host, redis) if tier is not None]
        self._behind = WriteBehind(redis, secret=secret, limit_bytes=write_behind_bytes, done=self._written) \
            if redis is not None else None
        self._lock = threading.Lock()          # of the two below
        self._fate: OrderedDict[bytes, str] = OrderedDict()         # key -> the reason if it should be missed
        self._counters: Counter[str] = Counter()
        if host is not None:
            host.watch_evictions(self._driven_out)

    # -- reading -----------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[str | None]:
        """Where each key is: "host", "redis" (its bytes were acknowledged there) or None. At most one round trip."""
        here = self._host.has(keys) if self._host is not None else set()
        there: set[bytes] = set()
        if self._redis is not None and (rest := [key for key in keys if key not in here]):
            try:
                there = self._redis.has(rest)
            except TierUnavailable as error:
                self._count(**{f"lookup_{error.reason}": 1})
        return ["host" if key in here else "redis" if key in there else None for key in keys]

    def get(self, keys: Sequence[bytes], tokens_of: Mapping[bytes, TokenIds] | None = None) -> dict[bytes, StoredFrame]:
        """The frames that are here. `fetch` also tells why the others are not."""
        return self.fetch(keys, tokens_of).frames

    def fetch(self, keys: Sequence[bytes], tokens_of: Mapping[bytes, TokenIds] | None = None, *,
              into: Mapping[bytes, memoryview] | None = None, fidelity: str = "exact") -> Fetched:
        """Bring frames from host and Redis, verified; what is not here or not right is missed, with a reason.

        tokens_of: the ids the caller wants the KV of, compared where given. into: writable memory per key, at least as
        long as the payload, which is then copied there (the one copy from host); where absent, memory of its own.
        """
        result = Fetched()
        ask = _Ask(self.layout, tokens_of or {}, into or {}, fidelity)
        wanted = list(dict.fromkeys(keys))
        with self._reading("host", len(wanted) if self._host is not None else 0):
            for key in wanted:
                if not self._from_host(key, ask, result):
                    result.missed.setdefault(key, self._reason(key))
        if self._redis is not None and result.missed:
            with self._reading("redis", len(result.missed)):
                self._from_redis(list(result.missed), ask, result)
        self._count(**{f"hits_{source}": sum(found.source == source for found in result.frames.values())
                       for source in ("host", "redis")})
        self._count(**{f"missed_{reason}": list(result.missed.values()).count(reason) for reason in MISS_REASONS})
        return result

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, frames: Sequence[tuple[FrameHeader, Buffer]], *, to: Sequence[str] = ("host", "redis"),
            pin: bool = False) -> set[bytes]:
        """Store copies of these frames; the keys the host tier holds afterwards, with `pin` each pinned once.

        to: "host" and "redis": into both, Redis by and by; "host": Redis gets it when the host tier drives it out;
        "redis": there only. A private frame goes nowhere but to the host tier. Never waits for Redis.
        """
        held: set[bytes] = set()
        for header, payload in frames:
            parts = encode(header, payload)
            private = header.fidelity == PRIVATE
            if self._host is not None and ("host" in to or private):
                held |= self._host.put({header.key: parts}, pin=pin)
            queued = False
            if self._behind is not None and "redis" in to and not private and not self._known(header.key):
                queued = self._behind.offer(header.key, parts)
            self._remember(header.key, "evicted" if header.key in held or queued or self._known(header.key)
                           else "over_limit")
        self._count(puts=len(frames))
        return held

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Take one pin from each; without pins they are ordinary frames of the host tier."""
        if self._host is not None:
            self._host.unpin(keys)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget frames everywhere: a private tail whose job ended, or KV that must not be reused."""
        if self._host is not None:
            self._host.delete(keys)
        if self._behind is not None:
            self._behind.cancel(keys)
        self._delete_from_redis(keys)

    def clear_host(self) -> int:
        """Forget what the host tier holds and nobody pins; how many frames went. Redis keeps its copies."""
        return self._host.clear() if self._host is not None else 0

    def flush(self, timeout_s: float, *, everything: bool = False) -> bool:
        """Wait until Redis has what was queued for it, with `everything` also what the host tier holds.

        False when that took longer. Frames that Redis refused, or lost since, are not waited for.
        """
        if self._behind is None:
            return True
        deadline = time.monotonic() + timeout_s
        if everything and self._host is not None:
            for key in self._host.held_keys():
                # The queue may be smaller than the host tier: let it run empty before the next one.
                while not self._queue(key) and (left := deadline - time.monotonic()) > 0:
                    if not self._behind.flush(left):
                        return False
        return self._behind.flush(max(0.0, deadline - time.monotonic()))

    def status(self) -> list[TierStatus]:
        """One entry per shelf that is there. Does no I/O."""
        with self._lock:
            counters = dict(self._counters)
        shelves = []
        for tier in self._tiers:
            status = tier.status()
            extra = {said: counters.get(f"{name}_{status.name}", 0) for said, name in _OF_EACH_TIER}
            if tier is self._redis and self._behind is not None:
                extra |= self._behind.counters()
            shelves.append(replace(status, counters={**status.counters, **extra}))
        return shelves

    def counters(self) -> dict[str, int]:
        """hits_<source>, missed_<reason>, integrity_<source>[_<what>], puts, spilled, spill_dropped; of fetches also
        lookups_<source> (frames), reads_<source> (calls) and read_us_<source> (their microseconds)."""
        with self._lock:
            return dict(self._counters)

    def close(self) -> None:
        """End the threads and give the memory back. What waits for Redis is dropped: `flush` first if it matters."""
        if self._behind is not None:
            self._behind.close()
        for tier in self._tiers:
            tier.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _from_host(self, key: bytes, ask: _Ask, result: Fetched) -> bool:
        if self._host is None or (held := self._host.hold(key)) is None:
            return False
        try:
            result.frames[key] = ask.check("host", key, held.view, None)
        except FrameInvalid as error:
            self._lied("host", error)
            result.missed[key] = "integrity"
        finally:
            self._host.release(held)
        if key in result.missed:
            self._host.delete([key])
            return False
        return True

    def _from_redis(self, keys: list[bytes], ask: _Ask, result: Fetched) -> None:
        assert self._redis is not None
        if self._behind is not None:
            keys = [key for key in keys if not self._behind.deleting(key)]
        try:
            found = self._redis.get(keys)
        except TierUnavailable as error:
            found = error.found
            for key in keys:
                if key not in found and result.missed[key] != "integrity":
                    result.missed[key] = error.reason
        lies: list[bytes] = []
        for key, value in found.items():
            try:
                result.frames[key] = ask.check("redis", key, value, self._secret)
                del result.missed[key]
            except FrameInvalid as error:
                self._lied("redis", error)
                result.missed[key] = "integrity"
                lies.append(key)
        self._delete_from_redis(lies)          # or nobody could ever put the right bytes there

    def _lied(self, source: str, error: FrameInvalid) -> None:
        self._count(**{f"integrity_{source}": 1, f"integrity_{source}_{error.reason}": 1})

    def _delete_from_redis(self, keys: Sequence[bytes]) -> None:
        if self._redis is not None and keys:
            try:
                self._redis.delete(keys)
            except TierUnavailable as error:
                self._count(**{f"delete_{error.reason}": 1})
                if self._behind is not None:
                    self._behind.delete(keys)

    def _driven_out(self, key: bytes, frame: memoryview) -> None:
        """The host tier needs the room: to Redis, unless it has it."""
        if self._behind is not None and not is_private(frame) and not self._known(key):
            self._count(**{"spilled" if self._behind.offer(key, [frame]) else "spill_dropped": 1})

    def _queue(self, key: bytes) -> bool:
        """Queue a frame of the host tier for Redis; False when the queue is full."""
        assert self._host is not None and self._behind is not None
        if self._known(key) or (held := self._host.hold(key)) is None:
            return True
        try:
            return is_private(held.view) or not self._behind.fits(held.size) or self._behind.offer(key, [held.view])
        finally:
            self._host.release(held)

    def _written(self, key: bytes, stored: bool) -> None:
        if not stored:
            self._remember(key, "over_limit")

    def _known(self, key: bytes) -> bool:
        return self._redis is not None and self._redis.knows(key)

    def _remember(self, key: bytes, fate: str) -> None:
        with self._lock:
            self._fate[key] = fate
            self._fate.move_to_end(key)
            if len(self._fate) > _REMEMBERED:
                self._fate.popitem(last=False)

    def _reason(self, key: bytes) -> str:
        with self._lock:
            return self._fate.get(key, "never_seen")

    @contextmanager
    def _reading(self, source: str, frames: int) -> Iterator[None]:
        """Clock one read of so many frames; nothing when there is nobody to ask."""
        began = time.perf_counter()
        yield
        if frames:
            spent = round((time.perf_counter() - began) * 1e6)
            self._count(**{f"lookups_{source}": frames, f"reads_{source}": 1, f"read_us_{source}": spent})

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._counters.update({name: amount for name, amount in amounts.items() if amount})


@dataclass(frozen=True, slots=True)
class _Ask:
    """One fetch's wishes: how each frame that arrives is checked and where it goes."""

    layout: Layout
    tokens_of: Mapping[bytes, TokenIds]
    into: Mapping[bytes, memoryview]
    fidelity: str

    def check(self, source: str, key: bytes, data: memoryview, secret: bytes | None) -> StoredFrame:
        header, payload = decode(data, expect_key=key, layout=self.layout, tokens=self.tokens_of.get(key),
                                 secret=secret, fidelity=self.fidelity)
        if (target := self.into.get(key)) is not None:
            # numpy lets go of the GIL while it copies
            np.frombuffer(target, dtype=np.uint8)[:len(payload)] = np.frombuffer(payload, dtype=np.uint8)
            payload = memoryview(target).cast("B")[:len(payload)]
        elif source == "host":
            payload = memoryview(bytes(payload))        # the tier's memory is the tier's
        return StoredFrame(source, header, payload)


def build_store(config: StoreConfig, layout: Layout, secret: bytes, *, host: HostTier | None = None) -> BlockStore:
    """The store that `config` describes. host: one to use instead of a new one, as by a worker that parks spans in it.

    A Redis that does not answer is no error: its state is "open" until it does.
    """
    if host is None and config.host_bytes:
        host = HostTier(config.host_bytes)
    redis = None
    if config.redis_url is not None:
        redis = RedisTier(config.redis_url, limit_bytes=config.redis_bytes,
                          layers=f"{layout.layer_first}-{layout.layer_last}",
                          value_bytes=frame_bytes(layout, layout.span_tokens) + SEAL_BYTES, ttl_s=config.redis_ttl_s,
                          connect_s=config.redis_connect_s, read_s=config.redis_read_s, write_s=config.redis_write_s,
                          floor_bytes_per_s=config.redis_floor_bytes_per_s)
    return BlockStore(layout, host=host, redis=redis, secret=secret, write_behind_bytes=config.write_behind_bytes)
