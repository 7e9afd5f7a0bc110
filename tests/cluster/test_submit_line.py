"""One stream, many lanes: what happens to one of them is nobody else's business; what happens to the stream is everyone's."""

from __future__ import annotations

import asyncio
from array import array

import grpc
import pytest

from kvbank.cluster.links import Links
from kvbank.cluster.submit_line import Lane, SubmitLine
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.proto import jobs_pb2 as pb

TOKEN = "ab" * 16


class LaneLost(Exception):
    """A lane ended without a last word."""


class Attempt:
    """One that keeps what it hears until it is read."""

    def __init__(self, lane: Lane, *prompt: int, count: int = 8) -> None:
        self.lane = lane
        self._heard: asyncio.Queue[pb.SubmitReply | LaneLost] = asyncio.Queue()
        lane.begin(pb.Job(id="j", prompt=array("i", prompt).tobytes(), max_tokens=count), self)

    def hear(self, reply: pb.SubmitReply) -> None:
        self._heard.put_nowait(reply)

    def lane_lost(self, reason: str) -> None:
        self._heard.put_nowait(LaneLost(reason))

    async def read(self) -> pb.SubmitReply:
        said = await self._heard.get()
        if isinstance(said, LaneLost):
            raise said
        return said


async def to_the_end(lane: Attempt) -> tuple[list[int], str]:
    """Tokens, and the last word."""
    ids: list[int] = []
    while (reply := await lane.read()).WhichOneof("kind") not in ("done", "failed", "lost"):
        ids += array("i", reply.tokens.ids).tolist()
    return ids, reply.WhichOneof("kind")


def test_many_attempts_share_one_stream(make_worker, answer_of) -> None:
    worker = make_worker("worker-0")

    async def play() -> None:
        links = Links(TOKEN)
        lanes = [Attempt(links.submit(worker.address), number) for number in range(50)]
        for number, lane in enumerate(lanes):
            assert await to_the_end(lane) == (answer_of([number], 8), "done")
            lane.lane.leave()
        await links.close()

    asyncio.run(play())
    assert worker.streams == 1 and len(worker.seen) == 50


def test_what_is_said_at_once_travels_together_as_far_as_a_message_holds_it(make_worker) -> None:
    worker = make_worker("worker-0")

    async def play(lengths: list[int]) -> None:
        links = Links(TOKEN)
        attempts = [Attempt(links.submit(worker.address), *[number] * length, count=1) for number, length in enumerate(lengths)]
        assert [(await to_the_end(attempt))[1] for attempt in attempts] == ["done"] * len(lengths)
        await links.close()

    asyncio.run(play([3] * 40))
    assert worker.messages == [40]
    worker.messages.clear()
    asyncio.run(play([400_000, 400_000, 400_000, 3]))                # 1.6 MB each
    assert worker.messages == [2, 2] and len(worker.seen) == 44


def test_a_lane_that_is_left_takes_nobody_along(make_worker, answer_of, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.01

    async def play() -> None:
        links = Links(TOKEN)
        stays, leaves = Attempt(links.submit(worker.address), 1), Attempt(links.submit(worker.address), 2, count=10_000)
        assert (await leaves.read()).WhichOneof("kind") == "accepted"
        reading = asyncio.create_task(to_the_end(leaves))
        await asyncio.sleep(0)
        leaves.lane.leave()
        leaves.lane.leave()
        with pytest.raises(LaneLost, match="left"):
            await reading
        assert await to_the_end(stays) == (answer_of([1], 8), "done")
        await links.close()

    asyncio.run(play())
    until(worker.ended.is_set)


def test_when_the_worker_dies_every_lane_hears_it_and_the_next_attempt_opens_a_new_stream(make_worker, answer_of) -> None:
    worker = make_worker("worker-0")

    async def play() -> None:
        links = Links(TOKEN)
        worker.hang_at = 3
        hangs = Attempt(links.submit(worker.address), 1)
        while (await hangs.read()).tokens.first_index != 2:
            pass
        worker.die_at = 2
        dies = Attempt(links.submit(worker.address), 2)
        for lane in (dies, hangs):
            with pytest.raises(LaneLost, match="unavailable"):
                await to_the_end(lane)
        assert await to_the_end(Attempt(links.submit(worker.address), 3)) == (answer_of([3], 8), "done")
        await links.close()

    asyncio.run(play())
    assert worker.streams == 2


def test_nobody_at_home_is_heard_without_waiting(free_tcp_port) -> None:
    async def play() -> None:
        links = Links(TOKEN)
        with pytest.raises(LaneLost, match="unavailable"):
            await to_the_end(Attempt(links.submit(f"127.0.0.1:{free_tcp_port}"), 1))
        await links.close()

    asyncio.run(play())


def test_the_wrong_token_is_heard_as_such(make_worker) -> None:
    worker = make_worker("worker-0")

    async def play() -> None:
        links = Links("cd" * 16)
        with pytest.raises(LaneLost, match=r"unauthenticated|stream_ended"):      # the latter: see the next test
            await to_the_end(Attempt(links.submit(worker.address), 1))
        await links.close()

    asyncio.run(play())
    assert not worker.seen


@pytest.mark.parametrize(("debug", "reason"), [('Failed "execute_batch": (...)', "stream_ended"), ("a bug", "internal"),
                                               (None, "internal")])
def test_a_stream_that_ended_under_a_message_is_not_called_internal(debug, reason) -> None:
    """grpc.aio forgets the status that ended a call when a message was just being written to it."""

    class Ended:
        async def read(self) -> None:
            metadata = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, debug_error_string=debug)

        async def write(self, message: pb.SubmitRequests) -> None:
            """It is not asked to the end."""

        def cancel(self) -> None:
            """It is over."""

    async def play() -> None:
        with pytest.raises(LaneLost, match=reason):
            await Attempt(SubmitLine(Ended(), channel=None).lane(), 1).read()

    asyncio.run(play())


