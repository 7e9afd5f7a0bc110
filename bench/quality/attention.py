"""The harness's dense attention behind the decoder's seam: whole contexts, and forks of them that hold less.

    context ----full attention, once----> Prefilled (keys, values, queries of every layer)
                                             |  a policy
                                             v
    questions' rows ----Reader----> Fork.read: what this fork holds of the context      one softmax over both
                              '---> rows of the same question that came before

A fork is read, never written: what a question adds lives in its Reader and goes with it. Knows no tasks and no scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Index = list[list[Tensor]]               # [layer][kv head]: ascending places in the context, int64; heads may differ in number
NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of questions: where each stands, and which question it is of. Both [R] int64."""

    positions: Tensor
    turn: Tensor


@dataclass(slots=True)
class Prefilled:
    """What full attention left of one context, by layer. seed: names the page, for policies that draw."""

    seed: str
    keys: list[Tensor]                   # [kv_heads, T, head_dim], rotated
    values: list[Tensor]                 # [kv_heads, T, head_dim]
    queries: list[Tensor]                # [heads, T, head_dim], rotated: for policies that score by attention

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in [*self.keys, *self.values])


class Fork(Protocol):
    """What a policy holds of one context."""

    device_bytes: int                    # of all tensors that a decode step reads: rows, places, scales, side state
    host_bytes: int                      # kept elsewhere and fetched from

    def read(self, layer: int, head: int, q: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys [n, d], values [n, d] and what is added to their scores, [R, n] or [1, n] (-inf hides a row), or None.

        q [R, heads of this kv head, d]: of the rows that attend now.
        """
        ...


class Whole:
    """All of it."""

    host_bytes = 0

    def __init__(self, context: Prefilled) -> None:
        self._context, self.device_bytes = context, context.num_bytes

    def read(self, layer: int, head: int, q: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._context.keys[layer][head], self._context.values[layer][head], None


class Evicted:
    """The rows of an index, copied out once; the others are gone."""

    host_bytes = 0

    def __init__(self, context: Prefilled, index: Index, side_bytes: int = 0) -> None:
        self._keys, self._values = (
            [[rows[head][kept] for head, kept in enumerate(layer)] for rows, layer in zip(of, index, strict=True)]
            for of in (context.keys, context.values))
        self.index = [[kept.to(torch.int32) for kept in layer] for layer in index]      # a cache must know what it holds
        held = [*self._keys, *self._values, *self.index]
        self.device_bytes = side_bytes + sum(each.nbytes for layer in held for each in layer)

    def read(self, layer: int, head: int, q: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._keys[layer][head], self._values[layer][head], None


Choose = Callable[[int, int, Tensor, Rows], Tensor]      # (layer, kv head, q, rows) -> [R, T] bool


class Selected:
    """Everything on the host; at each step as many rows as the budget has are brought to the device."""

    def __init__(self, context: Prefilled, tokens: int, choose: Choose, side_bytes: int = 0) -> None:
        self._context, self._choose, self._tokens = context, choose, tokens
        places = tokens * sum(len(keys) for keys in context.keys)
        row_bytes = 2 * context.keys[0].shape[2] * context.keys[0].element_size()
        self.device_bytes = side_bytes + places * (row_bytes + torch.int32.itemsize)
        self.host_bytes = context.num_bytes

    def read(self, layer: int, head: int, q: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values = self._context.keys[layer][head], self._context.values[layer][head]
        chosen = self._choose(layer, head, q, rows)
        if (most := int(chosen.sum(1).max())) > self._tokens:
            raise ValueError(f"{most} rows were chosen for one token, and the budget is {self._tokens}")
        if len(chosen) == 1:             # a decode step reads no more than it chose
            (kept,) = chosen[0].nonzero(as_tuple=True)
            return keys[kept], values[kept], None
        return keys, values, torch.zeros(chosen.shape, dtype=q.dtype).masked_fill_(~chosen, NEG_INF)


class Recorder:
    """`attend` of a prefill: causal attention of one sequence to itself, and what it leaves."""

    def __init__(self, seed: str) -> None:
        self.left = Prefilled(seed, [], [], [])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.transpose(0, 1).contiguous() for each in (q, k, v))
        self.left.queries.append(q)
        self.left.keys.append(k)
        self.left.values.append(v)
        groups = len(q) // len(k)
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1)


class Reader:
    """`attend` of questions on one fork. Rows of a question see the fork and what came before them in that question.

    Call `begin` before each forward with its rows; their keys and values stay, so that decoding goes on from them.
    """

    def __init__(self, fork: Fork, layers: int) -> None:
        self._fork = fork
        self._keys: list[Tensor | None] = [None] * layers        # [R so far, kv_heads, d]
        self._values: list[Tensor | None] = [None] * layers
        self._seen: Rows | None = None
        self.queries: list[Tensor] = []                          # [R, heads, d] of the last forward, by layer,
        self.outputs: list[Tensor] = []                          # and what attention made of them

    def begin(self, rows: Rows) -> None:
        self._new, before = rows, self._seen
        self._seen = rows if before is None else Rows(
            torch.cat((before.positions, rows.positions)), torch.cat((before.turn, rows.turn)))
        own = (rows.turn[:, None] == self._seen.turn) & (rows.positions[:, None] >= self._seen.positions)
        self._hidden = ~own
        self.queries, self.outputs = [], []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before_k, before_v = self._keys[layer], self._values[layer]
        k = k if before_k is None else torch.cat((before_k, k))
        v = v if before_v is None else torch.cat((before_v, v))
        self._keys[layer], self._values[layer] = k, v
        self.queries.append(q)
        group = q.shape[1] // k.shape[1]
        heads = [self._head(layer, head, q[:, head * group:(head + 1) * group], k[:, head], v[:, head])
                 for head in range(k.shape[1])]
        self.outputs.append(torch.cat(heads, dim=1))
        return self.outputs[-1]

    def _head(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, g, d] over the fork's rows and the questions' own, k and v [R so far, d]."""
        keys, values, bias = self._fork.read(layer, head, q, self._new)
        scaled = q * q.shape[-1] ** -0.5
        scores = torch.cat((scaled @ keys.T, (scaled @ k.T).masked_fill(self._hidden[:, None], NEG_INF)), dim=-1)
        if bias is not None:
            scores[..., :len(keys)] += bias[:, None]
        weights = scores.softmax(-1)
        return weights[..., :len(keys)] @ values + weights[..., len(keys):] @ v
