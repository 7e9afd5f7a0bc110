"""A job's timeline: news only, bounded."""

from __future__ import annotations

from kvbank.cluster.timeline import MAX_MOMENTS, Timeline


def test_only_what_changed_is_a_moment() -> None:
    line = Timeline()
    seen = [(0.0, "queued", 0), (0.1, "queued", 1), (0.2, "queued", 1), (0.5, "decode", 1), (0.6, "decode", 1)]
    for at, phase, attempt in seen:
        line.enter(at, phase, attempt, "worker-0" if attempt else "")
    assert [(m["at_s"], m["phase"], m["attempt"]) for m in line.told()["moments"]] == [
        (0.0, "queued", 0), (0.1, "queued", 1), (0.5, "decode", 1)]
    for at, blocks in [(0.1, 0), (0.2, 8), (0.3, 8), (0.4, 16), (0.5, 0)]:
        line.borrow(at, blocks)
    assert line.told()["borrowed"] == [[0.2, 8], [0.4, 16], [0.5, 0]]


def test_a_job_that_changes_for_ever_keeps_its_first_moments() -> None:
    line = Timeline()
    for n in range(MAX_MOMENTS + 10):
        line.enter(float(n), "waiting" if n % 2 else "decode", 1, "worker-0")
        line.borrow(float(n), n + 1)
    assert len(line.moments) == len(line.borrowed) == MAX_MOMENTS and 0 < line.left_out <= 10 and line.moments[0].at_s == 0.0
