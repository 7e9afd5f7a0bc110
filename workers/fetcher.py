"""TierFetcher: brings spans from host, disk and Redis ahead of need, on a thread of its own. Fills workers.seams.Fetcher.

    want (in order) --> pending --thread: store.fetch, a few at a time--> staged (bounded) --load--> a slot
                            \\--> missed, with the store's reason

The engine waits only for keys its next rows need, and never longer than `wait_s` without progress: then they are computed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.store import BlockStore, StoredFrame
from kvbank.kvstore.traces import Traces, context_of

BATCH = 4                                    # keys per fetch: bounds a round trip, and lets loads start early
ON_DEMAND_S = 0.25                           # a key nobody asked for ahead (a lost span) is waited for this long


@dataclass(slots=True)
class _Wants:
    """What one job asked for."""

    progress_at: float
    job: str = ""
    pending: OrderedDict[BlockKey, bytes] = field(default_factory=OrderedDict)   # key -> token ids, in order of need
    on_demand: dict[BlockKey, float] = field(default_factory=dict)               # key -> give up at
    staged: dict[BlockKey, StoredFrame] = field(default_factory=dict)
    missed: dict[BlockKey, str] = field(default_factory=dict)
    fetching: set[BlockKey] = field(default_factory=set)         # asked of the store now, and not dropped since


class TierFetcher:
    """One per worker. `want`, `state`, `load`, `drop` and `forget` are the engine thread's."""

    def __init__(
        self, store: BlockStore, load: Callable[[memoryview, SlotId, int], None], *, staging_bytes: int, wait_s: float,
        clock: Callable[[], float], wake: Callable[[], None], traces: Traces | None = None,
    ) -> None:
        """load: writes a payload into a slot from a token on. staging_bytes: what may be fetched and not loaded yet."""
        self._store, self._load = store, load
        self._staging_bytes, self._wait_s = staging_bytes, wait_s
        self._clock, self._wake, self._traces = clock, wake, traces
        self._jobs: dict[str, _Wants] = {}
        self._staged_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self._thread.start()

    @property
    def staged_bytes(self) -> int:
        return self._staged_bytes

    def want(self, job: str, keys: Sequence[BlockKey], tokens: Sequence[bytes], *, now: float) -> None:
        wants = _Wants(progress_at=now, job=job, pending=OrderedDict(zip(keys, tokens, strict=True)))
        with self._changed:
            self._drop(self._jobs.get(job))
            self._jobs[job] = wants
            self._changed.notify()

    def state(self, job: str, key: BlockKey, *, now: float) -> str:
        with self._changed:
            wants = self._jobs.setdefault(job, _Wants(progress_at=now, job=job))
            if key in wants.staged:
                return "here"
            if key in wants.missed:
                return wants.missed[key]
            if key not in wants.pending:
                wants.pending[key] = b""
                wants.on_demand[key] = now + ON_DEMAND_S
                self._changed.notify()
            give_up = wants.on_demand.get(key, wants.progress_at + self._wait_s)
            if now < give_up:
                return "coming"
            wants.pending.pop(key, None)
            wants.missed[key] = "timeout"
            return "timeout"

    def load(self, job: str, key: BlockKey, slot: SlotId, start: int) -> str | None:
        with self._changed:
            wants = self._jobs.get(job)
            frame = wants.staged.pop(key, None) if wants is not None else None
            if frame is None or wants is None:
                return None
            self._staged_bytes -= frame.payload.nbytes
            wants.progress_at = self._clock()
            self._changed.notify()
        self._load(frame.payload, slot, start)
        return frame.source

    def drop(self, job: str, key: BlockKey) -> None:
        """The job will not load this one: another shard lacks it, or its place was filled otherwise."""
        with self._changed:
            if (wants := self._jobs.get(job)) is not None:
                wants.pending.pop(key, None)
                wants.fetching.discard(key)          # asked for again, it is fetched again: these bytes may be wrong
                if (frame := wants.staged.pop(key, None)) is not None:
                    self._staged_bytes -= frame.payload.nbytes
                self._changed.notify()

    def forget(self, job: str) -> None:
        with self._changed:
            self._drop(self._jobs.pop(job, None))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _drop(self, wants: _Wants | None) -> None:
        if wants is not None:
            self._staged_bytes -= sum(frame.payload.nbytes for frame in wants.staged.values())
            wants.staged.clear()
            wants.pending.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (found := self._next()) is None:
                    self._changed.wait(1.0)
                if self._closed:
                    return
                assert found is not None
                wants, batch = found
                wants.fetching = set(batch)
            began = 0.0 if self._traces is None else time.monotonic()
            fetched = self._store.fetch(list(batch), {key: tokens for key, tokens in batch.items() if tokens})
            if self._traces is not None:
                sources = Counter(frame.source for frame in fetched.frames.values())
                self._traces.note("tier.fetch", context_of(wants.job), began, time.monotonic(), frames=len(batch),
                                  missed=len(fetched.missed), **sources)
            with self._changed:
                wants.progress_at = self._clock()
                for key in batch:
                    if key not in wants.fetching or wants.pending.pop(key, None) is None:
                        continue                     # dropped, given up or forgotten meanwhile
                    if (frame := fetched.frames.get(key)) is not None:
                        wants.staged[key] = frame
                        self._staged_bytes += frame.payload.nbytes
                    else:
                        wants.missed[key] = fetched.missed.get(key, "never_seen")
            self._wake()

    def _next(self) -> tuple[_Wants, dict[BlockKey, bytes]] | None:
        """The next keys to fetch. A lost span first, then jobs in the order they asked, while staging has room."""
        room = self._staged_bytes < self._staging_bytes
        for wants in self._jobs.values():
            urgent = [key for key in wants.on_demand if key in wants.pending]
            if urgent:
                return wants, {key: wants.pending[key] for key in urgent[:BATCH]}
            if room and wants.pending:
                first = list(wants.pending.items())[:BATCH]
                return wants, dict(first)
        return None
