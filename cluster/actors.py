"""Ray's side of the house: one actor per member, and the launcher that starts them. All of Ray is behind this file.

Ray places, starts and stops actors. On a Ray of several machines every member that holds KV has a seat: a placement
group of its own, not one for all, because Ray moves the lost part of a group as a whole or not at all. When a machine
dies each of its seats moves to a machine with room, or waits for one, and its member is started again there.

No tensor, prompt or token ever rides a Ray call: the actors' methods are start, address, pid, stop, and one that never
returns, by whose failure the launcher learns of a death without asking.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from kvbank.cluster.config import child_variables, marked_environment
from kvbank.cluster.logs import secrets_of, set_up
from kvbank.cluster.member import Build, Member, build_part, started
from kvbank.cluster.processes import tail
from kvbank.cluster.seats import Room, Wants, arrange, shortage
from kvbank.cluster.settings import NODE
from kvbank.errors import ConfigError, KVBankError, Unavailable, from_code

LOOK_S = 1.0                         # between two looks whether Ray has found the room, or somebody gave up
OBJECT_STORE_BYTES = 80 << 20        # about Ray's minimum: nothing of ours travels through it


class MemberActor:
    """One member inside a Ray actor. It forwards; a line that deserves a test belongs in member.py."""

    def __init__(self, config: Mapping[str, Any], build: Build = build_part) -> None:
        if os.path.isdir(os.path.dirname(config["log"])):        # not so on another machine: there Ray keeps the log
            output = os.open(config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
        set_up(config["id"], config.get("settings", {}), secrets_of(config))
        self._member = Member(_at_home(config), build=build)

    def start(self) -> dict[str, Any]:
        """`{"address", "pid"}` once it serves, else `{"error", "message"}`."""
        return started(self._member)

    def address(self) -> str:
        return self._member.address

    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        self._member.stop()

    def live(self) -> None:
        """Never returns: the call fails when this actor's process ends."""
        threading.Event().wait()


