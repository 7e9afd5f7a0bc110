"""Whatever ends the driver, and whenever, nothing of its cluster is left: process, socket, shared memory, folder."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbank.workers.models.random_model import write_random_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TAG = "KVBANK_TEST_RUN"              # in the environment of the driver, so of all that it starts, its guardian included


class Driver:
    """toy_driver.py as a process, with a temp folder and a tag of its own."""

    def __init__(self, model: Path, launcher: str, *settings: str, cwd: Path | None = None, **environment: str) -> None:
        self.tag = uuid.uuid4().hex
        self.temp = Path(tempfile.mkdtemp(prefix="kvt-", dir="/tmp"))          # short: it will hold unix sockets
        self.shared_before = set(os.listdir("/dev/shm"))
        self.said: list[str] = []
        self.answer: dict[str, object] = {}
        self.log = open(model / "driver.log", "w+")              # noqa: SIM115  closed in `end`
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "toy_driver.py"), str(model), launcher, *settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1,
            cwd=cwd or self.temp.parent, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temp), TAG: self.tag,
                 "XDG_STATE_HOME": str(model / "state"), **environment},
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("")              # it ended

    def until(self, line: str, within_s: float = 150.0) -> str:
        """Read what it says up to a line that begins so. Fails with its stderr when it ends or stays silent instead."""
        give_up = time.monotonic() + within_s
        while said := self._next(give_up):
            self.said.append(said)
            if said.startswith(line):
                if line == "up":
                    self.answer = json.loads(said.split(" ", 1)[1])
                return said
        self.log.seek(0)
        raise AssertionError(f"it never said {line!r} but {self.said}\n{self.log.read()}")

    def _next(self, give_up: float) -> str:
        try:
            return self._lines.get(timeout=max(0.0, give_up - time.monotonic()))
        except queue.Empty:
            return ""

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def left(self) -> list[str]:
        """Everything of this run that is still there, in words."""
        found = [f"process {pid}: {' '.join(words.split())}" for pid, words in tagged(self.tag, self.temp)]
        found += [f"in {at}: {names} {files}" for at, names, files in os.walk(self.temp) if names or files]
        new = set(os.listdir("/dev/shm")) - self.shared_before
        found += [f"shared memory {name}" for name in new if "kvbank" in name]
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return found + [f"socket {line}" for line in sockets if str(self.temp) in line]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid, _ in tagged(self.tag, self.temp):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(OSError):
                pipe.close()
        shutil.rmtree(self.temp, ignore_errors=True)


def tagged(tag: str, temp: Path | None = None) -> list[tuple[int, str]]:
    """Living processes with this run's tag in their environment, or with a file of its temp folder open."""
    wanted, found = f"{TAG}={tag}".encode(), []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if wanted not in Path(f"/proc/{name}/environ").read_bytes() and not (temp and has_open(name, temp)):
                continue
            if Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append((int(name), Path(f"/proc/{name}/cmdline").read_text().replace("\0", " ")))
        except OSError:
            continue
    return found


def has_open(pid: str, folder: Path) -> bool:
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
                return True
    return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_random_model(folder, hidden_size=32, num_layers=2, heads=2, kv_heads=1, vocab=300)


@pytest.fixture
def drive(model: Path) -> Iterator[Callable[..., Driver]]:
    """Start drivers; whatever they leave is swept after the test."""
    made: list[Driver] = []

    def start(launcher: str, *settings: str, **options: object) -> Driver:
        made.append(Driver(options.pop("model", model), launcher, *settings, **options))
        return made[-1]

    yield start
    for driver in made:
        driver.end()


@pytest.fixture
def ask(model: Path) -> Iterator[Callable[[str, str], None]]:
    """Steer the toys (see toy_member.py) for one test."""
    asked: list[Path] = []

    def put(what: str, text: str = "") -> None:
        asked.append(model / f"{what}.toy")
        asked[-1].write_text(text)

    yield put
    for path in asked:
        path.unlink()


def gone(driver: Driver, within_s: float = 10.0) -> None:
    """Wait until nothing is left, and say what is when it does not go."""
    give_up = time.monotonic() + within_s
    while left := driver.left():
        assert time.monotonic() < give_up, "\n".join(left)
        time.sleep(0.05)


POINTS = ["checking the model's files", "redis is ready", "control is ready", "worker-1 is ready", "up", "leaving"]


def reach(driver: Driver, point: str) -> None:
    if point == "leaving":
        driver.until("up")
        driver.tell("stop")
    driver.until(point)


ENDS = [(number, point) for number in (signal.SIGINT, signal.SIGKILL) for point in POINTS] + [(signal.SIGTERM, "up")]


@pytest.mark.parametrize(("number", "point"), ENDS, ids=lambda value: getattr(value, "name", value))
def test_nothing_is_left_when_the_driver_ends(drive, number: signal.Signals, point: str) -> None:
    driver = drive("process", "lenders=2")
    reach(driver, point)
    driver.process.send_signal(number)
    driver.process.wait(20.0)
    gone(driver)