def test_after_the_certificates_were_renewed_old_lanes_go_on_and_new_ones_get_a_new_stream(
        make_worker, answer_of, monkeypatch) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    stamps = [(1,)]
    monkeypatch.setattr(Badge, "stamp", lambda _badge: stamps[-1])

    async def play() -> None:
        links = Links(TOKEN)
        old = Attempt(links.submit(worker.address), 1)
        assert (await old.read()).WhichOneof("kind") == "accepted"
        line = links._lines[worker.address]
        stamps.append((2,))
        assert await to_the_end(Attempt(links.submit(worker.address), 2)) == (answer_of([2], 8), "done")
        assert await to_the_end(old) == (answer_of([1], 8), "done")
        assert line.over, "a line that nothing uses any more is closed"
        await links.close()

    asyncio.run(play())
    assert worker.streams == 2


def test_a_channel_of_before_a_renewal_is_closed_when_nothing_is_on_it(make_worker, monkeypatch) -> None:
    worker, now, stamps = make_worker("worker-0"), [0.0], [(1,)]
    worker.hang_at = 1                               # the job is there until the test leaves it
    monkeypatch.setattr(Badge, "stamp", lambda _badge: stamps[-1])

    async def play() -> None:
        links = Links(TOKEN, clock=lambda: now[0])

        async def older_at(at: float) -> dict[str, int]:
            now[0] = at
            await links.status(worker.address, timeout_s=10.0)
            return {purpose: len(older) for (_, purpose), older in links._older.items()}

        old = Attempt(links.submit(worker.address), 1)
        assert (await old.read()).WhichOneof("kind") == "accepted"
        await older_at(0.0)
        stamps.append((2,))
        links.submit(worker.address).leave()
        assert await older_at(1.0) == {"submit": 1, "unary": 1}
        stamps.append((3,))
        assert await older_at(2.0) == {"submit": 1, "unary": 2}
        kept = [one.channel for older in links._older.values() for one in older]
        assert await older_at(rpc.RETIRED_S + 1.5) == {"submit": 1, "unary": 1}
        assert await older_at(rpc.RETIRED_S + 100.0) == {"submit": 1}, "a job is on it"
        old.lane.leave()
        assert await older_at(rpc.RETIRED_S + 101.0) == {}
        while links._closing:
            await asyncio.sleep(0)
        assert [each.get_state() for each in kept] == [grpc.ChannelConnectivity.SHUTDOWN] * 3
        await links.close()

    asyncio.run(asyncio.wait_for(play(), 60))


def test_forgetting_an_address_ends_its_lanes(make_worker) -> None:
    worker = make_worker("worker-0")
    worker.hang_at = 0

    async def play() -> None:
        links = Links(TOKEN)
        lane = Attempt(links.submit(worker.address), 1)
        assert (await lane.read()).WhichOneof("kind") == "accepted"
        await links.forget(set(), purpose="submit")
        with pytest.raises(LaneLost, match="closed"):
            await to_the_end(lane)
        lane.lane.write(pb.SubmitRequest(cancel=pb.Cancel()))          # into the void
        lane.lane.leave()

    asyncio.run(play())
