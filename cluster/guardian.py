"""Guardian: a tiny process that outlives the driver by a few seconds and leaves nothing of its cluster behind.

    driver --pipe--> guardian        the driver tells it which processes and folders belong to the cluster
    driver stops, crashes or is killed: the pipe closes -> kill what is left, remove folders and shared memory, exit

The driver's own stop ends in the same closing of the same pipe, so the sweep is exercised on every run, not only after
a SIGKILL. Processes are found by the marker in their environment (which grandchildren inherit), and by the ids it was
told where there is no /proc. It runs as a bare file (`python -I -S guardian.py`) and imports the standard library only:
it must be up in milliseconds and must not be able to fail for anything that a cluster can break.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

MARKER = "KVBANK_CLUSTER"            # the same as in cluster.config, which this file cannot import
SWEEP_S = 30.0                       # it takes a fraction of a second; longer only where a kernel is stuck or starved
CLOSE_S = 7.0                        # how long the driver waits for it
QUIET_S = 0.3                        # nobody of ours seen this long: nobody is left, not even one between fork and exec


class Guardian:
    """The driver's end. `watch` each process group; `close` to have all swept; losing this object does the same."""

    def __init__(self, marker: str, folder: str) -> None:
        """Start it. It will remove `folder` (which need not exist yet) and shared memory named `marker`*."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), marker, folder, str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            cwd="/",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, pid: int) -> None:
        """Kill the process group of `pid` at the end, whatever its environment says."""
        self._tell(f"watch {pid} {_started(pid)}\n")

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Sweep now; True when all was gone in time. Safe to repeat."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            return self._process.wait(within_s) == 0
        except subprocess.TimeoutExpired:
            return False

    def stay(self) -> None:
        """Sweep when this process has ended, not before: one end of the pipe is never closed by anybody."""
        assert self._process.stdin is not None
        os.dup(self._process.stdin.fileno())

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):           # it is gone or closed: the sweep is over
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def marked(marker: str, folder: str = "") -> list[int]:
    """Processes of this user with the marker in their environment; empty where there is no /proc.

    Ray gives its processes new titles, which erases the beginning of their environment, at times with the marker. They
    are known by a log that they write below `folder`.
    """
    wanted, found = f"{MARKER}={marker}".encode(), []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in _read(name, "environ").split(b"\0") or (
                    folder and _is_rays(_read(name, "cmdline")) and _writes_below(name, folder)
                ):
                    found.append(int(name))
    return found


def _read(pid: str, what: str) -> bytes:
    with open(f"/proc/{pid}/{what}", "rb") as file:
        return file.read()


def _is_rays(command: bytes) -> bool:
    return command.startswith(b"ray::") or b"/ray/" in command


def _writes_below(pid: str, folder: str) -> bool:
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(folder + "/"):
                flags = next(line for line in _read(pid, f"fdinfo/{number}").splitlines() if line.startswith(b"flags"))
                if int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY:       # a reader is somebody's `tail -f`
                    return True
    return False


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: tells a process from a later one with the same id."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[19].decode()
    return "?"


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"Z"
    return True                      # no such process


def _sweep(marker: str, folder: str, told: dict[int, str], driver: int) -> bool:
    """Kill until nobody is left, then remove what they left. True when all is gone."""
    give_up = time.monotonic() + SWEEP_S
    quiet_since, all_dead = None, False
    while (now := time.monotonic()) < give_up:
        left = [pid for pid in marked(marker, folder) if pid != driver and not _is_zombie(pid)]
        left += [p for p, since in told.items() if _started(p) == since and not _is_zombie(p) and p not in left]
        for pid in left:
            with contextlib.suppress(OSError):
                if pid in told or os.getpgid(pid) == pid:        # a group leader of ours: the group is ours as well
                    os.killpg(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
        quiet_since = None if left else quiet_since or now
        if all_dead := quiet_since is not None and now - quiet_since >= QUIET_S:
            break
        time.sleep(0.03)
    for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []:
        if name.startswith(marker):
            with contextlib.suppress(OSError):
                os.unlink(f"/dev/shm/{name}")
    for _ in range(20):              # a dying process may still be writing a last line into it
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return all_dead
        time.sleep(0.05)
    return False


def main() -> int:
    """Read what to guard until the driver is gone, then sweep."""
    marker, folder, driver = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    told: dict[int, str] = {}
    pending = b""
    while os.getppid() == driver:    # a fork of the driver may hold the pipe open, so its closing is not the only sign
        if not select.select([0], [], [], 0.25)[0]:
            continue
        if not (more := os.read(0, 65536)):
            break
        *lines, pending = (pending + more).split(b"\n")
        for word, pid, since in (line.decode().split() for line in lines):
            if word == "watch":
                told[int(pid)] = since
    return 0 if _sweep(marker, folder, told, driver) else 1


if __name__ == "__main__":
    sys.exit(main())