def test_a_second_ctrl_c_is_safe_and_only_makes_it_faster(drive, ask) -> None:
    ask("deaf")                                                  # nobody stops when asked
    driver = drive("process", "lenders=1")
    driver.until("up")
    for _ in range(4):
        driver.process.send_signal(signal.SIGINT)
        time.sleep(0.15)                                         # a human's fingers, not a wait for anything
    assert driver.process.wait(20.0) == 130
    gone(driver)


def test_children_that_ignore_every_signal_and_grandchildren_end_with_the_driver(drive, ask) -> None:
    ask("deaf")
    ask("brood")
    driver = drive("process", "workers=1")
    driver.until("up")
    assert len(tagged(driver.tag)) >= 7, "driver, guardian, redis, control, worker, gateway, and a grandchild"
    driver.process.kill()
    gone(driver)


def test_a_process_of_the_drivers_own_is_left_alone(drive, until) -> None:
    driver = drive("process", "workers=1", "redis=none")
    driver.until("up")
    driver.tell("fork")
    driver.until("did fork")
    driver.process.kill()
    until(lambda: len(driver.left()) == 1, within_s=8.0)
    assert "time.sleep(600)" in driver.left()[0]


def test_an_error_in_the_start_leaves_nothing(drive, ask) -> None:
    ask("worker-1:refuse", "no such thing as worker one")
    driver = drive("process", "lenders=1")
    assert driver.until("error") == "error ConfigError no such thing as worker one"
    assert driver.process.wait(20.0) == 3
    assert driver.left() == []


def test_it_works_from_another_folder_whose_files_look_like_packages(drive, tmp_path: Path) -> None:
    for name in ("kvbank", "torch", "redis", "grpc", "cluster", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    driver = drive("process", "workers=1", cwd=tmp_path)
    driver.until("up")
    driver.tell("stop")
    driver.until("down")
    assert driver.process.wait(20.0) == 0 and driver.left() == []
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".py"] * 6, "it writes nothing where it stands"


def test_a_dead_member_comes_back_in_its_place(drive) -> None:
    driver = drive("process", "lenders=1")
    driver.until("up")
    address, processes = driver.answer["address"], driver.answer["processes"]
    for name in ("control", "gateway", "worker-1", "redis"):
        os.kill(processes[name], signal.SIGKILL)
    again = sorted(driver.until("", within_s=20.0) for _ in range(3))
    assert again == ["control is ready", "gateway is ready", "worker-1 is ready"]
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5.0):
        pass                                                     # the gateway's address stays what clients know
    driver.tell("stop")
    driver.until("down")
    assert driver.process.wait(20.0) == 0 and driver.left() == []


# -- real members ------------------------------------------------------------------------------------------------------

REAL = ("real", "workers=1", "lenders=1", "device_blocks=64", "lender_blocks=512")


@pytest.mark.parametrize(("launcher", "number"), [
    pytest.param("process", signal.SIGINT, marks=pytest.mark.slow), ("process", signal.SIGKILL),
    pytest.param("ray", signal.SIGKILL, marks=[pytest.mark.ray, pytest.mark.slow]),
])
def test_nothing_is_left_when_the_driver_ends_while_a_job_runs_on_borrowed_memory(
    drive, launcher: str, number: signal.Signals
) -> None:
    driver = drive(launcher, *REAL)
    driver.until("up")
    driver.tell("job")                                           # three times what the worker's own blocks hold
    driver.until("did job")
    driver.process.send_signal(number)
    driver.process.wait(20.0)
    gone(driver)


@pytest.mark.parametrize(("damage", "words"), [("truncate", "truncated"), ("rename", "missing")])
def test_weights_that_no_worker_can_load_end_the_start_with_a_model_error(
    drive, model: Path, tmp_path: Path, damage: str, words: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:                                                        # of the same length, so that only the name is wrong
        weights.write_bytes(weights.read_bytes().replace(b"model.layers.1.", b"model.layers.7."))
    driver = drive("process", *REAL, model=folder)
    said = driver.until("error")
    assert said.startswith("error ModelError") and words in said
    assert driver.process.wait(20.0) == 3
    gone(driver)


# -- the same on Ray ---------------------------------------------------------------------------------------------------

RAY_POINTS = [
    (signal.SIGKILL, "up"), pytest.param(signal.SIGINT, "worker-0 is ready", marks=pytest.mark.slow),
    *(pytest.param(number, point, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL)
      for point in ("starting Ray", "control is ready", "leaving")),
    pytest.param(signal.SIGINT, "up", marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, "worker-0 is ready", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, "up", marks=pytest.mark.slow),
]


@pytest.mark.ray
@pytest.mark.parametrize(("number", "point"), RAY_POINTS)
def test_nothing_is_left_when_the_driver_ends_on_ray(drive, until, number: signal.Signals, point: str) -> None:
    driver = drive("ray", "workers=1")
    reach(driver, point)
    if point == "starting Ray":
        until(lambda: any("gcs_server" in words for _, words in tagged(driver.tag)))
    driver.process.send_signal(number)
    driver.process.wait(30.0)
    gone(driver)
