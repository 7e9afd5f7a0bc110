"""Traces of a real cluster: one job's spans, written by three processes, are one tree below the caller's own span."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbank.cluster.client import Client

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def spans(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def complete(address: str, prompt: list[int], *, traceparent: str | None = None, **more: Any) -> dict[str, Any]:
    headers = {} if traceparent is None else {"traceparent": traceparent}
    asked = {"prompt": prompt, "max_tokens": 6, **more}
    answer = httpx.post(f"{address}/v1/completions", json=asked, headers=headers, timeout=120)
    answer.raise_for_status()
    body: dict[str, Any] = answer.json()
    return body


def test_the_spans_of_a_borrowing_job_are_one_tree_across_processes(cluster, text, until, tmp_path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra trace")
    folder = tmp_path / "spans"
    one = cluster(workers=1, lenders=1, exporter="file", trace_dir=str(folder))
    complete(one.address, text(1000), traceparent=f"00-{TRACE}-{CALLER}-01")
    complete(one.address, text(300, 1), traceparent="00-" + "0" * 32 + "-what-01")       # no trace: one of its own
    wanted = {"gateway.job", "gateway.attempt", "worker.submit", "engine.queue", "engine.prefill", "engine.decode",
              "lender.put", "lender.attend"}
    until(lambda: wanted <= {span["name"] for span in spans(folder) if span["trace_id"] == TRACE}, 20)
    one.stop()

    mine = [span for span in spans(folder) if span["trace_id"] == TRACE]
    by_id = {span["span_id"]: span for span in mine}
    assert len(by_id) == len(mine)
    parent_of = {span["name"]: by_id.get(span["parent_id"], {"name": span["parent_id"]})["name"] for span in mine}
    assert {name: parent_of[name] for name in wanted} == {
        "gateway.job": CALLER, "gateway.attempt": "gateway.job", "worker.submit": "gateway.attempt",
        **dict.fromkeys(("engine.queue", "engine.prefill", "engine.decode", "lender.put", "lender.attend"), "worker.submit")}
    assert {span["member"] for span in mine} == {"gateway", "worker-0", "lender-0"}
    counted = defaultdict(int)
    for span in mine:
        counted[span["name"]] += 1
        above = by_id.get(span["parent_id"])
        # One machine, one clock; spans made of monotonic times may be off by what the clock was set meanwhile.
        assert span["end_ns"] >= span["start_ns"] and (above is None or span["start_ns"] >= above["start_ns"] - 50_000_000)
    assert counted["gateway.job"] == counted["worker.submit"] == 1
    attend = [span["attributes"] for span in mine if span["name"] == "lender.attend"]
    assert sum(a["calls"] for a in attend) > counted["lender.attend"], "gathered, and not one span a layer"
    job = next(span["attributes"] for span in mine if span["name"] == "gateway.job")
    assert job["prompt_tokens"] == 1000 and job["output_tokens"] == 6 and job["outcome"] in ("stop", "length")
    roots = [span for span in spans(folder) if not span["parent_id"]]
    assert [span["name"] for span in roots] == ["gateway.job"], "the caller without a valid traceparent got a root of its own"


@pytest.mark.slow
def test_a_fetch_from_the_tiers_is_in_the_trace_and_an_unsampled_one_leaves_nothing(
    cluster, text, until, tmp_path
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra trace")
    folder = tmp_path / "spans"
    one = cluster(workers=1, lenders=0, redis=None, host_bytes=64 << 20, exporter="file", trace_dir=str(folder))
    for seed in range(4):                            # 48 blocks hold 768 tokens: the first prompt is driven out to the host
        complete(one.address, text(600, seed))
    complete(one.address, text(600, 0), traceparent=f"00-{TRACE}-{CALLER}-01")
    complete(one.address, text(600, 1), traceparent=f"00-{'a' * 32}-{CALLER}-00")       # its caller does not sample
    until(lambda: "tier.fetch" in {span["name"] for span in spans(folder) if span["trace_id"] == TRACE}, 20)
    one.stop()
    fetch = next(span for span in spans(folder) if span["name"] == "tier.fetch" and span["trace_id"] == TRACE)
    assert fetch["attributes"]["host"] >= 1 and fetch["member"] == "worker-0"
    assert "a" * 32 not in {span["trace_id"] for span in spans(folder)}


@pytest.mark.slow
def test_what_a_dead_lender_and_a_dead_worker_cost_is_in_the_trace(cluster, text, until, tmp_path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra trace")
    folder = tmp_path / "spans"
    one = cluster(workers=2, lenders=2, lender_blocks=160, prefill_chunk_tokens=32, restart=False, exporter="file",
                  trace_dir=str(folder))
    with Client(one.address) as client:
        job = client.submit(text(2400), max_tokens=48, ignore_eos=True)
        until(lambda: job.status().computed > 1500 and client.status().loans, 120)
        os.kill(one.processes[client.status().loans[0].lender], signal.SIGKILL)
        until(lambda: job.status().output_tokens > 2, 120)
        os.kill(one.processes[job.status().worker], signal.SIGKILL)
        job.result(timeout_s=200)
        until(lambda: "gateway.job" in {span["name"] for span in spans(folder)}, 20)
    one.stop()
    told = spans(folder)
    assert len({span["trace_id"] for span in told}) == 1, "one job, one trace"
    attempts = sorted((span for span in told if span["name"] == "gateway.attempt"), key=lambda span: span["start_ns"])
    assert [span["attributes"]["attempt"] for span in attempts] == list(range(1, len(attempts) + 1)) and len(attempts) >= 2
    (submit,) = [span for span in told if span["name"] == "worker.submit"]               # the killed one could not tell
    assert submit["parent_id"] == attempts[-1]["span_id"]
    assert next(span for span in told if span["name"] == "gateway.job")["attributes"]["attempts"] == len(attempts)


@pytest.mark.slow
def test_what_a_dead_lender_costs_is_a_span_of_its_own(cluster, text, until, tmp_path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra trace")
    folder = tmp_path / "spans"
    one = cluster(workers=1, lenders=3, lender_blocks=160, prefill_chunk_tokens=32, restart=False, exporter="file",
                  trace_dir=str(folder))
    with Client(one.address) as client:
        job = client.submit(text(2400), max_tokens=8, ignore_eos=True)
        until(lambda: job.status().computed > 1800 and client.status().loans, 120)
        os.kill(one.processes[client.status().loans[0].lender], signal.SIGKILL)
        receipt = job.result(timeout_s=200).receipt
    one.stop()
    (replay,) = [span for span in spans(folder) if span["name"] == "engine.replay"]
    assert replay["attributes"]["tokens"] == receipt.recomputed_after_fault > 0
