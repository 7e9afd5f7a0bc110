"""Members as subprocesses: how a start fails, what a stop leaves, what a child may know."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from kvbank.cluster import config
from kvbank.cluster.control import Control
from kvbank.cluster.guardian import Guardian, marked
from kvbank.cluster.processes import ProcessLauncher
from kvbank.errors import ConfigError, Unavailable

TOKEN = "ab" * 16
TOY = ("-P", str(Path(__file__).parent / "toy_member.py"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A control plane and a launcher of toys; `.config(id)` makes a member's config, `.ask(what)` steers the toys."""
    marker = f"kvbank-test-{secrets.token_hex(4)}"
    control = Control(TOKEN)
    address = control.start("127.0.0.1:0")
    settings = config.load({"model": str(tmp_path), "heartbeat_s": 0.05}, environ={}).flat()
    launcher = ProcessLauncher(marker, tmp_path, program=TOY)

    def member(name: str, **changes: object) -> dict[str, object]:
        return {"id": name, "kind": "lender", "token": TOKEN, "control": address, "bind": "127.0.0.1:0",
                "settings": settings, "cache_secret": "00" * 32, "model_digest": "", "shards": 1, **changes}

    def ask(what: str, text: str = "") -> None:
        (tmp_path / f"{what}.toy").write_text(text)

    yield SimpleNamespace(launcher=launcher, control=control, config=member, ask=ask, marker=marker, folder=tmp_path)
    launcher.close()
    control.stop()
    assert marked(marker) == []


def test_a_member_starts_registers_and_stops(place, until) -> None:
    address = place.launcher.start(place.config("lender-0"))
    assert address.startswith("127.0.0.1:")
    assert [view.facts.id for view in place.control.views()] == ["lender-0"]
    pid = place.launcher.processes["lender-0"]
    assert place.control.views()[0].facts.pid == pid and os.getpgid(pid) == os.getsid(pid) == pid
    place.launcher.stop(["lender-0"], grace_s=5.0)
    assert place.control.views() == [], "it said goodbye"
    assert place.launcher.processes == {} and place.launcher.dead() == []


def test_a_typed_error_of_the_member_is_raised_here(place) -> None:
    place.ask("refuse", "worker-1 runs torch 1, worker-0 runs torch 2")
    with pytest.raises(ConfigError, match="worker-1 runs torch 1, worker-0 runs torch 2"):
        place.launcher.start(place.config("lender-0"))
    assert place.launcher.processes == {}


def test_a_member_that_dies_while_starting_says_how_and_shows_its_last_words(place) -> None:
    place.ask("crash")
    words = r"(?s)lender-0 could not start: it ended with status 7.*something is very wrong"
    with pytest.raises(Unavailable, match=words):
        place.launcher.start(place.config("lender-0"))


def test_a_member_that_is_not_ready_in_time_is_ended(place) -> None:
    place.ask("slow", "600")
    with pytest.raises(Unavailable, match=r"was not ready within 1 s"):
        place.launcher.start(place.config("lender-0"), within_s=1.0)
    assert marked(place.marker) == []


def test_a_bug_in_a_part_is_reported_with_its_name(place) -> None:
    place.ask("slow", "not a number")
    with pytest.raises(Unavailable, match="ValueError: could not convert string to float"):
        place.launcher.start(place.config("lender-0"))


def test_a_member_that_will_not_stop_is_killed_with_all_it_started(place) -> None:
    place.ask("deaf")
    place.ask("brood")
    place.launcher.start(place.config("lender-0"))
    assert len(marked(place.marker)) == 2, "the member and what it started"
    begun = time.monotonic()
    place.launcher.stop(["lender-0"], grace_s=0.5)
    assert marked(place.marker) == []
    assert time.monotonic() - begun < 30                         # a bound against hanging, not a speed


def test_a_death_is_seen_and_the_name_is_free_again(place, until) -> None:
    place.launcher.start(place.config("lender-0"))
    os.kill(place.launcher.processes["lender-0"], signal.SIGKILL)
    until(lambda: place.launcher.dead() == ["lender-0"])
    place.launcher.stop(["lender-0"], grace_s=0.0)
    assert place.launcher.start(place.config("lender-0"))
    assert place.launcher.dead() == []


def test_a_member_outlives_neither_its_pipe_nor_its_launcher(place, until) -> None:
    place.launcher.start(place.config("lender-0"))
    child = place.launcher._children["lender-0"]
    child.process.stdin.close()                                  # what a dying launcher does
    assert child.process.wait(10.0) == 0


