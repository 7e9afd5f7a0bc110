"""Borrower: the bank as the engine sees it. Fills the seams Bank (workers/seams.py) and Lendings (workers/remote_attention.py).

    engine: lend_out, adopt, bring_home, settle        --events-->  DebtBook, through the Banker
    engine: poll, at a step boundary                   <--flips--   what is read elsewhere from now on

Translates and remembers where each lent span is; every decision is the book's. Methods are the engine thread's, except
`outgoing` and `staging`, which bulk threads call.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from kvbank.kvstore import loan_events as loans
from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.layout import BlockKey, Boot, SlotId
from kvbank.kvstore.messages import KeptSpan, Ref
from kvbank.kvstore.messages import Stale as StaleMessage
from kvbank.kvstore.span_table import new_uid
from kvbank.kvstore.timings import LoanTimings
from kvbank.kvstore.transport.links import HotEnded, HotLink
from kvbank.kvstore.vault import Arena
from kvbank.workers.remote_attention import Ref as SlotRef
from kvbank.workers.remote_attention import StreamBroken
from kvbank.workers.seams import (
    Adopted,
    AdoptEnded,
    BankEvent,
    GiveWay,
    Lost,
    Move,
    Moved,
    MustReturn,
    Returned,
    Stayed,
    StayedAway,
)

log = logging.getLogger(__name__)

REMEMBERED = 8192                            # spans left at lenders whose place we remember, and keys we distrust


@dataclass(frozen=True, slots=True)
class Lender:
    """A peer that could lend now."""

    id: str
    boot: Boot
    address: str
    lendable: int


@dataclass(slots=True)
class _Home:
    """A span on its way home: which slot it will have, and the buffer its bytes arrive in; None: not asked for yet."""

    slot: SlotId
    buffer: bytearray | None = None


class HotAdapter:
    """A HotLink that fails in the words of workers.remote_attention."""

    def __init__(self, link: HotLink) -> None:
        self.link = link

    def send(self, message: bytes) -> None:
        try:
            self.link.send(message)
        except HotEnded as error:
            raise StreamBroken(f"lender_{error.reason}") from error

    def receive(self) -> bytes:
        try:
            return self.link.receive()
        except HotEnded as error:
            raise StreamBroken(f"lender_{error.reason}") from error


class Borrower:
    """One per worker that runs a model."""

    def __init__(
        self, arena: Arena, slot_bytes: int, *, timings: LoanTimings, wake: Callable[[], None],
        lenders: Callable[[], list[Lender]], peers: Callable[[], list[Lender]] = list,
        locate: Callable[[Sequence[BlockKey]], list[tuple[Lender, list[BlockKey]]]] | None = None, staging_spans: int = 16,
    ) -> None:
        """lenders: who could lend by the latest advice, best first, never waits. peers: who could if they had room, never
        waits. locate: who holds which of these span keys; may take a fraction of a second, called on a thread of its own.
        wake: the engine has something to poll. staging_spans: what may be on its way home at once, beside the vault."""
        self._arena, self._slot_bytes, self._timings, self._wake = arena, slot_bytes, timings, wake
        self._lenders, self._peers, self._locate = lenders, peers, locate
        self._staging_spans = staging_spans
        self._banker: Banker | None = None
        self._names: dict[Boot, str] = {}
        self._streams: dict[str, HotAdapter] = {}
        self._where: dict[int, Ref] = {}
        self._moves: dict[int, Move] = {}
        self._homes: dict[int, _Home] = {}
        self.trace_of: Callable[[float], str] | None = None      # traceparent of the job of that age, when jobs are traced
        self._jobs: dict[int, str] = {}              # adopted uid -> job
        self._asking: dict[str, set[int]] = {}       # job -> uids without an answer
        self._key_of: dict[int, BlockKey] = {}       # uid -> the span's own key, while it is away
        self._left: OrderedDict[BlockKey, Boot] = OrderedDict()      # settled with keep: probably cached there
        self._distrusted: OrderedDict[BlockKey, None] = OrderedDict()
        self._asked = 0                              # slots asked for and neither granted nor refused
        self._inbox: list[Any] = []
        self._lock = Lock()
        self._finder = ThreadPoolExecutor(1, thread_name_prefix="locate")

    def connect(self, banker: Banker) -> None:
        """The banker whose book this is; once, before the engine starts."""
        self._banker = banker

    def close(self) -> None:
        """End the thread that looks for peers."""
        self._finder.shutdown(wait=False, cancel_futures=True)

    @property
    def num_borrowed(self) -> int:
        return len(self._where)

    # -- seams.Bank --------------------------------------------------------------------------------------------------

    def lendable(self) -> int:
        assert self._banker is not None and self._banker.book is not None
        book, now = self._banker.book, self._banker.now()
        free = sum(lender.lendable for lender in self._lenders() if not book.avoids(now, lender.boot))
        return max(0, free - self._asked)

    def callable_back(self) -> bool:
        assert self._banker is not None and self._banker.book is not None
        book, now = self._banker.book, self._banker.now()
        return any(not book.avoids(now, peer.boot) for peer in self._peers())

    def lend_out(self, moves: Sequence[Move], *, tenant: str, age: float, needy: bool = False) -> None:
        with self._lock:
            self._moves.update((move.uid, move) for move in moves)
            self._key_of.update((move.uid, move.keys[-1]) for move in moves)
        self._asked += len(moves)
        lenders = self._to_press() if needy else self._in_order()
        uids = tuple(move.uid for move in moves)
        self._tell(loans.Want(tuple(lender.boot for lender in lenders), uids, tenant, (age, ""), needy=needy,
                              trace=self.trace_of(age) if self.trace_of is not None else ""))

    def adopt(self, job: str, keys: Sequence[BlockKey], *, tenant: str, age: float) -> bool:
        if self._locate is None or not keys:
            return False
        self._asking[job] = set()
        try:
            self._finder.submit(self._found, job, list(keys), tenant, age)
        except RuntimeError:                         # closed: we are stopping
            del self._asking[job]
            return False
        return True

    def left(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        with self._lock:
            return [key for key in keys if key in self._left]

    def distrust(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._left.pop(key, None)
                self._distrusted[key] = None
            while len(self._distrusted) > REMEMBERED:
                self._distrusted.popitem(last=False)

    def bring_home(self, uid: int, slot: SlotId) -> None:
        if uid not in self._where:                   # lost in the same news that recalled it: nothing else would end this
            return
        with self._lock:
            self._homes[uid] = _Home(slot)
        self._fetch_home()

    def settle(self, uids: Sequence[int], *, keep: bool) -> None:
        told: dict[bool, list[int]] = {}             # keep -> uids
        with self._lock:
            for uid in uids:
                self._homes.pop(uid, None)           # bytes on their way home must not land in a slot given up
                ref, key = self._where.pop(uid, None), self._key_of.pop(uid, None)
                kept = keep and key not in self._distrusted
                told.setdefault(kept, []).append(uid)
                if kept and ref is not None and key is not None:
                    self._left[key] = ref.lender_boot
                    self._left.move_to_end(key)
            while len(self._left) > REMEMBERED:
                self._left.popitem(last=False)
        for kept, some in told.items():
            self._tell(loans.NoLongerNeeded(tuple(some), kept))

    def recall(self, slots: int, *, age: float) -> None:
        assert self._banker is not None
        if self._banker.ledger is not None and self._banker.ledger.num_lent:
            self._banker.tell_ledger(loans.Need(slots, (age, "")))

    def poll(self) -> list[BankEvent]:
        with self._lock:
            waiting, self._inbox = self._inbox, []
        events: list[BankEvent] = []
        for effect in [*waiting, *self._at_boundary()]:
            event = self._translate(effect)
            if event is not None:
                events.append(event)
            if isinstance(effect, (loans.Adopted, loans.AdoptFailed)):
                events += self._answered(effect.uid)
        self._fetch_home()
        return events

    # -- remote_attention.Lendings -----------------------------------------------------------------------------------

    def where(self, uid: int) -> tuple[str, SlotRef] | None:
        """Lenders are named by their boot here: one that came back under its id is another, and its refs name other spans."""
        ref = self._where.get(uid)
        return None if ref is None else (ref.lender_boot.hex(), (ref.loan, ref.slot, ref.gen))

    def attends(self, lender: str) -> bool:
        assert self._banker is not None and self._banker.book is not None
        return self._banker.book.attends(_boot(lender))

    def stream(self, lender: str) -> HotAdapter:
        assert self._banker is not None
        boot, banker = _boot(lender), self._banker
        try:
            link = banker.links.hot(
                boot, slow_s=self._timings.attend_hedge_s, lost_s=self._timings.attend_lost_s,
                on_slow=lambda: self._tell(loans.AttendSlow(boot)))
        except HotEnded as error:
            raise StreamBroken(f"lender_{error.reason}") from error
        adapter = self._streams.get(lender)
        if adapter is None or adapter.link is not link:
            self._streams = {name: one for name, one in self._streams.items() if not one.link.ended}
            adapter = self._streams[lender] = HotAdapter(link)
        return adapter

    def silent(self, lender: str, reason: str) -> None:
        self._tell(loans.AttendSilent(_boot(lender)))

    def stale(self, uids: Sequence[int]) -> None:
        refs = tuple(ref for uid in uids if (ref := self._where.get(uid)) is not None)
        if refs:
            self._tell(StaleMessage(refs))

    # -- the banker's Bytes; bulk threads ----------------------------------------------------------------------------

    def outgoing(self, uid: int) -> tuple[KeptSpan, memoryview] | None:
        with self._lock:
            move = self._moves.get(uid)
        if move is None:
            return None
        data = self._arena.slot(move.slot, self._slot_bytes).cpu().numpy().data
        return KeptSpan(move.keys, move.tokens, b""), data

    def staging(self, uid: int) -> memoryview:
        with self._lock:
            home = self._homes.get(uid)
        buffer = home.buffer if home is not None else None
        return memoryview(bytearray(self._slot_bytes) if buffer is None else buffer)

    def from_banker(self, effects: list[Any]) -> None:
        """Effects for the engine, from any thread: kept until the next poll."""
        with self._lock:
            self._inbox += [effect for effect in effects if not isinstance(effect, loans.FlipsWaiting)]
        self._wake()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _tell(self, event: Any) -> None:
        assert self._banker is not None
        rest = self._banker.tell_book(event)
        if rest:
            self.from_banker(rest)

    def _at_boundary(self) -> list[Any]:
        assert self._banker is not None
        return self._banker.tell_book(loans.StepBoundary())

    def _fetch_home(self) -> None:
        """Fetch what is to come home, as far as staging has room."""
        with self._lock:
            room = self._staging_spans - sum(home.buffer is not None for home in self._homes.values())
            due = [uid for uid, home in self._homes.items() if home.buffer is None][: max(0, room)]
            for uid in due:
                self._homes[uid].buffer = bytearray(self._slot_bytes)
        if due:
            self._tell(loans.BringHome(tuple(due), "LOCAL"))

    def _in_order(self) -> list[Lender]:
        """Fill one lender before the next: those that already lend to us first, then as advised."""
        lenders = self._lenders()
        for lender in lenders:
            self._meet(lender)
        using = {ref.lender_boot for ref in self._where.values()}
        return sorted((one for one in lenders if one.lendable), key=lambda one: one.boot not in using)

    def _to_press(self) -> list[Lender]:
        """Everybody who was not asked, or did not refuse, a moment ago."""
        assert self._banker is not None and self._banker.book is not None
        book, now = self._banker.book, self._banker.now()
        peers = [peer for peer in self._peers() if not book.avoids(now, peer.boot)]
        for peer in peers:
            self._meet(peer)
        return peers

    def _meet(self, lender: Lender) -> None:
        assert self._banker is not None
        self._names[lender.boot] = lender.id
        if not self._banker.links.knows(lender.boot):
            self._banker.links.know(lender.boot, lender.address)

    def _name(self, boot: Boot) -> str:
        return self._names.get(boot, boot.hex()[:8])

    def _found(self, job: str, keys: list[BlockKey], tenant: str, age: float) -> None:
        """Own thread: look for holders; whatever happens, the job hears of an end."""
        try:
            self._find(job, keys, tenant, age)
        except Exception:                                    # a thread without anybody above it; the job computes instead
            log.exception("looking for peers failed job=%s", job)
            self.from_banker([AdoptEnded(job)])

    def _find(self, job: str, keys: list[BlockKey], tenant: str, age: float) -> None:
        """Who holds which keys; then the book asks them."""
        assert self._locate is not None
        holders: dict[BlockKey, Boot] = {}
        for lender, held in self._locate(keys):
            self._meet(lender)
            holders |= {key: lender.boot for key in held if key not in holders}
        with self._lock:                             # what we left behind ourselves is known before control hears of it
            holders = {key: self._left.pop(key) for key in keys if key in self._left} | holders
            holders = {key: boot for key, boot in holders.items() if key not in self._distrusted}
        by_boot: dict[Boot, list[BlockKey]] = {}
        for key in keys:
            if key in holders:
                by_boot.setdefault(holders[key], []).append(key)
        trace = self.trace_of(age) if self.trace_of is not None else ""
        asked = [loans.Adopt(boot, tuple(new_uid() for _ in mine), tuple(mine), tenant, (age, ""), trace)
                 for boot, mine in by_boot.items()]
        with self._lock:
            waiting = self._asking.get(job)
            if waiting is not None:
                for event in asked:
                    waiting.update(event.uids)
                    self._jobs.update(dict.fromkeys(event.uids, job))
        for event in asked:
            self._tell(event)
        if not asked:
            self.from_banker([AdoptEnded(job)])

    def _answered(self, uid: int) -> list[BankEvent]:
        with self._lock:
            job = self._jobs.pop(uid, "")
            waiting = self._asking.get(job, set())
            waiting.discard(uid)
            if waiting:
                return []
            self._asking.pop(job, None)
        return [AdoptEnded(job)]

    def _translate(self, effect: Any) -> BankEvent | None:
        match effect:
            case AdoptEnded(job=job):
                self._asking.pop(job, None)
                return effect
            case loans.Yield(age=(stamp, _)):
                return GiveWay(stamp)
            case loans.Moved(uid=uid, ref=ref):
                self._where[uid] = ref
                self._end_move(uid)
                return Moved(uid, self._name(ref.lender_boot))
            case loans.BackToLocal(uid=uid, reason=reason):
                self._end_move(uid)
                self._key_of.pop(uid, None)
                return Stayed(uid, reason)
            case loans.StayedRemote(uid=uid):
                with self._lock:
                    self._homes.pop(uid, None)
                return StayedAway(uid)
            case loans.MustReturn(uid=uid, within_s=within_s, why=why):
                return MustReturn(uid, within_s, why)
            case loans.Adopted(uid=uid, key=key) if key in self._distrusted:     # asked for before we knew
                self._tell(loans.NoLongerNeeded((uid,), False))
                return None
            case loans.Adopted(uid=uid, key=key, ref=ref):
                self._where[uid] = ref
                with self._lock:
                    self._key_of[uid] = key
                return Adopted(self._jobs.get(uid, ""), key, uid, self._name(ref.lender_boot))
            case loans.CameHome(uid=uid):
                self._where.pop(uid, None)
                return self._came_home(uid)
            case loans.Lost(uid=uid, reason=reason):
                self._where.pop(uid, None)
                with self._lock:
                    self._homes.pop(uid, None)
                return Lost(uid, reason)
            case _:
                return None

    def _came_home(self, uid: int) -> BankEvent | None:
        with self._lock:
            home = self._homes.pop(uid, None)
        if home is None or home.buffer is None:
            return None
        self._arena.slot(home.slot, self._slot_bytes).copy_(torch.frombuffer(home.buffer, dtype=torch.uint8))
        return Returned(uid, home.slot)

    def _end_move(self, uid: int) -> None:
        with self._lock:
            if self._moves.pop(uid, None) is not None:
                self._asked -= 1


def _boot(lender: str) -> Boot:
    return Boot(bytes.fromhex(lender))
