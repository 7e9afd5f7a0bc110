"""The auditor: checks the laws of conservation over a whole bank in one process, and tells what led to the first breach.

    L1  per member: blank + idle + held + lent slots = all slots, and what is listed as readable is somewhere
    L2  what lenders have promised = what borrowers hold, but for what is on its way, and that arrives in time
    L3  one writer per slot and generation; bytes that were sealed or published never change
    L4  no loan with a member that is dead, for longer than a term
    L5  the log of a ledger, replayed, makes its state
    L6  when all is quiet: no pin, no hold, no loan, nothing staged or parked
    L7  file descriptors, threads and memory come back

    auditor = Auditor(lambda: bank.members)
    bank.run(job, each_step=auditor.check)         # on the thread that drives the engines, between steps
    auditor.check_quiet()

Attach it before the first job. Laws about books and bytes hold at every instant; L2 and L4 allow for messages under way.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import psutil

from kvbank.kvstore.ledger import GO, HELD, RECALLED, REVOKED, SEALED
from kvbank.kvstore.loan_events import PutEnded, Revoked
from kvbank.kvstore.messages import Envelope, Ref, Renew, Settle
from kvbank.kvstore.span_table import GONE, HOST, LOCAL, REMOTE
from kvbank.kvstore.transport import bulk
from tests.workers.shadow import Shadow

REMEMBERED = 2000                            # calls kept for the history
SHOWN = 60
SLACK_S = 3.0                                # a busy machine is late
DEAD_S = 8.0
BYTES_PER_CHECK = 4 << 20                    # of slots hashed again; a full check hashes all


class Broken(AssertionError):
    """A law is broken; the message names it and ends with what led to it."""


class Auditor:
    """Call it from one thread: the one that drives the engines."""

    def __init__(self, members: Callable[[], Sequence[Any]], *, clock: Callable[[], float] = time.monotonic) -> None:
        """members: those that live now; each is watched from the first check that sees it."""
        self._members, self._clock = members, clock
        self._started = clock()
        self._history: deque[tuple[float, str, str, tuple[Any, ...], Any]] = deque(maxlen=REMEMBERED)
        self._shadows: dict[bytes, Shadow] = {}
        self._names: dict[bytes, str] = {}
        self._since: dict[tuple[Any, ...], float] = {}       # an allowed difference, and when it was seen first
        self._gens: dict[tuple[bytes, int], Any] = {}        # (lender, slot) -> the newest ref seen there
        self._writing: dict[Any, str] = {}                   # ref -> GO given, Put not ended
        self._digests: dict[tuple[Any, ...], bytes] = {}     # what is final -> what it hashed to
        self._turn = 0
        self.excused: set[tuple[bytes, int]] = set()         # (lender, slot) whose bytes a test spoiled on purpose
        self._wrong: list[str] = []                          # seen between two checks
        self.checks = self.hashed = 0

    def check(self, *, full: bool = False) -> None:
        """Raises Broken. full: every final byte is hashed again, not only a share of them."""
        members = list(self._members())
        for member in members:
            self._watch(member)
        with ExitStack() as locks:
            for member in members:                           # one picture of all books; nobody else takes two locks
                locks.enter_context(member.vault.lock)
            if self._wrong:
                self._break(self._wrong[0])
            for law in (self._l1, self._l2, self._l3, self._l4, self._l5):
                for what in law(members):
                    self._break(what)
        self._hash_some(members, full)
        self.checks += 1

    def check_quiet(self) -> None:
        """As check, and L6: nobody has work or a message under way. Raises Broken."""
        self.check(full=True)
        for member in self._members():
            for what in self._l6(member):
                self._break(f"L6 {member.id}: {what}")

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self, member: Any) -> None:
        if member.boot in self._shadows:
            return
        with member.vault.lock:
            self._names[member.boot] = member.id
            self._shadows[member.boot] = Shadow(member.ledger, lambda name, given, got: self._heard(member.id, name, given, got))
            if (book := getattr(member, "book", None)) is not None:
                on = book.on

                def listen(now: float, event: Any) -> Any:
                    effects = on(now, event)
                    self._history.append((self._clock(), member.id, "book", (event,), tuple(effects)))
                    return effects

                book.on = listen

    def _heard(self, who: str, name: str, given: tuple[Any, ...], got: Any) -> None:
        """Under the lock of that member."""
        self._history.append((self._clock(), who, f"ledger.{name}", given, got if name != "on" else tuple(got)))
        if name == "begin_put" and got.kind == GO:
            self._writing[given[1]] = who if given[1] not in self._writing else f"{who} twice"
        elif name == "on" and isinstance(event := given[1], PutEnded):
            self._writing.pop(event.ref, None)
        elif name == "on" and isinstance(event, Envelope):
            ended = [effect.ref for effect in got if isinstance(effect, Revoked)]
            self._wrong += [f"L3 {who}: {what}" for what in _ended_by(event, ended)]

    def history(self, last: int = SHOWN) -> str:
        """The last calls, one a line."""
        lines = []
        for at, who, door, given, got in list(self._history)[-last:]:
            event = given[-1] if given else ""
            text = f"{at - self._started:9.4f} {who:12} {door:16} {_short(event)}"
            if got:
                text += " -> " + (", ".join(map(_short, got)) if isinstance(got, tuple) else _short(got))
            lines.append(text)
        return "\n".join(lines)

    def _break(self, what: str) -> None:
        raise Broken(f"{what}\nhistory, the last {SHOWN} calls:\n{self.history()}")

    # -- the laws ----------------------------------------------------------------------------------------------------

    def _l1(self, members: Sequence[Any]) -> Iterator[str]:
        for member in members:
            vault, ledger = member.vault, member.ledger
            for what in [*vault.check(), *ledger.check(), *(member.book.check() if hasattr(member, "book") else ())]:
                yield f"L1 {member.id}: {what}"
            lent, promised = sorted(vault._lent), sorted(ledger._lent)
            if lent != promised:
                yield f"L1 {member.id}: the vault lent slots {lent}, the ledger knows of {promised}"
            known = {**vault._held, **vault._idle}
            for key, span in vault.index._by_key.items():
                if span.place == GONE or key not in span.keys or (span.place == LOCAL and known.get(span.uid) is not span):
                    yield f"L1 {member.id}: the index lists a span that is nowhere: {_span(span)}"
            if hasattr(member, "engine"):
                yield from (f"L1 {member.id}: {what}" for what in _own(member))

    def _l2(self, members: Sequence[Any]) -> Iterator[str]:
        lenders = {member.boot: member for member in members}
        open_now: set[tuple[Any, ...]] = set()
        for borrower in members:
            if (book := getattr(borrower, "book", None)) is None:
                continue
            held, read = set(book.held()), dict.fromkeys(book.refs().values())
            for ref in held:
                lender = lenders.get(ref.lender_boot)
                slot = lender.ledger._find(ref) if lender is not None else None
                if slot is None or slot.state == REVOKED:
                    if lender is not None:
                        open_now.add(("L2", borrower.id, "holds", ref, "which its lender does not know"))
                    continue
                if ref in read and slot.state == HELD:
                    yield f"L2 {borrower.id}: reads {ref} before it was sealed"
                if ref in read and (debt := book._by_ref[ref]).ref == ref and debt.digest != slot.span.digest:
                    yield f"L2 {borrower.id}: holds another digest of {ref} than its lender"
            for lender in members:
                for ref in lender.ledger.live_refs(borrower.boot):
                    if ref not in held:
                        open_now.add(("L2", lender.id, "promised", ref, "which its borrower does not hold"))
        yield from self._overdue("L2", open_now, self._patience(members))

    def _l3(self, members: Sequence[Any]) -> Iterator[str]:
        for ref, writer in self._writing.items():
            if writer.endswith("twice"):
                yield f"L3 {writer}: two writers of {ref}"
        for member in members:
            for number, slot in member.ledger._lent.items():
                before = self._gens.get((member.boot, number))
                if before is not None and before != slot.ref and slot.ref.gen <= before.gen:
                    yield f"L3 {member.id}: slot {number} is {slot.ref} after {before}"
                self._gens[member.boot, number] = slot.ref
                if slot.pins > 1 and slot.putting:
                    yield f"L3 {member.id}: slot {number} is read while it is written: {slot}"

    def _l4(self, members: Sequence[Any]) -> Iterator[str]:
        alive = {member.boot for member in members}
        dead = set()
        for member in members:
            dead |= {("L4", member.id, "lends to", boot.hex()[:8], "which is dead")
                     for boot in member.ledger._loans if boot not in alive}
            if hasattr(member, "book"):
                dead |= {("L4", member.id, "borrows from", boot.hex()[:8], "which is dead")
                         for boot, lender in member.book._lenders.items() if lender.loans and boot not in alive}
        yield from self._overdue("L4", dead, max(DEAD_S, self._patience(members)))

    def _l5(self, members: Sequence[Any]) -> Iterator[str]:
        for member in members:
            try:
                what = self._shadows[member.boot].differs()
            except (AssertionError, IndexError, KeyError) as error:
                what = f"its log cannot be replayed: {type(error).__name__} {error}"
            if what:
                yield f"L5 {member.id}: {what}"

    def _l6(self, member: Any) -> Iterator[str]:
        counts = member.vault.counts()
        if counts.held or counts.lent or member.ledger.num_lent:
            yield f"slots are still in use: {counts}, {member.ledger.num_by_state()}"
        if (book := getattr(member, "book", None)) is not None and (book.held() or book.refs()):
            yield f"the book still holds {book.held()}"
        if (engine := getattr(member, "engine", None)) is None:
            return
        room, reuse = engine.room, engine.scheduler.reuse
        left = {"jobs": engine.jobs(), "away": room.away, "parked": room.parked, "moving": room._moving,
                "returning": room._returning, "claims": reuse._computing, "wanted": reuse._wanted, "adopting": reuse._adopting}
        if hasattr(member, "borrower"):
            left |= {"where": member.borrower._where, "homes": member.borrower._homes, "moves": member.borrower._moves}
        if (fetcher := getattr(member, "_fetcher", None)) is not None:
            left |= {"staged": fetcher.staged_bytes, "fetches": fetcher._jobs}
        if (host := member.parts.host) is not None:
            left["pinned host bytes"] = host.status().counters["bytes_pinned"]
        yield from (f"{name} is not empty: {what}" for name, what in left.items() if what)

    def _overdue(self, law: str, now_open: set[tuple[Any, ...]], patience_s: float) -> Iterator[str]:
        """What is allowed for a while, and has been there for longer. Forgets what is over."""
        now = self._clock()
        for what in [what for what in self._since if what[0] == law and what not in now_open]:
            del self._since[what]
        for what in now_open:
            since = self._since.setdefault(what, now)
            if now - since > patience_s:
                _, who, does, *rest = what
                yield f"{law} {who}: {does} {' '.join(map(str, rest))}, for {now - since:.1f} s"

    @staticmethod
    def _patience(members: Sequence[Any]) -> float:
        """A promise that one side alone knows of ends with the next Renew, its fill timer, or its term."""
        timings = members[0].timings
        return float(max(timings.term_s, 2 * timings.renew_s + timings.fill_s) + SLACK_S)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _hash_some(self, members: Sequence[Any], full: bool) -> None:
        """Sealed bytes are what was sealed; published spans are what they were when they were first seen."""
        final: list[tuple[tuple[Any, ...], Any, int, bytes]] = []          # (name, member, slot, digest or b"")
        for member in members:
            with member.vault.lock:
                for number, slot in member.ledger._lent.items():
                    if slot.state in (SEALED, RECALLED):
                        final.append((("lent", slot.ref), member, number, slot.span.digest))
                for span in [*member.vault._idle.values(), *member.vault._held.values()]:
                    if span.place == LOCAL and len(span.keys) == member.layout.blocks_per_span:
                        final.append((("own", member.boot, span.uid, span.slot), member, span.slot, span.digest))
        final = [one for one in final if (one[1].boot, one[2]) not in self.excused]
        known = {name for name, *_ in final}
        self._digests = {name: digest for name, digest in self._digests.items() if name in known}
        size = max((member.layout.slot_bytes for member in members), default=1)
        share = len(final) if full else max(1, BYTES_PER_CHECK // size)
        for step in range(min(share, len(final))):
            self._turn += 1
            name, member, number, said = final[self._turn % len(final)] if not full else final[step]
            self._hash_one(name, member, number, said)

    def _hash_one(self, name: tuple[Any, ...], member: Any, number: int, said: bytes) -> None:
        def still() -> bool:
            with member.vault.lock:
                if name[0] == "lent":
                    slot = member.ledger._find(name[1])
                    return slot is not None and slot.state in (SEALED, RECALLED)
                span = member.vault._idle.get(name[2]) or member.vault._held.get(name[2])
                return span is not None and span.slot == number

        length = bulk.digested_bytes(said) if said else member.layout.slot_bytes
        got = bulk.digest(member.arena.slot(number, length).numpy().data)
        want = self._digests.setdefault(name, said or got)
        self.hashed += 1
        if got != want and still():                          # it may have been given up while it was hashed
            self._break(f"L3 {member.id}: bytes of slot {number} changed after they were final: {name}")


def _ended_by(envelope: Envelope, ended: list[Ref]) -> Iterator[str]:
    """A borrower's word ends its own promises, those that it names: what else a message ended."""
    message, sender = envelope.message, envelope.from_boot
    for ref in ended:
        if isinstance(message, Settle) and (ref not in message.refs or ref.borrower_boot != sender):
            yield f"a Settle ended {ref}, which it does not name"
        if isinstance(message, Renew) and (ref.loan in message.keep or ref.loan > message.upto):
            yield f"a Renew ended {ref}, which it keeps or does not know"


