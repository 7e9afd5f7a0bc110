"""A Llama-family decoder, or a run of its layers, over a batch of rows. The one seam is `attend`.

    hidden -> norm -> q, k, v -> rotate -> attend -> o -> + hidden -> norm -> silu(gate) * up -> down -> + hidden

A row is one token at an explicit position. The decoder knows no sequences, slots or masks: `attend` alone writes and
reads KV. It does not know of shards either, only whether it starts with token ids and whether it ends in logits.
Numerics follow transformers: norms and rotation in float32, everything else in the weights' dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbank.kernels.rope import apply_rope
from kvbank.workers.models.config_reader import ModelConfig
from kvbank.workers.models.linear import (
    Linear,
    PackedGate,
    PackedLinear,
    PlainGate,
    PlainLinear,
    WideGate,
    WideLinear,
    packing,
)
from kvbank.workers.models.rope import RopeTable

log = logging.getLogger(__name__)


class Attend(Protocol):
    """Stores k and v of the new rows, attends to all that each row may see."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """layer: counted from this decoder's first. q [T, heads, head_dim], k and v [T, kv_heads, head_dim], rotated;
        they are views, not always contiguous. Returns [T, heads, head_dim] in q's dtype."""
        ...


class Decoder:
    """Layers `layers` of the model. Not thread-safe: one engine thread drives it."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], layers: range, first: bool, last: bool, *,
        exactness: str = "fast", device: str = "cpu",
    ) -> None:
        """weights: as weights.load_weights gives them for the same layers. The dict is emptied on the way, so that a
        matrix which is packed or moved is in memory twice for that moment only, and a narrow one that is widened thrice.
        exactness "bitwise": a row's bits do not depend on the other rows, as long as the number of rows is a multiple
        of 8 (the caller pads). The packed products keep that promise at no cost; where there are none (other
        devices, a torch without oneDNN) a warning says that nobody makes it."""
        self.config, self.first, self.last = config, first, last
        self.num_layers = len(layers)
        self.dtype = weights["0.qkv"].dtype
        build = _Builder(config, weights, device)
        self.packed = build.packed
        if exactness == "bitwise" and not self.packed:
            log.warning("bitwise_not_promised dtype=%s device=%s reason=no_packed_products", self.dtype, device)
        self._layers = [build.layer(f"{index}.") for index in range(self.num_layers)]
        self._embed = build.vector("embed") if "embed" in weights else None
        self._norm = build.vector("norm") if last else None
        self._head = build.head(self._embed) if last else None
        self._rope = RopeTable(config.rope, config.head_dim, device=device)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor | None, hidden: Tensor | None, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after this decoder's last layer, [T, hidden_size].

        token_ids [T] int64 where `first`, else hidden [T, hidden_size], which is not modified; positions [T] int64.
        """
        if self.first:
            assert token_ids is not None and self._embed is not None
            x = F.embedding(token_ids, self._embed)
        else:
            assert hidden is not None
            x = hidden.to(self.dtype, copy=True)
        cos, sin = self._rope.rows(positions)
        for index, layer in enumerate(self._layers):
            x = layer.run(index, x, cos, sin, attend)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> [R, vocab_size] float32. Only where `last`."""
        assert self._norm is not None and self._head is not None, "only the last shard has the head"
        return self._head(rms_norm(hidden, self._norm, self.config.rms_eps)).float()


@dataclass(slots=True)
class _Layer:
    """Two residual lines over fused matrices."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    input_norm: Tensor
    qkv: Linear                              # rows: all query heads, all key heads, all value heads
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate: Callable[[Tensor], Tensor]         # silu(gate) * up
    down: Linear

    def run(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The next layer's input, [T, hidden]; x may be overwritten."""
        x = self.o.plus(self._attended(index, rms_norm(x, self.input_norm, self.eps), cos, sin, attend), x)
        return self.down.plus(self.gate(rms_norm(x, self.post_norm, self.eps)), x)

    def _attended(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads, both = self.heads, self.heads + self.kv_heads
        qkv = self.qkv(x).view(len(x), both + self.kv_heads, self.head_dim)
        qk, v = qkv[:, :both], qkv[:, both:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((rms_norm(qk[:, :heads], self.q_norm, self.eps),
                            rms_norm(qk[:, heads:], self.k_norm, self.eps)), dim=1)
        qk = apply_rope(qk, cos, sin)
        return attend(index, qk[:, :heads], qk[:, heads:], v).reshape(len(x), heads * self.head_dim)


class _Builder:
    """Takes weights out of their dict into the form this device runs fastest."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], device: str) -> None:
        self._config, self._weights, self._device = config, weights, device
        dtype = weights["0.qkv"].dtype
        packed_in = packing(dtype, device)
        self.packed, self._wide = packed_in is not None, packed_in not in (None, dtype)

    def layer(self, at: str) -> _Layer:
        c = self._config
        return _Layer(
            heads=c.num_heads, kv_heads=c.num_kv_heads, head_dim=c.head_dim, eps=c.rms_eps,
            input_norm=self.vector(at + "input_norm"),
            qkv=self._linear(at + "qkv", at + "qkv_bias" if c.qkv_bias else None),
            q_norm=self.vector(at + "q_norm") if c.qk_norm else None,
            k_norm=self.vector(at + "k_norm") if c.qk_norm else None,
            o=self._linear(at + "o", at + "o_bias" if c.o_bias else None),
            post_norm=self.vector(at + "post_norm"),
            gate=self._gate(at + "gate_up"),
            down=self._linear(at + "down", None),
        )

    def vector(self, name: str) -> Tensor:
        return self._weights.pop(name).to(self._device)

    def head(self, embed: Tensor | None) -> Linear:
        if not self._config.tie_embeddings:
            return self._linear("head", None)
        assert embed is not None
        if self.packed and not self._wide:
            return PackedLinear(embed, shared=True)
        return self._kind(embed, None)

    def _linear(self, name: str, bias: str | None) -> Linear:
        return self._kind(self.vector(name), self.vector(bias) if bias else None)

    @property
    def _kind(self) -> Callable[[Tensor, Tensor | None], Linear]:
        return WideLinear if self._wide else PackedLinear if self.packed else PlainLinear

    def _gate(self, name: str) -> Callable[[Tensor], Tensor]:
        inner = self._config.intermediate_size
        if not self.packed:
            return PlainGate(self._linear(name, None), inner)
        return (WideGate if self._wide else PackedGate)(self.vector(name), inner)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean and the division in float32, the product in x's dtype."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight)
