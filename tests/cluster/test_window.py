"""Figures of ended jobs: sums with their denominators, percentiles by nearest rank, a window that slides and is bounded."""

from __future__ import annotations

import random

import pytest

from kvbank.cluster.window import Ended, Window, percentiles


def ended(at: float, *, prompt: int = 100, device: int = 40, ttft_s: float | None = 0.1, outcome: str = "length") -> Ended:
    return Ended(at, outcome, prompt, 10, prompt - device, {"device": device}, {"never_seen": prompt - device}, ttft_s, 0.01)


def test_what_left_the_window_counts_only_since_the_start() -> None:
    window = Window(window_s=60)
    window.add(ended(0.0, outcome="cancelled"))
    window.add(ended(50.0, prompt=200, device=0))
    told = window.told(61.0)
    assert told["window_s"] == 60 and told["recent"]["jobs"] == 1 and told["ever"]["jobs"] == 2
    assert told["recent"]["reused"] == {} and told["ever"]["reused"] == {"device": 40}
    assert told["recent"]["prompt_tokens"] == 200 and told["recent"]["outcomes"] == {"length": 1}
    assert told["ttft_s"]["count"] == 1
    empty = window.told(1000.0)
    assert empty["recent"]["jobs"] == 0 and empty["ttft_s"] == {"count": 0, "p50": None, "p99": None}


def test_a_window_with_too_many_jobs_says_how_short_it_became() -> None:
    window = Window(window_s=60, max_jobs=10)
    for at in range(20):
        window.add(ended(float(at)))
    told = window.told(20.0)
    assert told["recent"]["jobs"] == 10 and told["window_s"] == 10 and told["ever"]["jobs"] == 20
    assert window.told(200.0)["window_s"] == 60


def test_a_walk_of_jobs_keeps_the_sums_of_those_inside() -> None:
    rng, window, kept, now = random.Random(3), Window(window_s=30, max_jobs=40), [], 0.0
    for _ in range(500):
        now += rng.random() * 2
        kept.append(ended(now, prompt=rng.randrange(100, 200), device=rng.randrange(100)))
        window.add(kept[-1])
        kept = [job for job in kept if job.at >= now - 30][-40:]
        told = window.told(now)["recent"]
        assert told["prompt_tokens"] == sum(job.prompt_tokens for job in kept) and told["jobs"] == len(kept)
        assert told["reused"].get("device", 0) == sum(job.reused["device"] for job in kept)


@pytest.mark.parametrize(("values", "p50", "p99"), [([3.0], 3.0, 3.0), ([2.0, 1.0], 1.0, 2.0),
                                                    ([float(n) for n in range(1, 201)], 100.0, 198.0)])
def test_percentiles_are_values_that_were_measured(values: list[float], p50: float, p99: float) -> None:
    assert percentiles(values) == {"count": len(values), "p50": p50, "p99": p99}
