"""LocalCluster: a whole cluster on this machine, owned by this process. It starts it, keeps it up, and leaves nothing.

    guardian        first to start and last to end; sweeps everything when this process ends in whatever way
      redis         when settings say "embedded"
      control       the members' meeting point; a restart of it comes back at the same address
      worker-R[.S]  model workers, one per shard of each replica       lender-N   members that only lend
      gateway       the HTTP front door: `LocalCluster.address`

All is checked before anything is started: settings at construction, the world (model files, port, Redis) in `start`.
"""

from __future__ import annotations

import atexit
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final

from kvbank.cluster.config import load, marked_environment, state_dir, threads_per_worker
from kvbank.cluster.guardian import Guardian
from kvbank.cluster.keep_up import keep_up
from kvbank.cluster.processes import MEMBER_PROGRAM, ProcessLauncher
from kvbank.cluster.seams import Launcher
from kvbank.cluster.seats import member_id, seats
from kvbank.cluster.settings import Settings
from kvbank.cluster.start_checks import check_model, check_world
from kvbank.errors import ConfigError, Unavailable
from kvbank.kvstore.hashing import load_secret, model_digest
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis

SHORT_PATH = 40                                  # Ray puts unix sockets below the temp folder; their paths are bounded


class _Unset:
    """A keyword that was not given: the config file, the environment or the default decides."""

    def __repr__(self) -> str:
        return "default"


UNSET: Final[Any] = _Unset()


