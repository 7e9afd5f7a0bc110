"""Feed: the cluster as a stream for who watches: one snapshot, then what changed, once per second.

    Survey, gateway --one look per second, while anybody watches--> Feed --the same bytes--> watcher, watcher, ...
    jobs: admitted, lost, ended --always--> rings and sums, all bounded

However many watch, the members are asked once; a watcher that does not keep up is let go and may come again: it gets a
snapshot. Knows jobs of all tenants by name and number, never a prompt or an output.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from kvbank.cluster.changes import BAD, INFO, JOB, KINDS, OPS, WARN, Happening, differences
from kvbank.cluster.gateway import Gateway
from kvbank.cluster.job import Job
from kvbank.cluster.window import Ended, Window
from kvbank.errors import Overloaded

log = logging.getLogger(__name__)

EVERY_S = 1.0                        # between two looks
FRESH_S = 1.5                        # a snapshot may be made of a look that is not older
SERIES = 300                         # points that charts have
EVENTS = 200                         # of each kind
ENDED_JOBS = 100                     # listed after their end
MAX_WATCHERS = 64
BEHIND = 8                           # messages that one watcher may have unread

Told = dict[str, Any]


class Watcher:
    """One reader. `queue` ends with None."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue(BEHIND)
        self.behind = True                           # has no snapshot yet