class RayLauncher:
    """Starts members as Ray actors, on a Ray of its own or on one that it joins. All methods from any thread.

    A Ray that it started ends with `close`. Of one that it joined, only the actors it made are removed.
    """

    def __init__(
        self, marker: str, folder: Path, logs: Path, *, address: str | None = None,
        actor: type[MemberActor] = MemberActor,
    ) -> None:
        """`address`: join this Ray; None: the one this process is connected to, else a new one in `folder`."""
        self._marker = marker
        self._logs = logs
        self._actor = actor
        self._lock = threading.Lock()
        self._actors: dict[str, Any] = {}                        # handles
        self._lives: dict[str, Any] = {}
        self._pids: dict[str, int] = {}
        self._seats: dict[str, tuple[Wants, Any]] = {}           # what it holds and its placement group, by member
        self._home: str | None = None                            # this process's node, when members may be elsewhere
        self._stopping = False
        self._connected = not ray.is_initialized()               # by us, so we disconnect
        self.owns_ray = self._connected and address is None
        if not self._connected:
            return
        quiet: dict[str, Any] = {"namespace": marker, "log_to_driver": False, "logging_level": logging.ERROR}
        with marked_environment(marker if self.owns_ray else None):
            if self.owns_ray:
                ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), _node_ip_address="127.0.0.1",
                         object_store_memory=OBJECT_STORE_BYTES, **quiet)
                return
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RayError) as error:
                raise ConfigError(f"cluster.ray_address {address}: no Ray to join there ({error}); if that Ray asks for "
                                  "a token, as `ray start` does by default, set RAY_AUTH_MODE=token here too") from error

    @property
    def processes(self) -> dict[str, int]:
        """Process id by member id, of those that run."""
        ended = self.dead()
        with self._lock:
            return {name: pid for name, pid in self._pids.items() if name in self._actors and name not in ended}

    def reserve(self, wanted: Mapping[str, Wants], *, machines: int = 1, within_s: float) -> None:
        """Wait for that many machines, then take a seat for each of these members, spread; others stay on this machine.

        Raises ConfigError that says who finds no room, and Unavailable when the cluster stops meanwhile.
        """
        self._home, give_up = ray.get_runtime_context().get_node_id(), time.monotonic() + within_s
        while len(rooms := self._unless_stopping(_rooms)) < machines:
            _still(give_up, lambda: f"{len(rooms)} of {machines} machines (cluster.machines) are there: "
                   f"{', '.join(room.address for room in rooms)}. Wait for the others, or ask for fewer")
            time.sleep(LOOK_S)
        seated = arrange(wanted, rooms)
        group: Any = ray.util.placement_group
        for name, wants in wanted.items():
            wish = seated[name].node if name in seated else None         # without: Ray looks, and may grow
            self._seats[name] = wants, group([dict(wants)], strategy="STRICT_PACK", name=f"{self._marker}-{name}",
                                             _soft_target_node_id=wish) if wants else None
        for _, seat in self._seats.values():
            while seat is not None and not self._unless_stopping(partial(seat.wait, LOOK_S)):
                _still(give_up, lambda: shortage(wanted, self._unless_stopping(partial(_rooms, self._marker))))

    def _unless_stopping(self, ask: Callable[[], Any]) -> Any:
        """Ask Ray something that `close` must not interrupt: a Ray that has just been left would be started anew."""
        with self._lock:
            if self._stopping:
                raise Unavailable("the cluster is stopping")
            return ask()

    def _where(self, name: str) -> dict[str, Any]:
        """Ray's options that put a member into its place."""
        wants, seat = self._seats.get(name, ({}, None))
        own = {kind: much for kind, much in wants.items() if kind not in ("CPU", "GPU")}
        asks = {"num_cpus": wants.get("CPU", 0), "num_gpus": wants.get("GPU", 0), "resources": own}
        if seat is not None:
            return asks | {"scheduling_strategy": PlacementGroupSchedulingStrategy(seat, 0)}
        if name in self._seats:
            return asks | {"scheduling_strategy": "SPREAD"}
        if self._home is not None:
            return asks | {"scheduling_strategy": NodeAffinitySchedulingStrategy(self._home, soft=False)}
        return asks                                              # num_cpus 0: any number of members on this machine

    def start(self, config: Mapping[str, Any], *, threads: int = 1, within_s: float = 60.0) -> str:
        """Start one member and wait until it serves; its address. Raises its own typed error, or Unavailable."""
        name, give_up = str(config["id"]), time.monotonic() + within_s
        log_path = self._logs / f"{name}.log"
        with self._lock:
            if self._stopping:
                raise Unavailable("the cluster is stopping")
            remote: Any = ray.remote(self._actor)
            made = remote.options(
                name=name, namespace=self._marker, max_restarts=0, max_concurrency=8, **self._where(name),
                runtime_env={"env_vars": child_variables(self._marker, threads)},
            ).remote({**config, "log": str(log_path)})
            self._actors[name] = made
        try:
            pid = _answer(made.pid.remote(), give_up)
            answer = _answer(made.start.remote(), give_up)
            with self._lock:
                self._pids[name] = pid
                self._lives[name] = made.live.remote()
        except GetTimeoutError:
            answer = {"error": KVBankError.code, "message": f"it was not ready within {within_s:.0f} s"}
        except RayError as error:
            answer = {"error": KVBankError.code, "message": f"its actor died: {_in_short(error)}"}
        if "address" in answer:
            return str(answer["address"])
        self.stop([name], grace_s=0.0)
        if answer["error"] != KVBankError.code:
            raise from_code(answer["error"], answer["message"])
        raise Unavailable(f"{name} could not start: {answer['message']}; the end of its output:\n{tail(log_path)}")

    def dead(self) -> list[str]:
        """Ids of members whose actor has ended."""
        with self._lock:
            lives: dict[Any, str] = {life: name for name, life in self._lives.items() if name in self._actors}
        if not lives:
            return []
        ended, _ = ray.wait(list(lives), num_returns=len(lives), timeout=0)
        return [lives[life] for life in ended]

    def stop(self, ids: Sequence[str], *, grace_s: float) -> None:
        """Ask them all to stop, wait at most `grace_s`, then end the actors' processes."""
        with self._lock:
            actors = {name: self._actors.pop(name) for name in ids if name in self._actors}
            for name in actors:
                self._lives.pop(name, None)
                self._pids.pop(name, None)                       # while it starts again it has none
        if actors and grace_s > 0:
            with contextlib.suppress(RayError):
                goodbyes = [actor.stop.remote() for actor in actors.values()]
                ray.wait(goodbyes, num_returns=len(goodbyes), timeout=grace_s)
        for actor in actors.values():
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)

    def close(self, *, grace_s: float = 0.0) -> bool:
        """Stop everybody, then end our Ray or leave the one we joined. False when ours stays until this process ends,
        because another cluster of this process uses it."""
        with self._lock:
            self._stopping = True
            ids = list(self._actors)
        self.stop(ids, grace_s=grace_s)
        for _, seat in self._seats.values():
            with contextlib.suppress(RayError):
                if seat is not None and ray.is_initialized():
                    ray.util.remove_placement_group(seat)
        if not self._connected or not ray.is_initialized():
            return True
        if self.owns_ray and self._others():
            return False
        ray.shutdown()
        return True

    def _others(self) -> bool:
        """Whether actors of another cluster live on our Ray."""
        named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        return any(n["namespace"].startswith("kvbank-") and n["namespace"] != self._marker for n in named)