class LocalCluster:
    """A cluster on this machine. A context manager; `address` is where clients connect.

    Keywords not given come from `config` (a mapping, or the path of a YAML or TOML file), then from the environment
    (`KVBANK__SECTION__KEY`), then from the defaults: workers=2, shards=1, lenders=0, device_blocks=512, block_size=16,
    host_bytes="256MiB", redis="embedded" (or a URL, or None), dtype="float32", launcher="ray" (or "process"). Any other
    setting may be given by its name, too. `progress` hears one line per step of the start, one call at a time.

    Raises ConfigError or ModelError before anything is started; whatever `start` raises, nothing is left running.
    """

    member_program: ClassVar[Sequence[str]] = MEMBER_PROGRAM     # seams for tests: what a member runs
    member_actor: ClassVar[Any] = None

    def __init__(
        self, model: Any = UNSET, *, workers: int = UNSET, shards: int = UNSET, lenders: int = UNSET,
        device_blocks: int = UNSET, block_size: int = UNSET, host_bytes: int | str = UNSET, redis: str | None = UNSET,
        dtype: str = UNSET, launcher: str = UNSET, config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None, **settings: Any,
    ) -> None:
        given = {
            "model": model, "workers": workers, "shards": shards, "lenders": lenders, "device_blocks": device_blocks,
            "block_size": block_size, "host_bytes": host_bytes, "redis": redis, "dtype": dtype, "launcher": launcher,
            **settings,
        }
        overrides = {name: value for name, value in given.items() if value is not UNSET}
        self.settings: Settings = load(config, overrides=overrides)
        self._model = check_model(self.settings)
        self._on_progress = progress or (lambda line: None)
        self._telling = threading.RLock()                        # members start side by side
        self._lock = threading.Lock()                            # one start, one stop
        self._owner, self._starting = 0, False
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._guardian: Guardian | None = None
        self._launcher: Launcher | None = None
        self._redis: EmbeddedRedis | None = None
        self._configs: dict[str, dict[str, Any]] = {}
        self._folder = Path()
        self._address = ""
        self.token = secrets.token_hex(16)
        self.control_address = ""

    def __repr__(self) -> str:
        return f"LocalCluster({self._address or 'not started'})"

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """`http://host:port` of the gateway. Raises Unavailable when the cluster is not running."""
        if not self._address:
            raise Unavailable("the cluster is not running: call start(), or use it in a with statement")
        return self._address

    @property
    def processes(self) -> dict[str, int]:
        """Process id by member id ("control", "gateway", "worker-0", "lender-1", "redis"), of those that run."""
        found = dict(self._launcher.processes) if self._launcher is not None else {}
        if self._redis is not None and self._redis.running and self._redis.pid is not None:
            found["redis"] = self._redis.pid
        return found

    def start(self) -> LocalCluster:
        """Start everything and wait until it serves. Raises a typed error and leaves nothing when it cannot."""
        with self._lock:
            if self._guardian is not None:
                raise ConfigError("this cluster was started before; make a new LocalCluster")
            self._stopping.clear()
            self._hurry.clear()
            self._owner, self._starting = os.getpid(), True
            atexit.register(self.stop)
            try:
                self._start()
            except BaseException:
                self._stop_shielded()
                raise
            finally:
                self._starting = False
        return self

    def stop(self) -> None:
        """Stop everything, killing what does not stop by itself within `stop_grace_s`. Safe to repeat, and to
        interrupt: a second Ctrl-C only makes it faster. A start under way on another thread ends with Unavailable."""
        if self._owner != os.getpid():
            return                                               # a fork of the owner, on its own way out
        if self._starting and self._launcher is not None:
            self._launcher.close()
        with self._lock:
            if self._guardian is not None and not self._stopping.is_set():
                self._stop_shielded()

    # -- start ---------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        cluster, tiers = self.settings.cluster, self.settings.tiers
        check_world(self.settings)
        state = state_dir(self.settings)
        secret = tiers.cache_secret or load_secret(state).hex()
        self._progress("checking the model's files")
        digest = model_digest(self._model.folder, self._model.identity, state_folder=state)

        marker = f"kvbank-{secrets.token_hex(6)}"
        self._folder = _temp_folder() / marker
        self._guardian = Guardian(marker, str(self._folder))     # before there is anything to guard
        self._folder.mkdir(mode=0o700)
        logs = Path(cluster.log_dir) if cluster.log_dir else self._folder / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cluster.log_dir {logs} cannot be made: {error}") from None
        if tiers.redis == "embedded":
            with marked_environment(marker):
                self._redis = EmbeddedRedis(tiers.redis_bytes, run_folder=self._folder)
            self._guardian.watch(self._redis.pid or 0)
            self._progress("redis is ready")
        self._launcher = self._make_launcher(marker, logs)
        give_up = time.monotonic() + cluster.start_timeout_s     # finding room on a Ray has a limit of its own

        settings = self.settings.flat() | ({"redis": self._redis.url} if self._redis is not None else {})
        common = {"token": self.token, "settings": settings, "cache_secret": secret, "model_digest": digest,
                  "bind": f"{cluster.bind_host}:0", "folder": str(self._folder), "shards": cluster.shards}
        self.control_address = self._launch({**common, "kind": "control", "id": "control"}, give_up)
        self._configs["control"]["bind"] = self.control_address  # a restarted one must be found by its members
        common["control"] = self.control_address
        self._launch_all([*self._workers(common), *self._lenders(common)], give_up)
        self._address = self._launch({**common, "kind": "gateway", "id": "gateway"}, give_up)
        port = int(self._address.rpartition(":")[2])
        self._configs["gateway"]["settings"] = {**settings, "port": port}
        if cluster.restart:
            upkeep = (self._launcher, self._launch_again, self._stopping, self._redis, self._guardian.watch)
            threading.Thread(target=keep_up, args=upkeep, name="keep-up", daemon=True).start()

    def _make_launcher(self, marker: str, logs: Path) -> Launcher:
        assert self._guardian is not None
        if self.settings.cluster.launcher == "process":
            return ProcessLauncher(marker, logs, program=self.member_program, watch=self._guardian.watch)
        try:
            from kvbank.cluster.actors import MemberActor, RayLauncher
        except ImportError as error:
            raise ConfigError(f"launcher='ray' needs Ray ({error}): install it, or use launcher='process'") from error
        cluster, joined = self.settings.cluster, self.settings.cluster.ray_address
        self._progress("starting Ray" if joined is None else "joining Ray")
        launcher = RayLauncher(marker, self._folder / "ray", logs, address=joined, actor=self.member_actor or MemberActor)
        if joined is not None:
            self._launcher = launcher                            # so that a start that fails here leaves no actor
            self._progress("finding room for the members")
            launcher.reserve(seats(self.settings), machines=cluster.machines, within_s=cluster.place_timeout_s)
        return launcher

    def _progress(self, line: str) -> None:
        with self._telling:
            self._on_progress(line)

    def _workers(self, common: Mapping[str, Any]) -> list[dict[str, Any]]:
        cluster = self.settings.cluster
        return [
            {**common, "kind": "model", "id": member_id(replica, shard),
             "replica": replica, "shard": shard}
            for replica in range(cluster.workers) for shard in range(cluster.shards)
        ]

    def _lenders(self, common: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{**common, "kind": "lender", "id": f"lender-{number}", "shards": 1}
                for number in range(self.settings.cluster.lenders)]

    def _launch(self, config: dict[str, Any], give_up: float) -> str:
        assert self._launcher is not None
        self._configs[config["id"]] = config
        threads = threads_per_worker(self.settings) if config["kind"] == "model" else 1
        address = self._launcher.start(config, threads=threads, within_s=max(0.1, give_up - time.monotonic()))
        self._progress(f"{config['id']} is ready")
        return address

    def _launch_again(self, name: str) -> None:
        self._launch(self._configs[name], time.monotonic() + self.settings.cluster.start_timeout_s)

    def _launch_all(self, configs: Sequence[dict[str, Any]], give_up: float) -> None:
        """Launch side by side; the first error ends the wait, and the clean-up that follows ends the others."""
        outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def launch(config: dict[str, Any]) -> None:
            try:
                self._launch(config, give_up)
                outcomes.put(None)
            except BaseException as error:
                outcomes.put(error)

        for config in configs:
            threading.Thread(target=launch, args=(config,), name=f"start-{config['id']}", daemon=True).start()
        for _ in configs:
            if (error := outcomes.get()) is not None:
                raise error

    # -- stop ----------------------------------------------------------------------------------------------------------

    def _stop_shielded(self) -> None:
        """Run the clean-up on a thread of its own, which no KeyboardInterrupt reaches; interrupts make it hurry."""
        self._stopping.set()
        done, interrupted = _on_its_own_thread(self._clean_up), False
        while not done.is_set():
            try:
                done.wait()
            except KeyboardInterrupt:
                interrupted = True
                self._hurry.set()
        atexit.unregister(self.stop)
        if interrupted:
            raise KeyboardInterrupt

    def _clean_up(self) -> None:
        self._address, all_gone = "", True
        try:
            all_gone = self._clean_up_politely()
        finally:
            if self._guardian is not None and all_gone:
                self._guardian.close()
            elif self._guardian is not None:                     # our Ray serves another cluster of this process
                self._guardian.stay()

    def _clean_up_politely(self) -> bool:
        """Ask everybody to stop, then end them. False when something of ours has to stay until this process ends."""
        launcher, grace_s, all_gone = self._launcher, self.settings.cluster.stop_grace_s, True
        if launcher is not None:
            # The gateway first, so that streams end with a typed error instead of a broken connection.
            for ids in (["gateway"], [name for name in self._configs if name not in ("gateway", "control")]):
                ends = time.monotonic() + grace_s
                done = _on_its_own_thread(partial(launcher.stop, ids, grace_s=grace_s))
                while not done.wait(0.05) and not self._hurry.is_set():
                    pass                                         # hurried: what still runs is left to the guardian
                grace_s = max(0.5, ends - time.monotonic())
            all_gone = launcher.close(grace_s=0.0 if self._hurry.is_set() else 0.5)
        if self._redis is not None:
            self._redis.stop(within_s=0.5)
        return all_gone


def _on_its_own_thread(work: Callable[[], object]) -> threading.Event:
    """Run `work` where no KeyboardInterrupt reaches it; the event says when it has ended, well or not."""
    done = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            done.set()

    try:
        threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    except RuntimeError:                                         # the interpreter is ending and starts no more threads
        run()
    return done


def _temp_folder() -> Path:
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= SHORT_PATH else Path("/tmp")
