"""Every op of this floor once more, in plain dense torch: the oracle that the fast ones are tested against.

Slow on purpose, works in float32 and float64 on any device, and knows no trick: one loop per segment, one score matrix,
one mask made from absolute positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

NEG_INF = float("-inf")


class Rows(Protocol):
    """What the oracle needs of a `paged_attention.Segment`."""

    @property
    def first_row(self) -> int: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def spans(self) -> tuple[tuple[int, int], ...]: ...


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """[T, n] bool: key_pos <= query_pos, and key_pos > query_pos - window when there is a window."""
    gap = query_positions[:, None] - key_positions[None, :]
    return gap >= 0 if window is None else (gap >= 0) & (gap < window)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one sequence and the log-sum-exp of its scaled scores.

    q: [T, H, d]; k, v: [n, Hk, d]; seen: [T, n] bool. Query head h reads KV head h // (H // Hk).
    Returns out [T, H, d] and lse [T, H] in q's dtype; a row that sees nothing gets out 0 and lse -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,nhd->thn", q, k) * scale
    scores = scores.masked_fill(~seen[:, None, :], NEG_INF)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen[:, None, :], 0.0)
    return torch.einsum("thn,nhd->thd", weights, v), lse


def paged_attention(
    q: Tensor, kv: Tensor, segments: Sequence[Rows], *, span_tokens: int, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Oracle of `paged_attention.paged_attention`: out [T, H, d] and lse [T, H]; rows of no segment get (0, -inf).

    q: [T, H, d]; kv: [num_slots, 2, Hk, span_tokens, d]. Only visible keys are read, so the rest may hold NaN.
    """
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], NEG_INF, dtype=q.dtype, device=q.device)
    for segment in segments:
        rows = slice(segment.first_row, segment.first_row + len(segment.positions))
        if not segment.spans:
            continue
        offsets = torch.arange(span_tokens)
        key_positions = torch.cat([index * span_tokens + offsets for index, _ in segment.spans])
        slots = torch.tensor([slot for _, slot in segment.spans])
        keys, values = kv[slots].permute(1, 0, 3, 2, 4).flatten(1, 2)          # [2, n, Hk, d]
        seen = visible(segment.positions, key_positions, window)
        used = seen.any(0)
        out[rows], lse[rows] = dense_attention(
            q[rows], keys[used].to(q.dtype), values[used].to(q.dtype), seen[:, used], scale
        )
    return out, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Oracle of `merge_partials`: [(out [T, H, d], lse [T, H])] over disjoint keys -> (out, lse) over all of them."""
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts])
    top = lses.amax(0)
    weights = torch.where(lses == NEG_INF, 0.0, torch.exp(lses - torch.where(top == NEG_INF, 0.0, top)))
    total = weights.sum(0)
    out = (weights[..., None] * outs).sum(0) / torch.where(total == 0, 1.0, total)[..., None]
    return out, torch.where(total == 0, NEG_INF, torch.where(top == NEG_INF, 0.0, top) + torch.log(total))


def digest(
    q: Tensor, kv: Tensor, segments: Sequence[Rows], *, span_tokens: int, window: int | None
) -> list[list[tuple[int, int]]]:
    """Oracle of `digest.DigestPlan`, in Python's integers: the two lanes of each row and query head.

    q: [T, H, 16], numbers from 0 to 255; kv: [num_slots, 2, Hk, span_tokens, 16].
    """
    group = q.shape[1] // kv.shape[2]
    rows = [[(0, 0)] * q.shape[1] for _ in range(len(q))]
    for segment in segments:
        for row, position in enumerate(segment.positions.tolist(), segment.first_row):
            for head in range(q.shape[1]):
                total = [0, 0]
                for index, slot in segment.spans:
                    for offset in range(span_tokens):
                        at = index * span_tokens + offset
                        if at <= position and (window is None or at > position - window):
                            key, value = kv[slot, 0, head // group, offset], kv[slot, 1, head // group, offset]
                            total = [(t + _hash(key, value, at, lane)) % WORD for lane, t in enumerate(total)]
                raw = bytes(int(limb) for limb in q[row, head].tolist())
                odd = [int.from_bytes(raw[:8], "little") | 1, int.from_bytes(raw[8:], "little") | 1]
                rows[row][head] = (total[0] * odd[0] % WORD, total[1] * odd[1] % WORD)
    return rows


WORD = 1 << 64


def _hash(key: Tensor, value: Tensor, position: int, lane: int) -> int:
    total = 0
    for which, vector in enumerate((key, value)):
        raw = vector.contiguous().view(torch.uint8).numpy().tobytes()
        for at in range(0, len(raw), 8):
            number = 1 + lane + 2 * (at // 8 + 64 * which)               # of the multiplier, counted from 1
            multiplier = _mix(number * 0x9E3779B97F4A7C15) | 1
            total += multiplier * int.from_bytes(raw[at : at + 8], "little")
    place = position * 0x9E3779B97F4A7C15 + _mix((3, 5)[lane] * 0x9E3779B97F4A7C15)
    return _mix((total % WORD) ^ _mix(place))


def _mix(word: int) -> int:
    word %= WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Oracle of `store_kv.store_kv`."""
    span_tokens = kv.shape[3]
    for row, place in enumerate(slot_mapping.tolist()):
        if place >= 0:
            kv[place // span_tokens, 0, :, place % span_tokens] = k[row]
            kv[place // span_tokens, 1, :, place % span_tokens] = v[row]


def block_copy(arena: Tensor, src_slot: int, dst_slot: int, token_from: int, token_to: int) -> None:
    """Oracle of `block_copy.block_copy`."""
    for token in range(token_from, token_to):
        arena[dst_slot, :, :, :, token] = arena[src_slot, :, :, :, token]


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float = 1.0) -> Tensor:
    """Oracle of `rope.apply_rope`, in float64: each pair (j, j + d/2) turned by position * inv_freq[j].

    x: [T, heads, d]; returns x's dtype.
    """
    half = inv_freq.shape[0]
    angles = positions.double()[:, None, None] * inv_freq.double()
    a, b, rest = x.double().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = torch.cos(angles) * scaling, torch.sin(angles) * scaling
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)
