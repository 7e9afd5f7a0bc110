"""Banker: drives the two loan cores of one member. One lock, one timer thread, a few threads for bulk bytes.

    sessions, timers, engine --events--> LoanLedger, DebtBook --effects--> sessions, bulk threads, engine

Decides nothing: the cores do. Holds the lock only while a core thinks; bytes move and messages are sent without it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc

from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.frame import Buffer
from kvbank.kvstore.layout import Boot
from kvbank.kvstore.ledger import LoanLedger
from kvbank.kvstore.loan_events import (
    Answer,
    Avoid,
    CopyVerified,
    FetchFailed,
    InDebt,
    PeerGone,
    ProbePeer,
    PutDone,
    PutFailed,
    Revoked,
    Send,
    StartFetch,
    StartPut,
    StepBoundary,
    Tick,
    Yield,
)
from kvbank.kvstore.messages import (
    FOR_LENDER,
    PROTOCOL_VERSION,
    Compat,
    Envelope,
    Hello,
    HelloAck,
    KeptSpan,
    OtherBoot,
    Put,
    Ref,
)
from kvbank.kvstore.transport import bulk, wire
from kvbank.kvstore.transport.links import FETCH, PROBE_KEY, PUT, SESSION, Links, Outbox

log = logging.getLogger(__name__)

BULK_THREADS = 2
MAX_SLEEP_S = 1.0
FAILED_PAUSE_S = 0.1                         # after a bug, so that it does not spin


def new_boot() -> Boot:
    """A name for this life of the process."""
    return Boot(os.urandom(16))


class Bytes(Protocol):
    """Where the bytes of this member's own spans are (workers/borrower.py)."""

    def outgoing(self, uid: int) -> tuple[KeptSpan, Buffer] | None:
        """A full local span to be put at a lender; None when it is not wanted any more. digest is not filled in."""

    def staging(self, uid: int) -> memoryview:
        """A buffer of one span for bytes that come back."""


