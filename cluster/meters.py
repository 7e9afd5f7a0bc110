"""Meters: what the gateway counts, in a Prometheus registry of its own, with the census of the members beside it.

Names, labels and meanings are in families.py. No label says what a caller asked for. Tokens are noted when they
come and counted many at a time, which costs the decode less (docs/decisions/0022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import kvbank
from kvbank.cluster.census import Census
from kvbank.cluster.families import ALL, BEGIN_CODES, BEGIN_LOST, Names
from kvbank.cluster.job import Job

NOTES = 256                          # tokens that are noted before they are counted: 0.3 ms' work

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Meters:
    """One gateway's counters; several gateways in one process do not share any."""

    def __init__(self, *, model: str = "", jobs_limit: int = 0, expected: Mapping[str, int] | None = None) -> None:
        """model: as callers name it. expected: members by kind that the settings ask for."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]   # a second series for each
        self.registry = CollectorRegistry()
        self._model = model
        self._tenant, self._reason, self._source, self._code = Names(), Names(), Names(), Names()
        self._notes: list[tuple[str, int, float | None]] = []    # tenant, tokens that came together, seconds since others
        self._noted = 0                              # tokens

        self._admitted = self._counter("jobs_admitted")
        self._ended = self._counter("jobs_ended")
        self._refused = self._counter("requests_refused")
        self._lost = self._counter("attempts_lost")
        self._prompt = self._counter("prompt_tokens")
        self._output = self._counter("output_tokens")
        self._computed = self._counter("computed_tokens")
        self._reused = self._counter("reused_tokens")
        self._missed = self._counter("missed_tokens")
        self._replayed = self._counter("replayed_tokens").labels(model)
        self._ttft = self._seconds("ttft", _SECONDS)
        self._between = self._seconds("inter_token", _BETWEEN)
        self._total = self._seconds("job", _SECONDS)
        self._jobs = self._gauge("jobs")
        self._gauge("jobs_limit").set(jobs_limit)
        self._gauge("build_info").labels(kvbank.__version__, model).set(1)
        for code in BEGIN_CODES:
            self._refused.labels(self._code(code))   # from 0, or the first one of each would be no increase
        for reason in BEGIN_LOST:
            self._lost.labels(reason)
        self._census = Census(expected or {})
        self.registry.register(self._census)

    def _counter(self, name: str) -> Counter:
        family = ALL[f"kvbank_{name}_total"]
        return Counter(family.name, family.about, family.labels, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        family = ALL[f"kvbank_{name}"]
        return Gauge(family.name, family.about, family.labels, registry=self.registry)

    def _seconds(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        family = ALL[f"kvbank_{name}_seconds"]
        made = Histogram(family.name, family.about, family.labels, buckets=buckets, registry=self.registry)
        bound: Histogram = made.labels(self._model)
        return bound

    def observe(self, *, live: int, waiting: int, status: Mapping[str, Any]) -> None:
        """What the next scrape shows of the gateway's queue and of the members (`Survey.told`)."""
        self._jobs.labels("queued").set(waiting)
        self._jobs.labels("running").set(live - waiting)
        self._census.told = status

    def admitted(self, tenant: str) -> None:
        self._admitted.labels(self._model, self._tenant(tenant)).inc()

    def refused(self, code: str) -> None:
        self._refused.labels(self._code(code)).inc()

    def lost(self, reason: str) -> None:
        self._lost.labels(self._reason(reason)).inc()

    def tokens(self, job: Job, count: int, *, before: float) -> None:
        """The last `count` tokens of `job` came together; those before them did at monotonic `before`, 0.0: there were none."""
        self._notes.append((job.spec.tenant, count, job.last_token_at - before if before else None))
        if not before:
            self._ttft.observe(max(0.0, job.first_token_at - job.started_at))
        self._noted += count
        if self._noted >= NOTES:
            self._count()

    def page(self) -> bytes:
        """Everything, as Prometheus reads it."""
        self._count()
        return generate_latest(self.registry)

    def _count(self) -> None:
        """What was noted of tokens."""
        notes, self._notes, self._noted = self._notes, [], 0
        of_tenants: dict[str, int] = {}
        for tenant, count, seconds in notes:
            of_tenants[tenant] = of_tenants.get(tenant, 0) + count
            if seconds is not None:                  # tokens that came together share the time
                for _ in range(count):
                    self._between.observe(max(0.0, seconds) / count)
        for tenant, count in of_tenants.items():
            self._output.labels(self._model, self._tenant(tenant)).inc(count)

    def ended(self, job: Job) -> None:
        """A job is over and its receipt complete."""
        whose = (self._model, self._tenant(job.spec.tenant))
        self._ended.labels(*whose, job.finish_reason if job.error is None else job.error.code).inc()
        self._total.observe(max(0.0, job.ended_at - job.started_at))
        self._prompt.labels(*whose).inc(job.prompt_tokens)
        self._computed.labels(*whose).inc(job.receipt.get("computed_tokens", 0))
        self._replayed.inc(job.receipt.get("recomputed_after_fault", 0))
        for source, tokens in job.receipt.get("reused", {}).items():
            self._reused.labels(*whose, self._source(source)).inc(tokens)
        for reason, tokens in job.receipt.get("missed", {}).items():
            self._missed.labels(*whose, self._reason(reason)).inc(tokens)
