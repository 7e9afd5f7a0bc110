"""State files: how `kvbank down`, `status` and `submit` find a cluster that `kvbank up` started.

One private file (0600) per cluster name in the state folder. It names a process by id and birth, so that a recycled
process id is never signalled; a file whose process is gone means nothing and is removed by whoever finds it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kvbank.errors import ConfigError, NotFound

KILL_AFTER_S = 12.0                  # from asking a cluster to stop to killing its launcher; its guardian sweeps up


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A cluster of this user that is up, or on its way."""

    name: str
    pid: int
    born: float                      # of that process, as the system tells it
    address: str = ""                # empty while it starts
    api_key: str = field(default="", repr=False)     # one that works, when keys are configured
    ca: str = ""                     # PEM file that its https certificate can be checked with
    log: str = ""                    # of a detached one
    config: list[Any] = field(default_factory=list)  # effective settings as (key, value, source), secrets masked

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)       # a zombie has ended, and waits for who started it
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def path_of(folder: Path, name: str) -> Path:
    """Raises ConfigError for a name that is none, so that no name can lead out of the folder."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", name):
        raise ConfigError(f"{name!r} is no name for a cluster: use up to 64 of A-Z a-z 0-9 _ - .")
    return folder / "clusters" / f"{name}.json"


def taken(other: Running) -> ConfigError:
    """What is told to who wants its name."""
    return ConfigError(f"a cluster named {other.name!r} is already up at {other.address or '(starting)'}: choose another "
                       f"--name, or `kvbank down --name {other.name}` first")


def claim(folder: Path, name: str, **more: Any) -> Running:
    """Take a name for this process. Raises ConfigError when a living cluster has it."""
    if (other := find(folder, name)) is not None and other.pid != os.getpid():
        raise taken(other)
    mine = Running(name=name, pid=os.getpid(), born=psutil.Process().create_time(), **more)
    write(folder, mine)
    return mine


def write(folder: Path, running: Running) -> None:
    """Replace the file of this name at once and privately."""
    path = path_of(folder, running.name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{running.name}.")     # 0600 from the start
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(running), file)
    os.replace(temporary, path)


def find(folder: Path, name: str) -> Running | None:
    """The living cluster of this name, or None; a file without a living process is removed."""
    path = path_of(folder, name)
    try:
        body: Mapping[str, Any] = json.loads(path.read_text())
        running = Running(**body)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError):
        running = None
    if running is None or not running.alive:
        path.unlink(missing_ok=True)
        return None
    return running


def need(folder: Path, name: str) -> Running:
    """The living cluster of this name. Raises NotFound."""
    running = find(folder, name)
    if running is None:
        others = ", ".join(other.name for other in known(folder))
        hint = f"; up are: {others}" if others else ""
        raise NotFound(f"no cluster named {name!r} is up: start one with `kvbank up --model FOLDER`{hint}")
    return running


def known(folder: Path) -> list[Running]:
    """All living clusters, by name."""
    names = sorted(path.stem for path in (folder / "clusters").glob("*.json"))
    return [running for name in names if (running := find(folder, name)) is not None]


def release(folder: Path, mine: Running) -> None:
    """Give the name back, if it is still ours."""
    try:
        body = json.loads(path_of(folder, mine.name).read_text())
    except (OSError, ValueError):
        return
    if (body.get("pid"), body.get("born")) == (mine.pid, mine.born):
        path_of(folder, mine.name).unlink(missing_ok=True)


def stop(folder: Path, running: Running) -> bool:
    """Ask the cluster's process to stop and wait for it. False when it had to be killed."""
    try:
        process = psutil.Process(running.pid)
        if process.create_time() != running.born:
            return True
        process.send_signal(signal.SIGTERM)
        give_up_at = time.monotonic() + KILL_AFTER_S
        process.wait(timeout=max(0.0, give_up_at - time.monotonic()))
    except psutil.TimeoutExpired:
        process.kill()
        return False
    except psutil.Error:
        pass
    finally:
        release(folder, running)
    return True
