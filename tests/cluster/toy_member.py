"""A member whose parts compute nothing, for tests of what starts, watches and ends members. A program, or an actor.

The part's behaviour is chosen by files in the model folder, so that a test can change it from outside:
refuse (text of a ConfigError at start), crash (exit at start), slow (seconds before it serves), deaf (ignores SIGTERM),
brood (starts a grandchild that ignores signals).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbank.cluster.heartbeat import Heartbeat
from kvbank.cluster.member import Config, Part, build_part, main
from kvbank.errors import ConfigError


class Toy:
    """Holds no slots and says so; listens on a port."""

    def __init__(self, config: Config, line: Heartbeat | None) -> None:
        self.config, self.line = config, line
        self.members: list[str] = []
        self._socket = socket.socket()

    def start(self, address: str) -> str:
        asked = self._asked()
        if "refuse" in asked:
            raise ConfigError(asked["refuse"])
        if "crash" in asked:
            print("toy: something is very wrong", file=sys.stderr, flush=True)
            os._exit(7)
        if "brood" in asked:
            subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
        time.sleep(float(asked.get("slow", 0)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def stop(self) -> None:
        if "deaf" in self._asked():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Event().wait()
        self._socket.close()

    def identity(self) -> Mapping[str, Any]:
        return {"numerics": "toy", "slot_bytes": 4096, "slots_total": 8}

    def report(self, full: bool) -> Mapping[str, Any]:
        return {"slots_free": 8, "slots_lendable": 8}

    def on_members(self, members: Sequence[Any]) -> None:
        self.members = [member.id for member in members]

    def _asked(self) -> dict[str, str]:
        """What the test asks of this member: files `<id>.<what>` or `<what>` in the model folder."""
        found = {}
        for path in Path(self.config["settings"]["model"]).glob("*.toy"):
            name, _, what = path.stem.rpartition(":")
            if name in ("", self.config["id"]):
                found[what] = path.read_text()
        return found


class ToyGateway(Toy):
    """Listens on the port of the settings, like the real one."""

    def start(self, address: str) -> str:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self.config["settings"]["port"]))
        self._socket.listen()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"


def build(config: Config, line: Heartbeat | None) -> Part:
    if config["kind"] == "control":
        return build_part(config, line)
    return ToyGateway(config, line) if config["kind"] == "gateway" else Toy(config, line)


if __name__ == "__main__":
    main(build)
