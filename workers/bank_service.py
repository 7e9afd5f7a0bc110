"""Bank over gRPC: the lender's door. Sessions, spans in and out, and the hot stream; every byte of it raw or protobuf.

Forwards to the Banker and the AttendServer; the only thing it does itself is place and read slots' bytes, pinned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from threading import Thread

import grpc

from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.layout import Boot, Layout, SlotId
from kvbank.kvstore.ledger import BUSY, GO, SEALED, LoanLedger
from kvbank.kvstore.loan_events import Answer, PutBytes, PutEnded, Tainted
from kvbank.kvstore.messages import BadDigest, Envelope, Hello, HelloAck, Ref, Sealed
from kvbank.kvstore.traces import Traces
from kvbank.kvstore.transport import bulk, wire
from kvbank.kvstore.transport.hot import HotFormatError
from kvbank.kvstore.transport.links import BOOT_KEY, PROBE_KEY, Outbox
from kvbank.kvstore.vault import Arena
from kvbank.workers.attend_server import AttendServer

log = logging.getLogger(__name__)


class LedgerPins:
    """The ledger's pins under the lock of vault and ledger, for the attend server."""

    def __init__(self, banker: Banker, ledger: LoanLedger, lock: object) -> None:
        self._banker, self._boot, self._ledger, self._lock = banker, banker.boot, ledger, lock

    def pin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> list[bool]:
        with self._lock:                                 # type: ignore[attr-defined]
            return [self._ledger.pin(self._ref(borrower, ref)) for ref in refs]

    def unpin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> None:
        with self._lock:                                 # type: ignore[attr-defined]
            for ref in refs:
                self._ledger.unpin(self._ref(borrower, ref))

    def digest(self, borrower: bytes, ref: tuple[int, int, int]) -> bytes | None:
        with self._lock:                                 # type: ignore[attr-defined]
            span = self._ledger.span_of(self._ref(borrower, ref))
        return None if span is None else span.digest

    def trace_of(self, borrower: bytes, loan: int) -> str:
        with self._lock:                                 # type: ignore[attr-defined]
            return self._ledger.trace_of(Boot(borrower), loan)

    def taint(self, borrower: bytes, ref: tuple[int, int, int]) -> None:
        self._banker.tell_ledger(Tainted(self._ref(borrower, ref)))

    def _ref(self, borrower: bytes, ref: tuple[int, int, int]) -> Ref:
        return Ref(self._boot, Boot(borrower), *ref)


def layout_from(banker: Banker, borrower: bytes) -> Layout | None:
    """The layout that borrower's spans have, by its Hello."""
    compat = banker.compat_of(Boot(borrower))
    if compat is None:
        return None
    return Layout(num_layers=compat.layer_last, layer_first=compat.layer_first, layer_last=compat.layer_last,
                  kv_heads=compat.kv_heads, head_dim=compat.head_dim, span_tokens=compat.span_tokens,
                  block_size=compat.block_size, dtype=compat.dtype)


