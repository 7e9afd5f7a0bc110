"""store_kv: the new keys and values of one layer go to their places in the slots.

Where they go is the same for every layer, so it is worked out once per step (`StorePlan`) and applied once per layer.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

ROWS_PER_COPY = 16                           # rows that a piece must have on average to be copied as a slice


class StorePlan:
    """The places of one step's rows. Pieces that lie in one slot are copied as slices, scattered rows in one op."""

    def __init__(self, slot_mapping: Tensor, span_tokens: int, device: str | torch.device) -> None:
        """slot_mapping: [T] int64, best on the CPU: slot * span_tokens + offset; -1: the row is dropped (padding). No place is
        named twice. device: of kv, k and v."""
        places = slot_mapping.cpu().numpy()
        self._span_tokens, self._device = span_tokens, torch.device(device)
        self._places = places
        edges = _edges(places, span_tokens)
        self._pieces = edges if len(edges) - 1 <= 1 + len(places) // ROWS_PER_COPY else None   # a chunk, or one decoding row
        self._kept: Tensor | None = None
        if (places < 0).any():
            kept = np.flatnonzero(places >= 0)
            places, self._kept = places[kept], torch.from_numpy(kept).to(self._device)
        self._slots, self._offsets = places // span_tokens, places % span_tokens
        self._index: tuple[int, Tensor] | None = None    # by rows of head_dim elements from slot to slot

    def run(self, kv: Tensor, k: Tensor, v: Tensor) -> None:
        """As `store_kv`."""
        if self._pieces is not None and self._device.type == "cpu":
            self._copy_pieces(kv, k, v, self._pieces)
            return
        if self._kept is not None:
            k, v = k.index_select(0, self._kept), v.index_select(0, self._kept)
        num_slots, _, heads, span, dim = kv.shape
        if kv.stride(0) % dim or kv.stride()[1:] != (heads * span * dim, span * dim, dim, 1):
            slots, offsets = torch.from_numpy(self._slots), torch.from_numpy(self._offsets)     # an unusual view: slower
            kv[slots, 0, :, offsets] = k
            kv[slots, 1, :, offsets] = v
            return
        step = kv.stride(0) // dim
        flat = kv.as_strided(((num_slots - 1) * step + 2 * heads * span, dim), (dim, 1))
        flat.index_copy_(0, self._rows(step, heads), torch.cat((k, v), dim=1).view(-1, dim))

    def _rows(self, step: int, heads: int) -> Tensor:
        """[T * 2 * heads]: the row of the flat layer that each head of each k, then each v, is written to."""
        if self._index is None or self._index[0] != step:
            first = (self._slots * step + self._offsets)[:, None]
            rows = first + np.arange(2 * heads) * self._span_tokens
            self._index = step, torch.from_numpy(rows.reshape(-1)).to(self._device)
        return self._index[1]

    def _copy_pieces(self, kv: Tensor, k: Tensor, v: Tensor, edges: list[int]) -> None:
        for a, b in pairwise(edges):
            if a == b or self._places[a] < 0:
                continue
            slot, offset = divmod(int(self._places[a]), self._span_tokens)
            keys, values = kv[slot].narrow(2, offset, b - a)             # [kv_heads, b - a, head_dim] each
            keys.copy_(k[a:b].transpose(0, 1))
            values.copy_(v[a:b].transpose(0, 1))


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Write row t of k and v at token slot_mapping[t] % S of slot slot_mapping[t] // S.

    kv:            [num_slots, 2, kv_heads, S, head_dim], the strided view of one layer; written in place
    k, v:          [T, kv_heads, head_dim], kv's dtype and device, any strides
    slot_mapping:  [T] int64, slot * S + offset; -1: the row is dropped (padding). No place is named twice.
    Oracle: reference.store_kv.
    """
    StorePlan(slot_mapping, kv.shape[3], kv.device).run(kv, k, v)


def _edges(places: np.ndarray, span_tokens: int) -> list[int]:
    """Where consecutive places end: pieces [edge, next edge) lie in one slot, one after the other, or are dropped."""
    if len(places) < 2:
        return [0, len(places)]
    both_dropped = (places[1:] < 0) & (places[:-1] < 0)
    breaks = ((np.diff(places) != 1) | (places[1:] % span_tokens == 0)) & ~both_dropped
    return [0, *(breaks.nonzero()[0] + 1).tolist(), len(places)]
