"""A frame: the KV of some blocks in the one form that leaves a device, whatever the device's own layout is.

    0        4        6       8            12             20
    | "KVBF" | version | flags | header len | payload len  | header (msgpack) | zeros up to a multiple of 64 |
    | payload: [layers, 2, kv_heads, tokens, head_dim], little-endian | CRC32 of everything before |
    | seal, only where frames rest outside our processes: key id (4) | HMAC-SHA256 over (key ‖ frame) |

Correct or a miss: `decode` gives back exactly what `encode` was given under the key that was asked for, or raises
FrameInvalid with a reason. A frame proves itself: its key is the hash chain over its own parent and token ids, so a
value that was crossed, truncated, replaced or written by another format is never used. Knows nothing of tiers, torch
or devices.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from kvbank.kvstore.hashing import TokenIds, block_keys, token_bytes
from kvbank.kvstore.layout import BlockKey, Layout

MAGIC = b"KVBF"
VERSION = 1
PRIVATE = "private"                            # fidelity of a half-filled tail: readable under its job's own key only
MAX_HEADER_BYTES = 64 << 10                    # a span of 128 tokens needs about 900
MAX_PAYLOAD_BYTES = 1 << 30

_PRELUDE = struct.Struct("<4sHHIQ")
_CRC = struct.Struct("<I")
_ALIGN = 64
SEAL_BYTES = 4 + 32
_FIELDS = {"key", "parent", "layout", "tokens", "fidelity", "checksum"}

Buffer = bytes | bytearray | memoryview


class FrameInvalid(Exception):
    """These bytes are not the frame that was asked for.

    `reason` is one of truncated, magic, version, header, checksum, mac, key, layout, tokens, fidelity.
    Callers count it and go on as after a miss with reason `integrity`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """What the payload is. Build it with `of_tokens`, which computes the keys, or from keys that are at hand."""

    key: BlockKey                              # of the last block inside: the frame's name in every tier
    keys: tuple[BlockKey, ...]                 # of all blocks inside, in order; empty for a private tail
    parent: bytes                              # key of the block before the first one, or the root
    layout: Layout                             # with the layer range of the shard that wrote it
    tokens: bytes                              # ids of the tokens inside, int32-LE
    fidelity: str = "exact"

    @classmethod
    def of_tokens(cls, parent: bytes, token_ids: TokenIds, layout: Layout, *, fidelity: str = "exact") -> FrameHeader:
        """The header of the whole blocks that follow `parent`; ValueError for ids that are not blocks of a span."""
        tokens = token_bytes(token_ids)
        if not 0 < len(tokens) <= 4 * layout.span_tokens or len(tokens) % (4 * layout.block_size):
            raise ValueError(f"{len(tokens) // 4} tokens are not whole blocks of {layout.block_size} "
                             f"within a span of {layout.span_tokens}")
        keys = tuple(block_keys(parent, tokens, layout.block_size))
        return cls(key=keys[-1], keys=keys, parent=bytes(parent), layout=layout, tokens=tokens, fidelity=fidelity)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4

    @property
    def payload_bytes(self) -> int:
        return self.num_tokens * self.layout.token_bytes


def encode(header: FrameHeader, payload: Buffer) -> list[Buffer]:
    """The frame as a list of buffers to be written one after the other; the payload is not copied.

    payload: `[layers, 2, kv_heads, tokens, head_dim]` of `header.layout`, C-contiguous; must not change until written.
    Raises ValueError when its length is another. Cost: one CRC32 pass (about 6 GiB/s, without the GIL).
    """
    body = memoryview(payload).cast("B")
    if len(body) != header.payload_bytes:
        raise ValueError(f"payload has {len(body)} bytes, {header.num_tokens} tokens of this layout have "
                         f"{header.payload_bytes}")
    fields = {"key": header.key, "parent": header.parent, "layout": header.layout.canonical(), "tokens": header.tokens,
              "fidelity": header.fidelity, "checksum": "crc32"}
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    head = _PRELUDE.pack(MAGIC, VERSION, int(header.fidelity == PRIVATE), len(packed), len(body)) + packed
    head += bytes(-len(head) % _ALIGN)
    return [head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head)))]


def frame_bytes(layout: Layout, num_tokens: int) -> int:
    """How long a sealed frame of `num_tokens` can be at most: for sizing buffers and round trips before it is seen."""
    return num_tokens * (layout.token_bytes + 4) + 1024


def is_private(frame: memoryview) -> bool:
    """Whether a frame that `encode` made is a private one: those never leave the process."""
    return bool(frame[6] & 1)


