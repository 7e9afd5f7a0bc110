"""Line: one gateway's Submit stream at a worker. Many attempts of jobs, a lane each; one message for what a step brought.

    engine thread --put(events of a step)--> line --replies()--> | SubmitReplies | --> gateway      one wake-up a step

Says what happened on each lane, in order, and `progress` where nothing else was said for PROGRESS_S. A lane's first word
says that the job was accepted, unless it is `failed`: then `accepted` goes before it. Decides nothing.
"""

from __future__ import annotations

import logging
import queue
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from kvbank.errors import Cancelled, KVBankError
from kvbank.kvstore.traces import Trace
from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.engine import EngineEvent, Failed, Finished, Token
from kvbank.workers.seams import BackendLost
from kvbank.workers.sequence import JobSpec, Tally

log = logging.getLogger(__name__)

PROGRESS_S = 0.5
TOKENS_A_REPLY = 512                         # with 20 likely tokens each they are 84 KB
REPLIES_A_MESSAGE = 24                       # of 4 MiB at most

Receipts = Callable[[Tally, JobSpec, int], pb.Receipt]           # of a job that ended after so many output tokens
ProgressOf = Callable[[Sequence[JobSpec]], list[pb.Progress]]    # of these jobs now, in order


@dataclass(slots=True, eq=False)
class Lane:
    """One attempt. Its spec names it to the engine."""

    number: int
    spec: JobSpec
    trace: Trace | None = None
    accepted: bool = False                                       # and told so
    told_at: float = 0.0
    outputs: int = 0
    reasons: list[str] = field(default_factory=list)             # of cancels that the gateway sent
    ending: bool = False                                         # the engine was told to cancel it, maybe before it had it
    tokens: list[Token] = field(default_factory=list)            # not told yet


