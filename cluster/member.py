"""Member: one process of a cluster, whatever launched it. Builds the part its kind names; keeps its line to control.

A member's config is a plain JSON-able mapping, because it travels over a pipe or as a Ray argument:

    kind      control | model | lender | gateway
    id        "control", "worker-0", "worker-0.1" (its shard 1), "lender-2", "gateway"
    token     the cluster token, hex                          cache_secret   hex; keys and stored frames hang on it
    bind      "host:port" it listens on, port 0: any          model_digest   hex; empty without a model
    control   address of the control plane                    settings       Settings.flat()
    replica, shard, shards                                     folder         its own scratch folder, exists

As a program (`python -m kvbank.cluster.member`) it reads one such line on stdin, answers one line on the given
descriptor (`{"address", "pid"}` or `{"error", "message"}`), and then serves until SIGTERM, or until stdin closes: then
its launcher has died.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

import kvbank
from kvbank.cluster.heartbeat import Heartbeat
from kvbank.cluster.logs import secrets_of, set_up
from kvbank.cluster.membership import Facts, Versions
from kvbank.errors import ConfigError, KVBankError
from kvbank.kvstore.transport.badge import Badge
from kvbank.proto import control_pb2 as pb

log = logging.getLogger(__name__)

Config = Mapping[str, Any]
PR_SET_PDEATHSIG = 1
LEAVE_S = 4.0                        # a stop that takes longer is cut short


class Part(Protocol):
    """What a member is made of: something that serves."""

    def start(self, address: str) -> str:
        """Serve on `host:port` and return the address others use."""
        ...

    def stop(self) -> None: ...


@runtime_checkable
class Banker(Protocol):
    """A part that holds KV slots, and therefore registers with control and reports to it."""

    def start(self, address: str) -> str: ...
    def stop(self) -> None: ...
    def identity(self) -> Mapping[str, Any]:
        """numerics, slot_bytes, slots_total: what control tells others about it. Known once started."""
        ...

    def report(self, full: bool) -> Mapping[str, Any]:
        """Fields of control.proto's Report; see `Heartbeat`. Called on the heartbeat thread."""
        ...

    def on_members(self, members: Sequence[pb.Member]) -> None:
        """Everyone alive, whenever that changed. Called on the heartbeat thread."""
        ...


class Build(Protocol):
    """Makes the part. `line` asks control (lenders, locate, members); None for control itself and for the gateway.

    `config` is the member's, with `boot` (hex of 16 random bytes) added. Raises ConfigError or ModelError.
    """

    def __call__(self, config: Config, line: Heartbeat | None) -> Part: ...


def build_part(config: Config, line: Heartbeat | None) -> Part:
    """The part of a member by its kind. Heavy imports happen here, in the process that needs them."""
    if config["kind"] == "control":
        from kvbank.cluster.control import Control

        values = config["settings"]
        return Control(Badge.of_member(config), suspect_s=values["suspect_s"], gone_s=values["gone_s"],
                       directory_keys=values["directory_keys"])
    if config["kind"] == "gateway":
        return _Gateway(config)
    if config["kind"] in ("model", "lender"):
        from kvbank.workers.service import build_worker

        part: Part = build_worker(config, line)
        return part
    raise ConfigError(f"member kind {config['kind']!r} is not control, model, lender or gateway")


class _Gateway:
    """The HTTP front door as a part: it chooses its port from the settings, not from `bind`."""

    def __init__(self, config: Config) -> None:
        from kvbank.cluster.http.server import GatewaySettings, build_gateway

        self._server = build_gateway(GatewaySettings.from_flat(
            config["settings"], control=config["control"], badge=Badge.of_member(config),
            cache_secret=bytes.fromhex(config["cache_secret"]), model_digest=config["model_digest"],
        ))

    def start(self, address: str) -> str:
        return self._server.start()

    def stop(self) -> None:
        self._server.stop()


