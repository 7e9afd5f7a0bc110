"""Up and down: a cluster in the foreground or detached, and its end.

    up       settings -> claim the name -> LocalCluster -> state file -> wait for a signal -> stop -> release
    up -d    the same in a process of its own, which tells down a pipe how far it is
    down     finds it by its state file, asks, and kills what does not stop
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvbank
from kvbank.cluster import statefile
from kvbank.cluster.config import read_keys, state_dir
from kvbank.cluster.flags import CLUSTER_FLAGS, overrides_of, settings_of, state_folder
from kvbank.cluster.screen import console, print_json
from kvbank.cluster.settings import Settings
from kvbank.errors import KVBankError

ROOT = Path(kvbank.__file__).resolve().parent.parent


def up(args: argparse.Namespace) -> int:
    settings = settings_of(args)                       # a mistake is told before anything happens
    folder, key = state_dir(settings), _own_key(settings)
    if args.detach:
        return _up_detached(args, folder)
    from kvbank.cluster.launcher import LocalCluster

    if args.tell is not None:                        # detached: its log is a file that somebody may read by program
        from kvbank.cluster.logs import set_up

        set_up("launcher", settings.flat(), [*settings.http.api_keys, settings.tiers.cache_secret or ""])
    tell = _Teller(args)
    mine = statefile.claim(folder, args.name, api_key=key, ca=settings.http.tls_cert or "",
                           config=[list(row) for row in settings.rows()])
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _leave(leave))
    try:
        overrides = overrides_of(args)
        cluster = LocalCluster(config=args.config, progress=tell.progress, **_flat(overrides))
        with tell.working(f"starting {args.name}"):
            cluster.start()
        try:
            mine = replace(mine, address=cluster.address)
            statefile.write(folder, mine)
            tell.ready(mine, cluster.processes)
            while not leave.wait(1.0):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            with tell.working("stopping"):
                cluster.stop()
    except KVBankError as error:
        tell.failed(error)
        raise
    finally:
        statefile.release(folder, mine)
    return 0


def _own_key(settings: Settings) -> str:
    """The key that `status` and `submit` on this machine use: one that may do everything, if there is one."""
    http = settings.http
    keys = read_keys(Path(http.api_keys_file)) if http.api_keys_file else http.api_keys
    return next(iter(sorted(keys, key=lambda key: not keys[key].endswith(":ops"))), "")


def _flat(overrides: dict[str, Any]) -> dict[str, Any]:
    """Keywords for LocalCluster: leaf names alone, because a keyword cannot hold a dot."""
    return {name.rpartition(".")[2]: value for name, value in overrides.items()}


def _leave(leave: threading.Event) -> None:
    """SIGTERM: once it serves, leave; while it still starts, break the start off."""
    if leave.is_set():
        return
    leave.set()
    raise KeyboardInterrupt


def _up_detached(args: argparse.Namespace, folder: Path) -> int:
    """Start ourselves again without a terminal, and wait for its word."""
    if (other := statefile.find(folder, args.name)) is not None:
        raise statefile.taken(other)
    log = folder / "clusters" / f"{args.name}.log"
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    heard, told = os.pipe()
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
               "from kvbank.cluster.cli import main; sys.exit(main())", *_again(args), "--tell", str(told)]
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[told],
                                 start_new_session=True)
    os.close(told)
    tell = _Teller(args)
    try:
        with tell.working(f"starting {args.name}"), os.fdopen(heard) as lines:
            for line in lines:
                word = json.loads(line)
                if "progress" in word:
                    tell.progress(word["progress"])
                elif "error" in word:
                    child.wait()
                    raise _from_word(word["error"])
                else:
                    found = replace(statefile.need(folder, args.name), log=str(log))
                    statefile.write(folder, found)
                    tell.ready(found, word["processes"])
                    return 0
    except KeyboardInterrupt:
        child.terminate()
        raise
    raise kvbank.errors.Unavailable(f"the cluster ended while it started; its log is {log}")


def _from_word(error: dict[str, str]) -> KVBankError:
    return kvbank.errors.from_code(error["code"], error["message"])


def _again(args: argparse.Namespace) -> list[str]:
    """The flags of this call, for the process that takes over."""
    words = ["up", "--name", args.name]
    if args.config is not None:
        words += ["--config", str(args.config.resolve())]
    for name in CLUSTER_FLAGS:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for pair in args.set:
        words += ["--set", pair]
    return words


class _Teller:
    """Progress and outcome of a start, to a person, as JSON, or down the pipe of a detached one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._json: bool = args.json
        self._pipe = os.fdopen(args.tell, "w") if getattr(args, "tell", None) is not None else None
        self._console = console(to_stderr=True)
        self._status: Any = None

    def working(self, what: str) -> Any:
        self._status = self._console.status(what)
        return self._status

    def progress(self, line: str) -> None:
        if self._pipe is not None:
            self._say({"progress": line})
        elif self._status is not None:
            self._status.update(line)

    def ready(self, running: statefile.Running, processes: dict[str, int]) -> None:
        told = {"name": running.name, "address": running.address, "pid": running.pid, "processes": processes}
        if self._pipe is not None:
            self._say(told)
            self._pipe.close()
            self._pipe = None
        elif self._json:
            print_json(told)
        else:
            self._console.print(f"cluster {running.name} serves at [bold]{running.address}[/]")
            self._console.print(f"  dashboard: {running.address}/dashboard")
            self._console.print(f"  {len(processes)} processes: {', '.join(sorted(processes))}")
            self._console.print(f"  kvbank status --name {running.name}   kvbank down --name {running.name}")

    def failed(self, error: KVBankError) -> None:
        if self._pipe is not None:
            self._say({"error": {"code": error.code, "message": str(error)}})

    def _say(self, word: dict[str, Any]) -> None:
        assert self._pipe is not None
        with contextlib.suppress(OSError):           # nobody listens any more: go on, the state file tells the rest
            print(json.dumps(word), file=self._pipe, flush=True)


def down(args: argparse.Namespace) -> int:
    folder = state_folder()
    running = statefile.find(folder, args.name)
    clean = None
    if running is not None:
        with console(to_stderr=True).status(f"stopping {args.name}"):
            clean = statefile.stop(folder, running)
    told = {"name": args.name, "stopped": running is not None, "killed": clean is False}
    if args.json:
        print_json(told)
    else:
        words = "no such cluster was up" if running is None else "stopped" if clean else "killed: it did not stop"
        print(f"{args.name}: {words}")
    return 0
