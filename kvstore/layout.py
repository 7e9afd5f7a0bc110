"""Layout: what the bytes of a block mean. Two parties may exchange bytes only when their layouts agree.

Knows shapes and sizes; knows nothing of torch, devices or who holds what.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NewType

from kvbank.errors import ConfigError

BlockKey = NewType("BlockKey", bytes)          # 32 bytes: names the KV of one block given everything before it
SlotId = NewType("SlotId", int)                # index of a slot in one vault
Boot = NewType("Boot", bytes)                  # 16 random bytes per process start; compared for equality only

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Shape of one slot: `[layers, 2, kv_heads, span_tokens, head_dim]`, K at index 0 and V at 1, little-endian."""

    num_layers: int                  # of the whole model
    layer_first: int                 # this shard holds layers layer_first .. layer_last - 1
    layer_last: int
    kv_heads: int
    head_dim: int
    span_tokens: int = 128           # tokens per slot, a multiple of block_size
    block_size: int = 16             # tokens per block
    dtype: str = "float32"
    rope: str = "applied"            # keys are stored after rotation; "none" for position-free chunks

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {sorted(ITEM_BYTES)}")
        if self.block_size < 1 or self.span_tokens % self.block_size:
            raise ConfigError(f"span_tokens {self.span_tokens} must be a multiple of block_size {self.block_size}")
        if not 0 <= self.layer_first < self.layer_last <= self.num_layers:
            raise ConfigError(f"layers {self.layer_first}..{self.layer_last} are not within 0..{self.num_layers}")

    @property
    def layers(self) -> int:
        return self.layer_last - self.layer_first

    @property
    def blocks_per_span(self) -> int:
        return self.span_tokens // self.block_size

    @property
    def token_bytes(self) -> int:
        """K and V of one token over the layers of this shard."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def slot_bytes(self) -> int:
        return self.token_bytes * self.span_tokens

    @property
    def slot_shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.kv_heads, self.span_tokens, self.head_dim)

    def whole(self) -> Layout:
        """The layout of the whole model: what keys are made from, so that shards agree on them."""
        return replace(self, layer_first=0, layer_last=self.num_layers)

    def canonical(self) -> dict[str, int | str]:
        """Plain fields in a fixed order, for headers and keys."""
        return asdict(self)
