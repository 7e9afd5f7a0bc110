"""Meters: what the gateway counts, in a Prometheus registry of its own. No label says who asked, or for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvbank.cluster.job import Job

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Meters:
    """One gateway's counters; several gateways in one process do not share any."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"kvbank_{name}", about, labels, registry=self.registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"kvbank_{name}", about, labels, registry=self.registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"kvbank_{name}_seconds", about, buckets=_SECONDS, registry=self.registry)

        self._admitted = counter("jobs_admitted", "Jobs admitted")
        self._ended = counter("jobs_ended", "Jobs over, by outcome", "outcome")
        self._refused = counter("requests_refused", "Requests refused, by code", "code")
        self._lost = counter("attempts_lost", "Attempts without an outcome, by reason", "reason")
        self._prompt = counter("prompt_tokens", "Prompt tokens of jobs over")
        self._output = counter("output_tokens", "Tokens streamed")
        self._computed = counter("computed_tokens", "Tokens computed for jobs over")
        self._reused = counter("reused_tokens", "Prompt tokens not computed, by source", "source")
        self._missed = counter("missed_tokens", "Prompt tokens computed, by reason", "reason")
        self._ttft = seconds("ttft", "Admission to first token")
        self._total = seconds("job", "Admission to the end")
        self._jobs = gauge("jobs", "Jobs of this gateway, by state", "state")
        self._members = gauge("members", "Members that answer, by kind", "kind")
        self._blocks = gauge("blocks", "Device blocks, by member and state", "worker", "state")
        self._loans = gauge("loans", "Open loans")
        self._tier_bytes = gauge("tier_bytes", "Bytes in a tier", "worker", "tier")
        self._tier_limit = gauge("tier_limit_bytes", "Bytes a tier may hold", "worker", "tier")
        self._tier_events = gauge("tier_events", "A tier's own counters", "worker", "tier", "event")
        self._worker_events = gauge("worker_events", "A worker's own counters", "worker", "event")

    def observe(self, *, live: int, waiting: int, status: Mapping[str, Any]) -> None:
        """Set the gauges to what the members say of themselves (`Survey.told`)."""
        for gauge in (self._members, self._blocks, self._tier_bytes, self._tier_limit, self._tier_events,
                      self._worker_events):
            gauge.clear()                            # members that left must not be shown for ever
        self._jobs.labels("queued").set(waiting)
        self._jobs.labels("running").set(live - waiting)
        self._loans.set(len(status["loans"]))
        for worker in status["workers"]:
            name = worker["id"]
            self._members.labels(worker["kind"]).inc(0 if worker["state"] == "silent" else 1)
            for state in ("total", "free", "used", "lent", "borrowed"):
                self._blocks.labels(name, state).set(worker[f"blocks_{state}"])
            for tier in worker["tiers"]:
                self._tier_bytes.labels(name, tier["name"]).set(tier["bytes_used"])
                self._tier_limit.labels(name, tier["name"]).set(tier["bytes_limit"])
                for event, count in tier["counters"].items():
                    self._tier_events.labels(name, tier["name"], event).set(count)
            for event, count in worker["counters"].items():
                self._worker_events.labels(name, event).set(count)

    def admitted(self) -> None:
        self._admitted.inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def lost(self, reason: str) -> None:
        self._lost.labels(reason).inc()

    def tokens(self, job: Job, count: int) -> None:
        """`count` tokens of `job` arrived."""
        if 0 < count == len(job.ids):
            self._ttft.observe(max(0.0, job.first_token_at - job.started_at))
        self._output.inc(count)

    def ended(self, job: Job) -> None:
        """A job is over and its receipt complete."""
        self._ended.labels(job.finish_reason if job.error is None else job.error.code).inc()
        self._total.observe(max(0.0, job.ended_at - job.started_at))
        self._prompt.inc(job.prompt_tokens)
        self._computed.inc(job.receipt.get("computed_tokens", 0))
        for source, tokens in job.receipt.get("reused", {}).items():
            self._reused.labels(source).inc(tokens)
        for reason, tokens in job.receipt.get("missed", {}).items():
            self._missed.labels(reason).inc(tokens)
