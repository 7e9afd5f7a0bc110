"""Every bench runs to its end, prints JSON lines, and keeps the contract that outside users script against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPARISONS = (">=", "<=", "==")


def bench(name: str, *flags: str) -> list[dict[str, Any]]:
    """The lines of one bench, which must end with status 0."""
    done = run_bench(name, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_bench(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, "-m", "kvbank", "bench", name, "--json", *flags], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=280)


def figures_of(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The last line's figures, once its form was checked."""
    last = lines[-1]
    assert {"bench", "ok", "figures", "goals", "machine", "commit"} <= set(last) and all(line["bench"] == name for line in lines)
    assert last["ok"] is (not last["missed"]) and last["commit"]
    assert {"cpu", "cores", "load", "load_before"} <= set(last["machine"])
    assert all(isinstance(value, (int, float, str)) for value in last["figures"].values())
    for figure, (comparison, goal) in last["goals"].items():
        assert figure in last["figures"] and comparison in COMPARISONS and isinstance(goal, (int, float))
    figures: dict[str, Any] = last["figures"]
    return figures


def test_attend_times_the_hot_stream_beside_an_echo_of_the_same_sizes() -> None:
    figures = figures_of(bench("attend", "--quick", "--rounds", "100"), "attend")
    assert 16_384 < figures["bytes_there"] < 17_000 and 16_384 < figures["bytes_back"] < 17_000
    assert 0 < figures["attend_p50_us"] <= figures["attend_p99_us"] and figures["echo_p50_us"] > 0
    assert figures["attended_16_spans_p50_us"] > 0


@pytest.mark.slow
def test_prefix_has_a_figure_for_every_place_that_a_receipt_proves() -> None:
    lines = bench("prefix", "--quick")
    figures = figures_of(lines, "prefix")
    for line in lines[:-1]:
        place = line["prefix_on"]
        assert line["proved"] and line["share_from_there"] >= 0.8, line
        assert line["reused_share"] >= 0.99, line
        suffix = "" if place == "device" else f"_{place}"
        assert figures[f"ttft_cold_ms{suffix}"] > 0 and figures[f"ttft_warm_ms{suffix}"] > 0 and figures[f"ratio{suffix}"] > 0
    assert [line["prefix_on"] for line in lines[:-1]] == ["device", "peer", "host", "redis"]
    assert 0 < figures["worker_memory_beyond_mb"] <= 600


@pytest.mark.slow
def test_lending_counts_the_bytes_of_a_step_and_finds_the_largest_prompt() -> None:
    lines = bench("lending", "--quick")
    figures = figures_of(lines, "lending")
    assert figures["borrowed_share_local"] == 0
    for lenders in (1, 3):
        assert 0.4 < figures[f"borrowed_share_lenders_{lenders}"] < 0.6
        assert 0.9 <= figures[f"bytes_over_formula_{lenders}"] <= 2.0
    assert figures["capacity_ratio"] >= 6


@pytest.mark.slow
def test_engine_stands_beside_transformers() -> None:
    figures = figures_of(bench("engine", "--quick"), "engine")
    for name in ("decode_b1", "decode_b8", "decode_b32", "prefill_4k"):
        assert figures[f"{name}_tokens_per_s"] > 0 and figures[f"{name}_ratio"] > 0


@pytest.mark.slow
def test_gateway_stands_beside_the_engine() -> None:
    figures = figures_of(bench("gateway", "--quick"), "gateway")
    assert figures["decode_engine_tokens_per_s"] > 0 and figures["decode_gateway_tokens_per_s"] > 0
    assert figures["decode_loss"] < 1 and figures["decode_loss_in_workers_process"] < 1 and figures["ttft_added_ms"] > 0
    assert 0 < figures["freed_after_leaving_ms"] <= figures["freed_after_leaving_ms_max"]


def test_a_bench_that_is_not_there_is_refused_by_name() -> None:
    done = run_bench("nothing")
    assert done.returncode == 1
    message = json.loads(done.stdout)["error"]["message"]
    assert all(name in message for name in ("engine", "prefix", "lending", "attend", "quality"))
