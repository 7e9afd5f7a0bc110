"""store_kv: the new keys and values of one layer go to their places in the slots."""

from __future__ import annotations

from torch import Tensor


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Write row t of k and v at token slot_mapping[t] % S of slot slot_mapping[t] // S.

    kv:            [num_slots, 2, kv_heads, S, head_dim], the strided view of one layer; written in place
    k, v:          [T, kv_heads, head_dim], kv's dtype and device
    slot_mapping:  [T] int64, slot * S + offset; -1: the row is dropped (padding). No place is named twice.
    Oracle: reference.store_kv.
    """
    span_tokens = kv.shape[3]
    if slot_mapping.shape[0] == 1 and slot_mapping.device.type == "cpu":
        place = int(slot_mapping)                     # decode of one sequence: two plain copies, no index tensors
        if place >= 0:
            kv[place // span_tokens, 0, :, place % span_tokens].copy_(k[0])
            kv[place // span_tokens, 1, :, place % span_tokens].copy_(v[0])
        return
    dropped = slot_mapping < 0
    if slot_mapping.device.type == "cpu" and bool(dropped.any()):
        kept = (~dropped).nonzero().squeeze(1)
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    slots, offsets = slot_mapping // span_tokens, slot_mapping % span_tokens
    kv[slots, 0, :, offsets] = k
    kv[slots, 1, :, offsets] = v
