"""store_kv: the new keys and values of one layer go to their places in the slots."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor

ROWS_PER_COPY = 16                           # rows that a piece must have on average to be copied as a slice


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Write row t of k and v at token slot_mapping[t] % S of slot slot_mapping[t] // S.

    kv:            [num_slots, 2, kv_heads, S, head_dim], the strided view of one layer; written in place
    k, v:          [T, kv_heads, head_dim], kv's dtype and device, any strides
    slot_mapping:  [T] int64, slot * S + offset; -1: the row is dropped (padding). No place is named twice.
    Oracle: reference.store_kv.
    """
    span_tokens = kv.shape[3]
    if slot_mapping.device.type == "cpu":
        places = slot_mapping.numpy()
        edges = _edges(places, span_tokens)
        if len(edges) - 1 <= 1 + len(places) // ROWS_PER_COPY:           # a chunk, or one decoding sequence
            _copy_pieces(kv, k, v, places, edges)
            return
        if (places < 0).any():
            kept = (slot_mapping >= 0).nonzero().squeeze(1)
            k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    else:
        kept = (slot_mapping >= 0).nonzero().squeeze(1)
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    slots, offsets = slot_mapping // span_tokens, slot_mapping % span_tokens
    kv[slots, 0, :, offsets] = k
    kv[slots, 1, :, offsets] = v


def _edges(places: np.ndarray, span_tokens: int) -> list[int]:
    """Where consecutive places end: pieces [edge, next edge) lie in one slot, one after the other, or are dropped."""
    if len(places) < 2:
        return [0, len(places)]
    both_dropped = (places[1:] < 0) & (places[:-1] < 0)
    breaks = ((np.diff(places) != 1) | (places[1:] % span_tokens == 0)) & ~both_dropped
    return [0, *(breaks.nonzero()[0] + 1).tolist(), len(places)]


def _copy_pieces(kv: Tensor, k: Tensor, v: Tensor, places: np.ndarray, edges: list[int]) -> None:
    for a, b in pairwise(edges):
        if a == b or places[a] < 0:
            continue
        slot, offset = divmod(int(places[a]), kv.shape[3])
        keys, values = kv[slot].narrow(2, offset, b - a)                 # [kv_heads, b - a, head_dim] each
        keys.copy_(k[a:b].transpose(0, 1))
        values.copy_(v[a:b].transpose(0, 1))