def test_nobody_can_be_started_while_closing_and_a_start_under_way_ends(place) -> None:
    place.ask("slow", "600")
    errors: list[BaseException] = []

    def start() -> None:
        try:
            place.launcher.start(place.config("lender-0"))
        except BaseException as error:
            errors.append(error)

    starter = threading.Thread(target=start)
    starter.start()
    while not place.launcher.processes:
        time.sleep(0.01)
    place.launcher.close()
    starter.join(10.0)
    assert [type(error) for error in errors] == [Unavailable]
    with pytest.raises(Unavailable, match="stopping"):
        place.launcher.start(place.config("lender-1"))


def test_the_token_is_on_no_command_line_and_in_no_environment(place) -> None:
    place.launcher.start(place.config("lender-0"))
    pid = place.launcher.processes["lender-0"]
    for name in ("cmdline", "environ"):
        assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert TOKEN not in (place.folder / "lender-0.log").read_text()


def test_settings_in_the_environment_do_not_reach_a_member_twice(place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBANK__NONSENSE__X", "1")
    place.launcher.start(place.config("lender-0"))
    assert b"KVBANK__" not in Path(f"/proc/{place.launcher.processes['lender-0']}/environ").read_bytes()


@pytest.fixture
def sleeper() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start processes that ignore every polite signal."""
    made: list[subprocess.Popen[bytes]] = []

    def start(title: str = "python", keeps: IO[str] | None = None, **environment: str) -> subprocess.Popen[bytes]:
        program = "import signal, time; signal.signal(15, 1); signal.signal(2, 1); print(flush=True); time.sleep(600)"
        made.append(subprocess.Popen([title, "-I", "-S", "-c", program], executable=sys.executable, env=environment,
                                     start_new_session=True, stdout=subprocess.PIPE, stderr=keeps))
        assert made[-1].stdout.readline() == b"\n"
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def test_a_guardian_ends_those_with_its_marker_and_those_it_was_told_and_nobody_else(tmp_path: Path, sleeper) -> None:
    marker, folder = f"guarded-{secrets.token_hex(6)}", tmp_path / "mine"     # no name that another file looks for
    folder.mkdir()
    (folder / "redis.sock").write_text("")
    (folder / "deep").mkdir(mode=0o700)
    shared = Path("/dev/shm") / f"{marker}-lane-0"
    shared.write_bytes(b"x")
    guardian = Guardian(marker, str(folder))
    ours, told, other = sleeper(KVBANK_CLUSTER=marker), sleeper(), sleeper(KVBANK_CLUSTER=marker + "0")
    guardian.watch(told.pid)
    assert guardian.close()
    assert ours.wait(5.0) == told.wait(5.0) == -signal.SIGKILL
    assert other.poll() is None
    assert not folder.exists() and not shared.exists()
    assert guardian.close(), "twice is once"


def test_a_guardian_finds_the_processes_whose_environment_ray_erased_and_spares_readers(tmp_path: Path, sleeper) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "raylet.out").write_text("")
    guardian = Guardian(f"kvbank-{secrets.token_hex(6)}", str(folder))
    with open(folder / "raylet.out", "a") as writing, open(folder / "raylet.out") as reading:
        erased = sleeper(title="ray::Agent", keeps=writing)
        tail, fork = sleeper(title="ray::Tail", keeps=reading), sleeper(title="python", keeps=writing)
    assert guardian.close()
    assert erased.wait(5.0) == -signal.SIGKILL
    assert tail.poll() is None and fork.poll() is None, "a reader, and a child of the driver's own"


def test_a_guardian_does_not_harm_a_later_process_with_an_old_id(tmp_path: Path, sleeper) -> None:
    guardian = Guardian(f"kvbank-{secrets.token_hex(6)}", str(tmp_path / "none"))
    innocent = sleeper()
    guardian._tell(f"watch {innocent.pid} 1\n")                  # that id, as it was at another time
    assert guardian.close()
    assert innocent.poll() is None


def test_a_guardian_cannot_be_interrupted_from_the_terminal(tmp_path: Path, sleeper, until) -> None:
    marker = f"kvbank-{secrets.token_hex(6)}"
    guardian = Guardian(marker, str(tmp_path / "none"))
    ours = sleeper(KVBANK_CLUSTER=marker)
    assert os.getsid(guardian.pid) == guardian.pid, "not in the terminal's session"

    def ignored() -> int:
        (line,) = [s for s in Path(f"/proc/{guardian.pid}/status").read_text().splitlines() if s.startswith("SigIgn")]
        return int(line.split()[1], 16)

    until(lambda: ignored() >> (signal.SIGTERM - 1) & 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian.pid, number)
    assert guardian.close() and ours.wait(5.0) == -signal.SIGKILL
