"""Gateway: the life of a job, from admission to its receipt.

A job belongs to the gateway, an attempt to a worker (attempt.py). The gateway keeps the prompt and every token that was
streamed; when a worker dies, is silent or gives the job back, the next attempt goes elsewhere with what was emitted,
and whoever reads the stream sees neither a gap nor a repeat.

    submit -> [queued: no lane] -> attempt 1 -> tokens ... -> done
                                      | lost: attempt + 1, another worker
                                      | ending (client | stop | deadline | stopping): Cancel, wait for the receipt, over

Runs on one event loop. Knows no HTTP and no tensors; time, randomness, placement and text come in from outside.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbank.cluster.attempt import Attempt, Lost, ending_error, receipt_body
from kvbank.cluster.dispatch import Choose, Dispatch, Members, Process
from kvbank.cluster.intake import JobSpec
from kvbank.cluster.job import Job, SpanKeys, TextStream
from kvbank.cluster.links import Links
from kvbank.cluster.meters import Meters
from kvbank.cluster.quotas import Quotas
from kvbank.cluster.retained import Retained
from kvbank.cluster.roster import Worker
from kvbank.cluster.traced import TracedJobs
from kvbank.errors import InvalidRequest, KVBankError, NotFound, Overloaded, Unavailable
from kvbank.proto import jobs_pb2

log = logging.getLogger(__name__)

PINNABLE = 256                       # jobs that are over and whose prompts can still be pinned: 250 KB each at a million tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Bounds of one gateway; every wait and every store has one."""

    max_jobs: int = 1024             # jobs not over; one more is Overloaded
    tenant_jobs: int | None = None   # of them, of one tenant
    tenant_tokens_per_s: float | None = None     # prompts and outputs that one tenant may ask for
    lanes_per_worker: int = 200      # jobs at one worker at once
    retained_jobs: int = 4096        # jobs that are over and can still be read; who has most of them loses the oldest first
    retained_s: float = 3600.0
    silence_s: float = 10.0          # a worker that says nothing about a job that long has lost it
    grace_s: float = 2.0             # from Cancel to the receipt
    no_worker_s: float = 30.0        # a job without any worker to go to waits that long
    suspect_s: float = 1.0           # a worker that lost a job gets none of ours for that long
    fruitless: int = 3               # workers lost in a row while they had the job, without a token: it is given up


class Observer(Protocol):
    """Who wants to know what happens to jobs (feed.py). Called on the event loop: be quick, never raise."""

    def admitted(self, job: Job) -> None: ...
    def refused(self, code: str) -> None: ...
    def tokens(self, count: int) -> None: ...
    def lost(self, job: Job, worker: str, reason: str) -> None: ...
    def ended(self, job: Job) -> None: ...
    def stopping(self) -> None: ...


