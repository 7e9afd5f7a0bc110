"""Window: figures of the jobs that ended in the last minutes, and of all since the gateway started.

Every figure comes with its denominator: jobs, prompt tokens, or how many samples a percentile has. Knows receipts; knows
no prompt, no tenant and no clock.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW_S = 300.0
MAX_JOBS = 4096                      # of the window: when more ended in it, it is shorter, and says so


@dataclass(frozen=True, slots=True)
class Ended:
    """What remains of a job for the figures."""

    at: float
    outcome: str                     # stop | length | an error's code
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    reused: dict[str, int]           # prompt tokens by source
    missed: dict[str, int]           # prompt tokens by reason
    ttft_s: float | None             # None: it had no token
    token_s: float | None            # per token after the first; None with fewer than two tokens


@dataclass(slots=True)
class Sums:
    """Counts of a set of jobs."""

    jobs: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)

    def add(self, job: Ended, sign: int = 1) -> None:
        """Count a job in, or out again."""
        self.jobs += sign
        self.prompt_tokens += sign * job.prompt_tokens
        self.output_tokens += sign * job.output_tokens
        self.computed_tokens += sign * job.computed_tokens
        self.outcomes[job.outcome] += sign
        for counter, amounts in ((self.reused, job.reused), (self.missed, job.missed)):
            for name, amount in amounts.items():
                counter[name] += sign * amount

    def told(self) -> dict[str, Any]:
        """As plain values, nothing that is zero."""
        return {"jobs": self.jobs, "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens,
                "computed_tokens": self.computed_tokens,
                **{name: {key: count for key, count in counter.items() if count}
                   for name, counter in (("outcomes", self.outcomes), ("reused", self.reused), ("missed", self.missed))}}


class Window:
    """Add each job as it ends; ask at any time."""

    def __init__(self, window_s: float = WINDOW_S, max_jobs: int = MAX_JOBS) -> None:
        self._window_s, self._max_jobs = window_s, max_jobs
        self._jobs: deque[Ended] = deque()
        self._recent, self._ever = Sums(), Sums()
        self._cut = False            # jobs that ended within the window had to go

    def add(self, job: Ended) -> None:
        self._jobs.append(job)
        self._recent.add(job)
        self._ever.add(job)
        if len(self._jobs) > self._max_jobs:
            self._recent.add(self._jobs.popleft(), -1)
            self._cut = True

    def told(self, now: float) -> dict[str, Any]:
        """`{"window_s", "recent": sums, "ever": sums, "ttft_s": percentiles, "token_s": percentiles}`."""
        while self._jobs and self._jobs[0].at < now - self._window_s:
            self._recent.add(self._jobs.popleft(), -1)
            self._cut = False
        window_s = now - self._jobs[0].at if self._cut and self._jobs else self._window_s
        return {
            "window_s": round(window_s), "recent": self._recent.told(), "ever": self._ever.told(),
            "ttft_s": percentiles([job.ttft_s for job in self._jobs if job.ttft_s is not None]),
            "token_s": percentiles([job.token_s for job in self._jobs if job.token_s is not None]),
        }


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """`{"count", "p50", "p99"}` by nearest rank; None without values."""
    if not values:
        return {"count": 0, "p50": None, "p99": None}
    ranked = sorted(values)

    def rank(share: float) -> float:
        return ranked[math.ceil(share * len(ranked)) - 1]

    return {"count": len(ranked), "p50": rank(0.5), "p99": rank(0.99)}