def _own(member: Any) -> Iterator[str]:
    """A worker's spans against its sequences. On the engine's thread, between steps."""
    engine, vault = member.engine, member.vault
    readers: Counter[int] = Counter()
    seen: dict[int, Any] = {}
    for seq in engine.jobs():
        for index, span in seq.table.live():
            readers[span.uid] += 1
            seen[span.uid] = span
            if span.place == GONE:
                yield f"{seq.job.id} reads span {index}, which is gone: {_span(span)}"
        end, holes = -(-seq.num_tokens // seq.table.span_tokens), seq.table.holes
        for index in range(seq.table.released, end):
            start, stop = index * seq.table.span_tokens, min((index + 1) * seq.table.span_tokens, seq.num_tokens)
            if seq.table.at(index) is None and holes.overlap(start, stop) < stop - start:
                yield f"{seq.job.id} has no span for tokens {start}..{stop - 1} and no hole there either"
    room = engine.room
    if (borrower := getattr(member, "borrower", None)) is not None:
        home_here = member.chain.homes if member.chain is not None else {}       # and elsewhere for another shard
        yield from (f"a span is read at a lender, and no loan knows it: {_span(span)}" for uid, span in room.away.items()
                    if span.refs and uid not in borrower._where and uid not in home_here)
    elsewhere = {REMOTE: room.away, HOST: room.parked}
    for span in [*vault._held.values(), *room.away.values(), *room.parked.values(), *seen.values()]:
        if span.refs != readers[span.uid]:
            yield f"a span has {span.refs} readers in the books and {readers[span.uid]} in the sequences: {_span(span)}"
        if span.place in elsewhere and elsewhere[span.place].get(span.uid) is not span:
            yield f"nobody knows where a span is: {_span(span)}"
        if span.place == LOCAL and vault._held.get(span.uid) is not span:
            yield f"a span in use is not held: {_span(span)}"


def _span(span: Any) -> str:
    return f"uid {span.uid} {span.place} slot {span.slot} refs {span.refs} keys {[key.hex()[:6] for key in span.keys]}"


def _short(what: Any) -> str:
    """A call's argument or effect in few words: refs by their short names, keys and boots cut."""
    if hasattr(what, "from_boot"):
        return f"{what.from_boot.hex()[:6]}: {_short(what.message)}"
    if isinstance(what, bytes):
        return what.hex()[:6]
    if isinstance(what, Ref) or not is_dataclass(what):
        if isinstance(what, (tuple, list)):
            return f"[{', '.join(map(_short, what[:4]))}{', …' if len(what) > 4 else ''}]"
        return str(what)
    fields_of = [getattr(what, name.name) for name in fields(what) if name.name not in ("compat", "tokens")]
    return f"{type(what).__name__}({', '.join(_short(value) for value in fields_of)})"


# -- L7 -------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Footprint:
    """What this process has of the machine."""

    fds: int
    threads: int
    rss: int                                 # bytes

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        return cls(len(os.listdir("/proc/self/fd")), threading.active_count(), psutil.Process().memory_info().rss)

    def check_back(self, *, within_s: float = 10.0, share: float = 0.05, few: int = 4, few_bytes: int = 32 << 20) -> None:
        """L7: no more than `share` above this again, or a few; gRPC's own threads and sockets need a moment. Raises Broken."""
        give_up = time.monotonic() + within_s
        while True:
            now = Footprint.now()
            over = [f"{name} {before} -> {after}" for name, before, after, free in (
                ("fds", self.fds, now.fds, few), ("threads", self.threads, now.threads, few),
                ("rss", self.rss, now.rss, few_bytes)) if after > before * (1 + share) + free]
            if not over:
                return
            if time.monotonic() > give_up:
                raise Broken(f"L7: {', '.join(over)}; threads: {sorted(t.name for t in threading.enumerate())}")
            threading.Event().wait(0.2)
