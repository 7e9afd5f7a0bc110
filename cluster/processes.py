"""The cluster as plain subprocesses of the driver: no Ray needed. Each member is its own session and process group.

A member's config goes in over stdin, never on a command line; stdin then stays open as a lifeline. The output of each
goes to a file of its own, and the end of that file is part of the error when it cannot start.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvbank.cluster.config import child_env
from kvbank.errors import KVBankError, Unavailable, from_code

MEMBER_PROGRAM = ("-P", "-m", "kvbank.cluster.member")           # -P: the working directory is nobody's package path
TAIL_LINES = 15


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    ready: int                       # read end of its readiness pipe
    log_path: Path
    serves: bool = False             # it was ready once


class ProcessLauncher:
    """Starts members as children of this process. All methods may be called from any thread."""

    def __init__(
        self, marker: str, logs: Path, *, program: Sequence[str] = MEMBER_PROGRAM,
        watch: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """`marker` goes into every child's environment; `watch` hears of every process group at once."""
        self._marker = marker
        self._logs = logs
        self._program = [sys.executable, *program]
        self._watch = watch
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}
        self._stopping = False
        self._spawns: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        # The kernel sends the parent-death signal when the *thread* that forked ends, so all forks happen on one thread
        # that lives as long as this launcher.
        threading.Thread(target=self._spawner, name="spawner", daemon=True).start()

    @property
    def processes(self) -> dict[str, int]:
        """Process id by member id, of those that run."""
        with self._lock:
            return {name: child.process.pid for name, child in self._children.items() if child.process.poll() is None}

    def start(self, config: Mapping[str, Any], *, threads: int = 1, within_s: float = 60.0) -> str:
        """Start one member and wait until it serves; its address. Raises its own typed error, or Unavailable."""
        spawned: Future[_Child] = Future()
        with self._lock:                                         # nothing is asked after `close` ends the spawner
            if self._stopping:
                raise Unavailable("the cluster is stopping")
            self._spawns.put((lambda: self._spawn(config, threads), spawned))
        child = spawned.result()
        try:
            answer = _readiness(child, within_s)
        finally:
            os.close(child.ready)
        if "address" in answer:
            child.serves = True
            return str(answer["address"])
        self.stop([config["id"]], grace_s=0.0)
        if answer["error"] != KVBankError.code:
            raise from_code(answer["error"], answer["message"])
        raise Unavailable(f"{config['id']} could not start: {answer['message']}; the end of its output:\n"
                          f"{tail(child.log_path)}")

    def dead(self) -> list[str]:
        """Ids of members that served and whose process has ended."""
        with self._lock:
            return [name for name, child in self._children.items() if child.serves and child.process.poll() is not None]

    def stop(self, ids: Sequence[str], *, grace_s: float) -> None:
        """SIGTERM them all, wait at most `grace_s`, SIGKILL the rest of each process group, and reap."""
        with self._lock:
            children = [self._children.pop(name) for name in ids if name in self._children]
        for child in children:
            if grace_s > 0:
                _signal(child, signal.SIGTERM)
        give_up = time.monotonic() + grace_s
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, give_up - time.monotonic()))
            _signal(child, signal.SIGKILL)                       # also what it may have started itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(1.0)                          # longer only when stuck in the kernel
            assert child.process.stdin is not None
            with contextlib.suppress(OSError):
                child.process.stdin.close()

    def close(self, *, grace_s: float = 0.0) -> bool:
        """Stop everybody; nobody can be started any more. True: nothing of ours stays."""
        with self._lock:
            self._stopping = True
            ids = list(self._children)
        self.stop(ids, grace_s=grace_s)
        self._spawns.put(None)
        return True

    def _spawn(self, config: Mapping[str, Any], threads: int) -> _Child:
        ready, theirs = os.pipe()
        path = self._logs / f"{config['id']}.log"
        try:
            with open(path, "ab") as output, self._lock:
                if self._stopping:
                    raise Unavailable("the cluster is stopping")
                process = subprocess.Popen(
                    self._program, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, pass_fds=(theirs,),
                    env=child_env(self._marker, threads), start_new_session=True,
                )
                self._watch(process.pid)
                child = self._children[config["id"]] = _Child(process, ready, path)
            line = json.dumps({**config, "ready": theirs, "parent": os.getpid()})
            assert process.stdin is not None
            with contextlib.suppress(OSError):                   # it is dead already: its readiness pipe will say so
                _send(process.stdin, line)
            return child
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(theirs)

    def _spawner(self) -> None:
        while (asked := self._spawns.get()) is not None:
            work, outcome = asked
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)


def _send(pipe: IO[bytes], line: str) -> None:
    pipe.write(line.encode() + b"\n")
    pipe.flush()


def _readiness(child: _Child, within_s: float) -> Mapping[str, Any]:
    """What it says about its start, or, when it ended or stayed silent instead, an error that says so."""
    give_up, said = time.monotonic() + within_s, b""
    while not said.endswith(b"\n"):
        if not select.select([child.ready], [], [], max(0.0, give_up - time.monotonic()))[0]:
            return {"error": KVBankError.code, "message": f"it was not ready within {within_s:.0f} s"}
        if not (more := os.read(child.ready, 65536)):
            return {"error": KVBankError.code, "message": _ending(child)}
        said += more
    answer: Mapping[str, Any] = json.loads(said)
    return answer


def _ending(child: _Child) -> str:
    try:
        code = child.process.wait(1.0)                           # its pipe is closed, so it is ending
    except subprocess.TimeoutExpired:
        return "it closed its pipe without a word"
    return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"


def tail(path: Path) -> str:
    """The last lines of a member's output."""
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-TAIL_LINES:]) or "(nothing)"
    return "(nothing)"


def _signal(child: _Child, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(child.process.pid, number)
