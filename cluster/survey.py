"""Survey: what every member says of itself, asked at once and put side by side.

A member that does not answer in time is shown as the control plane last heard it, with state "silent": a status page
that leaves out the broken one is no help.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from kvbank.cluster.links import Links
from kvbank.cluster.roster import SILENT_S, Roster
from kvbank.proto import jobs_pb2
from kvbank.proto.control_pb2 import MemberView

TIMEOUT_S = 1.0
FRESH_S = 0.1                        # answers younger than this are told again


class Survey:
    """Merges Jobs.Status of all members with the control plane's snapshot."""

    def __init__(
        self, roster: Roster, links: Links, *, blocks_per_slot: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._roster = roster
        self._links = links
        self._blocks_per_slot = blocks_per_slot
        self._clock = clock
        self._asking = asyncio.Lock()
        self._told: dict[str, Any] | None = None
        self._told_at = 0.0
        self.borrowed: dict[str, int] = {}           # a job's name on the wire -> blocks it reads at lenders now

    async def told(self) -> dict[str, Any]:
        """`{"workers": [...], "loans": [...], "tiers": [...]}`, plain values. No job: jobs are their tenant's."""
        async with self._asking:
            if self._told is None or self._clock() - self._told_at > FRESH_S:
                self._told = await self._ask()
                self._told_at = self._clock()
            return self._told

    async def _ask(self) -> dict[str, Any]:
        await self._roster.refresh()
        views = [v for v in self._roster.members if v.member.kind in ("model", "lender")]
        answers = await asyncio.gather(*(self._ask_one(view) for view in views))
        workers = [self._worker(view, answer) for view, answer in zip(views, answers, strict=True)]
        workers.sort(key=lambda w: (w["kind"] != "model", w["replica"], w["shard"], w["id"]))
        self.borrowed = {job.id: job.borrowed_blocks for answer in answers if answer for job in answer.jobs}
        loans = {loan.id: _loan(loan) for answer in answers if answer for loan in answer.loans}
        return {"workers": workers, "loans": sorted(loans.values(), key=lambda loan: loan["id"]),
                "tiers": _merged_tiers(workers)}

    async def _ask_one(self, view: MemberView) -> jobs_pb2.WorkerStatus | None:
        if view.silent_s >= SILENT_S:
            return None
        try:
            return await self._links.status(view.member.address, timeout_s=TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None

    def _worker(self, view: MemberView, answer: jobs_pb2.WorkerStatus | None) -> dict[str, Any]:
        member, report, size = view.member, view.report, self._blocks_per_slot
        worker = {
            "id": member.id, "kind": member.kind, "replica": member.replica, "shard": member.shard,
            "host": member.host, "pid": member.pid, "state": "silent",
            "blocks_total": member.slots_total * size, "blocks_free": report.slots_free * size,
            "blocks_used": 0, "blocks_lent": report.slots_lent * size, "blocks_borrowed": report.slots_borrowed * size,
            "blocks_idle": 0, "draining": False, "tiers": [], "counters": {},
        }
        if answer is not None:
            worker |= {
                "state": "ok", "blocks_total": answer.blocks_total, "blocks_free": answer.blocks_free,
                "blocks_used": answer.blocks_used, "blocks_lent": answer.blocks_lent,
                "blocks_borrowed": answer.blocks_borrowed, "blocks_idle": answer.blocks_idle, "draining": answer.draining,
                "tiers": [_tier(tier) for tier in answer.tiers], "counters": dict(answer.counters),
            }
        return worker


def _tier(tier: jobs_pb2.TierStatus) -> dict[str, Any]:
    return {"name": tier.name, "bytes_used": tier.bytes_used, "bytes_limit": tier.bytes_limit, "frames": tier.frames,
            "state": tier.state, "counters": dict(tier.counters)}


def _merged_tiers(workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per tier. Host tiers are each member's own and add up; Redis is one for all and is seen by many."""
    merged: dict[str, dict[str, Any]] = {}
    for tier in (tier for worker in workers for tier in worker["tiers"]):
        blank = {**tier, "bytes_used": 0, "bytes_limit": 0, "frames": 0, "counters": {}}
        known = merged.setdefault(tier["name"], blank)
        join = max if tier["name"] == "redis" else int.__add__
        for field in ("bytes_used", "bytes_limit", "frames"):
            known[field] = join(known[field], tier[field])
        for name, count in tier["counters"].items():
            known["counters"][name] = known["counters"].get(name, 0) + count
        if tier["state"] not in ("ok", known["state"]):
            known["state"] = tier["state"]           # one member's open breaker is worth seeing
    return [merged[name] for name in sorted(merged)]


def _loan(loan: jobs_pb2.LoanStatus) -> dict[str, Any]:
    return {"id": loan.id, "lender": loan.lender, "borrower": loan.borrower, "blocks": loan.blocks,
            "term_s": loan.term_s, "age_s": loan.age_s, "blocks_recalled": loan.recalled_blocks}
