"""block_copy: a token range of one slot into another, all layers at once."""

from __future__ import annotations

from torch import Tensor


def block_copy(arena: Tensor, src_slot: int, dst_slot: int, token_from: int, token_to: int) -> None:
    """Copy tokens token_from .. token_to-1 of `src_slot` to the same places of `dst_slot`.

    arena: [num_slots, layers, 2, kv_heads, S, head_dim], any dtype, strided; written in place. The rest of `dst_slot`
    is left alone. Used when a sequence shares only part of a span. Oracle: reference.block_copy.
    """
    assert 0 <= token_from <= token_to <= arena.shape[4], "a token range lies within the span"
    arena[dst_slot, ..., token_from:token_to, :].copy_(arena[src_slot, ..., token_from:token_to, :])
