"""`kvbank top`: rates from counters, one screen, JSON, and its two ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvbank.cluster.answers import JobStatus, LoanStatus, Status, TierStatus, WorkerStatus
from kvbank.cluster.top import GONE_S, ROWS, compare, run, view, watch
from kvbank.errors import Unauthorized, Unavailable


def status(rows: float = 0, *, state: str = "ok", lookups: float = 0, found: float = 0, loans: int = 0) -> Status:
    return Status(
        workers=[WorkerStatus(id="worker-0", kind="model", state=state, blocks_total=48, blocks_used=12, blocks_lent=24,
                              counters={"forward_rows": rows, "jobs_running": 1.0, "jobs_waiting": 2.0}),
                 WorkerStatus(id="lender-0", kind="lender", state="ok", blocks_total=48)],
        tiers=[TierStatus(name="redis", state="open", bytes_used=1 << 20, bytes_limit=1 << 30, frames=3,
                          counters={"lookups": lookups, "found": found})],
        loans=[LoanStatus(id=f"l-{n}", lender="lender-0", borrower="worker-0", blocks=8, age_s=n) for n in range(loans)],
        jobs=[JobStatus(id="job-1", state="running", phase="decode", worker="worker-0", prompt_tokens=9, output_tokens=2)])


class Cluster:
    """Answers from a list; an exception in it is raised, and the last one stays."""

    def __init__(self, *answers: Status | Exception) -> None:
        self._answers = list(answers)
        self.now = 0.0

    def status(self) -> Status:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def drawn(look: object, width: int = 160) -> str:
    screen = Console(width=width, record=True, file=open(os.devnull, "w"))         # noqa: SIM115  written to nowhere
    screen.print(look)
    return screen.export_text()


def test_rates_are_what_grew_over_the_time_it_took() -> None:
    look = compare(status(300, lookups=10, found=9), status(100, lookups=6, found=6), 2.0)
    assert look.members["worker-0"]["rows"] == 100.0 and look.members["lender-0"]["rows"] == 0.0
    assert look.hits == {"redis": 0.75}


def test_a_member_that_was_started_again_counts_from_0_and_a_silent_one_has_no_rate() -> None:
    assert compare(status(50), status(1000), 1.0).members["worker-0"]["rows"] == 50.0
    assert "worker-0" not in compare(status(50, state="silent"), status(10), 1.0).members
    assert compare(status(50), None, 0.0).members == {}


def test_a_narrow_screen_leaves_out_columns_and_cuts_none() -> None:
    name, seen = f"job-{'f' * 32}", status(300)                       # a name as a client makes them
    seen = replace(seen, jobs=[replace(seen.jobs[0], id=name)])
    text = drawn(view(compare(seen, status(100), 1.0), 80), 80)
    assert "…" not in text and "borrowed" in text and "rows/s" in text and "answers/s" not in text
    assert "lender-0" in text and name in text


def test_a_screen_shows_all_and_says_when_it_leaves_something_out() -> None:
    text = drawn(view(compare(status(300, loans=ROWS + 5), status(100), 1.0)))
    assert "members 2 of 2" in text and "jobs 1 running" in text and "rows/s 200" in text
    assert "####========...." in text and "1+2" in text and "open" in text and "job-1" in text
    assert f"loans ({ROWS} of {ROWS + 5})" in text and f"{ROWS + 4}.0 s" in text, "the oldest loans are the ones shown"


def test_a_gateway_that_is_away_for_a_moment_is_waited_for_and_one_that_stays_away_ends_it() -> None:
    away = Unavailable("gone")
    place = Cluster(status(0), away, status(200), away)
    looks = list(watch(place, interval_s=1.0, clock=lambda: place.now, sleep=place.sleep))
    assert [look.members["worker-0"]["rows"] for look in looks] == [100.0], "two seconds passed between the two answers"
    assert place.now >= 2 + GONE_S


def test_the_first_error_is_raised_and_a_refusal_at_any_time() -> None:
    with pytest.raises(Unavailable):
        next(watch(Cluster(Unavailable("no cluster"))))
    place = Cluster(status(), Unauthorized("no"))
    with pytest.raises(Unauthorized):
        list(watch(place, clock=lambda: place.now, sleep=place.sleep))


def test_once_is_one_json_object_with_rates(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Cluster(status(1), status(2)), once=True, as_json=True, interval_s=0.0) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["workers"][0]["id"] == "worker-0" and "worker-0" in body["rates"]["members"]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("flags", [["--json"], []])
def test_the_command_ends_cleanly_with_ctrl_c(make_worker, make_server, tmp_path: Path, flags: list[str]) -> None:
    async def told() -> dict:
        return {"workers": [], "loans": [], "tiers": [{"name": "host", "counters": {}}]}

    server = make_server(make_worker("worker-0"), status=told)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbank", "top", "--address", server.address, "--interval-s", "0.1", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None and process.stdout.readline()           # it shows something: it runs
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 0 and errors == ""


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_terminal_is_given_back_as_it_was(make_worker, make_server) -> None:
    async def told() -> dict:
        return {"workers": [], "loans": [], "tiers": []}

    server = make_server(make_worker("worker-0"), status=told)
    mine, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbank", "top", "--address", server.address, "--interval-s", "0.1"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    shown = b""
    try:
        while b"members 0 of 0" not in shown:
            shown += os.read(mine, 4096)
        process.send_signal(signal.SIGINT)
        while b"\x1b[?1049l" not in shown:            # the screen that was there before
            shown += os.read(mine, 4096)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(mine)
        os.close(theirs)
    assert b"\x1b[?1049h" in shown and shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") == 1, "the cursor is back too"


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_the_command_ends_by_itself_when_the_cluster_goes(make_worker, make_server) -> None:
    async def told() -> dict:
        return {"workers": [], "loans": [], "tiers": []}

    server = make_server(make_worker("worker-0"), status=told)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbank", "top", "--json", "--address", server.address, "--interval-s", "0.1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None and json.loads(process.stdout.readline())["workers"] == []
        server.stop()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 0 and "has gone" in errors