class Feed:
    """One per gateway; lives on its event loop. An Observer of the gateway."""

    def __init__(
        self, gateway: Gateway, status: Callable[[], Awaitable[Told]], *,
        borrowed: Callable[[], Mapping[str, int]] = dict, facts: Mapping[str, Any] | None = None,
        every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:
        """status: Survey.told. borrowed: blocks read at lenders by jobs' names on the wire. facts: of the cluster, fixed."""
        self._gateway, self._status, self._borrowed = gateway, status, borrowed
        self._facts, self._every_s, self._clock, self._wall = dict(facts or {}), every_s, clock, wall
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None
        self._told: Told | None = None               # as the members said it
        self._seen: Told = _blank()                  # as watchers have it
        self._looked_at = float("-inf")
        self._opened: dict[str, float] = {}          # loan -> unix time
        self._series: deque[Told] = deque(maxlen=SERIES)
        self._events = {kind: deque[Told](maxlen=EVENTS) for kind in KINDS}
        self._fresh: deque[Told] = deque(maxlen=EVENTS)      # since the last message
        self._acts: deque[Told] = deque(maxlen=EVENTS)       # likewise, of the audit trail
        self._number = 0                             # of the last event
        self._ended: deque[Job] = deque(maxlen=ENDED_JOBS)
        self._tokens, self._tokens_before, self._tokens_at = 0, 0, clock()
        self.window = Window()
        self.audit: Callable[[], list[Told]] = list
        self.looks = 0                               # times the members were asked
        gateway.observers.append(self)

    # -- an Observer of the gateway ----------------------------------------------------------------------------------

    def admitted(self, job: Job) -> None:
        self._note(Happening(JOB, INFO, f"{_named(job)} admitted, {job.prompt_tokens:,} prompt tokens", job=job.wire_id))

    def refused(self, code: str) -> None:
        self._note(Happening(JOB, WARN, f"a job was refused: {code}"))

    def tokens(self, count: int) -> None:
        self._tokens += count

    def lost(self, job: Job, worker: str, reason: str) -> None:
        text = f"{_named(job)} lost attempt {job.attempt} on {worker}: {reason}"
        self._note(Happening(JOB, WARN, text, worker, job.wire_id))

    def ended(self, job: Job) -> None:
        outcome = job.error.code if job.error is not None else job.finish_reason
        level = INFO if job.error is None or outcome == "cancelled" else BAD
        text = f"{_named(job)} ended: {outcome}, {len(job.ids):,} tokens"
        self._note(Happening(JOB, level, text, job.worker, job.wire_id))
        self._ended.append(job)
        tokens = len(job.ids)
        self.window.add(Ended(
            self._clock(), outcome, job.prompt_tokens, tokens, job.receipt.get("computed_tokens", 0),
            dict(job.receipt.get("reused", {})), dict(job.receipt.get("missed", {})),
            job.first_token_at - job.started_at if tokens else None,
            (job.last_token_at - job.first_token_at) / (tokens - 1) if tokens > 1 else None,
        ))

    def stopping(self) -> None:
        """End all streams."""
        for watcher in list(self._watchers):
            self._let_go(watcher)
        if self._task is not None:
            self._task.cancel()

    def acted(self, entry: Told) -> None:
        """An ops action was tried."""
        if self._watchers:
            self._acts.append(entry)
        done = entry["outcome"] if entry["ok"] else f"refused: {entry['outcome']}"
        text = f"{entry['who']}: {entry['action']} {entry['job'] or entry['member']}: {done}"
        self._note(Happening(OPS, INFO if entry["ok"] else WARN, text, entry["member"], entry["job"]))

    def _note(self, happening: Happening) -> None:
        self._number += 1
        event = {"number": self._number, "at": self._wall(), "kind": happening.kind, "level": happening.level,
                 "text": happening.text, "member": happening.member, "job": happening.job}
        self._events[happening.kind].append(event)
        if self._watchers:
            self._fresh.append(event)

    # -- watching ----------------------------------------------------------------------------------------------------

    @property
    def watched(self) -> int:
        """How many watch now."""
        return len(self._watchers)

    def check_room(self) -> None:
        """Raises Overloaded when one more watcher is too many."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} pages watch this gateway already; close one", retry_after_s=5.0)

    async def watch(self) -> AsyncGenerator[tuple[str, str], None]:
        """(name, data) of each message: "snapshot" first, then "delta". Ends when the reader is too slow, or the gateway
        stops."""
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            if self._task is None or self._task.done():
                self._fresh.clear()
                self._acts.clear()
                self._task = asyncio.create_task(self._run())
            elif self._clock() - self._looked_at < FRESH_S:
                watcher.behind = False
                yield "snapshot", self._snapshot()
            while (message := await watcher.queue.get()) is not None:
                yield message
        finally:
            self._watchers.discard(watcher)

    async def _run(self) -> None:
        while self._watchers:
            started = self._clock()
            try:
                self._send(await self._look())
            except Exception:                        # the page shows that it hears nothing; the next look may do better
                log.exception("feed look_failed")
            await asyncio.sleep(max(0.05, self._every_s - (self._clock() - started)))

    def _send(self, delta: str) -> None:
        snapshot = ""
        for watcher in list(self._watchers):
            if watcher.behind:                       # it came since the last look
                snapshot = snapshot or self._snapshot()
                watcher.behind = False
                message = ("snapshot", snapshot)
            else:
                message = ("delta", delta)
            try:
                watcher.queue.put_nowait(message)
            except asyncio.QueueFull:
                log.info("feed watcher_too_slow")
                self._let_go(watcher)

    def _let_go(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)
        while not watcher.queue.empty():
            watcher.queue.get_nowait()
        watcher.queue.put_nowait(None)

    # -- one look ----------------------------------------------------------------------------------------------------

    async def _look(self) -> str:
        told = await self._status()
        self.looks += 1
        quiet_for = self._clock() - self._looked_at
        if self._told is not None and quiet_for < 10 * self._every_s:       # else nobody watched, and it is all news
            for happening in differences(self._told, told):
                self._note(happening)
        self._told, self._looked_at = told, self._clock()
        before, self._seen = self._seen, self._view(told)
        point = self._point(told)
        self._series.append(point)
        delta = {"at": self._wall(), "events": list(self._fresh), "point": point, "window": self.window.told(self._clock()),
                 "tiers": told["tiers"], "audit": list(self._acts), **_delta(before, self._seen)}
        self._fresh.clear()
        self._acts.clear()
        return _json(delta)

    def _view(self, told: Told) -> Told:
        """What watchers see, each list by id."""
        workers = {w["id"]: _worker(w) for w in told["workers"]}
        self._opened = {loan["id"]: self._opened.get(loan["id"], self._wall() - loan["age_s"]) for loan in told["loans"]}
        loans = {loan["id"]: {
            "id": loan["id"], "lender": loan["lender"], "borrower": loan["borrower"], "blocks": loan["blocks"],
            "recalled": loan.get("blocks_recalled", 0), "term_s": loan["term_s"], "opened": round(self._opened[loan["id"]], 1),
        } for loan in told["loans"]}
        borrowed, jobs = self._borrowed(), {}
        ended = {job.wire_id: job for job in self._ended}
        for job in self._gateway.everyones_jobs():
            if not job.over:
                job.timeline.borrow(self._clock() - job.started_at, borrowed.get(job.wire_id, 0))
                jobs[job.wire_id] = job_row(job, borrowed.get(job.wire_id, 0))
        jobs |= {name: job_row(job, 0) for name, job in ended.items()}
        return {"workers": workers, "loans": loans, "jobs": jobs}

    def _point(self, told: Told) -> Told:
        workers = [w for w in told["workers"] if w["state"] != "silent"]
        now, tokens = self._clock(), self._tokens
        rate = (tokens - self._tokens_before) / max(1e-3, now - self._tokens_at)
        if now - self._tokens_at > 10 * self._every_s:
            rate = 0.0                               # nobody watched: no rate of now
        self._tokens_before, self._tokens_at = tokens, now
        figures = self.window.told(now)
        return {
            "at": round(self._wall(), 2), "used": sum(w["blocks_used"] for w in workers),
            "lent": sum(w["blocks_lent"] for w in workers), "idle": sum(w.get("blocks_idle", 0) for w in workers),
            "total": sum(w["blocks_total"] for w in workers), "tokens_per_s": round(rate, 1),
            "queued": self._gateway.waiting, "running": self._gateway.live - self._gateway.waiting,
            "ttft_p50": figures["ttft_s"]["p50"], "ttft_p99": figures["ttft_s"]["p99"],
        }

    def _snapshot(self) -> str:
        events = sorted((event for ring in self._events.values() for event in ring), key=lambda event: int(event["number"]))
        return _json({
            "at": self._wall(), "every_s": self._every_s, "facts": self._facts, "events": events,
            "series": list(self._series), "window": self.window.told(self._clock()), "audit": self.audit(),
            "tiers": self._told["tiers"] if self._told else [],
            **{name: list(items.values()) for name, items in self._seen.items()},
        })

    async def worker(self, name: str) -> Told | None:
        """One member with all that it counts; None when there is none of that name."""
        told = self._told if self._told is not None and self._clock() - self._looked_at < FRESH_S else await self._status()
        return next((worker for worker in told["workers"] if worker["id"] == name), None)

    def job(self, wire_id: str) -> Job | None:
        """A live or retained job by its name on the wire."""
        return next((job for job in self._gateway.everyones_jobs() if job.wire_id == wire_id), None)

    def age_of(self, job: Job) -> float:
        """Seconds since it was admitted, at its end at most."""
        return (job.ended_at or self._clock()) - job.started_at


def job_row(job: Job, borrowed: int) -> Told:
    """A job in a list: numbers and names."""
    reused = sum(job.receipt.get("reused", {}).values())
    row = {
        "id": job.wire_id, "name": job.id, "tenant": job.spec.tenant, "state": job.state, "worker": job.worker,
        "attempt": job.attempt, "created": round(job.created, 2), "prompt_tokens": job.prompt_tokens,
        "output_tokens": len(job.ids), "max_tokens": job.spec.max_tokens, "borrowed": borrowed,
        "phase": job.timeline.moments[-1].phase if job.timeline.moments else "queued",
        "computed": job.progress.computed, "waits_for": job.progress.waits_for,
        "ttft_s": job.first_token_at - job.started_at if job.ids else None, "total_s": None, "outcome": "", "reused": reused,
    }
    if job.over:
        row |= {"total_s": job.ended_at - job.started_at, "phase": "", "waits_for": "",
                "outcome": job.error.code if job.error is not None else job.finish_reason}
    return row


def _worker(worker: Told) -> Told:
    """A member in a list: without its counters, which change every second."""
    return {
        **{name: worker[name] for name in ("id", "kind", "replica", "shard", "host", "pid", "state")},
        "draining": worker.get("draining", False), "total": worker["blocks_total"], "free": worker["blocks_free"],
        "idle": worker.get("blocks_idle", 0), "used": worker["blocks_used"], "lent": worker["blocks_lent"],
        "borrowed": worker["blocks_borrowed"], "recalls": worker["counters"].get("ledger_recalls", 0),
        "tiers": [{name: tier[name] for name in ("name", "state", "bytes_used", "bytes_limit", "frames")}
                  for tier in worker["tiers"]],
    }


def _blank() -> Told:
    return {"workers": {}, "loans": {}, "jobs": {}}


def _delta(before: Told, now: Told) -> Told:
    """Per list: items that are new or changed, and ids that are gone."""
    return {name: {"set": [item for key, item in now[name].items() if before[name].get(key) != item],
                   "gone": [key for key in before[name] if key not in now[name]]} for name in now}


def _named(job: Job) -> str:
    name = job.id if len(job.id) <= 24 else job.id[:19] + "…"
    return name if name.startswith("job") else f"job {name}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
