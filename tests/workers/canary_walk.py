"""A random walk of canary jobs through a city, with an auditor. Every job's tokens are what the canary answers alone."""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbank.errors import Cancelled
from kvbank.workers.canary_alone import CanaryAlone
from kvbank.workers.engine import Failed, Finished, Token
from kvbank.workers.sampler import SamplingParams
from kvbank.workers.sequence import JobSpec
from tests.workers.auditor import Auditor
from tests.workers.city import BLOCK, SLOT, SPAN, City, Weather

LENGTHS = (1, 7, 8, 9, 30, 31, 32, 33, 80, 160, 280, 450)
STEMS = (0, SPAN, 4 * SPAN - 3, 8 * SPAN)
QUIET_S = 40.0


class PatientClock:
    """Monotonic seconds, but at most STRIDE_S between two looks at it: who was stopped or starved meanwhile has not waited."""

    STRIDE_S = 0.25

    def __init__(self) -> None:
        self._seen, self._now = time.monotonic(), 0.0

    def __call__(self) -> float:
        seen = time.monotonic()
        self._now += min(max(0.0, seen - self._seen), self.STRIDE_S)
        self._seen = seen
        return self._now


class WrongToken(AssertionError):
    """The canary died."""


def build_city(model: Path, *, redis: str | None, **settings: Any) -> City:
    """Two workers of 12 slots, two lenders of 8, room for 8 frames on each host, 4 MiB in Redis; everything is short."""
    return City(model, **{
        "device_blocks": 12 * SPAN // BLOCK, "lender_blocks": 8 * SPAN // BLOCK, "host_bytes": 8 * (SLOT + 8192),
        "redis": redis, "redis_bytes": 4 << 20, "prefill_chunk_tokens": 4 * SPAN, "term_s": 3.0, "renew_s": 0.5, "fill_s": 1.0,
        "attend_lost_s": 0.5, "avoid_s": 0.3, "recall_calm_s": 1.0, "recall_drain_s": 1.0, "recall_urgent_s": 0.5,
        "stall_s": 120, **settings})