class Line:
    """Lanes by number. `open`, `end` and `put` may be called from any thread, `replies` from the stream's own."""

    def __init__(self, *, worker: str, clock: Callable[[], float], receipt: Receipts, progress: ProgressOf) -> None:
        self._worker, self._clock, self._receipt, self._progress = worker, clock, receipt, progress
        self._news: queue.SimpleQueue[Sequence[tuple[Lane, EngineEvent]] | pb.SubmitReply | None] = queue.SimpleQueue()
        self._lock = Lock()
        self._lanes: dict[int, Lane] = {}
        self._closed = self._last_word = False

    def open(self, lane: Lane) -> bool:
        """Listen for its events. False: the caller has left, or the number is in use."""
        with self._lock:
            if self._closed or lane.number in self._lanes:
                return False
            lane.told_at, lane.outputs = self._clock(), len(lane.spec.emitted)
            self._lanes[lane.number] = lane
        return True

    def lane(self, number: int) -> Lane | None:
        return self._lanes.get(number)

    def leave(self, number: int) -> Lane | None:
        """Say no more on this lane."""
        with self._lock:
            return self._lanes.pop(number, None)

    def say(self, number: int, **kind: Any) -> None:
        """A word that is no event of the engine."""
        self._news.put(pb.SubmitReply(lane=number, **kind))

    def put(self, events: Sequence[tuple[Lane, EngineEvent]]) -> None:
        """What a step brought for lanes of this line."""
        self._news.put(events)

    def say_no_more(self) -> None:
        """The gateway has no more jobs: the stream ends when the last lane does."""
        self._last_word = True
        self._news.put(None)

    def close(self) -> list[Lane]:
        """The stream is gone: the lanes that were open."""
        with self._lock:
            self._closed = True
            left = list(self._lanes.values())
            self._lanes.clear()
        self._news.put(None)
        return left

    def replies(self, ended: Callable[[Lane], None]) -> Iterator[pb.SubmitReplies]:
        """Everything that is said, until the line is closed, or idle after the gateway's last word. ended: hears of lanes that
        got their last word."""
        quiet_at = self._clock() + PROGRESS_S
        while not self._closed:
            for made in self._collect(max(0.0, quiet_at - self._clock()), ended):
                yield from _messages(made)
            if (now := self._clock()) >= quiet_at:
                yield from _messages(self._quiet(now))
                quiet_at = now + PROGRESS_S
            if self._last_word and not self._lanes and self._news.empty():
                return

    def _collect(self, within_s: float, ended: Callable[[Lane], None]) -> Iterator[list[pb.SubmitReply]]:
        """All that is there; tokens of one lane that came in several steps travel together, and are on their way when the last
        words of lanes are made."""
        try:
            news = [self._news.get(timeout=within_s)]
        except queue.Empty:
            return
        while not self._news.empty():
            news.append(self._news.get())
        made: list[pb.SubmitReply] = []
        spoken: dict[int, Lane] = {}                             # lanes with tokens to tell
        over: list[tuple[Lane, Finished | Failed]] = []
        for word in news:
            if isinstance(word, pb.SubmitReply):
                made.append(word)
                continue
            for lane, event in word or ():
                if self._lanes.get(lane.number) is not lane:
                    continue                                     # nobody listens any more
                if isinstance(event, Token):
                    lane.tokens.append(event)
                    spoken[lane.number] = lane
                else:
                    made += self._tokens(spoken.pop(lane.number, lane))
                    over.append((lane, event))
        for lane in spoken.values():
            made += self._tokens(lane)
        yield made
        made = []
        for lane, event in over:
            if self._lanes.get(lane.number) is lane:             # still
                made += self._begun(lane, self._last(lane, event))
                self.leave(lane.number)
                ended(lane)
        yield made

    def _tokens(self, lane: Lane) -> Iterator[pb.SubmitReply]:
        told, lane.tokens = lane.tokens, []
        lane.told_at = self._clock()
        for first in range(0, len(told), TOKENS_A_REPLY):
            part = told[first : first + TOKENS_A_REPLY]
            lane.outputs = part[-1].index + 1
            yield from self._begun(lane, pb.SubmitReply(lane=lane.number, tokens=tokens(part)))

    def _begun(self, lane: Lane, reply: pb.SubmitReply) -> list[pb.SubmitReply]:
        """The reply, after `accepted` if it is a lane's first and would be taken for a refusal without it."""
        told, lane.accepted = lane.accepted, True
        if told or not reply.HasField("failed"):
            return [reply]
        return [pb.SubmitReply(lane=lane.number, accepted=pb.Accepted(worker=self._worker)), reply]

    def _last(self, lane: Lane, event: Finished | Failed) -> pb.SubmitReply:
        try:
            receipt = self._receipt(event.tally, lane.spec, lane.outputs)
        except Exception:                            # a count that is none must not end the line, with all its jobs: theirs are 0
            log.exception("receipt_not_made job=%s", lane.spec.id)
            receipt = pb.Receipt()
        if isinstance(event, Finished):
            return pb.SubmitReply(lane=lane.number, done=pb.Done(finish_reason=event.reason, receipt=receipt))
        if isinstance(event.error, BackendLost):
            return pb.SubmitReply(lane=lane.number, lost=pb.Lost())
        if isinstance(event.error, Cancelled) and lane.reasons[:1] == ["stop"]:
            return pb.SubmitReply(lane=lane.number, done=pb.Done(finish_reason="stop", receipt=receipt))
        return pb.SubmitReply(lane=lane.number, failed=failed(event.error, receipt))

    def _quiet(self, now: float) -> list[pb.SubmitReply]:
        with self._lock:
            lanes = [lane for lane in self._lanes.values() if now - lane.told_at >= PROGRESS_S / 2]
        for lane in lanes:
            lane.told_at = now
        try:
            told = self._progress([lane.spec for lane in lanes]) if lanes else []
        except Exception:                            # of one of them a count that is none: all live, and must not look silent
            log.exception("progress_not_made jobs=%d", len(lanes))
            told = [pb.Progress() for _ in lanes]
        return [reply for lane, each in zip(lanes, told, strict=True)
                for reply in self._begun(lane, pb.SubmitReply(lane=lane.number, progress=each))]


def _messages(made: Sequence[pb.SubmitReply]) -> Iterator[pb.SubmitReplies]:
    for first in range(0, len(made), REPLIES_A_MESSAGE):
        yield pb.SubmitReplies(replies=made[first : first + REPLIES_A_MESSAGE])


def tokens(events: list[Token]) -> pb.Tokens:
    """Consecutive tokens of one job as the wire has them."""
    message = pb.Tokens(first_index=events[0].index, ids=array("i", [event.token for event in events]).tobytes())
    told = [event.logprobs for event in events if event.logprobs is not None]
    if len(told) == len(events):
        message.logprobs = array("f", [each.drawn for each in told]).tobytes()
        message.top_ids = array("i", [token for each in told for token in each.top_ids]).tobytes()
        message.top_logprobs = array("f", [value for each in told for value in each.top]).tobytes()
    return message


def failed(error: KVBankError, receipt: pb.Receipt) -> pb.Failed:
    return pb.Failed(code=error.code, message=str(error), receipt=receipt)
