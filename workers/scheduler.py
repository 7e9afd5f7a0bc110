"""Scheduler: whose rows are computed next, in which slots. Continuous batching with chunked prefill.

Every step: one row for each decoding job, then prompt rows, oldest job first, up to the prefill budget. A job's rows are
always those of its lowest hole, so a lost range is replayed before anything that needs it, by the same code as a prompt.

    running (oldest first)   A decode   B prefill 1200 of 4000   C replay [256, 384)
    plan                     A: 1 row   B: ...                   C: 128 rows      within prefill_chunk_tokens

Knows sequences, slots and time as an argument; computes nothing. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvbank.errors import DeadlineExceeded, KVBankError, Overloaded, Unavailable
from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.span_table import HOST, LOCAL, REMOTE
from kvbank.kvstore.vault import OutOfSlots, Vault
from kvbank.workers.batch import PlanBuilder, StepPlan, StepResult
from kvbank.workers.config import WorkerConfig
from kvbank.workers.reuse import Reuse
from kvbank.workers.room import Room
from kvbank.workers.sampler import Logprobs
from kvbank.workers.seams import Backend, Bank, Fetcher
from kvbank.workers.sequence import DONE, RUNNING, WAITING, JobSpec, Sequence

LOOK_AHEAD = 4                               # queued jobs whose bytes are fetched before their turn
OUTRANKED_STALLS = 20                        # a job waits so many stall_s for older ones elsewhere of which it only hears
GIVE_WAY_S = 1.0                             # younger jobs keep out of the way so long after an older one elsewhere asked


@dataclass(frozen=True, slots=True)
class Drawn:
    """One new token of a job."""

    seq: Sequence
    token: int
    logprobs: Logprobs | None


@dataclass(slots=True)
class Outcome:
    """What a step did to the jobs."""

    tokens: list[Drawn] = field(default_factory=list)
    finished: list[tuple[Sequence, str]] = field(default_factory=list)    # (sequence, finish reason)
    failed: list[tuple[Sequence, KVBankError]] = field(default_factory=list)


class Scheduler:
    """One per engine."""

    def __init__(
        self, config: WorkerConfig, vault: Vault, backend: Backend, bank: Bank, fetcher: Fetcher, *,
        root_of: Callable[[str], BlockKey], eos_ids: tuple[int, ...], window: int | None,
    ) -> None:
        """window: the widest sliding window when every layer has one, else None."""
        self.config, self.vault, self._backend = config, vault, backend
        self._eos_ids, self._window = eos_ids, window
        self._span = config.span_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._step = 0
        self._give_way = (float("inf"), float("-inf"))         # to jobs elsewhere older than this stamp, until then
        self._begun: set[str] = set()
        self.planned: list[Sequence] = []         # in the order of the plan's rows
        self.reuse = Reuse(vault, backend, bank, fetcher, root_of=root_of, block_size=config.block_size,
                           span_tokens=config.span_tokens, window=window)
        self.room = Room(vault, backend, bank, blocks_per_span=config.span_tokens // config.block_size,
                         running=lambda: self.running, queued=lambda: self.waiting,
                         preemptable=lambda: [s for s in self.running if s not in self.planned], preempt=self._preempt,
                         drop_fetched=self.reuse.drop_fetched)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def add(self, job: JobSpec, now: float) -> Sequence:
        """Queue a job. Raises Overloaded when the queue is full."""
        if len(self.waiting) >= self.config.max_queue:
            raise Overloaded(f"{len(self.waiting)} jobs wait already; retry in a moment")
        seq = Sequence(job, self._span, self.config.block_size, now=now)
        self._enqueue(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """The job ended, whatever the reason: all that it held is released. Safe to repeat."""
        if seq.state == DONE:
            return
        (self.running if seq in self.running else self.waiting).remove(seq)
        seq.state = DONE
        self._let_go(seq)
        self.reuse.forget(seq)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    # -- one step ----------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[tuple[Sequence, KVBankError]]:
        """Jobs that are past their deadline, and the oldest of those without one that made no progress for too long."""
        gone: list[tuple[Sequence, KVBankError]] = []
        if self.room.outranked:                         # it waits for a job that gets on, as far as a lender knows: a loan
            self.room.outranked = False                 # keeps the age it was made for when a younger job reads it on
            for seq in self.running:
                until = seq.computed_at + OUTRANKED_STALLS * self.config.stall_s
                seq.progress_at = max(seq.progress_at, min(now, until))
        for seq in [*self.running, *self.waiting]:
            if seq.deadline is not None and now >= seq.deadline:
                late = f"the deadline of {seq.job.deadline_s:.3g} s passed after {seq.num_output} tokens"
                gone.append((seq, DeadlineExceeded(late)))
        if (stuck := self._stuck(now)) is not None:
            gone.append((stuck, Unavailable(
                f"no room for {self.config.stall_s:.0f} s: the job has {len(stuck.table.live())} spans of {self._span} "
                f"tokens and waits for {stuck.waits_for or 'slots'}; add lenders, device_blocks or host_bytes")))
            for seq in self.running:
                seq.progress_at = now                   # what it leaves behind is theirs now
        spoiled = "KV that this answer was made from turned out wrong; what came of it is withdrawn: submit the job again"
        gone += [(seq, KVBankError(spoiled)) for seq in self.room.spoiled if seq.state != DONE]
        self.room.spoiled.clear()
        for seq, _ in gone:
            self.remove(seq)
        return gone

    def _stuck(self, now: float) -> Sequence | None:
        """The oldest job without a deadline that does not get on. Who waits for what older jobs have or compute gets on
        when they do."""
        progress_at = float("-inf")
        for seq in self.running:
            progress_at = max(progress_at, seq.progress_at)
            since = seq.progress_at if seq.waits_for == "fetch" else progress_at
            if seq.deadline is None and now - since > self.config.stall_s:
                return seq
        return None

    def next_plan(self, now: float) -> StepPlan | None:
        """The next step's work; None when nobody can compute now (`waits_for` says why)."""
        self._yield_to_older(now)
        self._admit(now)
        for job in self.room.adopt_ended:
            self.reuse.adopt_ended(job)
        self.room.adopt_ended.clear()
        self._step += 1
        self.planned = []
        builder = PlanBuilder(self._step, self._span, pad=self.config.exactness == "bitwise")
        budget = self.config.prefill_chunk_tokens
        for seq in list(self.running):              # oldest first: who is planned is not preempted or parked any more
            if seq.state != RUNNING:
                continue                            # preempted by an older one just now
            if seq.is_decoding:
                self._plan_rows(seq, builder, 1, now)
            elif budget > 0:
                budget -= self._plan_rows(seq, builder, budget, now)
        if not len(builder):
            return None
        return builder.build()

    def absorb(self, plan: StepPlan, result: StepResult, now: float) -> Outcome:
        """Apply a step's result. Rows that read a lost span are dropped; nothing is rewound, they are computed again."""
        outcome = Outcome()
        told = result.logprobs or (None,) * len(plan.draws)
        tokens = {draw.row: (token, each) for draw, token, each in zip(plan.draws, result.tokens, told, strict=True)}
        for seq, rows in zip(self.planned, plan.rows, strict=True):
            if seq.state != RUNNING:
                continue
            if result.lost and any(uid in result.lost for _, uid in (*rows.remote, *rows.host)):
                continue
            if rows.remote:
                seq.tally.remote_attention_calls += result.remote_calls
            seq.note_away(len(rows.remote), len(rows.host))
            self._computed(seq, rows.start, rows.stop, now)
            if (drawn := tokens.get(rows.first_row + rows.num_rows - 1)) is not None:
                self._sampled(Drawn(seq, *drawn), outcome, now)
        for uid, reason in result.lost.items():
            self.room.lose(uid, reason)
        for seq, _ in outcome.finished:
            self.remove(seq)
        return outcome

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        for seq in self.waiting[:LOOK_AHEAD]:
            self._begin(seq, now)                   # fetched before it is scheduled
        while self.waiting and len(self.running) < self.config.max_batch:
            seq = self.waiting[0]
            if now < self._give_way[1] and seq.job.age > self._give_way[0]:
                seq.waits_for = "slots"
                return
            if self.running and self.running[0].age < seq.age and not self._has_room_for(seq):
                seq.waits_for = "slots"
                return
            self.waiting.pop(0)
            self._begin(seq, now)
            self.reuse.hold(seq)
            seq.state, seq.waits_for, seq.progress_at, seq.computed_at = RUNNING, "", now, now
            self.running.append(seq)
            self.running.sort(key=lambda s: s.age)

    def _yield_to_older(self, now: float) -> None:
        """An older job on another worker cannot go on without what younger ones hold here: back to the queue with them."""
        if (stamp := self.room.older_elsewhere) is None:
            return
        self.room.older_elsewhere = None
        self._give_way = (min(stamp, self._give_way[0]) if now < self._give_way[1] else stamp, now + GIVE_WAY_S)
        for seq in [seq for seq in self.running if seq.job.age > stamp]:
            self._preempt(seq)

    def _has_room_for(self, seq: Sequence) -> bool:
        """Overcommit, but do not admit what would at once preempt or be preempted."""
        rows = min(seq.num_tokens, self.config.prefill_chunk_tokens)
        return self.vault.num_free >= -(-rows // self._span) + len(self.running)

    def _begin(self, seq: Sequence, now: float) -> None:
        if seq.job.id not in self._begun:
            self._begun.add(seq.job.id)
            self.reuse.begin(seq, now)

    def _plan_rows(self, seq: Sequence, builder: PlanBuilder, limit: int, now: float) -> int:
        """Add the next rows of one sequence; returns how many."""
        try:
            seq.waits_for = self.reuse.fill(seq, now)
        except OutOfSlots as short:
            seq.waits_for = "slots"
            if self._make_room(seq, short.short):
                seq.waits_for = self._fill_again(seq, now)
            elif self.vault.num_free and not self.room.waiting:      # all that is free is what would be copied
                seq.waits_for = self._fill_again(seq, now, whole=True)
        if seq.waits_for:
            return 0
        start, hole_end = seq.table.holes.lowest
        stop = self._take_slots(seq, start, min(hole_end, start + limit))
        if stop <= start:
            seq.waits_for = "slots"
            return 0
        live = [(i, s) for i, s in seq.table.live(stop) if i >= seq.table.released]
        builder.add(
            seq.token_ids[start:stop], start,
            [(i, s.slot) for i, s in live if s.place == LOCAL and s.slot is not None],
            remote=[(i, s.uid) for i, s in live if s.place == REMOTE and i * self._span < start],
            host=[(i, s.uid) for i, s in live if s.place == HOST and i * self._span < start],
            draw=seq.job.sampling if stop == seq.num_tokens else None, tenant=seq.job.key_space,
            logprobs=seq.job.logprobs,
        )
        self.planned.append(seq)
        self._lend_ahead(seq, stop)
        return stop - start

    def _fill_again(self, seq: Sequence, now: float, *, whole: bool = False) -> str:
        try:
            return self.reuse.fill(seq, now, whole=whole)
        except OutOfSlots:
            return "slots"

    def _make_room(self, seq: Sequence, short: int) -> bool:
        planned = {span.uid for other in self.planned for _, span in other.table.live()}
        return self.room.make(seq, short, planned=planned)

    def _take_slots(self, seq: Sequence, start: int, stop: int) -> int:
        """Make start .. stop-1 writable, or as much of it as there is room for. Returns the new stop."""
        needed = range(start // self._span, (stop - 1) // self._span + 1)
        short = sum(seq.table.at(index) is None for index in needed) - self.vault.num_free
        if short > 0:
            self._make_room(seq, short)
        for index in needed:
            if seq.table.at(index) is not None:
                continue
            try:
                (span,) = self.vault.new_spans(1, seq.owner)
            except OutOfSlots:                          # also when a lending thread was faster
                return max(start, index * self._span)
            seq.table.put(index, span)
        return stop

    def _lend_ahead(self, seq: Sequence, stop: int) -> None:
        """A long prompt will need more slots than there are: start lending now, behind this step's compute."""
        rest = -(-(seq.num_tokens - stop) // self._span)
        if rest > self.vault.num_free:
            chunk = -(-self.config.prefill_chunk_tokens // self._span)
            self.room.lend_ahead(seq, min(rest, 2 * chunk) - self.vault.num_free)

    # -- applying ----------------------------------------------------------------------------------------------------

    def _computed(self, seq: Sequence, start: int, stop: int, now: float) -> None:
        seq.table.holes.fill(start, stop)
        seq.progress_at = seq.computed_at = now
        seq.tally.computed_tokens += stop - start
        if replayed := seq.lost.overlap(start, stop):
            seq.tally.recomputed_after_fault += replayed
            seq.tally.missed[seq.loss_reason] += replayed
            seq.lost.fill(start, stop)
        self.reuse.note_computed(seq, start, stop)
        self.reuse.publish(seq, start, stop)
        if self._window is not None:
            self._release_behind_window(seq)

    def _sampled(self, drawn: Drawn, outcome: Outcome, now: float) -> None:
        seq, token = drawn.seq, drawn.token
        if token < 0:
            outcome.failed.append((seq, KVBankError("the model produced no finite logits for this job")))
            self.room.spoil(seq)                        # nobody shall find what it was made from
            self.remove(seq)
            return
        seq.append(token)
        if seq.tally.first_token_at is None:
            seq.tally.first_token_at = now
        outcome.tokens.append(drawn)
        if (reason := seq.finish_reason(self._eos_ids)) is not None:
            outcome.finished.append((seq, reason))

    def _release_behind_window(self, seq: Sequence) -> None:
        """Spans that no layer's window can see any more are let go."""
        assert self._window is not None
        visible = (seq.table.holes.lowest[0] if seq.table.holes else seq.num_tokens) - self._window + 1
        for index in range(seq.table.released, max(0, visible) // self._span):
            if (span := seq.table.at(index)) is not None:
                seq.table.put(index, None)
                self.room.release([span])
            seq.table.released = index + 1

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue: tokens are kept, the KV becomes idle cache and is found again by key."""
        self._let_go(seq)
        self.running.remove(seq)
        seq.state, seq.waits_for = WAITING, "slots"
        seq.table.holes.add(0, seq.num_tokens)
        self._enqueue(seq)

    def _let_go(self, seq: Sequence) -> None:
        spans = [span for _, span in seq.table.live()]
        for index in range(len(seq.table.spans)):
            seq.table.put(index, None)
        seq.table.released = 0
        self.room.release(reversed(spans))          # the tail first: it is evicted before the head
        self.room.settle(self.reuse.end(seq))
        self._begun.discard(seq.job.id)

    def _enqueue(self, seq: Sequence) -> None:
        self.waiting.append(seq)
        self.waiting.sort(key=lambda s: s.age)
