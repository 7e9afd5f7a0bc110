"""Attempts on one line, by a worker that says what the test says: what one of them meets is no other's business."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from kvbank.cluster.attempt import Attempt, Lost
from kvbank.cluster.http.jobs import job_body
from kvbank.cluster.intake import JobSpec
from kvbank.cluster.job import Job
from kvbank.cluster.submit_line import SubmitLine
from kvbank.errors import Cancelled
from kvbank.proto import jobs_pb2 as pb

DONE = pb.Done(finish_reason="length")


class Call:
    """A Submit stream without a wire."""

    def __init__(self) -> None:
        self.replies: asyncio.Queue[pb.SubmitReplies] = asyncio.Queue()
        self.said: list[pb.SubmitRequest] = []

    async def read(self) -> pb.SubmitReplies:
        return await self.replies.get()

    async def write(self, message: pb.SubmitRequests) -> None:
        self.said += message.requests

    def cancel(self) -> None:
        pass

    def answer(self, *replies: pb.SubmitReply) -> None:
        self.replies.put_nowait(pb.SubmitReplies(replies=replies))


def new_job() -> Job:
    text: Any = SimpleNamespace(stopped=False, push=lambda ids: "x", finish=lambda: "")
    spec = JobSpec(tenant="t", prompt=b"", max_tokens=3)
    return Job(id="a", wire_id="a", spec=spec, text=text, seed=1, age=1.0, created=0.0, started_at=0.0)


def begin(line: SubmitLine, job: Job, *, on_tokens: Callable[[int, float], object] = lambda count, before: None,
          silence_s: float = 30.0, grace_s: float = 30.0) -> tuple[Attempt, asyncio.Task[Lost | None]]:
    attempt = Attempt(job, line.lane(), silence_s=silence_s, grace_s=grace_s, clock=count(1.0).__next__, on_tokens=on_tokens,
                      on_stop=lambda: None)
    return attempt, asyncio.create_task(attempt.run())


async def job_has(job: Job, tokens: int) -> None:
    async with asyncio.timeout(20):
        while len(job.ids) < tokens:
            await asyncio.sleep(0)


def token(lane: int, index: int, ids: bytes = bytes(4)) -> pb.SubmitReply:
    return pb.SubmitReply(lane=lane, tokens=pb.Tokens(first_index=index, ids=ids))


@pytest.mark.parametrize("trouble", [StopIteration, ValueError])
def test_a_reply_that_cannot_be_taken_in_ends_its_job_and_no_other(trouble: type[Exception]) -> None:
    def fail(_count: int, _before: float) -> None:
        raise trouble

    async def play() -> None:
        line, sound, odd = SubmitLine(call := Call(), channel=None), new_job(), new_job()
        (_, broken), (_, malformed), (_, other) = begin(line, new_job(), on_tokens=fail), begin(line, odd), begin(line, sound)
        await asyncio.sleep(0)
        call.answer(token(1, 0), token(2, 0, b"abc"), token(3, 0), pb.SubmitReply(lane=3, done=DONE))
        with pytest.raises(RuntimeError if trouble is StopIteration else trouble) as caught:
            await broken
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert trouble is StopIteration or frames[-1] == "fail", "the log tells where it happened"
        with pytest.raises(ValueError, match="not a multiple"):
            await malformed
        assert await other is None and sound.ids == [0] and not odd.ids and not line.over
        line.close()

    asyncio.run(play())


def test_all_tokens_are_counted_with_the_time_of_those_before_them() -> None:
    async def play() -> None:
        line, job, counted = SubmitLine(call := Call(), channel=None), new_job(), []
        attempt, running = begin(line, job, on_tokens=lambda count, before: counted.append((count, job.last_token_at, before)))
        await asyncio.sleep(0)
        call.answer(token(1, 0, bytes(8)), token(1, 1), token(1, 1, bytes(8)), pb.SubmitReply(lane=1, done=DONE))
        assert await running is None and attempt._watch.cancelled()
        (first, at, none), (last, later, before) = counted      # of the second reply, a repeat, nothing
        assert (first, none, last) == (2, 0.0, 1) and 0.0 < at == before < later
        line.close()

    asyncio.run(play())


def test_what_fails_after_the_lane_was_lost_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        line, job = SubmitLine(call := Call(), channel=None), new_job()

        def fail(_count: int, _before: float) -> None:
            attempt.lane_lost("gone")
            raise ValueError("no such counter")

        attempt, running = begin(line, job, on_tokens=fail)
        await asyncio.sleep(0)
        call.answer(token(1, 0))
        assert await running == Lost("gone") and job.ids == [0] and not line.over
        line.close()

    asyncio.run(play())
    assert "job_reply_not_taken_in" in caplog.text and "no such counter" in caplog.text


def test_a_token_whose_text_cannot_be_made_is_not_taken() -> None:
    def fail(_ids: list[int]) -> str:
        raise RuntimeError("no text")

    async def play() -> None:
        line, job = SubmitLine(call := Call(), channel=None), new_job()
        _, running = begin(line, job)
        await asyncio.sleep(0)
        call.answer(token(1, 0))
        await job_has(job, 1)
        job.text.push = fail
        call.answer(token(1, 1))
        with pytest.raises(RuntimeError, match="no text"):
            await running
        assert (job.ids, job.texts) == ([0], ["x"]) and not line.over
        line.close()

    asyncio.run(play())


def test_silence_is_counted_from_the_last_word() -> None:
    """By a clock that moves when the test says so: a slow machine is no silent worker."""
    async def play() -> None:
        line, job, now = SubmitLine(call := Call(), channel=None), new_job(), [0.0]
        attempt, running = begin(line, job, silence_s=0.01)
        real = attempt._loop
        attempt._loop = SimpleNamespace(time=lambda: now[0], call_later=real.call_later, call_soon=real.call_soon)
        attempt._heard_at = 0.0
        await asyncio.sleep(0)
        for index in range(3):
            now[0] += 0.009                          # not long enough
            call.answer(token(1, index))
            await job_has(job, index + 1)
        await asyncio.sleep(0.05)                    # the watch looks several times meanwhile
        assert not running.done()
        now[0] += 0.011
        assert await running == Lost("silent") and not line.over
        line.close()

    asyncio.run(play())


def test_a_job_that_is_asked_to_end_gets_its_receipt_or_the_grace_period() -> None:
    async def play() -> None:
        line = SubmitLine(call := Call(), channel=None)
        for grace_s, lane in ((30.0, 1), (0.01, 2)):
            job = new_job()
            attempt, running = begin(line, job, grace_s=grace_s)
            await asyncio.sleep(0)
            job.ending = "client"
            attempt.cancel("client")
            if lane == 1:
                call.answer(pb.SubmitReply(lane=1, failed=pb.Failed(code="cancelled", receipt=pb.Receipt(computed_tokens=7))))
            with pytest.raises(Cancelled):
                await running
            assert job.receipt.get("computed_tokens", 0) == (7 if lane == 1 else 0)
        line.close()

    asyncio.run(play())


def test_a_job_whose_tokens_come_is_decoding_and_one_that_is_over_is_in_no_phase() -> None:
    """A quick job never hears of progress from its worker."""
    async def play() -> None:
        line, job = SubmitLine(call := Call(), channel=None), new_job()
        job.progress.total = 40
        _, running = begin(line, job)
        await asyncio.sleep(0)
        progress = pb.Progress(state="prefill", computed=8, total=40, waits_for="slots")
        call.answer(pb.SubmitReply(lane=1, progress=progress), token(1, 0))
        await job_has(job, 1)
        assert job_body(job)["progress"] == {"state": "decode", "computed": 40, "total": 40, "waits_for": ""}
        call.answer(pb.SubmitReply(lane=1, done=DONE))
        await running
        job.end(2.0)
        assert job_body(job)["state"] == "finished" and job_body(job)["progress"]["state"] == ""
        line.close()

    asyncio.run(play())


def test_an_attempt_that_is_given_up_leaves_its_lane_and_the_line_to_others() -> None:
    async def play() -> None:
        line, sound = SubmitLine(call := Call(), channel=None), new_job()
        (_, given_up), (_, other) = begin(line, new_job()), begin(line, sound)
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        call.answer(token(1, 0), token(2, 0), pb.SubmitReply(lane=2, done=DONE))
        assert await other is None and sound.ids == [0] and not line.over
        line.close()
        _, late = begin(line, new_job())
        assert await late == Lost("closed", accepted=True)

    asyncio.run(play())
