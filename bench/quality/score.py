"""What is counted on a page, and what is said of many: shares with intervals, distances from full attention, gates.

Definitions for people: docs/quality.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.needle.evaluate import wilson
from bench.quality.subject import Answered

CEILING_GATE = 0.95                      # full attention must reach it, or the model does not do the task
FLOOR_GATE = 0.20                        # random eviction at the smallest budget must not pass it, or the task needs no cache
TEXT_GATE = 1.02                         # random eviction must make a text this much harder, beyond doubt
Z = 1.96
LIFT_FROM = 0.05                         # between random and ceiling; a smaller gap is all noise


@dataclass(frozen=True, slots=True)
class Mark:
    """One page under one policy and budget."""

    right: list[bool]                    # by answer, or by token where tokens are counted
    kl: float                            # mean over the answers' tokens, in nats
    agree: float                         # share of them whose first choice is full attention's
    nll: float                           # mean surprise at the right token, in nats
    output_error: list[float]            # by layer: how far attention's output is from full attention's, mean of |a - b| / |b|
    tokens: int                          # of answers
    context: int                         # tokens
    kept: int                            # of them, by the budget
    needed: int                          # of them, to answer all that could be asked
    device_bytes: float
    host_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy and budget on one task, over all its pages."""

    policy: str
    query_aware: bool
    budget: float                        # share of the context's tokens
    task: str
    length: int
    where: dict[str, Any]
    pages: int
    right: int
    of: int
    share: float
    low: float                           # 95 % interval of the share
    high: float
    kl: float
    agree: float
    output_error: list[float]            # by layer
    ppl: float
    ppl_ratio: float                     # over full attention's, with its interval
    ppl_low: float
    ppl_high: float
    context: float                       # mean tokens
    device_bytes_per_token: float        # of context
    host_bytes_per_token: float
    ceiling: float                       # of whoever keeps whole answers and nothing else
    lift: float | None                   # (share - random) / (ceiling - random); None: nothing is missing, or too narrow to say
    marks: str                           # one digit per answer, in order, for paired comparisons

    def as_json(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


def mark(full: Answered, answered: Answered, *, by_token: bool, context: int, kept: int, needed: int, device_bytes: float,
         host_bytes: float) -> Mark:
    """Both answer the same turns in the same order."""
    wanted, found = full.logits.log_softmax(-1), answered.logits.log_softmax(-1)
    hit = answered.logits.argmax(-1) == answered.target
    apart = (answered.attended - full.attended).norm(dim=-1) / full.attended.norm(dim=-1)
    right = hit.tolist() if by_token else [bool(hit[answered.turn == turn].all()) for turn in answered.turn.unique()]
    return Mark(
        right=right, kl=float((wanted.exp() * (wanted - found)).sum(-1).mean()),
        agree=float((full.logits.argmax(-1) == answered.logits.argmax(-1)).float().mean()),
        nll=float(-found.gather(1, answered.target[:, None]).mean()),
        output_error=apart.mean(1).tolist(), tokens=len(hit), context=context, kept=kept, needed=needed,
        device_bytes=device_bytes, host_bytes=host_bytes)


def row(policy: str, query_aware: bool, budget: float, task: str, length: int, where: dict[str, Any], marks: Sequence[Mark],
        full: Sequence[Mark], random: Sequence[Mark], *, by_token: bool) -> Row:
    """marks, full and random: of the same pages. random: random eviction at the same budget."""
    share, low, high = interval([(sum(each.right), len(each.right)) for each in marks], by_token=by_token)
    tokens = torch.tensor([float(each.tokens) for each in marks])
    more = torch.tensor([one.nll - whole.nll for one, whole in zip(marks, full, strict=True)])
    ratio, ratio_low, ratio_high = _ratio(tokens, more)
    ceiling = sum(min(1.0, each.kept / each.needed) if each.needed else 1.0 for each in marks) / len(marks)
    by_random, context = _share(random), sum(each.context for each in marks)
    return Row(
        policy=policy, query_aware=query_aware, budget=budget, task=task, length=length, where=where, pages=len(marks),
        right=sum(sum(each.right) for each in marks), of=sum(len(each.right) for each in marks), share=share, low=low, high=high,
        kl=_mean(tokens, [each.kl for each in marks]), agree=_mean(tokens, [each.agree for each in marks]),
        output_error=[_mean(tokens, list(layer)) for layer in zip(*(each.output_error for each in marks), strict=True)],
        ppl=math.exp(min(50.0, _mean(tokens, [each.nll for each in marks]))), ppl_ratio=ratio, ppl_low=ratio_low,
        ppl_high=ratio_high, context=context / len(marks),
        device_bytes_per_token=sum(each.device_bytes for each in marks) / context,
        host_bytes_per_token=sum(each.host_bytes for each in marks) / context, ceiling=ceiling,
        lift=None if budget == 1.0 or ceiling - by_random < LIFT_FROM else (share - by_random) / (ceiling - by_random),
        marks="".join(str(int(right)) for each in marks for right in each.right))


def interval(counts: Sequence[tuple[int, int]], *, by_token: bool = False) -> tuple[float, float, float]:
    """Share and its 95 % Wilson interval, from (right, of) of every page.

    Answers of one page share its context, so they say less than as many answers of pages of their own: the interval is
    that of fewer answers, by the factor by which pages differ more than independent answers would (never of more). Where
    all are right or all wrong nothing tells that factor, and tokens of a page count as one.
    """
    right, of, pages = sum(good for good, _ in counts), sum(asked for _, asked in counts), len(counts)
    share = right / of
    independent = float(pages if by_token and right in (0, of) else of)
    if 0 < right < of and pages > 1:
        between = sum((good - share * asked) ** 2 for good, asked in counts) / of**2 * pages / (pages - 1)
        independent = of / max(1.0, between / (share * (1 - share) / of))
    low, high = wilson(share * independent, independent)  # type: ignore[arg-type]
    return share, max(0.0, low), min(1.0, high)


def verdict(chance: float, full: Row, floor: Row) -> str:
    """"" when the task tells policies apart; otherwise why it does not. floor: random eviction at the smallest budget."""
    if full.task == "text":
        if floor.ppl_ratio < TEXT_GATE or floor.ppl_low <= 1.0:
            return f"random eviction makes perplexity {floor.ppl_ratio:.3f} ({floor.ppl_low:.3f} to {floor.ppl_high:.3f}) of full"
        return ""
    if full.share < CEILING_GATE:
        return f"full attention reaches {full.share:.1%}"
    beyond_chance = (floor.share - chance) / (1 - chance)
    return "" if beyond_chance <= FLOOR_GATE else f"random eviction at {floor.budget:.2%} still reaches {floor.share:.1%}"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def _share(marks: Sequence[Mark]) -> float:
    return sum(sum(each.right) for each in marks) / sum(len(each.right) for each in marks)


def _mean(weights: Tensor, values: list[float]) -> float:
    return float((weights * torch.tensor(values)).sum() / weights.sum())


def _ratio(tokens: Tensor, more: Tensor) -> tuple[float, float, float]:
    """exp of the mean surplus of nats, with the 95 % interval that the pages' differences give."""
    mean = float((tokens * more).sum() / tokens.sum())
    half = Z * float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else 0.0
    return tuple(math.exp(min(50.0, each)) for each in (mean, mean - half, mean + half))  # type: ignore[return-value]
