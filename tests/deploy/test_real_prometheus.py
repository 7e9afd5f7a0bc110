"""A real Prometheus scrapes real clusters: every panel shows something, and real faults set off the right alerts."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from kvbank.cluster.client import Client
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis

pytestmark = pytest.mark.slow
DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def impatient_rules() -> dict[str, Any]:
    """deploy/alerts.yml as it is, but what holds for a second is told."""
    rules: dict[str, Any] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    return rules


def panel_queries() -> list[tuple[str, str]]:
    board = json.loads((DEPLOY / "grafana/kvbank.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    return [(title, expr.replace("$__rate_interval", "1m").replace("$__range", "5m").replace("$instance", ".*"))
            for title, expr in found]


def test_every_panel_of_the_dashboard_shows_something(
    cluster: Callable[..., Any], prometheus: Callable[..., Any], until: Callable[..., Any]
) -> None:
    assert len(panel_queries()) > 40
    one = cluster(workers=1, lenders=1, redis="embedded", host_bytes=8 << 20)
    server = prometheus(one.address)
    until(lambda: server.query("kvbank_build_info"))
    with Client(one.address) as client:
        for number in range(6):                      # all counters must be seen before and after something happened
            client.generate(prompt(1000, number % 2), max_tokens=8, ignore_eos=True)
            seen = len(server.query("kvbank_member_steps_total[5m]")[0]["values"])
            until(lambda seen=seen: len(server.query("kvbank_member_steps_total[5m]")[0]["values"]) > seen + 1)

        def empty() -> list[tuple[str, str]]:
            def shows(expr: str) -> bool:
                return any(sample["value"][1] != "NaN" for sample in server.query(expr))
            return [(title, expr) for title, expr in panel_queries() if not shows(expr)]

        for number in range(20):                     # a ratio of rates wants traffic within its window
            if not (left := empty()):
                return
            client.generate(prompt(1000, number % 3), max_tokens=8, ignore_eos=True)
        assert left == []


def test_a_dead_worker_and_a_dead_lender_set_off_their_alerts(
    cluster: Callable[..., Any], prometheus: Callable[..., Any], until: Callable[..., Any]
) -> None:
    one = cluster(workers=1, lenders=2, restart=False, prefill_chunk_tokens=32, lender_blocks=160, term_s=3.0)
    server = prometheus(one.address, impatient_rules())
    until(lambda: server.query("kvbank_member_up == 1"))
    with Client(one.address) as client:
        job = client.submit(prompt(2400), max_tokens=64, ignore_eos=True)
        until(lambda: client.status().loans and job.status().computed > 1500, 120)
        assert server.firing() - {"KvbankBooksDisagree", "KvbankDeviceMemoryFull"} == set()
        lender = client.status().loans[0].lender
        os.kill(one.processes[lender], signal.SIGKILL)
        job.result(timeout_s=240)
        until(lambda: {"KvbankLoansLost", "KvbankMemberMissing"} <= server.firing())
        assert "KvbankNoModelWorker" not in server.firing()
        assert "KvbankReplaying" in until(server.firing)
    os.kill(one.processes["worker-0"], signal.SIGKILL)
    until(lambda: "KvbankNoModelWorker" in server.firing())


def test_a_stopped_redis_opens_the_breaker_and_the_alert_and_closes_both(
    cluster: Callable[..., Any], prometheus: Callable[..., Any], until: Callable[..., Any]
) -> None:
    with EmbeddedRedis(64 << 20) as redis:
        one = cluster(workers=1, lenders=0, redis=redis.url, host_bytes=1 << 20)
        server = prometheus(one.address, impatient_rules())
        with Client(one.address) as client:
            client.generate(prompt(300), max_tokens=4)
            until(lambda: server.query("kvbank_tier_breaker"))
            assert "KvbankBreakerOpen" not in server.firing()
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                for seed in range(1, 6):
                    client.generate(prompt(300, seed), max_tokens=4)
                until(lambda: "KvbankBreakerOpen" in server.firing())
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            until(lambda: "KvbankBreakerOpen" not in server.firing())


def test_a_full_queue_is_told_as_overload(
    cluster: Callable[..., Any], prometheus: Callable[..., Any], until: Callable[..., Any]
) -> None:
    one = cluster(workers=1, lenders=0, max_jobs=2)
    server = prometheus(one.address, impatient_rules())
    until(lambda: server.query('kvbank_requests_refused_total{code="overloaded"}'))
    with Client(one.address) as client:
        running = [client.submit(prompt(200, seed), max_tokens=400, ignore_eos=True) for seed in range(2)]
        refused = httpx.post(f"{one.address}/v1/jobs", json={"prompt": prompt(50, 9), "max_tokens": 1})
        assert refused.status_code == 429
        until(lambda: {"KvbankOverloaded"} <= server.firing())
        for job in running:
            job.cancel()
