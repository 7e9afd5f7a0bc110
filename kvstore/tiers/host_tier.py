"""Frames in this process's own memory: at most `limit_bytes`, the least recently used ones go first.

    put ──> index, newest end        get, has, put again: to the newest end        room needed: oldest unpinned go
    pin: out of the order, stays until unpin          hold: a view that neither eviction nor delete can pull away

Memory is charged as it is taken from the system (whole pages) and given back as soon as a frame goes; in the steady
state a put takes over the buffer of the frame it drove out, so it costs one memcpy and no page fault.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvbank.kvstore.frame import Buffer
from kvbank.kvstore.tiers.tier import TierStatus

_PAGE = mmap.PAGESIZE
_MAPPED_FROM = 64 << 10                        # smaller frames come from the heap: a process may have 65,530 maps
_HEAP_OVERHEAD = 64


@dataclass(slots=True)
class Held:
    """One frame in the tier. `view` may be read while the caller holds or pins it, never written."""

    key: bytes
    memory: memoryview                         # all that was taken for it
    size: int                                  # of the frame
    charge: int                                # bytes counted against the limit
    holds: int = 0                             # by readers
    pins: int = 0                              # by those who parked it here
    gone: bool = False                         # out of the index; the memory goes with the last reader

    @property
    def movable(self) -> bool:
        return not self.holds and not self.pins

    @property
    def view(self) -> memoryview:
        return self.memory[:self.size]


class HostTier:
    """A bounded LRU shelf of frames. Thread-safe; readers wait for no copy, writers only for one another.

    """

    name = "host"

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._evicted: Callable[[bytes, memoryview], None] | None = None
        self._frames: dict[bytes, Held] = {}
        self._order: OrderedDict[bytes, None] = OrderedDict()      # unpinned ones only, oldest first
        self._evictable = 0                    # bytes charged to the frames in _order
        self._pinned = 0                       # bytes charged to frames with pins
        self._used = 0                         # bytes charged to everything that is not yet given back
        self._counters: Counter[str] = Counter()
        self._lock = threading.Lock()          # the books: never held over a copy
        self._writing = threading.Lock()       # one put at a time: the limit holds at every instant, also half-way

    # -- the Tier protocol ----------------------------------------------------------------------------------------

    def put(self, frames: dict[bytes, Sequence[Buffer]], *, pin: bool = False) -> set[bytes]:
        """Store frames and return the keys that are here afterwards; with `pin` each of them is pinned once.

        A frame that cannot fit (larger than the limit, or the rest is pinned) is refused and drives nothing else out. What is
        here already stays as it is, but for a frame that nobody pins: whoever parks here reads on without verifying, so
        these bytes take the place of those, which nobody has looked at for a while.
        """
        return {key for key, parts in frames.items() if self._put_one(key, parts, pin)}

    def get(self, keys: Sequence[bytes]) -> dict[bytes, memoryview]:
        """Copies of the frames that are here, each the caller's own."""
        found: dict[bytes, memoryview] = {}
        for key in keys:
            if (held := self.hold(key)) is not None:
                try:
                    found[key] = memoryview(bytes(held.view))
                finally:
                    self.release(held)
        return found

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which keys are here. Does not make them recent."""
        with self._lock:
            return {key for key in keys if key in self._frames}

    def delete(self, keys: Sequence[bytes]) -> None:
        """Forget frames now, pinned or not; memory that someone reads goes back with its last reader."""
        with self._lock:
            for key in keys:
                if (held := self._frames.get(key)) is not None:
                    self._drop_from_index(held)
                    self._pinned -= held.charge if held.pins else 0
                    held.pins = 0
                    if held.movable:
                        self._give_back(held)
                    self._counters["deleted"] += 1

    def clear(self) -> int:
        """Forget every frame that nobody pins or reads now. Returns how many went; `evicted` is not asked."""
        with self._lock:
            keys = list(self._order)
            for key in keys:
                held = self._frames[key]
                self._drop_from_index(held)
                self._give_back(held)
            self._counters["deleted"] += len(keys)
            return len(keys)

    def status(self) -> TierStatus:
        with self._lock:
            counters = {**self._counters, "bytes_pinned": self._pinned}
            return TierStatus(name=self.name, bytes_used=self._used, bytes_limit=self.limit_bytes,
                              frames=len(self._frames), state="ok" if self.limit_bytes else "off", counters=counters)

    def close(self) -> None:
        """Give all memory back."""
        self.delete(self.held_keys())

    def watch_evictions(self, evicted: Callable[[bytes, memoryview], None]) -> None:
        """Have each frame shown to `evicted` that another one drives out, before its memory is reused.

        It must copy what it wants to keep, be quick, and not call this tier's `put`.
        """
        self._evicted = evicted

    def held_keys(self) -> list[bytes]:
        """All keys that are here now."""
        with self._lock:
            return list(self._frames)

    # -- pins -----------------------------------------------------------------------------------------------------

    def hold(self, key: bytes) -> Held | None:
        """The frame itself, without a copy, readable until `release`; None when it is not here. Makes it recent."""
        with self._lock:
            held = self._frames.get(key)
            self._counters["hits" if held is not None else "misses"] += 1
            if held is not None:
                self._fix(held)
                held.holds += 1
            return held

    def release(self, held: Held) -> None:
        """End one `hold`. Slices of its view must not be touched afterwards."""
        with self._lock:
            held.holds -= 1
            self._unfix(held)

    def pin(self, keys: Sequence[bytes]) -> set[bytes]:
        """Keep these frames until `unpin`, whatever else needs room: for spans parked here. The keys that were here."""
        with self._lock:
            here = [held for key in dict.fromkeys(keys) if (held := self._frames.get(key)) is not None]
            for held in here:
                self._fix(held)
                self._pinned += 0 if held.pins else held.charge
                held.pins += 1
            return {held.key for held in here}

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Take one pin from each of these frames; ones that were deleted meanwhile are passed over."""
        with self._lock:
            for key in dict.fromkeys(keys):
                if (held := self._frames.get(key)) is not None and held.pins:
                    held.pins -= 1
                    self._pinned -= 0 if held.pins else held.charge
                    self._unfix(held)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _put_one(self, key: bytes, parts: Sequence[Buffer], pin: bool) -> bool:
        with self._writing:
            with self._lock:
                if (held := self._frames.get(key)) is not None:
                    self._counters["put_again"] += 1
                    if held.pins or not pin:
                        self._fix(held)
                        held.pins += int(pin)
                        self._unfix(held)      # without a pin: to the newest end
                        return True
                    self._drop_from_index(held)
                    if held.movable:
                        self._give_back(held)
            size = sum(memoryview(part).nbytes for part in parts)
            charge = _charge(size)
            with self._lock:
                if (leaving := self._make_room(charge)) is None:
                    return False
            if (memory := self._let_go(leaving, charge)) is None:
                return False
            _copy(parts, memory)
            with self._lock:                   # published only now, with every byte in place
                self._frames[key] = held = Held(key=key, memory=memory, size=size, charge=charge, pins=int(pin))
                self._pinned += charge if pin else 0
                self._unfix(held)
                self._counters["puts"] += 1
                self._counters["bytes_put"] += size
        return True

    def _make_room(self, charge: int) -> list[Held] | None:
        """Take the oldest out of the index until `charge` more would fit; None, and nothing taken, when it cannot."""
        if charge > self.limit_bytes:
            self._counters["refused_oversize"] += 1
            return None
        if self._used - self._evictable + charge > self.limit_bytes:
            self._counters["refused_pinned"] += 1
            return None
        leaving: list[Held] = []
        over = self._used + charge - self.limit_bytes
        while over > 0:
            held = self._frames[next(iter(self._order))]
            self._drop_from_index(held)
            leaving.append(held)
            over -= held.charge
        return leaving

    def _let_go(self, leaving: list[Held], charge: int) -> memoryview | None:
        """Offer the leaving frames to `evicted`, give their memory back, and return memory of `charge` bytes, charged.

        None when the system has no memory left, whatever the limit says.
        """
        reused: memoryview | None = None
        for held in leaving:
            if self._evicted is not None:
                self._evicted(held.key, held.view)
            with self._lock:
                self._counters["evicted"] += 1
                if reused is None and held.charge == charge:
                    reused = held.memory       # stays charged: it changes hands
                else:
                    self._give_back(held)
        if reused is not None:
            return reused
        with self._lock:
            self._used += charge
        try:
            return _take(charge)
        except (MemoryError, OSError):
            with self._lock:
                self._used -= charge
                self._counters["refused_no_memory"] += 1
            return None

    def _fix(self, held: Held) -> None:
        """Take it out of the order of eviction, if it is in it."""
        if held.movable:
            del self._order[held.key]
            self._evictable -= held.charge

    def _unfix(self, held: Held) -> None:
        """Back to the newest end of the order once nobody holds or pins it; memory of a forgotten frame goes back."""
        if not held.movable:
            return
        if held.gone:
            self._give_back(held)
        else:
            self._order[held.key] = None
            self._evictable += held.charge

    def _drop_from_index(self, held: Held) -> None:
        del self._frames[held.key]
        held.gone = True
        self._fix(held)

    def _give_back(self, held: Held) -> None:
        """Return the memory to the system: the map ends with its last reference, which is this one."""
        held.memory = memoryview(b"")
        self._used -= held.charge


def _charge(size: int) -> int:
    return -(-size // _PAGE) * _PAGE if size >= _MAPPED_FROM else size + _HEAP_OVERHEAD


def _take(charge: int) -> memoryview:
    if charge >= _MAPPED_FROM and charge % _PAGE == 0:
        # private and anonymous: goes back to the system at once, whatever the allocator would keep
        return memoryview(mmap.mmap(-1, charge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return memoryview(bytearray(charge))


def _copy(parts: Sequence[Buffer], memory: memoryview) -> None:
    """One memcpy per part, without the GIL for the large ones, so that an engine thread computes on."""
    target, start = np.frombuffer(memory, dtype=np.uint8), 0
    for part in parts:
        source = np.frombuffer(part, dtype=np.uint8) if memoryview(part).nbytes else np.empty(0, dtype=np.uint8)
        target[start:start + len(source)] = source
        start += len(source)
