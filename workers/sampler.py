"""Logits to tokens. A row's token depends on its logits, its parameters and (seed, position), and on nothing else.

So a job gives the same tokens alone, batched, resumed on another worker or replayed. The noise comes from a
counter-based generator (Philox 4x64, Salmon et al. 2011) keyed by (seed, position): no state to carry, nothing to lose.
Sampling is Gumbel-max over the tokens that top-k and top-p leave. Log-probabilities are the model's own: before temperature,
top-k and top-p. Knows nothing of jobs, stop strings or shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbank.errors import InvalidRequest, ModelError

SEED_LIMIT = 1 << 63                         # seeds travel as signed 64-bit integers
MAX_TEMPERATURE = 100                        # far beyond any use: all tokens are equally likely there
MAX_LOGPROBS = 20                            # likely tokens told beside each drawn one
FIRST_LOOK = 1024                            # top-p tries this many likely tokens before it sorts the whole vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one job draws its tokens. Raises InvalidRequest naming the field that is out of range."""

    temperature: float = 0.0                 # 0: greedy, the other fields are then ignored
    top_p: float = 1.0                       # the most likely tokens that together reach this probability; 1: all
    top_k: int = 0                           # that many most likely tokens, and those that tie with the last; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, (int, float), 0 <= _number(self.temperature) <= MAX_TEMPERATURE,
               f"a number from 0 to {MAX_TEMPERATURE}")
        _check("top_p", self.top_p, (int, float), 0 < _number(self.top_p) <= 1, "a number above 0 and at most 1")
        _check("top_k", self.top_k, (int,), 0 <= _number(self.top_k) < 1 << 31, "an integer of at least 0")
        _check("seed", self.seed, (int,), 0 <= _number(self.seed) < SEED_LIMIT,
               f"an integer from 0 to {SEED_LIMIT - 1}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one drawn token: its natural log-probability, and the likeliest tokens (on a tie the lowest id) with theirs."""

    drawn: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


class BadLogits(ModelError):
    """Some rows have no largest finite logit (NaN, +inf, or nothing but -inf). The other rows were sampled.

    rows:    indices of the bad rows, ascending
    tokens:  one entry per row, None for the bad ones
    """

    def __init__(self, rows: tuple[int, ...], tokens: list[int | None]) -> None:
        super().__init__(f"the model gave no usable logits (NaN or infinite) for {len(rows)} of {len(tokens)} rows: "
                         f"{list(rows)}")
        self.rows = rows
        self.tokens = tokens


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token per row. Greedy takes the largest logit, on a tie the lowest id.

    logits:     [R, vocab], float32, any device; left as it is
    positions:  where in its sequence each new token will stand; with the seed it fixes the noise
    Raises BadLogits after sampling all the rows it can.
    """
    assert len(logits) == len(params) == len(positions), "one SamplingParams and one position per row"
    if not params:
        return []
    best, ids = _largest(logits)
    tokens: list[int | None] = ids.tolist()
    usable = np.isfinite(best)
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        if not usable[row]:
            tokens[row] = None
        elif not param.greedy:
            tokens[row] = _draw(logits[row].float().cpu().numpy(), float(best[row]), param, position)
    good = [token for token in tokens if token is not None]
    if len(good) < len(tokens):
        raise BadLogits(tuple(int(row) for row in np.flatnonzero(~usable)), tokens)
    return good


def _largest(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each row's largest logit and where it first stands; a NaN anywhere in the row comes out as its maximum."""
    if logits.device.type == "cpu":          # 32 rows of 32,000: 50 us, where torch's own takes 550
        values = logits.float().numpy()
        ids = values.argmax(axis=1)
        return values[np.arange(len(ids)), ids], ids
    best, where = logits.max(dim=-1)
    return best.float().cpu().numpy(), where.cpu().numpy()


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> tuple[Logprobs | None, ...]:
    """Log-probabilities of drawn tokens under the softmax of their logits, as `torch.log_softmax` of float32 gives them.

    logits:  [R, vocab], any float dtype and device; left as it is
    tokens:  one per row; a negative one (its logits were not usable) gets None
    counts:  how many of the likeliest tokens to tell as well, 0 to MAX_LOGPROBS; None: nothing of this row
    """
    rows = [row for row, count in enumerate(counts) if count is not None and tokens[row] >= 0]
    told: list[Logprobs | None] = [None] * len(counts)
    if not rows:
        return tuple(told)
    every = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(dim=-1)
    drawn = every.gather(1, torch.tensor([[tokens[row]] for row in rows], device=every.device)).squeeze(1).tolist()
    wanted = [min(counts[row] or 0, every.shape[1]) for row in rows]
    likely = _likeliest(every, max(wanted))
    for at, (row, count) in enumerate(zip(rows, wanted, strict=True)):
        ids, values = likely[at]
        told[row] = Logprobs(drawn[at], tuple(ids[:count].tolist()), tuple(values[:count].tolist()))
    return tuple(told)


def _likeliest(values: Tensor, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, values) of each row's `count` largest. topk alone may take any of several that tie: which one would differ
    from machine to machine, so all that reach its last value are looked at."""
    if not count:
        return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(values)
    floor = values.topk(count, dim=-1).values[:, -1:]
    found = (values >= floor).nonzero()
    kept = values[found[:, 0], found[:, 1]].cpu().numpy()
    where = found.cpu().numpy()
    likely = []
    for row in range(len(values)):
        mine = where[:, 0] == row
        ids, near = where[mine, 1], kept[mine]
        order = np.lexsort((ids, -near))[:count]
        likely.append((ids[order], near[order]))
    return likely


def gumbel_noise(seed: int, position: int, vocab_size: int, tokens: np.ndarray | None = None) -> np.ndarray:
    """Standard Gumbel noise, [vocab_size] float32: a function of its arguments, up to an ulp of the machine's `log`.

    tokens: only the noise of these ids, in their order.
    """
    words = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw((vocab_size + 1) // 2)
    words = words.astype("<u8", copy=False).view("<u4")[:vocab_size]
    if tokens is not None:
        words = words[tokens]
    # Uniform in (0, 1], fine near 0 because that end makes the winners: -log1p(-u) is an exponential waiting time.
    uniform = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    with np.errstate(divide="ignore"):       # u = 1: waits for ever
        return -np.log(-np.log1p(-uniform))


def _draw(logits: np.ndarray, best: float, param: SamplingParams, position: int) -> int:
    with np.errstate(over="ignore"):         # a token that far below the best can only be -inf
        scores = (logits - np.float32(best)) / np.float32(max(param.temperature, 1e-6))     # largest is 0
    floor = -math.inf
    if 0 < param.top_k < len(scores):
        floor = float(np.partition(scores, -param.top_k)[-param.top_k])
    if param.top_p < 1:
        floor = max(floor, _top_p_floor(scores[scores >= floor], param.top_p))
    if floor == -math.inf:
        return int(np.argmax(scores + gumbel_noise(param.seed, position, len(scores))))
    kept = np.flatnonzero(scores >= floor)
    return int(kept[np.argmax(scores[kept] + gumbel_noise(param.seed, position, len(scores), kept))])


def _top_p_floor(scores: np.ndarray, top_p: float) -> float:
    """The score of the last token needed to reach `top_p` of the probability; tokens that tie with it stay too."""
    total = float(np.exp(scores, dtype=np.float64).sum())
    count = min(FIRST_LOOK, len(scores))
    while True:
        likely = -np.sort(-(scores if count == len(scores) else np.partition(scores, -count)[-count:]))
        reached = np.cumsum(np.exp(likely, dtype=np.float64)) >= top_p * total
        if reached.any():
            return float(likely[int(np.argmax(reached))])
        if count == len(scores):             # rounding kept the sum a hair below the total
            return float(likely[-1])
        count = len(scores)


def _number(value: object) -> int | float:
    """The value for a comparison; NaN, which fails them all, when it is no number."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _check(field: str, value: object, kinds: tuple[type, ...], in_range: bool, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not in_range:
        raise InvalidRequest(f"{field} is {value!r}, but must be {wanted}")
