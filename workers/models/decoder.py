"""A Llama-family decoder, or a run of its layers, over a batch of rows. The one seam is `attend`.

    hidden -> norm -> q, k, v -> rotate -> attend -> o -> + hidden -> norm -> silu(gate) * up -> down -> + hidden

A row is one token at an explicit position. The decoder knows no sequences, slots or masks: `attend` alone writes and
reads KV. It does not know of shards either, only whether it starts with token ids and whether it ends in logits.
Numerics follow transformers: norms and rotary angles in float32, everything else in the weights' dtype.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbank.workers.models.config_reader import ModelConfig
from kvbank.workers.models.rope import RopeTable, rotate_


class Attend(Protocol):
    """Stores k and v of the new rows, attends to all that each row may see."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """layer: counted from this decoder's first. q [T, heads, head_dim], k and v [T, kv_heads, head_dim], rotated;
        they are views that the next layer overwrites: copy what you keep. Returns [T, heads, head_dim] in q's dtype."""
        ...


class Decoder:
    """Layers `layers` of the model. Not thread-safe: one engine thread drives it."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], layers: range, first: bool, last: bool, *,
        exactness: str = "fast", device: str = "cpu",
    ) -> None:
        """weights: as weights.load_weights gives them for the same layers; the dict is emptied, so that a matrix that
        is repacked is not in memory twice.
        exactness "bitwise": a row's result does not depend on the other rows, as long as the number of rows is a
        multiple of 8 (the caller pads)."""
        self.config, self.first, self.last = config, first, last
        self.num_layers = len(layers)
        take = {name: tensor.to(device) for name, tensor in weights.items()}
        weights.clear()
        self.dtype = take["0.qkv"].dtype
        self._embed = take.get("embed")
        self._norm = take.get("norm")
        self._head = take["embed"] if last and config.tie_embeddings else take.get("head")
        self._layers = [_Layer(config, take, f"{i}.") for i in range(self.num_layers)]
        self._rope = RopeTable(config.rope, config.head_dim, dtype=self.dtype, device=device)

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
            layer.run(index, x, cos, sin, attend)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> [R, vocab_size] float32. Only where `last`."""
        assert self._norm is not None and self._head is not None, "only the last shard has the head"
        return F.linear(rms_norm(hidden, self._norm, self.config.rms_eps), self._head).float()


class _Layer:
    """Two residual lines over fused matrices."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], at: str) -> None:
        self.heads, self.kv_heads, self.eps = config.num_heads, config.num_kv_heads, config.rms_eps
        self.head_dim, self.inner = config.head_dim, config.intermediate_size
        self.input_norm, self.post_norm = weights[at + "input_norm"], weights[at + "post_norm"]
        self.qkv, self.qkv_bias = weights[at + "qkv"], weights.get(at + "qkv_bias")
        self.o, self.o_bias = weights[at + "o"], weights.get(at + "o_bias")
        self.gate_up, self.down = weights[at + "gate_up"], weights[at + "down"]
        self.q_norm, self.k_norm = weights.get(at + "q_norm"), weights.get(at + "k_norm")

    def run(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> None:
        """x [T, hidden] becomes the next layer's input, in place."""
        x += self._attention(index, rms_norm(x, self.input_norm, self.eps), cos, sin, attend)
        x += self._mlp(rms_norm(x, self.post_norm, self.eps))

    def _attention(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        qkv = F.linear(x, self.qkv, self.qkv_bias).view(len(x), heads + 2 * kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            qkv[:, :heads] = rms_norm(qkv[:, :heads], self.q_norm, self.eps)
            qkv[:, heads : heads + kv_heads] = rms_norm(qkv[:, heads : heads + kv_heads], self.k_norm, self.eps)
        rotate_(qkv[:, : heads + kv_heads], cos, sin)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        return F.linear(attend(index, q, k, v).reshape(len(x), heads * self.head_dim), self.o, self.o_bias)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).split(self.inner, dim=-1)
        return F.linear(F.silu(gate, inplace=True).mul_(up), self.down)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean and the division in float32, the product in x's dtype."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)
