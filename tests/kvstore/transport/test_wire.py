"""Every message survives the wire unchanged, and no bytes make `unpack` do anything but answer or raise WireError."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbank.kvstore import messages as m
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.transport import wire
from kvbank.proto import bank_pb2 as pb

BOOT, OTHER = Boot(b"b" * 16), Boot(b"o" * 16)

boots = st.binary(min_size=16, max_size=16).map(Boot)
keys = st.binary(min_size=32, max_size=32).map(BlockKey)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
words = st.text(max_size=20)
refs = st.builds(m.Ref, boots, boots, u64, u32, u64)
many_refs = st.lists(refs, max_size=4).map(tuple)
many_keys = st.lists(keys, max_size=4).map(tuple)
compats = st.builds(
    m.Compat, model_digest=words, layer_first=u32, layer_last=u32, kv_heads=u32, head_dim=u32, dtype=words, block_size=u32,
    span_tokens=u32, numerics=words, slot_bytes=u64,
)
MESSAGES: dict[type, st.SearchStrategy[Any]] = {
    m.Hello: st.builds(m.Hello, u32, words, boots, st.binary(max_size=16), compats),
    m.HelloAck: st.builds(m.HelloAck, boots, st.binary(max_size=16), words, words, u32),
    m.Borrow: st.builds(m.Borrow, u64, words, st.floats(allow_nan=False, allow_infinity=False), u32, words, many_keys),
    m.Grant: st.builds(m.Grant, u64, many_refs, u32, st.lists(st.binary(max_size=32), max_size=4).map(tuple), many_keys),
    m.Refuse: st.builds(m.Refuse, u64, words, u32),
    m.Renew: st.builds(m.Renew, u64, u64, st.lists(u64, max_size=4).map(tuple)),
    m.Renewed: st.builds(m.Renewed, u64, u32, many_refs),
    m.Settle: st.builds(m.Settle, many_refs, st.booleans()),
    m.Settled: st.builds(m.Settled, many_refs),
    m.Recall: st.builds(m.Recall, many_refs, u32, words),
    m.Stale: st.builds(m.Stale, many_refs),
    m.OtherBoot: st.builds(m.OtherBoot, boots, boots),
}
envelopes = st.builds(m.Envelope, boots, boots, st.one_of(*MESSAGES.values()))


@given(envelopes)
@settings(max_examples=200, deadline=None)
def test_unpack_undoes_pack(envelope: m.Envelope) -> None:
    assert wire.unpack(wire.pack(envelope)) == envelope


def test_every_message_has_a_form_on_the_wire_and_a_side_that_hears_it() -> None:
    every = get_args(m.Message)
    assert set(MESSAGES) == set(every) == {*m.FOR_LENDER, *m.FOR_BORROWER}
    assert {field.name for field in pb.Envelope.DESCRIPTOR.fields} - {"from_boot", "to_boot"} == {
        "".join(f"_{c.lower()}" if c.isupper() else c for c in each.__name__).lstrip("_") for each in every}
    for message in every:
        assert is_dataclass(message) and "__slots__" in vars(message)
        assert {field.name for field in fields(message)} == {
            field.name for field in pb.DESCRIPTOR.message_types_by_name[message.__name__].fields}


@given(st.binary(max_size=200))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_an_envelope_or_a_wire_error(data: bytes) -> None:
    with suppress(wire.WireError):
        wire.unpack(data)


@given(envelopes, st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_envelope_is_another_one_or_a_wire_error(envelope: m.Envelope, data: st.DataObject) -> None:
    raw = bytearray(wire.pack(envelope))
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[at:]
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
    with suppress(wire.WireError):
        wire.unpack(bytes(raw))


def envelope(**kind: Any) -> bytes:
    return bytes(pb.Envelope(from_boot=BOOT, to_boot=OTHER, **kind).SerializeToString())


@pytest.mark.parametrize("data", [
    b"",
    envelope(),
    pb.Envelope(from_boot=b"short", to_boot=BOOT, settled=pb.Settled()).SerializeToString(),
    pb.Envelope(from_boot=BOOT, settled=pb.Settled()).SerializeToString(),
    envelope(stale=pb.Stale(refs=[pb.Ref(lender_boot=BOOT, borrower_boot=b"x")])),
    envelope(borrow=pb.Borrow(loan=1, spans=1, keys=[b"not 32 bytes"])),
    envelope(borrow=pb.Borrow(loan=1, spans=1, age=float("nan"))),
    envelope(borrow=pb.Borrow(loan=1, spans=1, age=float("inf"))),
    envelope(hello=pb.Hello(boot=b"")),
], ids=["nothing", "no message", "short from", "no to", "short boot in a ref", "short key", "nan", "infinite", "no boot"])
def test_what_a_core_could_not_rely_on_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.unpack(data)


def test_a_field_of_a_later_version_is_passed_over() -> None:
    later = envelope(settled=pb.Settled()) + bytes([(100 << 3 | 0) & 0x7F | 0x80, (100 << 3) >> 7, 1])   # field 100, varint 1
    assert wire.unpack(later) == m.Envelope(BOOT, OTHER, m.Settled(()))