def _at_home(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A member's config with this machine's address in Ray wherever it says "node"."""
    host, _, port = config["bind"].rpartition(":")
    if NODE not in (host, config["settings"].get("host")):
        return config
    mine = ray.get_runtime_context().get_node_id()
    here = next(node["NodeManagerAddress"] for node in _nodes() if node["NodeID"] == mine)
    settings = {**config["settings"], "host": here} if config["settings"].get("host") == NODE else config["settings"]
    return {**config, "bind": f"{here}:{port}" if host == NODE else config["bind"], "settings": settings}


def _still(give_up: float, reason: Callable[[], str]) -> None:
    if time.monotonic() >= give_up:
        raise ConfigError(f"no room on this Ray within cluster.place_timeout_s: {reason()}")


def _rooms(marker: str = "") -> list[Room]:
    """The machines of this Ray that are alive; what the seats of `marker`'s cluster already hold counts as free.

    Who has taken what is not in Ray's public words: without them, all is free.
    """
    free: dict[str, dict[str, float]] = {}
    with contextlib.suppress(ImportError):
        from ray._private.state import available_resources_per_node
        told: Any = available_resources_per_node
        free = {node: dict(much) for node, much in told().items()}
    if marker and free:
        table: Any = ray.util.placement_group_table
        for seat in table().values():
            for at, wants in seat["bundles"].items() if seat["name"].startswith(f"{marker}-") else ():
                held = free.get(seat["bundles_to_node_id"].get(at, ""), {})
                for kind, much in wants.items():
                    held[kind] = held.get(kind, 0.0) + much
    return [Room(node=node["NodeID"], address=node["NodeManagerAddress"], total=node["Resources"],
                 free=free.get(node["NodeID"], node["Resources"])) for node in _nodes() if node["Alive"]]


def _nodes() -> list[dict[str, Any]]:
    ask: Any = ray.nodes
    found: list[dict[str, Any]] = ask()
    return found


def _in_short(error: RayError) -> str:
    """The last line of what Ray says, which is the error itself when there is one."""
    return [line for line in str(error).splitlines() if line.strip()][-1].strip()


def _answer(call: Any, give_up: float) -> Any:
    return ray.get(call, timeout=max(0.1, give_up - time.monotonic()))
