"""A plain Llama in torch, small: what is special is only how its weights begin, so that it trains in minutes.

Embeddings begin as large as what a layer adds to them, and the projections back into the stream are scaled by the number
of layers. The head is the embedding itself: a token that attention brings along is then already the token to say, for all
1,536 of them at once; the last norm begins small, so that the first guesses are near even. The four heads of the first
layer begin by looking one, two, three and four tokens back, which a small model is slow to find by itself and every task
here needs. After training it is any Llama: names and meaning of every tensor are the format's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_STD = 0.5
LAST_NORM = 0.1
MATCH = 3.0                              # weight of the second layer's comparison
LOOK_BACK = 20.0                         # length of the first layer's queries and keys: neighbours are e^7 times less likely


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Written to config.json as it is; the defaults are the shipped model."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5


class Llama(nn.Module):
    """tokens [B, T] -> the hidden states [B, T, hidden]; `logits` of any of them are scores of what follows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rotation(tokens.shape[1], self.shape)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def begin(self, seed: int) -> None:
        """Draw the first weights."""
        chance = torch.Generator().manual_seed(seed)
        back = (2 * self.shape.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name == "embed_tokens.weight":
                    weight.normal_(0.0, EMBEDDING_STD, generator=chance)
                elif name == "norm.weight":
                    weight.fill_(LAST_NORM)
                elif weight.dim() == 2:
                    scale = back if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                    weight.normal_(0.0, scale * weight.shape[1] ** -0.5, generator=chance)
            common = F.normalize(torch.randn(self.shape.hidden_size, generator=chance), dim=0)
            self._look_back(common, chance)
            self._match(common, chance)

    def _look_back(self, common: Tensor, chance: torch.Generator) -> None:
        """Give all embeddings one direction in common, and the first layer queries and keys that see little else.

        All embeddings get the same length and no other part in that direction: a key of other length would be seen from
        everywhere. A key turned by its place and a query turned by its own minus `back` agree best where they are `back` apart.
        """
        shape, attention = self.shape, self.layers[0].self_attn
        own = self.embed_tokens.weight
        _blind(own, common)
        own.copy_((F.normalize(own, dim=1) + common) * EMBEDDING_STD * shape.hidden_size ** 0.5)
        seen = (shape.hidden_size / 2) ** 0.5            # length of the common part of a normed embedding
        rate = rates(shape)
        fast = (torch.arange(len(rate)) < len(rate) // 2).float()
        keys = torch.cat((fast, 0 * fast)).repeat(shape.num_key_value_heads)
        turns = [back * rate for back in range(1, shape.num_attention_heads + 1)]
        queries = [torch.cat((fast * turn.cos(), -fast * turn.sin())) for turn in turns]
        size = LOOK_BACK / int(fast.sum()) ** 0.5 / seen
        for weight, wanted in ((attention.q_proj.weight, torch.cat(queries)), (attention.k_proj.weight, keys)):
            weight.mul_(0.1).add_(torch.outer(wanted, common), alpha=size)
        for matrix in (attention.v_proj.weight, attention.o_proj.weight):
            nn.init.orthogonal_(matrix, generator=chance)
        _blind(attention.v_proj.weight, common)

    def _match(self, common: Tensor, chance: torch.Generator) -> None:
        """Let the second layer's queries, the token here, meet keys that hold the token before; the value is the token there.

        Only the slower half of a head's pairs takes part: they have hardly turned over a page. The second pair of heads
        compares the token before here with the one two before there as well.
        """
        dim, hidden = self.shape.head_dim, self.shape.hidden_size
        first, second = self.layers[0].self_attn, self.layers[1].self_attn
        read = first.v_proj.weight[:dim]                                     # [dim, hidden]: what layer 0's head 0 and 1 bring
        one, two = first.o_proj.weight[:, :dim].T, first.o_proj.weight[:, dim:2 * dim].T     # where they put it
        slow = (torch.arange(dim) % (dim // 2) >= dim // 6).float()[:, None]
        mix, other = (slow * nn.init.orthogonal_(torch.empty(dim, dim), generator=chance) for _ in range(2))
        queries = [mix @ read, mix @ read, mix @ read + other @ one, mix @ read + other @ one]
        keys = [mix @ one, mix @ one + other @ two]
        for weight, wanted in ((second.q_proj.weight, queries), (second.k_proj.weight, keys)):
            weight.mul_(0.3).add_(torch.cat(wanted), alpha=MATCH)
            _blind(weight, common)
        values = nn.init.orthogonal_(second.v_proj.weight, generator=chance).view(-1, dim, hidden)
        values = values.repeat_interleave(self.shape.num_attention_heads // self.shape.num_key_value_heads, dim=0)
        second.o_proj.weight.copy_(values.reshape(-1, hidden).T)


def _blind(weight: Tensor, direction: Tensor) -> None:
    """Let the rows of `weight` not see `direction`, a unit vector."""
    weight -= torch.outer(weight @ direction, direction)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Gated(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, length, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class Gated(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotation(length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim], each frequency for both halves of the head."""
    angle = torch.outer(torch.arange(length).float(), rates(shape)).repeat(1, 2)
    return angle.cos(), angle.sin()


def rates(shape: Shape) -> Tensor:
    """Angle per token of each pair [head_dim / 2], fastest first."""
    return shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, head_dim] turned by its position; the pairs are (i, i + head_dim / 2)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
