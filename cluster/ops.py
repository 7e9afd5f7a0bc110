"""Ops: what whoever runs the cluster may have done to a member, and the record of who did.

    route (ops door) --Caller.name, member, action--> Ops --gRPC--> member            every try is kept, and logged

A pin is of a job's prompt, on the worker that ran it last, and has a term: without either, pins are how caches leak. There is
no clearing of Redis: it belongs to all members, and has its own limit and term.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc.aio

from kvbank.cluster.job import Job
from kvbank.errors import InvalidRequest, NotFound, Unavailable
from kvbank.proto import ops_pb2
from kvbank.proto.control_pb2 import MemberView

log = logging.getLogger(__name__)

ACT_S = 5.0                          # a member that has not answered by then is not waited for
PIN_S = 600.0                        # how long a pin lasts that names no term
MAX_AUDIT = 200
ACTIONS = ("drain", "undrain", "recall", "clear")
_HOST_ONLY = ops_pb2.OpsRequest(clear=ops_pb2.ClearCaches(host=True))


class Roster(Protocol):
    """Who is there."""

    @property
    def members(self) -> list[MemberView]: ...


class Links(Protocol):
    """How a member is reached."""

    async def act(self, address: str, request: ops_pb2.OpsRequest, *, timeout_s: float) -> ops_pb2.OpsReply: ...


class Ops:
    """One per gateway. `audit` is the record, newest last."""

    def __init__(self, roster: Roster, links: Links, *, wall: Callable[[], float] = time.time) -> None:
        self._roster, self._links, self._wall = roster, links, wall
        self.audit: deque[dict[str, Any]] = deque(maxlen=MAX_AUDIT)
        self.on_act: Callable[[dict[str, Any]], None] = lambda entry: None

    async def act(self, member: str, action: str, *, who: str, tenant: str) -> dict[str, Any]:
        """Have it done; returns the audit entry. Raises InvalidRequest, NotFound, Unavailable: those are recorded too."""
        entry = {"who": who, "tenant": tenant, "action": action[:64], "member": member[:64], "job": ""}
        return await self._recorded(entry, self._act(member, action))

    async def pin(self, wire_id: str, job: Job | None, term_s: float, *, who: str, tenant: str) -> dict[str, Any]:
        """Have what the job's prompt left on its worker evicted after all others for so many seconds; 0 ends that. As act."""
        entry = {"who": who, "tenant": tenant, "action": "pin" if term_s else "unpin",
                 "member": "" if job is None else job.worker, "job": wire_id[:64]}
        return await self._recorded(entry, self._pin(job, math.ceil(term_s)))

    async def _act(self, member: str, action: str) -> str:
        reply, left = await self._ask(member, _request(action)), ""
        if action == "clear":                        # each shard keeps its own part of what was parked
            shards = self._followers(member)
            replies = await asyncio.gather(*[self._ask(shard, _HOST_ONLY) for shard in shards], return_exceptions=True)
            reply.frames += sum(each.frames for each in replies if isinstance(each, ops_pb2.OpsReply))
            away = [shard for shard, each in zip(shards, replies, strict=True) if isinstance(each, BaseException)]
            left = f"; not by {', '.join(away)}: ask again" if away else ""
        return {"drain": f"{reply.blocks} lent blocks called back", "undrain": "takes jobs and lends again",
                "recall": f"{reply.blocks} lent blocks called back",
                "clear": f"{reply.blocks} idle blocks and {reply.frames} host frames dropped{left}"}[action]

    async def _pin(self, job: Job | None, term_s: int) -> str:
        if job is None:
            raise NotFound("there is no such job: it never was, or it ended too long ago")
        if not job.worker:
            raise InvalidRequest("no worker has had this job yet")
        keys = job.span_keys
        if not keys.ends and not keys.tail:
            raise InvalidRequest("the gateway has no block keys of this prompt: it is shorter than a block, its worker "
                                 "makes them alone, or many jobs have ended since")
        reply = await self._ask(job.worker, ops_pb2.OpsRequest(pin=ops_pb2.Pin(ends=keys.ends, tail=keys.tail, term_s=term_s)))
        if not term_s:
            return f"{reply.blocks} blocks unpinned"
        more = f"; {reply.left_out} more would be over half of the vault" if reply.left_out else ""
        return f"{reply.blocks} blocks pinned for {term_s} s{more}"

    def _followers(self, leader: str) -> list[str]:
        """The other shards of its replica, if it has any."""
        models = [view.member for view in self._roster.members if view.member.kind == "model"]
        replicas = {one.replica for one in models if one.id == leader}
        return [one.id for one in models if one.replica in replicas and one.shard]

    async def _ask(self, member: str, request: ops_pb2.OpsRequest) -> ops_pb2.OpsReply:
        address = next((view.member.address for view in self._roster.members
                        if view.member.id == member and view.member.kind in ("model", "lender")), None)
        if address is None:
            raise NotFound("there is no such member")
        try:
            reply = await self._links.act(address, request, timeout_s=ACT_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the member did not do it ({error.code().name.lower()}); it may be down, or of another version"
                              ) from None
        if reply.error:
            raise InvalidRequest(reply.error)
        return reply

    async def _recorded(self, entry: dict[str, Any], doing: Awaitable[str]) -> dict[str, Any]:
        try:
            outcome = await doing
        except (InvalidRequest, NotFound, Unavailable) as error:
            self._record({**entry, "ok": False, "outcome": str(error)})
            raise
        return self._record({**entry, "ok": True, "outcome": outcome})

    def _record(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry = {"at": self._wall(), **entry}
        self.audit.append(entry)
        said = ("action", "member", "job", "who", "tenant", "ok", "outcome")
        log.info("ops action=%s member=%r job=%r who=%s tenant=%s ok=%s outcome=%r", *(entry[name] for name in said))
        self.on_act(entry)
        return entry


def _request(action: str) -> ops_pb2.OpsRequest:
    if action in ("drain", "undrain"):
        return ops_pb2.OpsRequest(draining=ops_pb2.Draining(on=action == "drain"))
    if action == "recall":
        return ops_pb2.OpsRequest(recall=ops_pb2.RecallLoans())
    if action == "clear":
        return ops_pb2.OpsRequest(clear=ops_pb2.ClearCaches(device=True, host=True))
    raise InvalidRequest(f"the action must be one of {', '.join(ACTIONS)}")
