"""Engine: one worker's loop. Chooses work, brings its spans in, computes, publishes what became reusable.

    engine = Engine(...)
    engine.add(JobSpec(id="a", prompt=[1, 2, 3], max_tokens=8))
    while engine.busy:
        for event in engine.step():
            ...

Knows the order of things within a step; the decisions are the scheduler's, the bytes the backend's. One thread owns it:
`add`, `cancel` and `check_fits` may be called from any thread, all else from that thread only.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event as Flag
from typing import Any

from kvbank.errors import Cancelled, KVBankError, TooLong
from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.store import BlockStore
from kvbank.kvstore.vault import Vault
from kvbank.workers.config import WorkerConfig
from kvbank.workers.room import Room
from kvbank.workers.sampler import Logprobs
from kvbank.workers.scheduler import Outcome, Scheduler
from kvbank.workers.seams import Backend, BackendLost, Bank, Fetcher, NoBank, NoFetcher, nothing
from kvbank.workers.sequence import JobSpec, Sequence, Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """One more output token; index 0 is the job's first."""

    job: str
    index: int
    token: int
    logprobs: Logprobs | None = None         # when the job asked for them


@dataclass(frozen=True, slots=True)
class Finished:
    """The job ended well; 'stop' or 'length'."""

    job: str
    reason: str
    tally: Tally


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended with an error; what it held is released."""

    job: str
    error: KVBankError
    tally: Tally


EngineEvent = Token | Finished | Failed


@dataclass(slots=True)
class EngineCounters:
    """Totals since start."""

    steps: int = 0
    forward_rows: int = 0
    forward_s: float = 0.0
    step_s: float = 0.0
    remote_calls: int = 0
    last_logits: dict[str, Any] = field(default_factory=dict)      # job -> logits of its last draw, when kept


class Engine:
    """Runs the jobs of one replica on this worker (which leads its chain, if there are other shards)."""

    def __init__(
        self, config: WorkerConfig, vault: Vault, backend: Backend, *, clock: Callable[[], float],
        root_of: Callable[[str], BlockKey], eos_ids: tuple[int, ...] = (), max_position: int | None = None,
        window: int | None = None, bank: Bank | None = None, fetcher: Fetcher | None = None,
        capacity_tokens: Callable[[], int] | None = None,
    ) -> None:
        """clock: monotonic seconds. capacity_tokens: KV tokens the whole cluster could hold, for admission."""
        self.config, self.vault, self.backend = config, vault, backend
        self._clock = clock
        self._max_position = max_position
        self._bank = bank or NoBank()
        self.scheduler = Scheduler(config, vault, backend, self._bank, fetcher or NoFetcher(), root_of=root_of,
                                   eos_ids=eos_ids, window=window)
        self._window = window
        self._capacity_tokens = capacity_tokens or (lambda: config.num_slots * config.span_tokens)
        self._jobs: dict[str, Sequence] = {}
        self._inbox: deque[JobSpec | str] = deque()       # a string cancels the job of that id
        self._made: list[EngineEvent] = []                # of a step; kept when it breaks, for who cleans up
        self.meanwhile: Callable[[], None] = nothing      # called while a step computes: see Backend.run
        self.wake = Flag()                                # set whenever a step may have something to do
        self.keep_logits = False                          # tests and quality benches read counters.last_logits
        self.counters = EngineCounters()
        self.store: BlockStore | None = None              # the shelves below, when this engine owns them

    def add(self, *jobs: JobSpec) -> None:
        """Hand jobs in; they begin in the same step, as far as there is room. What is wrong with one comes back as a Failed
        event."""
        self._inbox.extend(jobs)
        self.wake.set()

    def cancel(self, job_id: str) -> None:
        """End a job; a Failed event with Cancelled follows unless it ended already."""
        self._inbox.append(job_id)
        self.wake.set()

    def check_fits(self, job: JobSpec) -> None:
        """Admission: the worst case must fit the model and the cluster's whole capacity. Raises TooLong. Any thread."""
        worst = len(job.prompt) + job.max_tokens
        if self._max_position is not None and worst > self._max_position:
            raise TooLong(f"prompt of {len(job.prompt)} tokens + max_tokens {job.max_tokens} = {worst} exceed the model's "
                          f"limit of {self._max_position} tokens; shorten one of them")
        span = self.config.span_tokens
        needed = -(-worst // span) * span
        if self._window is not None:
            needed = min(needed, -(-(self._window + self.config.prefill_chunk_tokens) // span + 1) * span)
        if needed > (capacity := self._capacity_tokens()):
            raise TooLong(f"prompt of {len(job.prompt)} tokens + max_tokens {job.max_tokens} need KV memory for {needed} "
                          f"tokens; the cluster holds {capacity}: add workers, lenders, device_blocks or host_bytes")

    @property
    def busy(self) -> bool:
        return bool(self._inbox) or self.scheduler.busy

    @property
    def room(self) -> Room:
        return self.scheduler.room

    def jobs(self) -> list[Sequence]:
        """A snapshot for status; fields may change while it is read."""
        return list(self._jobs.values())

    def step(self) -> list[EngineEvent]:
        """One turn. Returns at once when there is nothing to compute; then wait for `wake`."""
        self.wake.clear()
        try:
            self._step(self._clock(), self._made)
        except BackendLost as lost:
            self._made = self.fail_all(lost)
            self.room.absorb(self._bank.poll())           # ends what was being moved
            self.vault.drop_idle()
        return self._take_made()

    def _take_made(self) -> list[EngineEvent]:
        made, self._made = self._made, []
        return made

    def _step(self, started: float, events: list[EngineEvent]) -> None:
        if self._inbox or any(not seq.is_decoding for seq in self.scheduler.running):
            self.meanwhile()                              # prompts make a long step: whatever waits does not wait for that
        self._take_inbox(started, events)
        self.room.absorb(self._bank.poll())
        events += [self._failed(seq, error) for seq, error in self.scheduler.expire(started)]
        plan = self.scheduler.next_plan(started)
        if plan is None:
            return
        if any(rows.remote or rows.host for rows in plan.rows):
            self.meanwhile()                              # nor for a lender that may be silent
        result = self.backend.run(plan, keep_logits=self.keep_logits, meanwhile=self.meanwhile)
        if self.keep_logits and result.logits is not None:
            self._note_logits(plan, result.logits)
        outcome = self.scheduler.absorb(plan, result, self._clock())
        events += self._events(outcome)
        self._count(plan.rows, result.forward_s, result.remote_calls, self._clock() - started)

    def fail_all(self, error: KVBankError) -> list[EngineEvent]:
        """End every job with `error`: after a step that raised. What that step had to say before is said too."""
        jobs = self.jobs()
        for seq in jobs:
            try:
                self.scheduler.remove(seq)
            except Exception:                             # its slots may be gone until a restart; the engine is not
                log.exception("job_not_taken_apart job=%s", seq.job.id)
        return self._take_made() + [self._failed(seq, error) for seq in jobs]

    def run_until_idle(self, *, max_steps: int = 1_000_000) -> list[EngineEvent]:
        """Step until every job ended; for tests and in-process benches."""
        events: list[EngineEvent] = []
        for _ in range(max_steps):
            if not self.busy:
                return events
            made = self.step()
            events += made
            if not made:
                self.wake.wait(0.002)
        raise AssertionError(f"jobs did not end in {max_steps} steps")

    # -- intake ------------------------------------------------------------------------------------------------------

    def _take_inbox(self, now: float, events: list[EngineEvent]) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                if (seq := self._jobs.get(item)) is not None:
                    self.scheduler.remove(seq)
                    events.append(self._failed(seq, Cancelled(f"job {item} was cancelled by its caller")))
                continue
            try:
                self.check_fits(item)
                self._jobs[item.id] = self.scheduler.add(item, now)
            except KVBankError as error:
                events.append(Failed(item.id, error, Tally(submitted_at=now)))

    # -- output ------------------------------------------------------------------------------------------------------

    def _events(self, outcome: Outcome) -> list[EngineEvent]:
        events: list[EngineEvent] = [Token(drawn.seq.job.id, drawn.seq.num_output - 1, drawn.token, drawn.logprobs)
                                     for drawn in outcome.tokens]
        for seq, reason in outcome.finished:
            self._jobs.pop(seq.job.id, None)
            events.append(Finished(seq.job.id, reason, seq.tally))
        events += [self._failed(seq, error) for seq, error in outcome.failed]
        return events

    def _failed(self, seq: Sequence, error: KVBankError) -> Failed:
        self._jobs.pop(seq.job.id, None)
        return Failed(seq.job.id, error, seq.tally)

    def _note_logits(self, plan: Any, logits: Any) -> None:
        by_row = {draw.row: logits[i] for i, draw in enumerate(plan.draws)}
        for seq, rows in zip(self.scheduler.planned, plan.rows, strict=True):
            row = rows.first_row + rows.num_rows - 1
            if row in by_row:
                self.counters.last_logits[seq.job.id] = by_row[row].clone()

    def _count(self, rows: tuple[Any, ...], forward_s: float, remote_calls: int, step_s: float) -> None:
        counters = self.counters
        counters.steps += 1
        counters.forward_rows += sum(r.num_rows for r in rows)
        counters.forward_s += forward_s
        counters.step_s += step_s
        counters.remote_calls += remote_calls
