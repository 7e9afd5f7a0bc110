"""Ops: what whoever runs the cluster may have done to a member, and the record of who did.

    route (ops door) --Caller.name, member, action--> Ops --gRPC--> member            every try is kept, and logged

There is no pin: a frame is evictable or held by a job that needs it, and a pin without a job and a term is how caches
leak. There is no clearing of Redis: it belongs to all members, and has its own limit and term.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import grpc.aio

from kvbank.errors import InvalidRequest, NotFound, Unavailable
from kvbank.proto import ops_pb2
from kvbank.proto.control_pb2 import MemberView

log = logging.getLogger(__name__)

ACT_S = 5.0                          # a member that has not answered by then is not waited for
MAX_AUDIT = 200
ACTIONS = ("drain", "undrain", "recall", "clear")


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
        try:
            outcome = await self._act(member, action)
        except (InvalidRequest, NotFound, Unavailable) as error:
            self._record(member, action[:64], who, tenant, ok=False, outcome=str(error))
            raise
        return self._record(member, action, who, tenant, ok=True, outcome=outcome)

    async def _act(self, member: str, action: str) -> str:
        request = _request(action)
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
        return {"drain": f"{reply.blocks} lent blocks called back", "undrain": "takes jobs and lends again",
                "recall": f"{reply.blocks} lent blocks called back",
                "clear": f"{reply.blocks} idle blocks and {reply.frames} host frames dropped"}[action]

    def _record(self, member: str, action: str, who: str, tenant: str, *, ok: bool, outcome: str) -> dict[str, Any]:
        entry = {"at": self._wall(), "who": who, "tenant": tenant, "action": action, "member": member[:64], "ok": ok,
                 "outcome": outcome}
        self.audit.append(entry)
        log.info("ops action=%s member=%r who=%s tenant=%s ok=%s outcome=%r", action, member[:64], who, tenant, ok, outcome)
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