class BankService:
    """One per member that lends."""

    def __init__(
        self, banker: Banker, arena: Arena, attend: AttendServer, lock: object, *, traces: Traces | None = None
    ) -> None:
        assert banker.ledger is not None
        self._traces = traces
        self._banker, self._ledger, self._arena, self._attend, self._lock = banker, banker.ledger, arena, attend, lock

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("kvbank.Bank", {
            "Session": grpc.stream_stream_rpc_method_handler(self.session),
            "Put": grpc.stream_unary_rpc_method_handler(self.put),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch),
            "Attend": grpc.stream_stream_rpc_method_handler(self.attend),
        })

    def session(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Envelopes in; what the ledger says to that borrower out."""
        borrower, outbox = _caller(context), Outbox()
        if any(key == PROBE_KEY for key, _ in context.invocation_metadata()):
            yield from self._answer_probe(messages)
            return
        self._banker.serve_session(borrower, outbox)
        context.add_callback(lambda: self._banker.session_ended(borrower, outbox))
        Thread(target=self._read, args=(messages,), name="session-in", daemon=True).start()
        yield from outbox

    def _answer_probe(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Somebody doubts that we are who we were: one Hello, one HelloAck, nothing else changes."""
        envelope = wire.unpack(next(messages))
        if isinstance(envelope.message, Hello):
            ack = HelloAck(self._banker.boot, envelope.message.nonce, "", "probe", 0)
            yield wire.pack(Envelope(self._banker.boot, envelope.from_boot, ack))

    def _read(self, messages: Iterator[bytes]) -> None:
        try:
            for data in messages:
                self._banker.arrived(data)
        except grpc.RpcError:
            pass
        except Exception as error:                       # gRPC's iterator raises a bare Exception when the call is over
            log.debug("session reader ended error=%s", type(error).__name__)

    def put(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Place a span in the slot its ref names. The bytes count only once their digest was checked where they lie."""
        try:
            header = bulk.unpack_put(next(messages))
        except (StopIteration, bulk.BulkFormatError):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        ref = header.ref
        if ref.borrower_boot != _caller(context) or header.length > self._arena.slot_bytes:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        with self._lock:                                 # type: ignore[attr-defined]
            verdict = self._ledger.begin_put(self._banker.now(), ref)
        if verdict.kind == SEALED:
            return bulk.pack_answer(bulk.PutAnswer(bulk.SEALED, verdict.digest))
        if verdict.kind != GO:
            return bulk.pack_answer(bulk.PutAnswer(bulk.BUSY if verdict.kind == BUSY else bulk.STALE))
        whole, began = False, 0.0 if self._traces is None else time.monotonic()
        target = self._arena.slot(SlotId(ref.slot), header.length)
        try:
            whole = self._place(messages, target.numpy().data, ref)
        except Exception as error:                       # the stream broke: what came is not used
            log.debug("put cut error=%s", type(error).__name__)
        got = bulk.digest(target.numpy().data) if whole else None
        effects = self._banker.tell_ledger(PutEnded(ref, header.span if whole else None, got))
        if self._traces is not None:
            self._traces.note("lender.put", self._trace_of(ref), began, time.monotonic(), bytes=header.length)
        return bulk.pack_answer(_answer(effects))

    def fetch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Read a span back, pinned for as long as it takes."""
        try:
            ref = bulk.unpack_fetch(request)
        except bulk.BulkFormatError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        with self._lock:                                 # type: ignore[attr-defined]
            span = self._ledger.span_of(ref) if ref.borrower_boot == _caller(context) else None
            pinned = span is not None and self._ledger.pin(ref)
        if span is None or not pinned:
            return
        began, length = 0.0 if self._traces is None else time.monotonic(), 0
        try:
            length = int.from_bytes(span.digest[4:12], "little")
            for piece in bulk.pieces(self._arena.slot(SlotId(ref.slot), length).numpy().data):
                yield bulk.fetch_piece(piece)
            yield bulk.fetch_end(span.digest)
        finally:
            with self._lock:                             # type: ignore[attr-defined]
                self._ledger.unpin(ref)
            if self._traces is not None:
                self._traces.note("lender.fetch", self._trace_of(ref), began, time.monotonic(), bytes=length)

    def attend(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The hot stream."""
        try:
            yield from self._attend.serve(_caller(context), messages)
        except (HotFormatError, LookupError):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "invalid_request")

    def _trace_of(self, ref: Ref) -> str:
        with self._lock:                                 # type: ignore[attr-defined]
            return self._ledger.trace_of(ref.borrower_boot, ref.loan)

    def _place(self, messages: Iterator[bytes], target: memoryview, ref: Ref) -> bool:
        at = 0
        for piece in messages:
            if at + len(piece) > target.nbytes:
                return False
            target[at : at + len(piece)] = piece
            at += len(piece)
            self._banker.tell_ledger(PutBytes(ref))
        return at == target.nbytes


def _answer(effects: list[object]) -> bulk.PutAnswer:
    for effect in effects:
        if isinstance(effect, Answer):
            if isinstance(effect.message, Sealed):
                return bulk.PutAnswer(bulk.SEALED, effect.message.digest)
            return bulk.PutAnswer(bulk.BAD_DIGEST if isinstance(effect.message, BadDigest) else bulk.STALE)
    return bulk.PutAnswer(bulk.BUSY)                     # cut short: the borrower tries again


def _caller(context: grpc.ServicerContext) -> Boot:
    """The calling life, as it names itself; what it may touch is decided by refs, which carry the same name."""
    for key, value in context.invocation_metadata():
        if key == BOOT_KEY and isinstance(value, str):
            try:
                return Boot(bytes.fromhex(value))
            except ValueError:
                break
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
    raise AssertionError("abort raises")
