"""Dispatch: which worker a job's next attempt goes to, and what this gateway has at each of them.

    job --next_worker--> [waits while every lane is taken, or nobody is there] --> worker --lane--> in the books until it is over

A worker's own report and the directory lag by a heartbeat, so what was sent where since weighs as well: the second of two
jobs with one prefix should find the first, and that of two others an idle worker. A worker that lost a job is left alone
for a moment. Runs on the gateway's event loop. Knows no tokens and no streams.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from kvbank.cluster.attempt import ending_error
from kvbank.cluster.job import Job
from kvbank.cluster.roster import Worker
from kvbank.errors import Unavailable
from kvbank.kvstore.hashing import KEY_BYTES

LOOK_AGAIN_S = 0.2                   # a job that waits for a worker: a suspect may be trusted again by then

Process = tuple[str, bytes]          # a worker's id and boot


class Choose(Protocol):
    """Placement: which of these workers should run a job of `tokens` prompt tokens."""

    def __call__(self, workers: Sequence[Worker], held_blocks: Mapping[str, int], tokens: int) -> str | None: ...


class Members(Protocol):
    """What the gateway asks of the roster."""

    def workers(self) -> list[Worker]: ...
    async def holders(self, keys: bytes) -> dict[str, int]: ...
    def on_change(self, listener: Callable[[], None]) -> None: ...


class Dispatch:
    """One per gateway."""

    def __init__(
        self, members: Members, choose: Choose, *, lanes_per_worker: int, suspect_s: float, no_worker_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """suspect_s: how long a worker that lost a job gets none. no_worker_s: how long a job waits for any to be there."""
        self._members, self._choose, self._clock = members, choose, clock
        self._lanes_per_worker, self._suspect_s, self._no_worker_s = lanes_per_worker, suspect_s, no_worker_s
        self._lanes: dict[str, int] = {}             # address -> attempts there
        self._pending: dict[str, int] = {}           # worker id -> prompt tokens sent there without a first token yet
        self._suspects: dict[Process, float] = {}    # until when
        self._recent = RecentPrefixes()
        self._room = asyncio.Event()                 # a lane came free or the members changed
        members.on_change(self._room.set)

    def used(self) -> set[str]:
        """Addresses that attempts run at."""
        return {address for address, lanes in self._lanes.items() if lanes}

    def suspect(self, worker: Worker) -> None:
        """It lost a job."""
        now = self._clock()
        self._suspects = {name: until for name, until in self._suspects.items() if until > now}
        self._suspects[(worker.id, worker.boot)] = now + self._suspect_s

    async def next_worker(self, job: Job, refused: Collection[Process]) -> Worker:
        """Wait for one with a free lane that did not refuse the job. Raises Unavailable when there is none to wait for, and
        what the job was asked to end with."""
        while True:
            if job.ending:
                raise ending_error(job)
            self._room.clear()
            alive = [w for w in self._members.workers() if (w.id, w.boot) not in refused]
            trusted = [w for w in alive if self._suspects.get((w.id, w.boot), 0.0) <= self._clock()]
            free = [w for w in trusted if self._lanes.get(w.address, 0) < self._lanes_per_worker]
            if free and (chosen := await self._place(job, free)) is not None:
                if self._lanes.get(chosen.address, 0) >= self._lanes_per_worker:
                    continue                         # others took the last lane while the directory was asked
                return chosen
            if trusted:                              # all lanes are taken: they come free as jobs end
                job.homeless_since = self._clock()
            elif self._clock() >= job.homeless_since + self._no_worker_s:
                raise Unavailable(f"no model worker could be reached for {self._no_worker_s:g} s; see `kvbank status`")
            await self._wait_for_room(job)

    @contextmanager
    def lane(self, job: Job, worker: Worker) -> Iterator[Callable[[], None]]:
        """An attempt at this worker, in the books while it lasts. Call what it gives when tokens came."""
        self._recent.note(job.keys, worker)
        owed = job.prompt_tokens                     # until its first token, the prompt is work that waits there
        self._lanes[worker.address] = self._lanes.get(worker.address, 0) + 1
        self._pending[worker.id] = self._pending.get(worker.id, 0) + owed

        def settle() -> None:
            nonlocal owed
            self._pending[worker.id] -= owed
            owed = 0

        try:
            yield settle
        finally:
            settle()
            self._lanes[worker.address] -= 1
            self._room.set()

    async def _place(self, job: Job, free: list[Worker]) -> Worker | None:
        if len(free) == 1:
            return free[0]
        held = await self._members.holders(job.keys)
        for worker in free:
            held[worker.id] = max(held.get(worker.id, 0), self._recent.leading(job.keys, worker))
        seen = [self._with_pending(worker) for worker in free]
        chosen = self._choose(seen, held, job.prompt_tokens)
        return next((w for w in free if w.id == chosen), None)

    def _with_pending(self, worker: Worker) -> Worker:
        pending = max(worker.tokens_pending, self._pending.get(worker.id, 0))
        running = max(worker.jobs_running, self._lanes.get(worker.address, 0) - worker.jobs_waiting)
        return replace(worker, tokens_pending=pending, jobs_running=running)

    async def _wait_for_room(self, job: Job) -> None:
        """Until a lane comes free, the members change, the job is asked to end, or a moment passes."""
        waits = [asyncio.ensure_future(self._room.wait()), asyncio.ensure_future(job.wake.wait())]
        try:
            await asyncio.wait(waits, timeout=LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class RecentPrefixes:
    """Which worker was sent which block last; bounded, oldest forgotten first."""

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._sent: OrderedDict[bytes, Process] = OrderedDict()

    def note(self, keys: bytes, worker: Worker) -> None:
        for at in range(0, len(keys), KEY_BYTES):
            key = keys[at:at + KEY_BYTES]
            self._sent[key] = (worker.id, worker.boot)
            self._sent.move_to_end(key)
        while len(self._sent) > self._limit:
            self._sent.popitem(last=False)

    def leading(self, keys: bytes, worker: Worker) -> int:
        """How many leading blocks of `keys` this very process of the worker was sent."""
        count = 0
        for at in range(0, len(keys), KEY_BYTES):
            if self._sent.get(keys[at:at + KEY_BYTES]) != (worker.id, worker.boot):
                break
            count += 1
        return count
