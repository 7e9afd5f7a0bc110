"""StepPlan: the work of one step as plain data. The leading shard makes it; every shard of the chain runs it.

A batch is rows of several sequences, each row one token at an explicit position; nothing assumes that rows are the tail
of their sequence (replayed and blended rows are not).

    rows     0   1   2   3   4   5   6   7
    seq      A   B   B   B   B   -   -   -        A decodes one token, B prefills four, 3 rows of padding (bitwise)
    position 900 512 513 514 515 0   0   0
    slot     7*S+4  ...                -1         -1: nothing is stored
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from kvbank.workers.sampler import Logprobs, SamplingParams

PAD_ROWS = 8                                 # under `bitwise`: rows are padded so that every GEMM has one shape per row
FEW_ROWS = 64                                # above it always: a row count never seen costs up to 1.7 ms per product


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Tokens start .. stop-1 of one sequence, and where the spans they read are."""

    first_row: int
    start: int
    stop: int
    local: tuple[tuple[int, int], ...]       # (span index, slot)
    remote: tuple[tuple[int, int], ...] = () # (span index, span uid)
    host: tuple[tuple[int, int], ...] = ()   # (span index, span uid)
    tenant: str = ""                         # whose sequence it is, with its salt: part of every key, and of the canary's KV

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to sample: from which row, how, and at which position of its sequence."""

    row: int
    params: SamplingParams
    position: int
    logprobs: int | None = None              # tell its log-probability and so many likely tokens; None: do not


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All arrays int64, length = rows including padding."""

    step: int
    token_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray                 # slot * span_tokens + offset; -1: padding
    rows: tuple[PlannedRows, ...]
    draws: tuple[Draw, ...]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def pack(self) -> bytes:
        """For the other shards. `unpack(plan.pack()) == plan`."""
        draws = [(d.row, d.params.temperature, d.params.top_p, d.params.top_k, d.params.seed, d.position, d.logprobs)
                 for d in self.draws]
        rows = [(r.first_row, r.start, r.stop, r.local, r.remote, r.host, r.tenant) for r in self.rows]
        arrays = (self.token_ids.tobytes(), self.positions.tobytes(), self.slot_mapping.tobytes())
        return bytes(msgpack.packb((self.step, *arrays, rows, draws)))


def unpack(data: bytes) -> StepPlan:
    """Inverse of StepPlan.pack."""
    step, tokens, positions, mapping, rows, draws = msgpack.unpackb(data, use_list=False)
    arrays = [np.frombuffer(bytearray(array), dtype=np.int64) for array in (tokens, positions, mapping)]
    return StepPlan(
        step, arrays[0], arrays[1], arrays[2],
        rows=tuple(PlannedRows(*row) for row in rows),
        draws=tuple(Draw(row, SamplingParams(temperature=t, top_p=p, top_k=k, seed=seed), position, logprobs)
                    for row, t, p, k, seed, position, logprobs in draws),
    )


@dataclass(slots=True)
class StepResult:
    """What a step gave: one token per draw, and the spans that could not be read (uid -> why)."""

    tokens: list[int]
    lost: dict[int, str]
    logits: Any = None                       # [draws, vocab] float32, only when asked for
    remote_calls: int = 0
    forward_s: float = 0.0                   # inside the model and attention
    logprobs: tuple[Logprobs | None, ...] = ()     # one per draw; empty when no draw asked


class PlanBuilder:
    """Collects the rows of one step."""

    def __init__(self, step: int, span_tokens: int, *, pad: bool) -> None:
        self._step, self._span_tokens, self._pad = step, span_tokens, pad
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._mapping: list[int] = []
        self._rows: list[PlannedRows] = []
        self._draws: list[Draw] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def add(
        self, token_ids: Sequence[int], start: int, local: list[tuple[int, int]], *,
        remote: list[tuple[int, int]], host: list[tuple[int, int]], draw: SamplingParams | None, tenant: str = "",
        logprobs: int | None = None,
    ) -> None:
        """Rows for tokens at positions start.. of one sequence; `draw`: sample what follows the last of them."""
        stop, span = start + len(token_ids), self._span_tokens
        slot_of = dict(local)
        self._rows.append(PlannedRows(len(self._tokens), start, stop, tuple(local), tuple(remote), tuple(host), tenant))
        self._tokens.extend(token_ids)
        self._positions.extend(range(start, stop))
        self._mapping.extend(slot_of[p // span] * span + p % span for p in range(start, stop))
        if draw is not None:
            self._draws.append(Draw(len(self._tokens) - 1, draw, stop, logprobs))

    def build(self) -> StepPlan:
        pad = self._pad or len(self._tokens) > FEW_ROWS
        fill = -len(self._tokens) % PAD_ROWS if pad else 0
        padded = (self._tokens + [0] * fill, self._positions + [0] * fill, self._mapping + [-1] * fill)
        tokens, positions, mapping = (np.array(values, dtype=np.int64) for values in padded)
        return StepPlan(self._step, tokens, positions, mapping, rows=tuple(self._rows), draws=tuple(self._draws))