class Banker:
    """One per member. `ledger` is None where nothing is lent, `book` where nothing is borrowed."""

    def __init__(
        self, node: str, boot: Boot, compat: Compat, links: Links, lock: Any, clock: Callable[[], float], *,
        ledger: LoanLedger | None = None, book: DebtBook | None = None, data: Bytes | None = None,
        on_engine: Callable[[list[Any]], None] | None = None,
    ) -> None:
        """lock: the short lock of vault and ledger. on_engine: effects for the engine, and FlipsWaiting to wake it."""
        self.node, self.boot, self.compat, self.links = node, boot, compat, links
        self.ledger, self.book = ledger, book
        self._lock, self._clock, self._data = lock, clock, data
        self._on_engine = on_engine or (lambda effects: None)
        self._timer = threading.Condition()
        self._dirty = False
        self._stopping = False
        self._served: dict[Boot, Outbox] = {}
        self._moving: set[Ref] = set()                 # bulk transfers under way
        self._compats: dict[Boot, Compat] = {}
        self._pool = ThreadPoolExecutor(BULK_THREADS, thread_name_prefix="bulk")
        self._probes = ThreadPoolExecutor(2, thread_name_prefix="probe")
        self._thread = threading.Thread(target=self._run_timers, name="bank-timers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._timer:
            self._stopping = True
            self._timer.notify()
        self.links.close()
        for outbox in list(self._served.values()):
            outbox.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._probes.shutdown(wait=False, cancel_futures=True)

    def now(self) -> float:
        return self._clock()

    # -- events in ---------------------------------------------------------------------------------------------------

    def tell_book(self, event: Any) -> list[Any]:
        """Feed the borrower's core and carry out what it says. Returns the effects that are the engine's to apply."""
        assert self.book is not None
        if isinstance(event, StepBoundary) and not self.book.flips_waiting:
            return []                                   # the engine comes every step: the timers would be woken each time
        with self._lock:
            effects = self._route(list(self.book.on(self._clock(), event)))
        return self._carry_out(effects)

    def tell_ledger(self, event: Any) -> list[Any]:
        """Feed the lender's core and carry out what it says. Returns all effects, for the caller's Answer."""
        assert self.ledger is not None
        with self._lock:
            effects = self._route(list(self.ledger.on(self._clock(), event)))
        self._carry_out(effects)
        return effects

    def arrived(self, data: bytes) -> None:
        """An envelope from any session."""
        try:
            envelope = wire.unpack(data)
        except wire.WireError as error:
            log.warning("bad envelope error=%s", error)
            return
        message = envelope.message
        if isinstance(message, Hello):
            self._compats[envelope.from_boot] = message.compat
        if self.ledger is not None and isinstance(message, FOR_LENDER):
            self.tell_ledger(envelope)
        if self.book is not None and (isinstance(message, OtherBoot) or not isinstance(message, FOR_LENDER)):
            self._hand_over(self.tell_book(envelope))

    def serve_session(self, borrower: Boot, outbox: Outbox) -> None:
        """A peer opened a session to us: what the ledger says to it goes there."""
        old = self._served.get(borrower)
        self._served[borrower] = outbox
        if old is not None:
            old.close()

    def session_ended(self, borrower: Boot, outbox: Outbox) -> None:
        outbox.close()
        if self._served.get(borrower) is not outbox:
            return                                      # it has opened another one meanwhile
        del self._served[borrower]
        with self._lock:
            owes = self.ledger is not None and bool(self.ledger.live_refs(borrower))
        if owes and self.links.knows(borrower):
            self._submit(self._probes, self._probe, borrower)    # its slots need not wait for the term

    def compat_of(self, borrower: Boot) -> Compat | None:
        """What that borrower said its spans are."""
        return self._compats.get(borrower)

    def peer_gone(self, boot: Boot) -> None:
        """That life of a peer is over."""
        self.links.drop(boot)
        if self.ledger is not None:
            self.tell_ledger(PeerGone(boot))
        if self.book is not None:
            self._hand_over(self.tell_book(PeerGone(boot)))

    # -- effects out -------------------------------------------------------------------------------------------------

    def _route(self, effects: list[Any]) -> list[Any]:
        """Under the lock: what one core says for the other reaches it before anything is sent."""
        done: list[Any] = []
        while effects:
            effect = effects.pop(0)
            if isinstance(effect, InDebt):
                if self.ledger is not None:
                    effects = [*self.ledger.on(self._clock(), effect), *effects]
            elif isinstance(effect, Avoid):
                if self.book is not None:
                    effects = [*self.book.on(self._clock(), effect), *effects]
            else:
                done.append(effect)
        self._dirty = True
        return done

    def _carry_out(self, effects: Iterable[Any]) -> list[Any]:
        rest = []
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case StartPut():
                    self._submit(self._pool, self._put, effect)
                case StartFetch():
                    self._submit(self._pool, self._fetch, effect)
                case ProbePeer():
                    self._submit(self._probes, self._probe, effect.boot)
                case Yield():
                    self._hand_over([effect])
                case Answer() | Revoked():
                    pass                                # the bulk handler's; the audit's
                case _:
                    rest.append(effect)
        with self._timer:
            self._timer.notify()
        return rest

    def _hand_over(self, effects: list[Any]) -> None:
        if effects:
            self._on_engine(effects)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[[Any], None], argument: Any) -> None:
        if not self._stopping:
            pool.submit(self._guarded, work, argument)

    def _guarded(self, work: Callable[[Any], None], argument: Any) -> None:
        try:
            work(argument)
        except Exception:                               # a worker thread has nobody above it; the cores retry by timer
            log.exception("bank work failed work=%s", work.__name__)

    def _send(self, effect: Send) -> None:
        envelope = wire.pack(Envelope(self.boot, effect.to_boot, effect.message))
        served = self._served.get(effect.to_boot)
        if not isinstance(effect.message, FOR_LENDER) or (isinstance(effect.message, OtherBoot) and served):
            if served is not None:
                served.put(envelope)
            return
        boot = effect.to_boot
        session, fresh = self.links.session(boot, self.arrived, lambda: self._session_lost(boot))
        if session is None:
            return
        if fresh:
            session.outbox.put(wire.pack(Envelope(self.boot, boot, self._hello())))
        session.outbox.put(envelope)

    def _hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, self.node, self.boot, os.urandom(8), self.compat)

    def _session_lost(self, boot: Boot) -> None:
        """Our session to a lender broke: find out whether that life is over."""
        if not self._stopping and self.links.knows(boot):
            self._submit(self._probes, self._probe, boot)

    # -- bulk bytes --------------------------------------------------------------------------------------------------

    def _put(self, effect: StartPut) -> None:
        assert self._data is not None and self.book is not None
        ref, uid = effect.ref, effect.uid
        if ref in self._moving:
            return                                      # said again while the bytes still move
        self._moving.add(ref)
        try:
            outgoing = self._data.outgoing(uid) if effect.source is None else self._relayed(effect)
            if outgoing is None:
                event: Any = PutFailed(ref, "cut")
            else:
                event = self._put_bytes(ref, *outgoing)
        finally:
            self._moving.discard(ref)
        self._hand_over(self.tell_book(event))

    def _put_bytes(self, ref: Ref, span: KeptSpan, data: Buffer) -> PutDone | PutFailed:
        assert self.book is not None
        mine = bulk.digest(data)
        header = bulk.pack_put(Put(ref, KeptSpan(span.keys, span.tokens, mine), memoryview(data).nbytes))
        try:
            call = self.links.bulk(ref.lender_boot, PUT)
            raw = call(_chain(header, bulk.pieces(data)), timeout=self.book.timings.put_give_up_s, metadata=self.links.metadata)
            answer = bulk.unpack_answer(raw)
        except (grpc.RpcError, bulk.BulkFormatError, KeyError):
            return PutFailed(ref, "cut")
        if answer.kind == bulk.SEALED:
            return PutDone(ref, mine, answer.digest)
        return PutFailed(ref, {bulk.STALE: "stale", bulk.BAD_DIGEST: "bad_digest"}.get(answer.kind, "cut"))

    def _relayed(self, effect: StartPut) -> tuple[KeptSpan, Buffer] | None:
        """A span that moves from one lender to another, through staging."""
        assert self._data is not None and effect.source is not None
        target = self._data.staging(effect.uid)
        if self._fetch_bytes(effect.source, target) != effect.digest or bulk.digest(target) != effect.digest:
            return None
        outgoing = self._data.outgoing(effect.uid)
        return None if outgoing is None else (outgoing[0], target)

    def _fetch(self, effect: StartFetch) -> None:
        assert self._data is not None
        if effect.ref in self._moving:
            return
        self._moving.add(effect.ref)
        try:
            target = self._data.staging(effect.uid)
            told = self._fetch_bytes(effect.ref, target)
            event: Any = FetchFailed(effect.uid, "stale" if told == b"" else "cut")
            if told:
                event = CopyVerified(effect.uid, bulk.digest(target), effect.attempt)
        finally:
            self._moving.discard(effect.ref)
        self._hand_over(self.tell_book(event))

    def _fetch_bytes(self, ref: Ref, target: memoryview) -> bytes | None:
        assert self.book is not None
        try:
            call = self.links.bulk(ref.lender_boot, FETCH)
            messages = call(bulk.pack_fetch(ref), timeout=self.book.timings.put_give_up_s, metadata=self.links.metadata)
            return bulk.place_fetch(messages, target)
        except (grpc.RpcError, bulk.BulkFormatError, KeyError):
            return None

    # -- is a peer still there? --------------------------------------------------------------------------------------

    def _probe(self, boot: Boot) -> None:
        """A second connection and a Hello: PeerGone when another boot answers, or nobody listens three times running."""
        timings = (self.book or self.ledger).timings       # type: ignore[union-attr]
        refusals, pause = 0, timings.gone_within_s / (timings.gone_refusals + 1)
        for _ in range(timings.gone_refusals):
            answer = self._knock(boot, timings.attend_lost_s)
            if answer == "other":
                self.peer_gone(boot)
                return
            if answer != "refused" or self._stopping:
                return
            refusals += 1
            threading.Event().wait(pause)
        if refusals >= timings.gone_refusals:
            self.peer_gone(boot)

    def _knock(self, boot: Boot, timeout_s: float) -> str:
        """'same' | 'other' | 'refused' | 'silent'."""
        channel = self.links.fresh_channel(boot)
        if channel is None:
            return "silent"
        outbox = Outbox()
        outbox.put(wire.pack(Envelope(self.boot, boot, self._hello())))
        try:
            knock: Callable[..., Any] = channel.stream_stream(SESSION)
            for data in knock(iter(outbox), timeout=timeout_s, metadata=(*self.links.metadata, (PROBE_KEY, "1"))):
                message = wire.unpack(data).message
                if isinstance(message, HelloAck):
                    return "same" if message.boot == boot else "other"
            return "silent"
        except grpc.RpcError as error:
            return "refused" if error.code() == grpc.StatusCode.UNAVAILABLE else "silent"
        except wire.WireError:
            return "silent"
        finally:
            outbox.close()
            channel.close()

    # -- timers ------------------------------------------------------------------------------------------------------

    def _run_timers(self) -> None:
        while not self._stopping:
            try:
                self._wait_or_tick()
            except Exception:                           # without this thread nothing is renewed: every loan would end
                log.exception("bank timers failed")
                threading.Event().wait(FAILED_PAUSE_S)

    def _wait_or_tick(self) -> None:
        with self._lock:
            now = self._clock()
            wakes = [core.wake_at() for core in (self.ledger, self.book) if core is not None]
            self._dirty = False
        wait = min([MAX_SLEEP_S, *(at - now for at in wakes)])
        if wait > 0:
            with self._timer:
                if not self._dirty and not self._stopping:
                    self._timer.wait(wait)
            return
        if self.ledger is not None:
            self.tell_ledger(Tick())
        if self.book is not None:
            self._hand_over(self.tell_book(Tick()))


def _chain(header: bytes, pieces: Iterable[bytes]) -> Iterable[bytes]:
    yield header
    yield from pieces


