"""Jobs over gRPC: a Submit stream from each gateway, with a lane for each attempt of a job (jobs_line.py).

    gateway --job--> | accepted, progress*, tokens*, done|failed|lost | --> gateway        a cancel may come at any time

Forwards between lanes and the engine's inbox and events; decides nothing. What a stream's reader does takes no longer than
it takes to check the jobs of a message.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from threading import Thread

import grpc

from kvbank.errors import InvalidRequest, KVBankError, TooLong, Unavailable
from kvbank.kvstore.traces import Trace, Traces, context_of
from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.engine import Engine, EngineEvent, Token
from kvbank.workers.held_keys import split_keys
from kvbank.workers.jobs_line import Lane, Line, failed
from kvbank.workers.sampler import MAX_LOGPROBS, SamplingParams
from kvbank.workers.sequence import JobSpec, Tally

log = logging.getLogger(__name__)

HEAR_S = 1.0                                 # for control to say who is there, before a job is refused


class JobsService:
    """One per worker that leads its chain."""

    def __init__(
        self, engine: Engine, worker_id: str, *, vocab_size: int, status: Callable[[], pb.WorkerStatus],
        clock: Callable[[], float], hear_control: Callable[[float], None] = lambda within_s: None,
        resting: Callable[[], bool] = lambda: False,
        traces: Traces | None = None,
    ) -> None:
        """hear_control: within so many seconds the engine knows the members of now, unless control is away. resting: no new
        job is taken."""
        self._engine, self._id, self._vocab = engine, worker_id, vocab_size
        self._status, self._clock, self._hear_control, self._resting = status, clock, hear_control, resting
        self._traces = traces
        self._contexts: dict[float, str] = {}        # age of a traced job -> its traceparent
        self._lanes: dict[str, tuple[Line, Lane]] = {}           # by the name that the engine knows
        self._attempts = count(1)
        self._untold: list[EngineEvent] = []         # engine thread only

    def deliver(self, events: list[EngineEvent]) -> None:
        """Engine thread, after each step: what it brought. The first word of an attempt and the last one are told at once;
        other tokens wait for a moment in the next step at which sending them takes nothing from it (Engine.meanwhile)."""
        self.tell()                                  # if that step had no such moment
        self._untold = events
        if any(self._urgent(event) for event in events):
            self.tell()

    def tell(self) -> None:
        """Engine thread: hand what waits to the lines."""
        told: dict[Line, list[tuple[Lane, EngineEvent]]] = {}
        events, self._untold = self._untold, []
        for event in events:
            if (found := self._lanes.get(event.job)) is not None:
                told.setdefault(found[0], []).append((found[1], event))
        for line, news in told.items():
            line.put(news)

    def _urgent(self, event: EngineEvent) -> bool:
        if not isinstance(event, Token):
            return True
        found = self._lanes.get(event.job)
        return found is not None and event.index == len(found[1].spec.emitted)

    def submit(self, requests: Iterator[pb.SubmitRequests], context: grpc.ServicerContext) -> Iterator[pb.SubmitReplies]:
        """The Submit handler."""
        line = Line(worker=self._id, clock=self._clock, receipt=self._receipt, progress=self._progress)
        if not context.add_callback(lambda: self._hang_up(line)):
            return                                   # the caller has gone already
        try:
            yield pb.SubmitReplies()                 # somebody is at home: a job that is lost from here on is one that we had
            Thread(target=self._listen, args=(requests, line, context), daemon=True, name="submit-reader").start()
            yield from line.replies(self._forget)
        finally:
            self._hang_up(line)

    def trace_of(self, age: float) -> str:
        """The traceparent of the job with this admission stamp; empty when it is not traced."""
        return self._contexts.get(age, "")

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("kvbank.Jobs", {
            "Submit": grpc.stream_stream_rpc_method_handler(
                self.submit, request_deserializer=pb.SubmitRequests.FromString,
                response_serializer=pb.SubmitReplies.SerializeToString),
            "Status": grpc.unary_unary_rpc_method_handler(
                lambda _request, _context: self._status(), request_deserializer=pb.StatusRequest.FromString,
                response_serializer=pb.WorkerStatus.SerializeToString),
        })

    # -- what a gateway says -----------------------------------------------------------------------------------------

    def _listen(self, messages: Iterator[pb.SubmitRequests], line: Line, context: grpc.ServicerContext) -> None:
        try:
            for message in messages:
                taken = [lane for request in message.requests if (lane := self._hear(request, line)) is not None]
                self._begin(*taken)
            line.say_no_more()
        except grpc.RpcError:
            pass                                     # the stream ended: its callback hangs up
        except Exception:                            # a line that nobody listens to must not look alive
            log.exception("submit_reader_failed")
            context.cancel()

    def _hear(self, request: pb.SubmitRequest, line: Line) -> Lane | None:
        """A lane is one whose job can begin."""
        kind = request.WhichOneof("kind")
        if kind == "cancel":
            if (lane := line.lane(request.lane)) is not None:
                lane.reasons.append(request.cancel.reason)
                lane.ending = True
                self._engine.cancel(lane.spec.id)
        elif kind == "leave":
            if (lane := line.leave(request.lane)) is not None:
                self._drop(lane)
        else:
            return self._take(request, line)
        return None

    def _take(self, request: pb.SubmitRequest, line: Line) -> Lane | None:
        """Check a job, and say why it is not taken if it is not."""
        job, trace = request.job, None
        try:
            if request.WhichOneof("kind") != "job":
                raise InvalidRequest("the first message of a lane must be a job")
            if self._resting():
                raise Unavailable("this worker is draining and takes no new jobs")
            name = f"{job.id}#{job.attempt}.{next(self._attempts)}"
            if self._traces is not None:
                trace = self._traces.begin("worker.submit", job.trace, job=job.id, worker=self._id, attempt=job.attempt)
                name += trace.suffix                 # whoever does work for the job finds it there
                self._contexts[job.age] = trace.parent
            lane = Lane(request.lane, job_spec(job, name, self._vocab), trace)
            self._lanes[name] = (line, lane)
            if not line.open(lane):
                self._forget(lane)
                raise InvalidRequest("this lane has a job already")
        except Exception as unfit:                   # it is this job's trouble alone, whatever it is
            if not isinstance(unfit, KVBankError):
                log.exception("job_not_taken job=%s", job.id)
            error = unfit if isinstance(unfit, KVBankError) else KVBankError("the worker met an internal error")
            if trace is not None:
                self._end_trace(job.age, trace, outcome=error.code)
            line.say(request.lane, failed=failed(error, pb.Receipt()))
            return None
        try:
            self._engine.check_fits(lane.spec)
        except TooLong:
            Thread(target=self._begin_later, args=(lane,), daemon=True, name="hear-control").start()
            return None
        return lane

    def _begin(self, *lanes: Lane) -> None:
        if lanes:
            self._engine.add(*[lane.spec for lane in lanes])
        for lane in lanes:
            if lane.ending:                          # that came too early for the engine
                self._engine.cancel(lane.spec.id)

    def _begin_later(self, lane: Lane) -> None:
        """The gateway may know of lenders that came after this worker was last told: it hears of them before it refuses."""
        self._hear_control(HEAR_S)
        self._begin(lane)

    # -- the end of lanes --------------------------------------------------------------------------------------------

    def _hang_up(self, line: Line) -> None:
        for lane in line.close():
            self._drop(lane)

    def _drop(self, lane: Lane) -> None:
        lane.ending = True
        self._engine.cancel(lane.spec.id)
        self._forget(lane)

    def _forget(self, lane: Lane) -> None:
        self._lanes.pop(lane.spec.id, None)
        if lane.trace is not None:
            self._end_trace(lane.spec.age, lane.trace)

    def _end_trace(self, age: float, trace: Trace, **attributes: str) -> None:
        """The context is forgotten unless a later attempt of the job is here already."""
        if self._contexts.get(age) == trace.parent:
            del self._contexts[age]
        trace.end(**attributes)

    # -- what lanes say ----------------------------------------------------------------------------------------------

    def _progress(self, specs: Sequence[JobSpec]) -> list[pb.Progress]:
        running, told = {seq.job.id: seq for seq in self._engine.jobs()}, []
        for spec in specs:
            if (seq := running.get(spec.id)) is None:
                told.append(pb.Progress(state="queued", total=len(spec.prompt)))
                continue
            state = "queued" if seq.state == "waiting" else "decode" if seq.is_decoding else "prefill"
            told.append(pb.Progress(state="waiting" if state == "prefill" and seq.waits_for else state,
                                    computed=seq.prompt_computed, total=seq.num_prompt, waits_for=seq.waits_for))
        return told

    def _receipt(self, tally: Tally, spec: JobSpec, outputs: int) -> pb.Receipt:
        now = self._clock()
        first = tally.first_token_at
        if self._traces is not None:
            trace_phases(self._traces, spec, tally, now)
        return pb.Receipt(
            prompt_tokens=len(spec.prompt), output_tokens=outputs, computed_tokens=tally.computed_tokens,
            reused=dict(tally.reused), missed=dict(tally.missed), borrowed_blocks_peak=tally.borrowed_blocks_peak,
            parked_blocks_peak=tally.parked_blocks_peak, lenders=list(tally.lenders),
            remote_attention_calls=tally.remote_attention_calls, recomputed_after_fault=tally.recomputed_after_fault,
            ttft_s=(first - tally.submitted_at) if first is not None else 0.0, total_s=now - tally.submitted_at,
        )


def job_spec(job: pb.Job, name: str, vocab_size: int) -> JobSpec:
    """The wire's job as the engine wants it. Raises InvalidRequest."""
    prompt, emitted = _ids(job.prompt), _ids(job.emitted)
    if not prompt:
        raise InvalidRequest("the prompt is empty; give at least one token")
    for ids in (prompt, emitted):
        if ids and (min(ids) < 0 or max(ids) >= vocab_size):
            bad = next(t for t in ids if not 0 <= t < vocab_size)
            raise InvalidRequest(f"token id {bad} is outside the model's vocabulary of {vocab_size}")
    if job.max_tokens <= len(emitted):
        raise InvalidRequest(f"max_tokens {job.max_tokens} leaves nothing to generate")
    if job.policy not in ("", "exact"):
        raise InvalidRequest(f"policy {job.policy!r} is not known here; use 'exact'")
    if len(job.keys) % 32:
        raise InvalidRequest(f"{len(job.keys)} bytes of block keys are not a whole number of 32-byte keys")
    if "\0" in job.tenant:
        raise InvalidRequest("a tenant has no NUL in its name")
    s = job.sampling
    return JobSpec(
        id=name, prompt=prompt, emitted=emitted, max_tokens=job.max_tokens,
        sampling=SamplingParams(temperature=s.temperature, top_p=s.top_p or 1.0, top_k=s.top_k, seed=s.seed),
        stop_token_ids=frozenset(job.stop_token_ids), ignore_eos=job.ignore_eos, tenant=job.tenant or "default",
        deadline_s=job.deadline_ms / 1e3 if job.deadline_ms else None, age=job.age,
        keys=tuple(split_keys(job.keys)),            # one look at the field: each copies it
        cache_salt=job.cache_salt, logprobs=min(job.logprobs, MAX_LOGPROBS) if job.HasField("logprobs") else None,
    )


def trace_phases(traces: Traces, spec: JobSpec, tally: Tally, now: float) -> None:
    """The engine's part of a job's trace, from its tally: queue, prefill, decode, and what was computed again."""
    parent = context_of(spec.id)
    started = now if tally.started_at is None else tally.started_at
    traces.record("engine.queue", parent, tally.submitted_at, started)
    if tally.started_at is None:
        return
    first = now if tally.first_token_at is None else tally.first_token_at
    traces.record("engine.prefill", parent, started, first, prompt_tokens=len(spec.prompt),
                  computed_tokens=tally.computed_tokens, reused_tokens=sum(tally.reused.values()))
    if tally.first_token_at is not None:
        traces.record("engine.decode", parent, first, now, remote_attention_calls=tally.remote_attention_calls,
                      lenders=len(tally.lenders))
    if tally.replay_began is not None:
        traces.record("engine.replay", parent, tally.replay_began, tally.replay_ended, tokens=tally.recomputed_after_fault)


def _ids(data: bytes) -> list[int]:
    if len(data) % 4:
        raise InvalidRequest("token ids are not int32")
    return array("i", data).tolist()
