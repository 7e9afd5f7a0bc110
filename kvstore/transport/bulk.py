"""The bulk stream's bytes: whole spans to a lender and back. One call per span, raw pieces of at most 1 MiB.

    Put    header, piece* -> one answer (SEALED digest | BAD_DIGEST | STALE | BUSY)
    Fetch  header         -> piece*, end with the digest         (or STALE and nothing else)

Knows the format and one digest; knows nothing of ledgers, slots or who asks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgpack

from kvbank.kvstore.frame import Buffer
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.messages import KeptSpan, Put, Ref
from kvbank.kvstore.transport.rpc import PIECE_BYTES

SEALED, BAD_DIGEST, STALE, BUSY = "sealed", "bad_digest", "stale", "busy"
_END = b"E"
_PIECE = b"P"


class BulkFormatError(Exception):
    """Bytes that no version of us sends on a bulk stream."""


@dataclass(frozen=True, slots=True)
class PutAnswer:
    """kind: SEALED | BAD_DIGEST | STALE | BUSY. digest: of the bytes where the lender placed them, when SEALED."""

    kind: str
    digest: bytes = b""


def digest(data: Buffer) -> bytes:
    """Names a span's bytes: CRC32 and length, 12 bytes. Against accidents, not against attackers. About 6 GiB/s."""
    view = memoryview(data).cast("B")
    return zlib.crc32(view).to_bytes(4, "little") + view.nbytes.to_bytes(8, "little")


def digested_bytes(checked: bytes) -> int:
    """How many bytes that digest is of."""
    return int.from_bytes(checked[4:12], "little")


def pack_put(put: Put) -> bytes:
    span = put.span
    return bytes(msgpack.packb([_ref(put.ref), list(span.keys), span.tokens, span.digest, put.length]))


def unpack_put(data: bytes) -> Put:
    """Raises BulkFormatError."""
    try:
        ref, keys, tokens, checked, length = msgpack.unpackb(data)
        return Put(_unref(ref), KeptSpan(tuple(BlockKey(k) for k in keys), tokens, checked), length)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BulkFormatError(f"not a Put header: {error}") from error


def pack_answer(answer: PutAnswer) -> bytes:
    return bytes(msgpack.packb([answer.kind, answer.digest]))


def unpack_answer(data: bytes) -> PutAnswer:
    """Raises BulkFormatError."""
    try:
        kind, checked = msgpack.unpackb(data)
        return PutAnswer(kind, checked)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BulkFormatError(f"not an answer to a Put: {error}") from error


def pack_fetch(ref: Ref) -> bytes:
    return bytes(msgpack.packb(_ref(ref)))


def unpack_fetch(data: bytes) -> Ref:
    """Raises BulkFormatError."""
    try:
        return _unref(msgpack.unpackb(data))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BulkFormatError(f"not a Fetch header: {error}") from error


def pieces(data: Buffer) -> Iterator[bytes]:
    """`data` in messages; each is one copy, because gRPC sends only bytes."""
    view = memoryview(data).cast("B")
    for start in range(0, view.nbytes, PIECE_BYTES):
        yield bytes(view[start : start + PIECE_BYTES])


def fetch_piece(piece: bytes) -> bytes:
    return _PIECE + piece


def fetch_end(checked: bytes) -> bytes:
    return _END + checked


def place_fetch(messages: Iterator[bytes], target: memoryview) -> bytes | None:
    """Write a Fetch's pieces into `target` and return the lender's digest; b"" when it said nothing: the ref is stale; None
    when the stream ended early. Raises BulkFormatError when more bytes come than fit."""
    at = 0
    for message in messages:
        if message[:1] == _END:
            return message[1:] if at == target.nbytes else None
        if at + len(message) - 1 > target.nbytes:
            raise BulkFormatError("a Fetch brought more bytes than the span has")
        target[at : at + len(message) - 1] = message[1:]
        at += len(message) - 1
    return None if at else b""


def _ref(ref: Ref) -> list[bytes | int]:
    return [ref.lender_boot, ref.borrower_boot, ref.loan, ref.slot, ref.gen]


def _unref(fields: list[bytes | int]) -> Ref:
    lender, borrower, loan, slot, gen = fields
    if not (isinstance(lender, bytes) and isinstance(borrower, bytes) and isinstance(loan, int) and isinstance(slot, int)
            and isinstance(gen, int)):
        raise ValueError("a ref has five fields")
    return Ref(Boot(lender), Boot(borrower), loan, slot, gen)
