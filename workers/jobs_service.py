"""Jobs over gRPC: one Submit stream per attempt of a job. Tokens, progress, cancel and the receipt ride it.

    gateway --job--> | accepted, progress*, tokens*, done|failed | --> gateway          a cancel may come at any time

Forwards between streams and the engine's inbox and events; decides nothing. Servicer threads never wait for the engine
longer than PROGRESS_S, nor for control longer than HEAR_S.
"""

from __future__ import annotations

import queue
from array import array
from collections.abc import Callable, Iterator
from threading import Lock, Thread
from typing import Any

import grpc

from kvbank.errors import Cancelled, InvalidRequest, KVBankError, TooLong, Unavailable
from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.traces import Trace, Traces, context_of
from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.engine import Engine, EngineEvent, Failed, Finished, Token
from kvbank.workers.sampler import MAX_LOGPROBS, SamplingParams
from kvbank.workers.seams import BackendLost
from kvbank.workers.sequence import JobSpec, Tally

PROGRESS_S = 0.5
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
        self._queues: dict[str, queue.SimpleQueue[EngineEvent]] = {}
        self._lock = Lock()
        self._attempts = 0

    def deliver(self, events: list[EngineEvent]) -> None:
        """Engine thread: hand events to the streams that wait for them."""
        for event in events:
            waiting = self._queues.get(event.job)
            if waiting is not None:
                waiting.put(event)

    def submit(self, requests: Iterator[pb.SubmitRequest], context: grpc.ServicerContext) -> Iterator[pb.SubmitReply]:
        """The Submit handler."""
        trace: Trace | None = None
        try:
            first = next(requests)
            if first.WhichOneof("kind") != "job":
                raise InvalidRequest("the first message of Submit must be a job")
            if self._resting():
                raise Unavailable("this worker is draining and takes no new jobs")
            with self._lock:
                self._attempts += 1
                name = f"{first.job.id}#{first.job.attempt}.{self._attempts}"
            if self._traces is not None:
                trace = self._traces.begin("worker.submit", _traceparent(context), job=first.job.id, worker=self._id,
                                           attempt=first.job.attempt)
                name += trace.suffix                 # whoever does work for the job finds it there
                self._contexts[first.job.age] = trace.parent
            spec = job_spec(first.job, name, self._vocab)
            self._know_who_lends(spec)
        except StopIteration:
            return
        except KVBankError as error:
            if trace is not None:
                self._forget_trace(first.job.age, trace)
                trace.end(outcome=error.code)
            yield _failed(error, pb.Receipt())
            return
        waiting: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self._queues[name] = waiting
        reasons: list[str] = []
        try:
            self._engine.add(spec)                   # first: a cancel that came before its job would be forgotten
            if not context.add_callback(lambda: self._engine.cancel(name)):
                self._engine.cancel(name)            # the caller has gone already
                return
            Thread(target=self._read_cancel, args=(requests, name, reasons), daemon=True, name="submit-reader").start()
            yield pb.SubmitReply(accepted=pb.Accepted(worker=self._id))
            yield from self._stream(waiting, spec, reasons)
        except BackendLost as lost:                  # as if this worker had died: not a word about the job, so it goes on
            context.abort(grpc.StatusCode.UNAVAILABLE, str(lost))
        finally:
            self._queues.pop(name, None)
            if trace is not None:
                self._forget_trace(first.job.age, trace)
                trace.end()

    def _forget_trace(self, age: float, trace: Trace) -> None:
        """Unless a later attempt of the job is here already."""
        if self._contexts.get(age) == trace.parent:
            del self._contexts[age]

    def trace_of(self, age: float) -> str:
        """The traceparent of the job with this admission stamp; empty when it is not traced."""
        return self._contexts.get(age, "")

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("kvbank.Jobs", {
            "Submit": grpc.stream_stream_rpc_method_handler(
                self.submit, request_deserializer=pb.SubmitRequest.FromString,
                response_serializer=pb.SubmitReply.SerializeToString),
            "Status": grpc.unary_unary_rpc_method_handler(
                lambda _request, _context: self._status(), request_deserializer=pb.StatusRequest.FromString,
                response_serializer=pb.WorkerStatus.SerializeToString),
        })

    def _know_who_lends(self, spec: JobSpec) -> None:
        """The gateway may know of lenders that came after this worker was last told: it hears of them before it refuses."""
        try:
            self._engine.check_fits(spec)
        except TooLong:
            self._hear_control(HEAR_S)

    def _read_cancel(self, requests: Iterator[pb.SubmitRequest], name: str, reasons: list[str]) -> None:
        try:
            for request in requests:
                if request.WhichOneof("kind") == "cancel":
                    reasons.append(request.cancel.reason)
                    self._engine.cancel(name)
        except grpc.RpcError:
            pass                                     # the stream ended: its callback has cancelled the job

    def _stream(
        self, waiting: queue.SimpleQueue[EngineEvent], spec: JobSpec, reasons: list[str]
    ) -> Iterator[pb.SubmitReply]:
        outputs = len(spec.emitted)
        while True:
            try:
                event = waiting.get(timeout=PROGRESS_S)
            except queue.Empty:
                yield self._progress(spec)
                continue
            if isinstance(event, Token):
                tokens = [event]
                while not waiting.empty():           # one message for all that is there
                    event = waiting.get()
                    if not isinstance(event, Token):
                        break
                    tokens.append(event)
                outputs = tokens[0].index + len(tokens)
                yield pb.SubmitReply(tokens=_tokens(tokens))
            if isinstance(event, Finished):
                yield pb.SubmitReply(done=pb.Done(finish_reason=event.reason, receipt=self._receipt(event.tally, spec, outputs)))
                return
            if isinstance(event, Failed):
                if isinstance(event.error, BackendLost):
                    raise event.error
                receipt = self._receipt(event.tally, spec, outputs)
                if isinstance(event.error, Cancelled) and reasons[:1] == ["stop"]:
                    yield pb.SubmitReply(done=pb.Done(finish_reason="stop", receipt=receipt))
                else:
                    yield _failed(event.error, receipt)
                return

    def _progress(self, spec: JobSpec) -> pb.SubmitReply:
        for seq in self._engine.jobs():
            if seq.job.id == spec.id:
                state = "queued" if seq.state == "waiting" else "decode" if seq.is_decoding else "prefill"
                return pb.SubmitReply(progress=pb.Progress(
                    state="waiting" if state == "prefill" and seq.waits_for else state, computed=seq.prompt_computed,
                    total=seq.num_prompt, waits_for=seq.waits_for))
        return pb.SubmitReply(progress=pb.Progress(state="queued", total=len(spec.prompt)))

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
    if (bad := next((t for t in (*prompt, *emitted) if not 0 <= t < vocab_size), None)) is not None:
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
        keys=tuple(BlockKey(job.keys[i : i + 32]) for i in range(0, len(job.keys), 32)),
        cache_salt=job.cache_salt, logprobs=min(job.logprobs, MAX_LOGPROBS) if job.HasField("logprobs") else None,
    )


def _tokens(events: list[Token]) -> pb.Tokens:
    """Consecutive tokens of one job as the wire has them."""
    message = pb.Tokens(first_index=events[0].index, ids=array("i", [event.token for event in events]).tobytes())
    told = [event.logprobs for event in events if event.logprobs is not None]
    if len(told) == len(events):
        message.logprobs = array("f", [each.drawn for each in told]).tobytes()
        message.top_ids = array("i", [token for each in told for token in each.top_ids]).tobytes()
        message.top_logprobs = array("f", [value for each in told for value in each.top]).tobytes()
    return message


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


def _traceparent(context: grpc.ServicerContext) -> str:
    return next((str(value) for key, value in context.invocation_metadata() if key == "traceparent"), "")


def _ids(data: bytes) -> list[int]:
    if len(data) % 4:
        raise InvalidRequest("token ids are not int32")
    return array("i", data).tolist()


def _failed(error: KVBankError, receipt: Any) -> pb.SubmitReply:
    return pb.SubmitReply(failed=pb.Failed(code=error.code, message=str(error), receipt=receipt))
