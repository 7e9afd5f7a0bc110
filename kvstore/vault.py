"""Vault: the slots of one worker. Each is blank, held (read by a running sequence), idle (cached, keyed) or lent.

    blank --new_span--> held --release, has keys--> idle --hold--> held
      ^                  |                            |
      |<--release, no keys                            |--evict (oldest first, pinned last; on_evict may spill it)--> blank
    blank|idle --take_for_loan--> lent --give_back--> blank|idle        idle --adopt--> lent

`Vault` keeps the books and `Arena` the bytes: the books are pure and the leader of a chain of shards keeps them for all.
Engine and servicer threads share a vault: every public method takes `lock`, and nobody computes or copies under it.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import RLock

import torch

from kvbank.kvstore.idle import IdleSpans
from kvbank.kvstore.layout import BlockKey, Layout, SlotId
from kvbank.kvstore.messages import KeptSpan
from kvbank.kvstore.prefix_index import PrefixIndex
from kvbank.kvstore.span_table import GONE, LOCAL, Span
from kvbank.kvstore.transport import bulk


class OutOfSlots(Exception):
    """A take could not be met; nothing was taken. The scheduler makes room and tries again."""

    def __init__(self, short: int, free: int, total: int) -> None:
        super().__init__(f"{short} slots short: {free} of {total} are free")
        self.short = short


@dataclass(frozen=True, slots=True)
class VaultCounts:
    """Slots by state. They always add up to total."""

    total: int
    blank: int
    idle: int
    held: int
    lent: int

    @property
    def free(self) -> int:
        return self.blank + self.idle


@dataclass(frozen=True, slots=True)
class Pinned:
    """Blocks that a pin covers, and blocks that it would cover if more slots could be pinned."""

    blocks: int
    left_out: int = 0


class Vault:
    """Books of the slots. Knows spans and keys, never bytes."""

    def __init__(
        self,
        num_slots: int,
        *,
        blocks_per_span: int,
        lend_cap: int = 0,
        guarantee: int = 0,
        on_evict: Callable[[Span], None] | None = None,
        on_scrub: Callable[[list[SlotId]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """lend_cap: slots that may be lent at once. guarantee: slots that an owner keeps while another one needs some: who has
        more gives way first, the one that asks before the others; 0: the oldest goes. on_evict: called before an idle span's
        slot is reused (spill). on_scrub: called with slots about to be written by a new owner; their bytes become zero.
        clock: seconds, for the terms of pins."""
        self.lock = RLock()
        self.index = PrefixIndex(blocks_per_span)
        self.num_slots = num_slots
        self.lend_cap = lend_cap
        self._guarantee = guarantee
        self._bps = blocks_per_span
        self._on_evict = on_evict
        self._on_scrub = on_scrub
        self._blank = list(range(num_slots))   # a heap: low slots first, so that sequences get adjacent runs
        self._idle = IdleSpans(clock)          # by uid, oldest first
        self._held: dict[int, Span] = {}
        self._lent: dict[SlotId, Span | None] = {}
        self._coming: dict[SlotId, None] = {}  # own slots whose bytes are on their way

    # -- own sequences -----------------------------------------------------------------------------------------------

    def counts(self) -> VaultCounts:
        with self.lock:
            held = len(self._held) + len(self._coming)
            return VaultCounts(self.num_slots, len(self._blank), len(self._idle), held, len(self._lent))

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    def new_spans(self, number: int, owner: str = "") -> list[Span]:
        """`number` fresh writable spans with one reader each, evicting idle ones oldest first; all or nothing.

        Their bytes are zero, so that what lies beyond the written tokens is finite. Raises OutOfSlots.
        """
        spans = [Span(slot=slot, refs=1, owner=owner) for slot in self.take_slots(number, owner)]
        with self.lock:
            for span in spans:
                assert span.slot is not None
                del self._coming[span.slot]
                self._held[span.uid] = span
        return spans

    def hold(self, span: Span) -> bool:
        """One more reader: an idle span is no longer evictable. False: it was lent or dropped since it was found, which a
        lending thread may do at any time before this."""
        with self.lock:
            if span.place == GONE or (span.place == LOCAL and span.uid not in self._held and span.uid not in self._idle):
                return False
            span.refs += 1
            if self._idle.pop(span.uid, None) is not None:
                self._held[span.uid] = span
            return True

    def release(self, span: Span) -> bool:
        """One reader less. True when nobody reads it any more and it is not LOCAL: the caller settles or drops it."""
        with self.lock:
            assert span.refs > 0, "a span was released more often than held"
            span.refs -= 1
            if span.refs:
                return False
            if span.place != LOCAL:
                return True
            if span.moving:
                return False                   # the move's end decides
            self.retire(span)
            return False

    def retire(self, span: Span) -> None:
        """Nobody reads a LOCAL span: cache it when it has keys of its own, else blank its slot."""
        with self.lock:
            if any(self.index.find(key) is span for key in span.keys):
                self._held.pop(span.uid, None)
                self._idle[span.uid] = span
            else:
                self.drop(span)

    def drop(self, span: Span) -> None:
        """Forget the span and blank its slot, if it has one."""
        with self.lock:
            self.index.withdraw(span)
            self._held.pop(span.uid, None)
            self._idle.forget(span.uid)
            if span.slot is not None:
                heapq.heappush(self._blank, span.slot)
            span.slot, span.place = None, GONE

    def leave(self, span: Span, place: str) -> None:
        """The span is read elsewhere now: blank its slot, keep its keys in the index."""
        with self.lock:
            self._held.pop(span.uid, None)
            self._idle.forget(span.uid)
            assert span.slot is not None
            heapq.heappush(self._blank, span.slot)
            span.slot, span.place = None, place

    def settle_in(self, span: Span, slot: SlotId) -> None:
        """The span is read in `slot` (taken by `take_slots`) from now on."""
        with self.lock:
            del self._coming[slot]
            span.slot, span.place = slot, LOCAL
            self._held[span.uid] = span

    def take_slots(self, number: int, owner: str = "") -> list[SlotId]:
        """Bare slots for bytes that will arrive (a span coming home); give them back by `blank_slots`.

        Evicts idle spans oldest first, and copies their bytes out without the lock: nobody finds or lends them meanwhile.
        """
        with self.lock:
            if (short := number - self.num_free) > 0:
                raise OutOfSlots(short, self.num_free, self.num_slots)
            leaving: list[Span] = []
            while len(self._blank) + len(leaving) < number:
                leaving.append(self._take_idle(self._next_to_go(owner, number)))
            slots = [SlotId(heapq.heappop(self._blank)) for _ in range(number - len(leaving))]
            self._coming.update(dict.fromkeys(slots))
            slots += [span.slot for span in leaving if span.slot is not None]
        try:
            for span in leaving:
                if self._on_evict is not None:
                    self._on_evict(span)
            if self._on_scrub is not None:
                self._on_scrub(slots)
        except BaseException:
            self.blank_slots(slots)
            raise
        finally:
            for span in leaving:
                span.slot, span.place = None, GONE
        return sorted(slots)

    def _next_to_go(self, owner: str, asked: int) -> Span:
        """Under the lock: which idle span makes room for this owner, which asked for so many slots. The oldest of: its own if
        it has more than the guarantee, else of those who have, else its own, else any. A pinned one when no other is left."""
        idle = self._idle.next_to_go()
        if not self._guarantee:
            return next(iter(idle))
        has = Counter(span.owner for span in (*self._held.values(), *self._idle.spans()))
        has[owner] += asked
        over = {"", *(name for name, slots in has.items() if slots > self._guarantee)}      # "": borrowers' own cache
        for fits in ({owner} & over, over, {owner}):
            if (span := next((span for span in idle if span.owner in fits), None)) is not None:
                return span
        return next(iter(idle))

    def _take_idle(self, span: Span) -> Span:
        """Under the lock: this idle span is on its way out; its slot is nobody's but the caller's."""
        self._idle.forget(span.uid)
        self.index.withdraw(span)
        assert span.slot is not None
        self._coming[span.slot] = None
        return span

    def blank_slots(self, slots: Sequence[SlotId]) -> None:
        with self.lock:
            for slot in slots:
                del self._coming[slot]
                heapq.heappush(self._blank, slot)

    def distrust(self, keys: Iterable[bytes]) -> list[Span]:
        """No span that holds one of these blocks, or was made from one, is found again: idle ones are dropped, and those that
        a borrower adopted do not come back as cache. Returns all of them."""
        with self.lock:
            lent = {span.uid: span for span in self._lent.values() if span is not None}
            spans = self.index.beneath(keys, lent.values())
            for span in spans:
                if span.uid in self._idle:
                    self.drop(span)
                elif span.uid in lent:
                    span.place = GONE
                else:
                    self.index.withdraw(span)
            return spans

    def drop_idle(self) -> int:
        """Forget everything cached and not read. Returns how many spans went."""
        with self.lock:
            spans = list(self._idle.values())
            for span in spans:
                self.drop(span)
            return len(spans)

    def drop_idle_spilled(self) -> int:
        """As drop_idle, but each span's bytes are offered to the tiers first. Returns how many spans went."""
        went = 0
        while True:
            with self.lock:
                if not self._idle:
                    return went
                span = self._take_idle(next(iter(self._idle.values())))
            assert span.slot is not None
            if self._on_evict is not None:
                self._on_evict(span)
            self.blank_slots([span.slot])
            span.slot, span.place = None, GONE
            went += 1

    # -- pins --------------------------------------------------------------------------------------------------------

    def pin(self, ends: Sequence[BlockKey], tail: Sequence[BlockKey], term_s: float) -> Pinned:
        """For so long the spans of this prompt that lie here make room after all others. ends: the last key of each whole
        span. tail: the keys after them. From the prompt's start on, until half of the slots are pinned."""
        with self.lock:
            pinned = self._idle.pinned
            room, left_out = self.num_slots // 2 - len(pinned), 0
            found: dict[int, int] = {}
            for span, blocks in self._lying(ends, tail):
                if span.uid not in pinned and (room := room - 1) < 0:
                    left_out += blocks
                else:
                    found[span.uid] = blocks
            self._idle.pin(found, term_s)
            return Pinned(sum(found.values()), left_out)

    def unpin(self, ends: Sequence[BlockKey], tail: Sequence[BlockKey]) -> Pinned:
        """End the pins of this prompt's spans, whoever made them."""
        with self.lock:
            pinned = self._idle.pinned
            found = {span.uid: blocks for span, blocks in self._lying(ends, tail) if span.uid in pinned}
            self._idle.unpin(found)
            return Pinned(sum(found.values()))

    @property
    def num_pinned(self) -> int:
        """Slots whose spans are pinned, in whatever state."""
        with self.lock:
            return len(self._idle.pinned)

    def _lying(self, ends: Sequence[BlockKey], tail: Sequence[BlockKey]) -> Iterator[tuple[Span, int]]:
        """The spans in our own slots that serve this prompt, lent or not, each with the number of its blocks that do."""
        lent = {span.keys[-1]: span for span in self._lent.values() if span is not None}
        last = next((blocks for blocks in range(len(tail), 0, -1) if tail[blocks - 1] in self.index), 0)
        for key, blocks in (*((key, self._bps) for key in ends), *((key, last) for key in tail[last - 1 : last])):
            if (span := self.index.find(key) or lent.get(key)) is not None and span.place == LOCAL:
                yield span, blocks

    # -- the ledger's pool (kvstore/ledger.py SlotPool) --------------------------------------------------------------

    def lendable(self) -> int:
        """Slots that a new loan could get now."""
        with self.lock:
            return max(0, min(self.num_free, self.lend_cap - len(self._lent)))

    def take_for_loan(self, number: int) -> list[SlotId]:
        """Up to `number` slots for a borrower; idle spans make room without being spilled."""
        with self.lock:
            number = min(number, self.lendable())
            while len(self._blank) < number:
                self.drop(self._next_to_go("", 0))
            slots = [SlotId(heapq.heappop(self._blank)) for _ in range(number)]
            self._lent.update(dict.fromkeys(slots))
            return slots

    def give_back(
        self, slot: SlotId, keys: Sequence[BlockKey] = (), tokens: bytes = b"", digest: bytes = b""
    ) -> None:
        """A loan on the slot ended. With keys its bytes stay as an idle cached span, evictable at once."""
        with self.lock:
            was = self._lent.pop(slot)
            if not keys or self.index.find(keys[-1]) is not None or (was is not None and was.place == GONE):
                if was is not None:
                    self._idle.forget(was.uid)
                heapq.heappush(self._blank, slot)
                return
            parent = b"" if was is None else was.parent
            owner = "" if was is None else was.owner
            span = Span(slot=slot, keys=list(keys), tokens=tokens, digest=digest, parent=parent, owner=owner)
            self.index.adopt(span)
            if was is not None:
                self._idle.hand_on(was.uid, span.uid)
            self._idle[span.uid] = span

    def lend_idle(self, key: BlockKey) -> Span | None:
        """Turn the idle full span that ends with `key` into a lent slot: a borrower reads it where it lies."""
        with self.lock:
            span = self.index.find(key)
            if (span is None or span.refs or span.place != LOCAL or span.moving or span.uid not in self._idle
                    or len(span.keys) < self._bps or span.keys[-1] != key or len(self._lent) >= self.lend_cap):
                return None
            del self._idle[span.uid]
            self.index.withdraw(span)
            assert span.slot is not None
            self._lent[span.slot] = span
            return span

    def check(self) -> list[str]:
        """Broken conservation laws, in words; empty when all is well."""
        with self.lock:
            counts = self.counts()
            wrong = []
            if counts.blank + counts.idle + counts.held + counts.lent != counts.total:
                wrong.append(f"L1: slots do not add up: {counts}")
            places = [*self._blank, *self._lent, *self._coming, *(s.slot for s in self._idle.values()),
                      *(s.slot for s in self._held.values())]
            if len(set(places)) != len(places):
                wrong.append("L1: a slot is in two states")
            wrong += [f"idle span {s.uid} has readers" for s in self._idle.values() if s.refs]
            here = {*self._held, *self._idle, *(span.uid for span in self._lent.values() if span is not None)}
            wrong += [f"span {uid} is pinned and has no slot" for uid in self._idle.pinned if uid not in here]
            if 2 * self.num_pinned > self.num_slots:
                wrong.append(f"{self.num_pinned} of {self.num_slots} slots are pinned: more than half")
            return wrong


