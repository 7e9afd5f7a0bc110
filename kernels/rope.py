"""Rotary position embedding: cos/sin tables, applying them, and moving keys that are already rotated.

The Llama ("rotate half") pairing: dimension j turns together with j + d/2.

    [a0 a1 a2 ... | b0 b1 b2 ...]   ->   a' = a*cos - b*sin,   b' = b*cos + a*sin,   angle = position * inv_freq[j]

Tables are float32 whatever the model's dtype: a bfloat16 angle is wrong by whole turns after a few hundred tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, inv_freq: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, d] float32, each row [c0 .. c(d/2-1), c0 .. c(d/2-1)], times `scaling` (YaRN's factor).

    positions: [T] int64; inv_freq: [d/2] float32, radians per token. Made once per step, shared by all layers.
    """
    angles = positions.to(torch.float32)[:, None] * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return torch.cos(angles) * scaling, torch.sin(angles) * scaling


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned by the tables: [T, heads, head_dim] in any float dtype -> the same, computed in float32.

    cos, sin: [T, d] of `rope_tables`; d < head_dim turns the first d dimensions only (partial rotary).
    Oracle: reference.rotate.
    """
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
    wide = x if x.dtype == torch.float32 else x.float()
    half, sin = dim // 2, sin[:, None]
    turned = wide * cos[:, None]
    turned[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return turned if x.dtype == torch.float32 else turned.to(x.dtype)


def rerotate(k: Tensor, delta: Tensor | int, inv_freq: Tensor) -> Tensor:
    """Move rotated keys by `delta` tokens: R(p + delta) = R(delta) R(p) (CacheBlend, arXiv 2405.16444).

    k: [T, kv_heads, head_dim]; delta: one int for all rows, or [T] int64, may be negative. Values need no such thing.
    Exact to rounding. Keys rotated with scaled tables (YaRN) keep their factor: only the angle changes.
    """
    if isinstance(delta, int):
        delta = torch.tensor([delta], device=k.device)
    return apply_rope(k, *rope_tables(delta, inv_freq.to(k.device)))
