"""Frames: what was encoded under a key comes back under that key, or nothing does."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbank.kvstore.frame import (
    MAGIC,
    PRIVATE,
    FrameHeader,
    FrameInvalid,
    decode,
    encode,
    frame_bytes,
    seal,
)
from kvbank.kvstore.layout import BlockKey, Layout

LAYOUT = Layout(num_layers=2, layer_first=0, layer_last=2, kv_heads=1, head_dim=4, span_tokens=32, block_size=8)
SECRET = b"s" * 32
HEADER = FrameHeader.of_tokens(b"p" * 32, list(range(100, 132)), LAYOUT)
PAYLOAD = bytes(i * 7 % 251 for i in range(HEADER.payload_bytes))
GOLDEN = "33a2b4b3cea80d8f589202855dc0014f47a0711fdfe4f5187422f5a74243fe48"     # of the sealed frame, format version 1
PLAIN = b"".join(encode(HEADER, PAYLOAD))
SEALED = PLAIN + seal(HEADER.key, encode(HEADER, PAYLOAD), SECRET)


def reason(data: bytes, **changed: object) -> str:
    with pytest.raises(FrameInvalid) as caught:
        decode(data, **{"expect_key": HEADER.key, "layout": LAYOUT, **changed})     # type: ignore[arg-type]
    return caught.value.reason


@given(st.integers(1, 4), st.binary(min_size=32, max_size=32), st.booleans(), st.randoms(use_true_random=False))
def test_a_frame_comes_back_as_it_went(blocks: int, parent: bytes, sealed: bool, rng) -> None:
    header = FrameHeader.of_tokens(parent, [rng.randrange(2**31) for _ in range(8 * blocks)], LAYOUT)
    payload = rng.randbytes(header.payload_bytes)
    parts = encode(header, payload)
    data = b"".join(parts) + (seal(header.key, parts, SECRET) if sealed else b"")
    assert len(data) <= frame_bytes(LAYOUT, header.num_tokens)
    back, body = decode(data, expect_key=header.key, layout=LAYOUT, tokens=header.tokens,
                        secret=SECRET if sealed else None)
    assert back == header and body == payload
    assert len(back.keys) == blocks and back.keys[-1] == back.key


def test_the_payload_is_neither_copied_when_encoding_nor_when_decoding() -> None:
    payload = bytearray(PAYLOAD)
    assert encode(HEADER, payload)[1].obj is payload                                # type: ignore[union-attr]
    data = bytearray(PLAIN)
    assert decode(data, expect_key=HEADER.key, layout=LAYOUT)[1].obj is data


def test_the_bytes_of_a_frame_are_golden() -> None:
    """A format that changed without a new VERSION would read old values as corrupt, or worse."""
    assert hashlib.sha256(SEALED).hexdigest() == GOLDEN
    assert (PLAIN.index(PAYLOAD) % 64, PLAIN[-4:]) == (0, zlib.crc32(PLAIN[:-4]).to_bytes(4, "little"))


@pytest.mark.parametrize("sealed", [False, True])
def test_every_flipped_byte_is_rejected(sealed: bool) -> None:
    good, secret = (SEALED, SECRET) if sealed else (PLAIN, None)
    for at in range(len(good)):
        for flip in (0x01, 0x80):
            bad = bytearray(good)
            bad[at] ^= flip
            with pytest.raises(FrameInvalid):
                decode(bad, expect_key=HEADER.key, layout=LAYOUT, secret=secret)


@pytest.mark.parametrize("sealed", [False, True])
def test_every_truncation_and_every_extension_is_rejected(sealed: bool) -> None:
    good, secret = (SEALED, SECRET) if sealed else (PLAIN, None)
    for cut in range(len(good)):
        with pytest.raises(FrameInvalid):
            decode(good[:cut], expect_key=HEADER.key, layout=LAYOUT, secret=secret)
    assert reason(good + b"\0", secret=secret) == "truncated"
    assert reason(good + good, secret=secret) == "truncated"


@settings(max_examples=300)
@given(st.data())
def test_any_mutation_is_refused_or_equal(data: st.DataObject) -> None:
    good = bytearray(SEALED)
    for _ in range(data.draw(st.integers(1, 4))):
        kind, at = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"])), data.draw(st.integers(0, len(good)))
        if kind == "flip":
            good[at:at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del good[at:at + data.draw(st.integers(0, 100))]
        elif kind == "insert":
            good[at:at] = data.draw(st.binary(max_size=40))
        else:
            size = data.draw(st.integers(1, 64))
            good[at:at + size], good[:size] = good[:size], good[at:at + size]
    try:
        header, payload = decode(good, expect_key=HEADER.key, layout=LAYOUT, secret=SECRET)
    except FrameInvalid:
        return
    assert header == HEADER and payload == PAYLOAD


@given(st.binary(max_size=400), st.booleans(), st.booleans())
def test_foreign_bytes_are_refused_whatever_they_are(data: bytes, ours: bool, sealed: bool) -> None:
    with pytest.raises(FrameInvalid):
        decode((PLAIN[:20] if ours else b"") + data, expect_key=HEADER.key, layout=LAYOUT,
               secret=SECRET if sealed else None)


def test_each_reason_is_told_apart() -> None:
    other = FrameHeader.of_tokens(b"q" * 32, list(range(32)), LAYOUT)
    assert reason(b"") == "truncated"
    assert reason(b"*3\r\n$3\r\nSET") == "magic"
    assert reason(MAGIC + b"\x00\x00" + PLAIN[6:]) == "version"
    assert reason(MAGIC + b"\x02\x00" + PLAIN[6:]) == "version"
    assert reason(PLAIN[:-1]) == "truncated"
    assert reason(PLAIN[:-1] + bytes([PLAIN[-1] ^ 1])) == "checksum"
    assert reason(PLAIN, expect_key=other.key) == "key"
    assert reason(PLAIN, layout=replace(LAYOUT, dtype="float16")) == "layout"
    assert reason(PLAIN, layout=replace(LAYOUT, layer_first=1)) == "layout"
    assert reason(PLAIN, tokens=list(range(32))) == "tokens"
    assert reason(PLAIN, fidelity="codec:int8") == "fidelity"
    assert reason(PLAIN, secret=SECRET) == "mac", "a frame that nobody sealed"
    assert reason(SEALED, secret=b"t" * 32) == "mac", "sealed by another secret"
    assert reason(SEALED, expect_key=other.key, secret=SECRET) == "mac", "another key's value: the seal binds the key"
    assert reason(SEALED) == "truncated", "a seal where none belongs"


def test_a_header_with_a_right_checksum_and_wrong_fields_is_refused() -> None:
    def forged(**changed: object) -> bytes:
        fields = {"key": HEADER.key, "parent": HEADER.parent, "layout": LAYOUT.canonical(), "tokens": HEADER.tokens,
                  "fidelity": "exact", "checksum": "crc32", **changed}
        packed = msgpack.packb({name: value for name, value in fields.items() if value is not ...})
        head = MAGIC + (1).to_bytes(2, "little") + bytes(2) + len(packed).to_bytes(4, "little")
        head += len(PAYLOAD).to_bytes(8, "little") + packed
        head += bytes(-len(head) % 64)
        return head + PAYLOAD + zlib.crc32(head + PAYLOAD).to_bytes(4, "little")

    assert decode(forged(), expect_key=HEADER.key, layout=LAYOUT)[0] == HEADER
    for field in ("key", "parent", "layout", "tokens", "fidelity", "checksum"):
        assert reason(forged(**{field: ...})) == "header", f"{field} is missing"
    assert reason(forged(extra=1)) == "header"
    assert reason(forged(checksum="none")) == "header"
    assert reason(forged(key="text")) == "header"
    assert reason(forged(tokens=[1, 2, 3])) == "header"
    assert reason(forged(parent=b"z" * 32)) == "key", "key, parent and ids are one chain"
    assert reason(forged(tokens=HEADER.tokens[:-4] + b"zzzz")) == "key"
    assert reason(forged(tokens=HEADER.tokens[:-4])) == "layout"
    assert reason(forged(tokens=b"")) == "layout"
    assert reason(forged(layout={})) == "layout"
    assert reason(forged(layout=[[]] * 50)) == "layout"


def test_a_declared_length_costs_nothing_before_it_is_checked() -> None:
    bomb = MAGIC + (1).to_bytes(2, "little") + bytes(2) + b"\xff" * 12 + bytes(100)
    assert reason(bomb) == "truncated"


def test_a_private_tail_is_read_under_its_own_key_and_fidelity_only() -> None:
    tail = FrameHeader(key=BlockKey(b"job-7".ljust(32, b"\0")), keys=(), parent=HEADER.key, layout=LAYOUT,
                       tokens=bytes(4 * 5), fidelity=PRIVATE)
    data = b"".join(encode(tail, bytes(tail.payload_bytes)))
    assert decode(data, expect_key=tail.key, layout=LAYOUT, fidelity=PRIVATE)[0] == tail
    assert reason(data, expect_key=tail.key) == "fidelity"
    assert reason(data) == "key"


def test_a_payload_of_another_length_is_refused_when_encoding() -> None:
    with pytest.raises(ValueError, match="bytes"):
        encode(HEADER, PAYLOAD[:-1])
    with pytest.raises(ValueError, match="whole blocks"):
        FrameHeader.of_tokens(bytes(32), [1, 2, 3], LAYOUT)
    with pytest.raises(ValueError, match="whole blocks"):
        FrameHeader.of_tokens(bytes(32), list(range(40)), LAYOUT)