class Gateway:
    """Keeps jobs and finds each a worker until it is over. Every method runs on the gateway's event loop."""

    def __init__(
        self,
        *,
        roster: Members,
        links: Links,
        choose: Choose,
        open_text: Callable[[tuple[str, ...]], TextStream],
        block_keys: Callable[[str, bytes], bytes] = lambda _key_space, _prompt: b"",
        blocks_per_span: int = 8,
        eos_ids: Sequence[int] = (),
        limits: GatewayLimits | None = None,
        meters: Meters | None = None,
        traced: TracedJobs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or GatewayLimits()
        self.meters = meters or Meters()
        self.traced = traced
        self._roster = roster
        self._links = links
        self._open_text = open_text
        self._block_keys = block_keys
        self._blocks_per_span = blocks_per_span
        self._eos_ids = frozenset(eos_ids)
        self._clock = clock
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()     # (tenant, id); live ones and retained ones
        self._over = Retained(limit=self.limits.retained_jobs, keep_s=self.limits.retained_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._pinnable: deque[Job] = deque()         # the last ones that are over
        self._dispatch = Dispatch(roster, choose, lanes_per_worker=self.limits.lanes_per_worker, clock=clock,
                                  suspect_s=self.limits.suspect_s, no_worker_s=self.limits.no_worker_s)
        self._quotas = Quotas(jobs=self.limits.tenant_jobs, tokens_per_s=self.limits.tenant_tokens_per_s)
        self._last_age = 0.0
        self._stopping = False
        self.observers: list[Observer] = []
        roster.on_change(self._let_go)

    # ------------------------------------------------------------------ what callers do

    def submit(self, spec: JobSpec) -> Job:
        """Admit a job, or return the one that this tenant already submitted under this job_id with this content. One that
        ended because its last reader left makes room for its repeat.

        Raises Overloaded when the bounded queue is full or the tenant has had its share, InvalidRequest when the job_id names
        something else.
        """
        if spec.job_id is not None and (known := self._jobs.get((spec.tenant, spec.job_id))) is not None:
            if known.spec.fingerprint != spec.fingerprint:
                raise InvalidRequest("this job_id names another request; use a new one", param="job_id")
            if not known.left or (known.over and known.error is None):
                return known
            if not known.over:
                raise Overloaded("the job of this job_id is ending, because its reader left; send it again in a moment")
        return self.submit_all([spec])[0]

    def submit_all(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Admit the new jobs of one request, all of one tenant: all or none, and a request that is refused costs nothing."""
        if self._stopping:
            raise Unavailable("the cluster is stopping")
        if len(specs) > self.limits.max_jobs:
            raise InvalidRequest(f"this request has {len(specs)} choices, and {self.limits.max_jobs} jobs may wait or run "
                                 "at once; ask for fewer, or raise http.max_jobs")
        try:
            if self.live + len(specs) > self.limits.max_jobs:
                raise Overloaded(f"{self.live} jobs are waiting or running, and {self.limits.max_jobs} is the limit; retry later",
                                 retry_after_s=self._retry_after())
            self._quotas.admit(specs[0].tenant, sum(spec.prompt_tokens + spec.max_tokens for spec in specs), self._clock(),
                               jobs=len(specs))
        except Overloaded:
            for observer in self.observers:
                observer.refused("overloaded")
            raise
        return [self._begin(spec) for spec in specs]

    def _begin(self, spec: JobSpec) -> Job:
        job = self._admit(spec)
        task = asyncio.create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def get(self, tenant: str, job_id: str) -> Job:
        """A live or retained job of this tenant. Raises NotFound."""
        self._forget_old()
        job = self._jobs.get((tenant, job_id))
        if job is None:
            raise NotFound("there is no such job: it never was, or it ended too long ago")
        return job

    def jobs(self, tenant: str) -> list[Job]:
        """This tenant's jobs, oldest first."""
        self._forget_old()
        return [job for (owner, _), job in self._jobs.items() if owner == tenant]

    def everyones_jobs(self) -> list[Job]:
        """All live and retained jobs, oldest first: for who runs the cluster."""
        self._forget_old()
        return list(self._jobs.values())

    def cancel(self, job: Job) -> None:
        """Ask a job to end; harmless when it is over. Its receipt follows within `grace_s`."""
        self._end(job, "client")

    def leave(self, job: Job) -> None:
        """A reader left: the job ends if there is no other."""
        job.readers -= 1
        if not job.readers and not job.over and not job.ending:
            job.left = True
            self._end(job, "client")

    @property
    def live(self) -> int:
        return len(self._jobs) - len(self._over)

    @property
    def waiting(self) -> int:
        return sum(1 for job in self._jobs.values() if job.state == "queued")

    def workers(self) -> list[Worker]:
        return self._roster.workers()

    async def stop(self) -> None:
        """End every job as Unavailable and wait for their receipts, at most the grace period."""
        self._stopping = True
        for observer in self.observers:
            observer.stopping()
        for job in list(self._jobs.values()):
            self._end(job, "stopping")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.limits.grace_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._links.close()
        if self.traced is not None:
            await asyncio.to_thread(self.traced.close)

    # ------------------------------------------------------------------ admission and retention

    def _admit(self, spec: JobSpec) -> Job:
        self._last_age = max(self._last_age + 1e-6, time.time())
        keys = self._block_keys(spec.key_space, spec.prompt)
        drawn = secrets.token_hex(32)
        job = Job(
            id=spec.job_id or f"job-{drawn[:24]}",
            wire_id=f"j-{drawn[24:48]}",
            spec=spec,
            text=self._open_text(spec.stop),
            seed=spec.seed if spec.seed is not None else int(drawn[48:], 16) >> 1,
            age=self._last_age,
            created=time.time(),
            started_at=self._clock(),
            homeless_since=self._clock(),
            prompt_tokens=spec.prompt_tokens,
            keys=keys,
            span_keys=SpanKeys.of(keys, self._blocks_per_span),
        )
        job.progress.total = spec.prompt_tokens
        name = (spec.tenant, job.id)
        self._over.discard(name)                     # one that was left: its repeat is the newest of all
        self._jobs.pop(name, None)
        self._jobs[name] = job
        if spec.deadline_s is not None:
            job.deadline = asyncio.get_running_loop().call_later(spec.deadline_s, self._end, job, "deadline")
        self.meters.admitted(spec.tenant)
        job.enter("queued", self._clock())
        for observer in self.observers:
            observer.admitted(job)
        if self.traced is not None:
            self.traced.admitted(job)
        return job

    def _forget_old(self) -> None:
        for name in self._over.give_way(self._clock()):
            del self._jobs[name]

    def _retry_after(self) -> float:
        recent = [self._jobs[name] for name in self._over.newest(16)]
        if not recent:
            return 1.0
        seconds = sum(job.ended_at - job.started_at for job in recent) / len(recent)
        return min(30.0, max(1.0, seconds))

    # ------------------------------------------------------------------ one job

    async def _run(self, job: Job) -> None:
        try:
            await self._serve(job)
        except KVBankError as error:
            self._close(job, error)
        except asyncio.CancelledError:
            self._close(job, Unavailable("the cluster is stopping"))
            raise
        except Exception:                            # a bug must cost this job and no other
            log.exception("job_internal_error job=%s", job.wire_id)
            self._close(job, KVBankError("an internal error ended this job"))
        else:
            self._close(job, None)

    def _close(self, job: Job, error: KVBankError | None) -> None:
        job.end(self._clock(), error=error)
        self._quotas.release(job.spec.tenant)
        self._over.add((job.spec.tenant, job.id), job.ended_at)
        self._pinnable.append(job)
        if len(self._pinnable) > PINNABLE:
            self._pinnable.popleft().span_keys = SpanKeys()
        self._finish_receipt(job)
        self.meters.ended(job)
        for observer in self.observers:
            observer.ended(job)
        if self.traced is not None:
            self.traced.over(job)
        self._forget_old()
        job.announce()

    async def _serve(self, job: Job) -> None:
        """Attempt after attempt until one settles the job. Raises the error that ends it."""
        fruitless = 0
        refused: set[Process] = set()                # said no to this job
        while True:
            worker = await self._dispatch.next_worker(job, refused)
            before = len(job.ids)
            lost = await self._attempt(job, worker)
            if lost is None:
                return
            if job.ending:
                raise ending_error(job)
            if self._complete(job):                  # only the last word of the attempt was lost
                return
            self.meters.lost(lost.reason)
            job.progress.restart("worker")
            job.enter("queued", self._clock(), f"lost: {lost.reason}")
            for observer in self.observers:
                observer.lost(job, worker.id, lost.reason)
            log.info("job_attempt_lost job=%s attempt=%d worker=%s reason=%s emitted=%d",
                     job.wire_id, job.attempt, worker.id, lost.reason, len(job.ids))
            if lost.refusal is not None:
                refused.add((worker.id, worker.boot))
                if refused >= {(w.id, w.boot) for w in self._roster.workers()}:
                    raise lost.refusal
                continue
            self._dispatch.suspect(worker)
            if not lost.accepted:                    # nobody at home: that says nothing about the job
                continue
            job.homeless_since = self._clock()
            fruitless = fruitless + 1 if len(job.ids) == before else 0
            if fruitless >= self.limits.fruitless:
                raise Unavailable(f"{fruitless} workers in a row were lost while they had this job; it is given up")

    def _complete(self, job: Job) -> bool:
        """Whether the tokens at hand already are the whole output."""
        spec = job.spec
        if job.ids and (job.ids[-1] in spec.stop_token_ids
                        or (job.ids[-1] in self._eos_ids and not spec.ignore_eos)):
            job.finish_reason = "stop"
        elif len(job.ids) >= spec.max_tokens:
            job.finish_reason = "length"
        return bool(job.finish_reason)

    def _let_go(self) -> None:
        """The members changed: channels to those that left are closed, unless jobs still end there."""
        known = {worker.address for worker in self._roster.workers()}
        task = asyncio.ensure_future(self._links.forget(self._dispatch.used() | known, purpose="submit"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attempt(self, job: Job, worker: Worker) -> Lost | None:
        """Run the job on one worker, with what it costs there kept in the books meanwhile."""
        job.attempt += 1
        job.worker = worker.id
        job.progress.restart("")
        job.enter("queued", self._clock())
        with self._dispatch.lane(job, worker) as settle:
            def on_tokens(count: int, before: float) -> None:
                settle()
                self.meters.tokens(job, count, before=before)
                for observer in self.observers:
                    observer.tokens(count)

            span = self.traced.attempt(job, worker.id) if self.traced is not None else None
            attempt = Attempt(
                job, self._links.submit(worker.address), silence_s=self.limits.silence_s, grace_s=self.limits.grace_s,
                clock=self._clock, on_tokens=on_tokens, on_stop=lambda: self._end(job, "stop"),
                trace=span.parent if span is not None else "",
            )
            try:
                return await attempt.run()
            finally:
                if span is not None:
                    span.end(output_tokens=len(job.ids))

    def _end(self, job: Job, reason: str) -> None:
        """Begin to end a job, wherever it is."""
        if job.over or job.ending:
            return
        job.ending = reason
        job.wake.set()
        if job.attempt_running is not None:
            job.attempt_running.cancel(reason)

    def _finish_receipt(self, job: Job) -> None:
        """Numbers that only the gateway can know: of the whole job and not of its last attempt."""
        receipt = job.receipt = job.receipt or receipt_body(jobs_pb2.Receipt())
        receipt["prompt_tokens"] = job.prompt_tokens
        receipt["output_tokens"] = len(job.ids)
        receipt["ttft_s"] = max(0.0, job.first_token_at - job.started_at) if job.ids else 0.0
        receipt["total_s"] = job.ended_at - job.started_at
        receipt["attempts"] = job.accepted
        if job.accepted > 1:
            receipt["recomputed_after_fault"] = max(receipt["recomputed_after_fault"], receipt["computed_tokens"])
