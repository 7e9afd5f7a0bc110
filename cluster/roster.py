"""Roster: who serves jobs now, and who holds which prefix, as far as the gateway knows.

The control plane is asked twice a second; when it is silent the last answer stays in use, because a job needs a worker
and not a control plane.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from kvbank.cluster.links import Links
from kvbank.proto.control_pb2 import MemberView

log = logging.getLogger(__name__)

SILENT_S = 3.0                       # a member that long without a heartbeat gets no new jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The leading shard of one replica: where jobs are sent."""

    id: str
    boot: bytes
    address: str
    numerics: str = ""
    jobs_running: int = 0
    jobs_waiting: int = 0
    tokens_pending: int = 0          # prompt tokens that it has yet to compute
    slots_free: int = 0
    slots_total: int = 0
    draining: bool = False           # refuses new jobs


class Roster:
    """The gateway's view of the members. `refresh` asks control; everything else answers from memory."""

    def __init__(self, links: Links, control: str, *, every_s: float = 0.5, timeout_s: float = 1.0) -> None:
        self._links = links
        self._control = control
        self._every_s = every_s
        self._timeout_s = timeout_s
        self.members: list[MemberView] = []          # another list after each refresh
        self._serving: list[Worker] = []
        self._task: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each refresh that changed who can serve."""
        self._listeners.append(listener)

    async def start(self) -> None:
        await self.refresh()
        self._task = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Ask control once. Silence keeps the last view."""
        try:
            reply = await self._links.snapshot(self._control, timeout_s=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            log.debug("roster control_silent code=%s", error.code().name)
            return
        before = {(w.id, w.boot) for w in self._serving}
        self.members = list(reply.members)
        self._serving = serving(self.members)
        if {(w.id, w.boot) for w in self._serving} != before:
            for listener in self._listeners:
                listener()

    def workers(self) -> list[Worker]:
        """Replicas with every shard alive, by id."""
        return self._serving

    async def holders(self, keys: bytes) -> dict[str, int]:
        """Leading blocks of `keys` that every shard of a replica holds, by the id of its leading shard.

        As the directory has it, so a hint. Empty when control does not answer at once.
        """
        if not keys:
            return {}
        try:
            reply = await self._links.locate(self._control, keys, timeout_s=0.1)
        except grpc.aio.AioRpcError:
            return {}
        leading: dict[str, int] = {}
        for holding in reply.holdings:
            if holding.first == 0:
                leading[holding.id] = max(leading.get(holding.id, 0), holding.count)
        held: dict[int, int] = {}                    # replica -> what all its shards hold
        leads: dict[int, str] = {}
        for member in (view.member for view in self.members if view.member.kind == "model"):
            blocks = leading.get(member.id, 0)
            held[member.replica] = min(held.get(member.replica, blocks), blocks)
            if member.shard == 0:
                leads[member.replica] = member.id
        return {name: held[replica] for replica, name in leads.items() if held[replica]}


def serving(members: Sequence[MemberView]) -> list[Worker]:
    """The leads of replicas with every shard alive, by id."""
    alive = [v for v in members if v.silent_s < SILENT_S]
    shards: dict[int, int] = {}
    for view in alive:
        if view.member.kind == "model":
            shards[view.member.replica] = shards.get(view.member.replica, 0) + 1
    leads = [
        v for v in alive
        if v.member.kind == "model" and v.member.shard == 0
        and shards[v.member.replica] >= max(1, v.member.shards)
    ]
    return sorted((_worker(view) for view in leads), key=lambda w: w.id)


def _worker(view: MemberView) -> Worker:
    member, report = view.member, view.report
    return Worker(
        id=member.id, boot=member.boot, address=member.address, numerics=member.numerics,
        jobs_running=report.jobs_running, jobs_waiting=report.jobs_waiting, tokens_pending=report.tokens_pending,
        slots_free=report.slots_free, slots_total=member.slots_total, draining=report.draining,
    )
