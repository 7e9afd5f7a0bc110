"""Meters: what the gateway counts, in a Prometheus registry of its own. Never a prompt, a key or a job id in a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvbank.cluster.job import Job

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Meters:
    """One gateway's counters; several gateways in one process do not share any."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._admitted = Counter("kvbank_jobs_admitted", "Jobs admitted", registry=registry)
        self._ended = Counter("kvbank_jobs_ended", "Jobs over, by outcome", ["outcome"], registry=registry)
        self._refused = Counter("kvbank_requests_refused", "Requests refused, by code", ["code"], registry=registry)
        self._lost = Counter("kvbank_attempts_lost", "Attempts without an outcome, by reason", ["reason"], registry=registry)
        self._prompt = Counter("kvbank_prompt_tokens", "Prompt tokens of jobs over", registry=registry)
        self._output = Counter("kvbank_output_tokens", "Tokens streamed", registry=registry)
        self._computed = Counter("kvbank_computed_tokens", "Tokens computed for jobs over", registry=registry)
        self._reused = Counter("kvbank_reused_tokens", "Prompt tokens not computed, by source", ["source"], registry=registry)
        self._missed = Counter("kvbank_missed_tokens", "Prompt tokens computed, by reason", ["reason"], registry=registry)
        self._ttft = Histogram("kvbank_ttft_seconds", "Admission to first token", buckets=_SECONDS, registry=registry)
        self._total = Histogram("kvbank_job_seconds", "Admission to the end", buckets=_SECONDS, registry=registry)

        self._jobs = Gauge("kvbank_jobs", "Jobs of this gateway, by state", ["state"], registry=registry)
        self._members = Gauge("kvbank_members", "Members that answer, by kind", ["kind"], registry=registry)
        self._blocks = Gauge("kvbank_blocks", "Device blocks, by member and state", ["worker", "state"], registry=registry)
        self._loans = Gauge("kvbank_loans", "Open loans", registry=registry)
        self._tier_bytes = Gauge("kvbank_tier_bytes", "Bytes in a tier", ["worker", "tier"], registry=registry)
        self._tier_limit = Gauge("kvbank_tier_limit_bytes", "Bytes a tier may hold", ["worker", "tier"], registry=registry)
        self._tier_events = Gauge("kvbank_tier_events", "A tier's own counters", ["worker", "tier", "event"],
                                  registry=registry)
        self._counters = Gauge("kvbank_worker_events", "A worker's own counters", ["worker", "event"], registry=registry)

    def observe(self, *, live: int, waiting: int, status: Mapping[str, Any]) -> None:
        """Set the gauges to what the members say of themselves (`Survey.told`)."""
        for gauge in (self._members, self._blocks, self._tier_bytes, self._tier_limit, self._tier_events, self._counters):
            gauge.clear()
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
                self._counters.labels(name, event).set(count)

    def admitted(self) -> None:
        self._admitted.inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def lost(self, reason: str) -> None:
        self._lost.labels(reason).inc()

    def tokens(self, job: Job, count: int, now: float) -> None:
        """`count` tokens of `job` arrived at `now`."""
        if count and len(job.ids) <= count and job.first_token_at == now:
            self._ttft.observe(max(0.0, now - job.started_at))
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