class Arena:
    """The bytes of a vault: one flat buffer of equal slots, seen through layouts."""

    def __init__(self, num_slots: int, slot_bytes: int, device: str = "cpu") -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.device = device
        self.bytes = torch.zeros(num_slots * slot_bytes, dtype=torch.uint8, device=device)

    def view(self, layout: Layout) -> torch.Tensor:
        """`[num_slots, layers, 2, kv_heads, span_tokens, head_dim]` in the layout's dtype, sharing the bytes.

        The layout may need less than a slot: the rest of each slot is left alone.
        """
        dtype = getattr(torch, layout.dtype)
        item = dtype.itemsize
        assert layout.slot_bytes <= self.slot_bytes and self.slot_bytes % item == 0
        layers, two, heads, tokens, dim = layout.slot_shape
        flat = self.bytes.view(dtype)
        strides = (self.slot_bytes // item, 2 * heads * tokens * dim, heads * tokens * dim, tokens * dim, dim, 1)
        return flat.as_strided((self.num_slots, layers, two, heads, tokens, dim), strides)

    def slot(self, slot: SlotId, length: int | None = None) -> torch.Tensor:
        """The first `length` bytes of one slot, uint8, sharing the bytes."""
        start = slot * self.slot_bytes
        return self.bytes[start : start + (self.slot_bytes if length is None else length)]

    def scrub(self, slots: Sequence[SlotId]) -> None:
        """Zero the slots: whoever writes next never sees what was there, and unwritten tokens are finite."""
        for slot in slots:
            self.slot(slot).zero_()


class LendPool:
    """The vault as the ledger sees it: fills kvstore.ledger.SlotPool."""

    def __init__(self, vault: Vault, arena: Arena) -> None:
        self._vault, self._arena = vault, arena

    def lendable(self) -> int:
        return self._vault.lendable()

    def take_for_loan(self, number: int) -> list[SlotId]:
        return self._vault.take_for_loan(number)

    def adopt(self, keys: Sequence[BlockKey], tenant: str) -> list[tuple[int, KeptSpan]]:
        """The tenant is in the keys: whoever can name one may read what lies under it. A span of our own fills its slot."""
        found: list[tuple[int, KeptSpan]] = []
        for key in keys:
            if (span := self._vault.lend_idle(key)) is not None and span.slot is not None:
                digest = span.digest or bulk.digest(self._arena.slot(span.slot).cpu().numpy().data)
                found.append((span.slot, KeptSpan(tuple(span.keys), span.tokens, digest)))
        return found

    def give_back(self, slot: int, kept: KeptSpan | None) -> None:
        if kept is None:
            self._vault.give_back(SlotId(slot))
        else:
            self._vault.give_back(SlotId(slot), kept.keys, kept.tokens, kept.digest)