@dataclass
class Walk:
    """Dice, jobs and what came of them."""

    city: City
    alone: CanaryAlone
    rng: random.Random
    audit: Auditor
    weather: Weather | None = None
    most_live: int = 4                       # jobs at once on each worker
    cancel: float = 0.01                     # chance per step and job
    strike: float = 0.02                     # chance per step of something happening to a member
    quiet_s: float = QUIET_S                 # without an event, and something is wrong
    outputs: tuple[int, ...] = (1, 2, 9, 30)
    lengths: tuple[int, ...] = LENGTHS
    stems: tuple[int, ...] = STEMS
    clock: PatientClock = field(default_factory=PatientClock)
    answers: dict[Any, list[int]] = field(default_factory=dict)      # what the canary was asked alone
    want: dict[str, list[int]] = field(default_factory=dict)
    got: dict[str, list[int]] = field(default_factory=dict)
    live: dict[str, Any] = field(default_factory=dict)               # job -> its worker
    cancelled: set[str] = field(default_factory=set)
    checked: int = 0
    tokens: int = 0
    numbers: int = 0                         # of the jobs so far
    reused: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def job(self, number: int) -> JobSpec:
        """Texts meet in their beginnings, within a tenant and across."""
        rng = self.rng
        text = _text(rng.choice(self.stems), rng.randrange(3)) + _text(rng.choice(self.lengths), rng.randrange(10))
        sampling = SamplingParams() if rng.random() < 0.8 else SamplingParams(temperature=1.5, seed=number % 5)
        return JobSpec(id=f"j{number}", prompt=text, max_tokens=rng.choice(self.outputs), ignore_eos=True, sampling=sampling,
                       age=float(number), tenant=rng.choice("aab"))

    def run(self, jobs: int, *, cpu_s: float = float("inf")) -> None:
        """Raises WrongToken, auditor.Broken; AssertionError when nothing moves. cpu_s: of this process, then no new job: the
        same amount of trouble on a busy machine as on a quiet one."""
        last, rng, quiet_since, until = self.numbers + jobs, self.rng, self.clock(), time.process_time() + cpu_s
        while (more := self.numbers < last and time.process_time() < until) or self.live:
            while more and len(self.live) < self.most_live * len(self.city.workers) and rng.random() < 0.4:
                self._start(self.job(self.numbers), rng.choice(self.city.workers))
                self.numbers += 1
                more = self.numbers < last
            if self.live and rng.random() < self.cancel:
                name = rng.choice(sorted(self.live))
                self.cancelled.add(name)
                self.live[name].engine.cancel(name)
            if self.weather is not None and rng.random() < self.strike:
                self.weather.strike()
            if self.weather is not None and rng.random() < 0.03:
                self.most_live = rng.choice((1, 1, 2, 4))          # rushes and lulls: with free slots, spans come home
            events = self.city.step()
            for _, event in events:
                self._take(event)
            self.audit.check(full=any(not isinstance(event, Token) for _, event in events))
            if events:
                quiet_since = self.clock()
            else:
                self.city.worker.engine.wake.wait(0.001)
            assert self.clock() - quiet_since < self.quiet_s, self._stuck()

    def end(self) -> None:
        """Peace: everything comes back, and the books are empty."""
        if self.weather is not None:
            self.weather.clear()
        patience = self.audit._patience(self.city.living) + 5.0
        give_up = self.clock() + patience
        while any(m.vault.counts().lent or m.ledger.num_lent for m in self.city.living) or any(
                w.engine.room.waiting or w.book.held() for w in self.city.workers):
            self.city.step()
            self.audit.check()
            assert self.clock() < give_up, f"not quiet after {patience:.0f} s: {self._lent()}"
            self.city.worker.engine.wake.wait(0.01)
        self.audit.check_quiet()

    def _start(self, job: JobSpec, worker: Any) -> None:
        self.want[job.id] = self._alone(job)
        self.live[job.id] = worker
        worker.engine.add(job)

    def _alone(self, job: JobSpec) -> list[int]:
        """Its right answer; texts come again, and the canary needs to be asked once."""
        name = (array("i", job.prompt).tobytes(), job.tenant, job.sampling)
        if len(self.answers.get(name, ())) < job.max_tokens:
            self.answers[name] = self.alone.answer(job.prompt, job.max_tokens, tenant=job.tenant, sampling=job.sampling)
        return self.answers[name][: job.max_tokens]

    def _take(self, event: Any) -> None:
        want, got = self.want[event.job], self.got.setdefault(event.job, [])
        if isinstance(event, Token):
            if len(got) >= len(want) or event.token != want[len(got)] or event.index != len(got):
                raise WrongToken(f"{event.job}: token {event.index} is {event.token}, alone the canary says {want[len(got):][:1]}"
                                 f" after {len(got)} right ones\n{self.audit.history()}")
            got.append(event.token)
            self.tokens += 1
            return
        del self.live[event.job], self.want[event.job], self.got[event.job]
        if isinstance(event, Finished):
            if got != want:
                raise WrongToken(f"{event.job} ended with {len(got)} of {len(want)} tokens")
            self.checked += 1
            self.reused += event.tally.reused
            self.seen["borrowed"] += event.tally.borrowed_blocks_peak > 0
            self.seen["parked"] += event.tally.parked_blocks_peak > 0
            self.seen["replayed"] += event.tally.recomputed_after_fault > 0
            return
        assert isinstance(event, Failed)
        if self.weather is not None and self.weather.did["rotten slot"] and "turned out wrong" in str(event.error):
            self.seen["spoiled"] += 1        # it had answered from bytes that rotted, and says so
            return
        assert isinstance(event.error, Cancelled) and event.job in self.cancelled, f"{event.job} failed: {event.error!r}"
        self.seen["cancelled"] += 1

    def _stuck(self) -> str:
        waiting = [(seq.job.id, seq.state, seq.waits_for, seq.num_tokens) for w in self.city.workers for seq in w.engine.jobs()]
        return f"nothing for {self.quiet_s:.0f} s: {waiting}, {self._lent()}\n{self.audit.history()}"

    def _lent(self) -> list[Any]:
        return [(m.id, m.vault.counts(), m.ledger.num_by_state()) for m in self.city.living]


def _text(length: int, seed: int) -> list[int]:
    rng = random.Random(seed * 7919 + 1)
    return [rng.randrange(3, 60000) for _ in range(length)]