class Member:
    """One member, started once and stopped once. `build` is the seam for tests."""

    def __init__(self, config: Config, *, build: Build = build_part) -> None:
        self.config: Config = {**config, "boot": os.urandom(16).hex()}
        self._build = build
        self._part: Part | None = None
        self._line: Heartbeat | None = None
        self.address = ""

    def start(self) -> str:
        """Build, serve, and register when it holds slots; the address others use. A failure leaves nothing behind."""
        try:
            if self.config["kind"] in ("model", "lender"):
                self._line = Heartbeat(
                    self.config["control"], Badge.of_member(self.config), interval_s=self.config["settings"]["heartbeat_s"],
                    report=self._report, on_members=self._meet,
                )
            self._part = self._build(self.config, self._line)
            self.address = self._part.start(self.config["bind"])
            if self._line is not None:
                self._line.start(self._facts(), self._versions())
        except BaseException:
            self.stop()
            raise
        log.info("member_ready id=%s address=%s", self.config["id"], self.address)
        return self.address

    def stop(self) -> None:
        """Say goodbye to control, then end the part. Safe to repeat."""
        line, self._line = self._line, None
        part, self._part = self._part, None
        if line is not None:
            line.stop()
        if part is not None:
            part.stop()

    def _report(self, full: bool) -> Mapping[str, Any]:
        return self._part.report(full) if isinstance(self._part, Banker) else {}

    def _meet(self, members: Sequence[pb.Member]) -> None:
        if isinstance(self._part, Banker):
            self._part.on_members(members)

    def _facts(self) -> Facts:
        told = self._part.identity() if isinstance(self._part, Banker) else {}
        config = self.config
        return Facts(
            id=config["id"], boot=bytes.fromhex(config["boot"]), kind=config["kind"], replica=config.get("replica", 0),
            shard=config.get("shard", 0), shards=config.get("shards", 1), host=socket.gethostname(), pid=os.getpid(),
            address=self.address, numerics=told.get("numerics", ""), slot_bytes=told.get("slot_bytes", 0),
            slots_total=told.get("slots_total", 0),
        )

    def _versions(self) -> Versions:
        return Versions(kvbank=kvbank.__version__, model_digest=self.config.get("model_digest", ""),
                        torch=_installed("torch"))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- as a program ------------------------------------------------------------------------------------------------------

def main(build: Build = build_part) -> None:
    """Serve one member as a child process of a launcher; see the top of this file. Does not return."""
    config = json.loads(sys.stdin.readline())
    _die_with(config.pop("parent"))
    ready = os.fdopen(config.pop("ready"), "w")
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # Ctrl-C is for the launcher, which then stops us
    set_up(config["id"], config.get("settings", {}), secrets_of(config))
    member = Member(config, build=build)
    answer = started(member)
    if "error" in answer:
        log.error("member_failed id=%s error=%s message=%s", config["id"], answer["error"], answer["message"])
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())        # until here SIGTERM simply ends us
    try:
        print(json.dumps(answer), file=ready, flush=True)
        ready.close()
    except OSError:                                              # nobody waits for us any more
        leave.set()
    if "error" not in answer:
        _when(lambda: sys.stdin.read() == "", then=leave.set)    # read to the end: the launcher holds the other end
        leave.wait()
        _when(lambda: threading.Event().wait(LEAVE_S), then=lambda: os._exit(1))
        member.stop()
    logging.shutdown()
    os._exit(0 if "error" not in answer else 1)                  # not sys.exit: no thread of anybody's may keep us


def started(member: Member) -> dict[str, Any]:
    """Start it and put the outcome into words that cross a process boundary."""
    try:
        address = member.start()
        gc.collect()
        gc.freeze()                                              # what it began with stays: no collection walks through it again
        return {"address": address, "pid": os.getpid()}
    except KVBankError as error:
        return {"error": error.code, "message": str(error)}
    except Exception as error:                                   # a bug, or a machine that lacks something: say which
        log.exception("member_crashed id=%s", member.config["id"])
        return {"error": "internal", "message": f"{type(error).__name__}: {error}"}


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the launcher dies. The launcher's guardian does the same, a little later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:                                   # it died before we could ask
        os._exit(1)


def _when(wait: Callable[[], object], *, then: Callable[[], object]) -> None:
    """Run `then` after `wait` returns, on a thread that keeps nobody alive."""
    threading.Thread(target=lambda: (wait(), then()), daemon=True).start()


if __name__ == "__main__":
    main()
