"""Envelopes as bytes: kvstore.messages to proto/bank.proto and back. `unpack(pack(envelope)) == envelope`.

Knows both forms; decides nothing. What a core relies on is checked here: it never sees a boot of three bytes, or an age
that is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from kvbank.kvstore import messages as m
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.proto import bank_pb2 as pb

BOOT_BYTES = 16
KEY_BYTES = 32
TRACE_CHARS = 55                       # of a traceparent; what is longer is none


class WireError(Exception):
    """Bytes that are no envelope of ours."""


def pack(envelope: m.Envelope) -> bytes:
    """Protobuf bytes of one envelope."""
    name, body = _OUT[type(envelope.message)](envelope.message)
    raw = pb.Envelope(from_boot=envelope.from_boot, to_boot=envelope.to_boot, **{name: body})
    return bytes(raw.SerializeToString())


def unpack(data: bytes) -> m.Envelope:
    """Raises WireError."""
    try:
        raw = pb.Envelope.FromString(data)
        kind = raw.WhichOneof("kind")
        if kind is None:
            raise WireError("an envelope without a message")
        return m.Envelope(_boot(raw.from_boot), _boot(raw.to_boot), _IN[kind](getattr(raw, kind)))
    except (DecodeError, ValueError, KeyError) as error:
        raise WireError(str(error)) from error


def _boot(data: bytes) -> Boot:
    if len(data) != BOOT_BYTES:
        raise ValueError(f"a boot has {BOOT_BYTES} bytes, not {len(data)}")
    return Boot(data)


def _key(data: bytes) -> BlockKey:
    if len(data) != KEY_BYTES:
        raise ValueError(f"a block key has {KEY_BYTES} bytes, not {len(data)}")
    return BlockKey(data)


def _age(stamp: float) -> float:
    if not math.isfinite(stamp):
        raise ValueError(f"an age of {stamp} cannot be ordered")
    return stamp


def _ref(ref: m.Ref) -> pb.Ref:
    return pb.Ref(
        lender_boot=ref.lender_boot, borrower_boot=ref.borrower_boot, loan=ref.loan, slot=ref.slot, gen=ref.gen)


def _refs(refs: tuple[m.Ref, ...]) -> list[pb.Ref]:
    return [_ref(ref) for ref in refs]


def _unrefs(refs: Any) -> tuple[m.Ref, ...]:
    return tuple(m.Ref(_boot(r.lender_boot), _boot(r.borrower_boot), r.loan, r.slot, r.gen) for r in refs)


def _compat(c: m.Compat) -> pb.Compat:
    return pb.Compat(
        model_digest=c.model_digest, layer_first=c.layer_first, layer_last=c.layer_last, kv_heads=c.kv_heads,
        head_dim=c.head_dim, dtype=c.dtype, block_size=c.block_size, span_tokens=c.span_tokens, numerics=c.numerics,
        slot_bytes=c.slot_bytes,
    )


def _uncompat(c: pb.Compat) -> m.Compat:
    return m.Compat(
        model_digest=c.model_digest, layer_first=c.layer_first, layer_last=c.layer_last, kv_heads=c.kv_heads,
        head_dim=c.head_dim, dtype=c.dtype, block_size=c.block_size, span_tokens=c.span_tokens, numerics=c.numerics,
        slot_bytes=c.slot_bytes,
    )


_OUT: dict[type, Callable[[Any], tuple[str, Any]]] = {
    m.Hello: lambda x: ("hello", pb.Hello(version=x.version, node=x.node, boot=x.boot, nonce=x.nonce,
                                          compat=_compat(x.compat))),
    m.HelloAck: lambda x: ("hello_ack", pb.HelloAck(boot=x.boot, nonce=x.nonce, fit=x.fit, reason=x.reason,
                                                    lendable=x.lendable)),
    m.Borrow: lambda x: ("borrow", pb.Borrow(loan=x.loan, tenant=x.tenant, age=x.age, spans=x.spans, job=x.job,
                                             keys=x.keys, needy=x.needy, trace=x.trace)),
    m.Grant: lambda x: ("grant", pb.Grant(loan=x.loan, refs=_refs(x.refs), term_ms=x.term_ms,
                                          sealed_digests=x.sealed_digests, keys=x.keys)),
    m.Refuse: lambda x: ("refuse", pb.Refuse(loan=x.loan, code=x.code, retry_ms=x.retry_ms)),
    m.Renew: lambda x: ("renew", pb.Renew(no=x.no, upto=x.upto, keep=x.keep)),
    m.Renewed: lambda x: ("renewed", pb.Renewed(no=x.no, term_ms=x.term_ms, refs=_refs(x.refs))),
    m.Settle: lambda x: ("settle", pb.Settle(refs=_refs(x.refs), keep=x.keep)),
    m.Settled: lambda x: ("settled", pb.Settled(refs=_refs(x.refs))),
    m.Recall: lambda x: ("recall", pb.Recall(refs=_refs(x.refs), within_ms=x.within_ms, why=x.why)),
    m.Stale: lambda x: ("stale", pb.Stale(refs=_refs(x.refs))),
    m.OtherBoot: lambda x: ("other_boot", pb.OtherBoot(boot=x.boot, asked=x.asked)),
}

_IN: dict[str, Callable[[Any], m.Message]] = {
    "hello": lambda x: m.Hello(x.version, x.node, _boot(x.boot), x.nonce, _uncompat(x.compat)),
    "hello_ack": lambda x: m.HelloAck(_boot(x.boot), x.nonce, x.fit, x.reason, x.lendable),
    "borrow": lambda x: m.Borrow(x.loan, x.tenant, _age(x.age), x.spans, x.job, tuple(_key(k) for k in x.keys),
                                 x.needy, x.trace[:TRACE_CHARS]),
    "grant": lambda x: m.Grant(x.loan, _unrefs(x.refs), x.term_ms, tuple(x.sealed_digests),
                               tuple(_key(k) for k in x.keys)),
    "refuse": lambda x: m.Refuse(x.loan, x.code, x.retry_ms),
    "renew": lambda x: m.Renew(x.no, x.upto, tuple(x.keep)),
    "renewed": lambda x: m.Renewed(x.no, x.term_ms, _unrefs(x.refs)),
    "settle": lambda x: m.Settle(_unrefs(x.refs), x.keep),
    "settled": lambda x: m.Settled(_unrefs(x.refs)),
    "recall": lambda x: m.Recall(_unrefs(x.refs), x.within_ms, x.why),
    "stale": lambda x: m.Stale(_unrefs(x.refs)),
    "other_boot": lambda x: m.OtherBoot(_boot(x.boot), _boot(x.asked)),
}