def seal(key: bytes, frame: Sequence[Buffer], secret: bytes) -> bytes:
    """What is appended to a frame that leaves our processes to rest. Binds every byte of it to `key`. 1.8 GiB/s."""
    mac_key, key_id = _mac_key(secret)
    mac = hmac.new(mac_key, key, "sha256")
    for part in frame:
        mac.update(part)
    return key_id + mac.digest()


def decode(data: Buffer, *, expect_key: bytes, layout: Layout, tokens: TokenIds | None = None,
           secret: bytes | None = None, fidelity: str = "exact") -> tuple[FrameHeader, memoryview]:
    """Header and payload (a view of `data`) of the frame named `expect_key`, every byte of it checked.

    tokens: the ids the caller wants the KV of; compared when given. secret: given for what rested outside, and then the
    seal must be there. Raises FrameInvalid only, whatever the bytes are; allocates nothing of a declared size.
    """
    whole = memoryview(data).cast("B")
    start, end = _bounds(whole, sealed=secret is not None)
    frame = whole[:end + _CRC.size]
    if secret is not None:
        mac_key, key_id = _mac_key(secret)
        mac = hmac.new(mac_key, expect_key, "sha256")
        mac.update(frame)
        if not hmac.compare_digest(key_id + mac.digest(), whole[len(frame):]):
            raise FrameInvalid("mac")
    if zlib.crc32(frame[:end]) != _CRC.unpack(frame[end:])[0]:
        raise FrameInvalid("checksum")
    return _header(frame, expect_key=expect_key, layout=layout, tokens=tokens, fidelity=fidelity), frame[start:end]


def _bounds(whole: memoryview, *, sealed: bool) -> tuple[int, int]:
    """Where the payload starts and ends; what is declared must be what was received, to the byte."""
    if whole[:4] != MAGIC[:len(whole)]:
        raise FrameInvalid("magic")
    if len(whole) < _PRELUDE.size:
        raise FrameInvalid("truncated")
    _, version, flags, header_len, payload_len = _PRELUDE.unpack_from(whole)
    if version != VERSION or flags > 1:
        raise FrameInvalid("version")
    if header_len > MAX_HEADER_BYTES or payload_len > MAX_PAYLOAD_BYTES:
        raise FrameInvalid("truncated")
    start = _PRELUDE.size + header_len
    start += -start % _ALIGN
    end = start + payload_len
    if len(whole) == end + _CRC.size and sealed:
        raise FrameInvalid("mac")              # a whole frame, but nobody sealed it
    if len(whole) != end + _CRC.size + (SEAL_BYTES if sealed else 0):
        raise FrameInvalid("truncated")
    return start, end


def _header(frame: memoryview, *, expect_key: bytes, layout: Layout, tokens: TokenIds | None,
            fidelity: str) -> FrameHeader:
    header_len, payload_len = _PRELUDE.unpack_from(frame)[3:]
    try:
        fields: Any = msgpack.unpackb(frame[_PRELUDE.size:_PRELUDE.size + header_len], raw=False, strict_map_key=True)
    except (ValueError, RecursionError):
        raise FrameInvalid("header") from None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS or fields["checksum"] != "crc32":
        raise FrameInvalid("header")
    if not all(isinstance(fields[name], bytes) for name in ("key", "parent", "tokens")):
        raise FrameInvalid("header")
    if fields["key"] != expect_key:
        raise FrameInvalid("key")
    if fields["layout"] != layout.canonical():
        raise FrameInvalid("layout")
    if fields["fidelity"] != fidelity or is_private(frame) != (fidelity == PRIVATE):
        raise FrameInvalid("fidelity")
    num_tokens, ids = len(fields["tokens"]) // 4, fields["tokens"]
    if len(ids) % 4 or not 0 < num_tokens <= layout.span_tokens or payload_len != num_tokens * layout.token_bytes:
        raise FrameInvalid("layout")
    if tokens is not None and ids != token_bytes(tokens):
        raise FrameInvalid("tokens")
    keys: tuple[BlockKey, ...] = ()
    if fidelity != PRIVATE:                    # the chain ties key, parent and ids together: 0.4 µs a block
        keys = tuple(block_keys(fields["parent"], ids, layout.block_size))
        if num_tokens % layout.block_size or keys[-1] != expect_key:
            raise FrameInvalid("key")
    return FrameHeader(key=BlockKey(expect_key), keys=keys, parent=fields["parent"], layout=layout, tokens=ids,
                       fidelity=fidelity)


def _mac_key(secret: bytes) -> tuple[bytes, bytes]:
    """The key that seals, apart from the one that names blocks, and its 4-byte id. Both change with the secret."""
    mac_key = hmac.digest(secret, b"kvbank frame seal 1", "sha256")
    return mac_key, hashlib.sha256(mac_key).digest()[:4]
