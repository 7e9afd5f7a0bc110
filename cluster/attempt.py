"""Attempt: one job on one worker, as long as its lane of the Submit stream lasts.

    job -> | accepted, progress*, tokens*, done | failed | lost | ->        at any time: cancel(reason) ->

Whatever ends the lane is told apart here: the job is settled, the job failed, or only this attempt was lost and
another worker may go on. Tokens count at the next index of the job's output and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbank.cluster.job import Job, Logprob
from kvbank.cluster.submit_line import MESSAGE_BYTES, Lane
from kvbank.errors import Cancelled, DeadlineExceeded, KVBankError, TooLong, Unavailable, from_code
from kvbank.proto import jobs_pb2

log = logging.getLogger(__name__)

KEYS_AND_IDS_BYTES = 3 << 20         # of a message of at most 4 MiB; above it the worker hashes for itself
# Codes a worker may answer that say something about it and not about the job: another worker may do better.
_ELSEWHERE = frozenset({"unavailable", "overloaded", "internal", "model_error", "config_error"})
_WORDED_FOR_US = frozenset({"internal", "model_error", "config_error"})      # may name paths: not for the caller


@dataclass(frozen=True, slots=True)
class Lost:
    """An attempt without an outcome. `refusal`: the worker answered, and does not want the job."""

    reason: str
    accepted: bool = True            # False: the worker cannot have had the job
    refusal: KVBankError | None = None


class Attempt:
    """`run` it once. Meanwhile `job.attempt_running` is this object, so that whoever ends the job tells its worker."""

    def __init__(
        self, job: Job, lane: Lane, *, silence_s: float, grace_s: float, clock: Callable[[], float],
        on_tokens: Callable[[int, float], None], on_stop: Callable[[], None], trace: str = "",
    ) -> None:
        """on_tokens: hears how many came, and when the ones before them did (0.0: there were none). on_stop: ends the job, for
        a stop string was seen. trace: traceparent."""
        self._job = job
        self._lane = lane
        self._silence_s, self._grace_s = silence_s, grace_s
        self._clock = clock
        self._on_tokens, self._on_stop = on_tokens, on_stop
        self._trace = trace
        self._accepted = False
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Lost | None] = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._receipt: jobs_pb2.Receipt | None = None

    async def run(self) -> Lost | None:
        """None: the job is settled. Raises the error that ends the job, also the one it was asked to end with."""
        job = self._job
        self._watch = self._loop.call_later(self._silence_s, self._look)
        try:
            message = self._message()
            if message.ByteSize() > MESSAGE_BYTES:   # it would end the stream, and everybody's lane with it
                raise TooLong("the prompt and its output so far are more than one message to a worker can hold: "
                              "shorten the prompt")
            self._lane.begin(message, self)
            job.attempt_running = self
            if job.ending:                           # since a worker was chosen
                self.cancel(job.ending)
            return await self._outcome
        finally:
            self._watch.cancel()
            if self._receipt is not None:            # read when the last tokens are on their way to who waits for them
                job.receipt = receipt_body(self._receipt)
            job.attempt_running = None
            self._lane.leave()

    def _look(self) -> None:
        """Now and then: a timer that each reply sets anew costs more than what it guards."""
        if (left := self._heard_at + self._silence_s - self._loop.time()) > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self.lane_lost("silent")

    def cancel(self, reason: str) -> None:
        """Tell the worker, and stop waiting for its receipt after the grace period."""
        self._lane.write(jobs_pb2.SubmitRequest(cancel=jobs_pb2.Cancel(reason=reason)))
        self._loop.call_later(self._grace_s, self._lane.leave)

    def hear(self, reply: jobs_pb2.SubmitReply) -> None:
        """Of the lane. Whatever goes wrong here ends this job and no other."""
        if self._outcome.done():
            return
        self._heard_at = self._loop.time()
        try:
            self._heard(reply)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The gateway logs what is no error of ours, and counts it with the job."""
        if self._outcome.done():
            log.error("job_reply_not_taken_in job=%s", self._job.wire_id, exc_info=error)
        elif isinstance(error, StopIteration):       # no future takes one
            self._outcome.set_exception(RuntimeError(f"a reply could not be taken in: {error!r}"))
        else:
            self._outcome.set_exception(error)

    def lane_lost(self, reason: str) -> None:
        """Of the lane."""
        if self._outcome.done():
            return
        try:
            self._outcome.set_result(self._over(reason))
        except KVBankError as error:
            self._outcome.set_exception(error)

    def _heard(self, reply: jobs_pb2.SubmitReply) -> None:
        job, kind = self._job, reply.WhichOneof("kind")
        if not self._accepted:
            self._accepted = True
            if kind != "failed":                     # a refusal took nothing up
                job.accepted += 1
                job.enter("accepted", self._clock())
        if kind == "tokens" and not self._take(reply.tokens):
            self._outcome.set_result(Lost("token_gap"))
        elif kind == "progress":
            self._note(reply.progress)
        elif kind == "done":
            self._done(reply.done)
            self._outcome.set_result(None)
        elif kind == "failed":
            self._outcome.set_result(self._failed(reply.failed))
        elif kind == "lost":
            self._outcome.set_result(self._over("unavailable"))

    def _message(self) -> jobs_pb2.Job:
        job, spec = self._job, self._job.spec
        left_ms, emitted = 0, array("i", job.ids).tobytes()
        if spec.deadline_s is not None:
            left_ms = max(1, int(1000 * (job.started_at + spec.deadline_s - self._clock())))
        return jobs_pb2.Job(
            id=job.wire_id, attempt=job.attempt, tenant=spec.tenant, prompt=spec.prompt,
            emitted=emitted, max_tokens=spec.max_tokens,
            sampling=jobs_pb2.Sampling(
                temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k, seed=job.seed
            ),
            stop_token_ids=spec.stop_token_ids, ignore_eos=spec.ignore_eos, deadline_ms=left_ms,
            keys=job.keys if len(job.keys) + len(spec.prompt) + len(emitted) <= KEYS_AND_IDS_BYTES else b"",
            age=job.age, policy=spec.policy, cache_salt=spec.cache_salt, logprobs=spec.logprobs, trace=self._trace,
        )

    def _take(self, tokens: jobs_pb2.Tokens) -> bool:
        """Append what is new; False when a token is missing in between. After a stop string nothing is taken."""
        job = self._job
        if job.ending:
            return True
        skip = len(job.ids) - tokens.first_index
        if skip < 0:
            return False
        now, before, had = self._clock(), job.last_token_at, len(job.ids)
        ids = array("i", tokens.ids).tolist()
        likely = _logprobs(tokens, len(ids)) if tokens.logprobs else [None] * len(ids)
        for token, logprob in zip(ids[skip:], likely[skip:], strict=True):
            job.take(token, now, logprob)
            if job.text.stopped:
                self._on_stop()
                break
        if len(job.ids) > had:
            job.enter("decode", now)
            told = job.progress                      # the worker says it only where tokens are slow to come
            told.state, told.waits_for, told.computed = "decode", "", told.total
            job.announce()
            self._on_tokens(len(job.ids) - had, before)
        return True

    def _note(self, progress: jobs_pb2.Progress) -> None:
        told = self._job.progress
        told.state, told.waits_for = progress.state, progress.waits_for
        told.computed, told.total = progress.computed, progress.total
        self._job.enter(progress.state or "queued", self._clock(), progress.waits_for)
        self._job.announce()

    def _done(self, done: jobs_pb2.Done) -> None:
        job, self._receipt = self._job, done.receipt
        if job.ending == "stop":
            job.finish_reason = "stop"
        elif done.finish_reason in ("stop", "length"):
            job.finish_reason = done.finish_reason
        else:
            raise ending_error(job) if job.ending else Cancelled("the worker cancelled this job")

    def _failed(self, failed: jobs_pb2.Failed) -> Lost | None:
        job, self._receipt = self._job, failed.receipt
        if job.ending:
            return self._over(failed.code)
        message = failed.message
        if failed.code in _WORDED_FOR_US:
            log.warning("job_worker_failed job=%s worker=%s code=%s message=%s",
                        job.wire_id, job.worker, failed.code, message)
            message = "the worker could not serve this job"
        error = from_code(failed.code, message)
        if failed.code in _ELSEWHERE:
            return Lost(failed.code, refusal=error)
        raise error

    def _over(self, reason: str) -> Lost | None:
        """The lane is over without the worker's last word: as it should be when the job was asked to end."""
        if self._job.ending == "stop":
            self._job.finish_reason = "stop"
            return None
        if self._job.ending:
            raise ending_error(self._job)
        if not self._accepted and self._lane.someone_there:      # it may have died of this job, before its first word
            self._accepted, self._job.accepted = True, self._job.accepted + 1
        return Lost(reason, accepted=self._accepted)


