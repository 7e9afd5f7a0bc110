"""WriteBehind: frames on their way to Redis, on a thread that nobody waits for.

    offer ──copy──> queue (at most `limit_bytes`, else dropped and counted) ──seal──> tier.put ──> acknowledged

While the tier is down what is queued stays queued; what comes when the queue is full is dropped. A frame is tried three
times. Dropping one is never an error: somebody will recompute it. What must not be used any more is deleted on the same
thread when it has arrived, or when the tier can be reached again: `deleting` until then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from kvbank.kvstore.frame import Buffer, seal
from kvbank.kvstore.tiers.redis_tier import RedisTier
from kvbank.kvstore.tiers.tier import TierUnavailable

_log = logging.getLogger(__name__)

_TRIES = 3
_BATCH_BYTES = 8 << 20
_LOOK_AGAIN_S = 0.05                           # while the tier is down
_MAX_DELETING = 1 << 16                        # keys to be deleted; the oldest is forgotten beyond that


class WriteBehind:
    """Owns one thread and at most `limit_bytes` of copies. `done(key, stored)` is told how each frame ended."""

    def __init__(self, tier: RedisTier, *, secret: bytes, limit_bytes: int,
                 done: Callable[[bytes, bool], None]) -> None:
        self._tier, self._secret, self._limit_bytes, self._done = tier, secret, limit_bytes, done
        self._changed = threading.Condition()  # guards all below; held for a few lines at a time
        self._waiting: OrderedDict[bytes, tuple[bytes, int]] = OrderedDict()        # key -> (frame, tries)
        self._sending: dict[bytes, int] = {}   # key -> bytes
        self._deleting: OrderedDict[bytes, None] = OrderedDict()
        self._bytes = 0
        self._closing = False
        self._counters: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="kvbank-write-behind", daemon=True)
        self._thread.start()

    def offer(self, key: bytes, frame: Sequence[Buffer]) -> bool:
        """Queue a copy of a frame; False, and counted, when there is no room for it or we are closing."""
        size = sum(memoryview(part).nbytes for part in frame)
        with self._changed:
            if key in self._waiting or key in self._sending:
                return True
            if self._closing or self._bytes + size > self._limit_bytes:
                self._counters["write_behind_dropped_full"] += 1
                return False
            self._bytes += size                # claimed before the copy, so that the bound holds at every instant
        copy = b"".join(frame)
        with self._changed:
            if key in self._waiting or self._closing:
                self._bytes -= size            # two threads offered it at once
                return not self._closing
            self._waiting[key] = (copy, 0)
            self._changed.notify_all()
        return True

    def fits(self, size: int) -> bool:
        """Whether a frame of this size could be queued at all."""
        return size <= self._limit_bytes

    def cancel(self, keys: Sequence[bytes]) -> None:
        """Forget what is queued under these keys; what is being sent arrives, and is deleted."""
        with self._changed:
            for key in keys:
                if (entry := self._waiting.pop(key, None)) is not None:
                    self._bytes -= len(entry[0])
            self._delete_later([key for key in keys if key in self._sending])

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete these from the tier as soon as it can be reached."""
        with self._changed:
            self._delete_later(keys)

    def deleting(self, key: bytes) -> bool:
        """What the tier holds under this key must not be used."""
        return key in self._deleting

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued, being sent or to be deleted; False when that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._sending or self._deleting), timeout_s)

    def counters(self) -> dict[str, int]:
        with self._changed:
            return {**self._counters, "write_behind_bytes": self._bytes}

    def close(self) -> None:
        """Drop what is queued and end the thread."""
        with self._changed:
            self._closing = True
            self._counters["write_behind_dropped_closing"] += len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            if not batch:
                self._delete()
                continue
            stored, unavailable = self._send({key: frame for key, (frame, _) in batch.items()})
            with self._changed:
                for key, (frame, tries) in batch.items():
                    del self._sending[key]
                    if key in self._deleting:
                        stored.discard(key)
                    elif unavailable and key not in stored and tries + 1 < _TRIES and not self._closing:
                        self._waiting[key] = (frame, tries + 1)
                        self._waiting.move_to_end(key, last=False)
                        continue
                    self._bytes -= len(frame)
                    self._counters["write_behind_stored" if key in stored else "write_behind_lost"] += 1
            for key in batch:
                if key not in self._waiting:
                    self._done(key, key in stored)
            batch = {}                         # the copies go now, not at the next turn
            with self._changed:
                self._changed.notify_all()

    def _next_batch(self) -> dict[bytes, tuple[bytes, int]] | None:
        """What fits one batch, oldest first; waits while there is nothing, or nobody to send it to. Empty: something is to be
        deleted first. None: closing."""
        with self._changed:
            while not self._closing:
                if not self._waiting and not self._deleting:
                    self._changed.wait()
                elif self._tier.state != "ok":
                    self._changed.wait(_LOOK_AGAIN_S)
                else:
                    break
            else:
                return None
            batch: dict[bytes, tuple[bytes, int]] = {}
            size = 0
            while self._waiting and not self._deleting and (not batch or size < _BATCH_BYTES):
                key, entry = self._waiting.popitem(last=False)
                batch[key], self._sending[key] = entry, len(entry[0])
                size += len(entry[0])
            return batch

    def _delete_later(self, keys: Sequence[bytes]) -> None:
        """Under the lock."""
        self._deleting.update(dict.fromkeys(keys))
        while len(self._deleting) > _MAX_DELETING:
            self._deleting.popitem(last=False)
        self._changed.notify_all()

    def _delete(self) -> None:
        """Nothing is being sent now, so what is deleted does not come back."""
        with self._changed:
            keys = list(self._deleting)
        try:
            self._tier.delete(keys)
        except TierUnavailable:
            with self._changed:
                self._changed.wait(_LOOK_AGAIN_S)
            return
        with self._changed:
            for key in keys:
                self._deleting.pop(key, None)
            self._changed.notify_all()

    def _send(self, frames: dict[bytes, bytes]) -> tuple[set[bytes], bool]:
        """What was stored, and whether the tier went away meanwhile."""
        started = time.monotonic()
        try:
            stored = self._tier.put({key: [frame, seal(key, [frame], self._secret)] for key, frame in frames.items()})
        except TierUnavailable:
            return {key for key in frames if self._tier.knows(key)}, True
        _log.debug("write_behind_sent frames=%d stored=%d seconds=%.3f", len(frames), len(stored),
                   time.monotonic() - started)
        return stored, False