def _logprobs(tokens: jobs_pb2.Tokens, count: int) -> list[Logprob | None]:
    """One per token; None where the message does not hold together."""
    drawn = array("f", tokens.logprobs).tolist()
    each = len(tokens.top_ids) // max(1, count)      # bytes of ids, and as many of values, beside each token
    if len(drawn) != count or len(tokens.top_logprobs) != len(tokens.top_ids) or each * count != len(tokens.top_ids) or each % 4:
        return [None] * count
    cuts = [slice(at * each, (at + 1) * each) for at in range(count)]
    return [Logprob(value, tokens.top_ids[cut], tokens.top_logprobs[cut]) for value, cut in zip(drawn, cuts, strict=True)]


def ending_error(job: Job) -> KVBankError:
    """What a job that was asked to end ends with."""
    if job.ending == "deadline":
        return DeadlineExceeded(
            f"the job's deadline of {job.spec.deadline_s:g} s passed after {len(job.ids)} of "
            f"{job.spec.max_tokens} tokens"
        )
    if job.ending == "stopping":
        return Unavailable("the cluster is stopping")
    return Cancelled("the job was cancelled by its caller")


def receipt_body(receipt: jobs_pb2.Receipt) -> dict[str, Any]:
    """A receipt as plain values."""
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "output_tokens": receipt.output_tokens,
        "computed_tokens": receipt.computed_tokens,
        "reused": dict(receipt.reused),
        "missed": dict(receipt.missed),
        "borrowed_blocks_peak": receipt.borrowed_blocks_peak,
        "parked_blocks_peak": receipt.parked_blocks_peak,
        "lenders": list(receipt.lenders),
        "remote_attention_calls": receipt.remote_attention_calls,
        "recomputed_after_fault": receipt.recomputed_after_fault,
        "ttft_s": receipt.ttft_s,
        "total_s": receipt.total_s,
    }
