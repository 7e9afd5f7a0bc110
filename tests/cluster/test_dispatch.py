"""Where the next attempt of a job goes, by a clock that moves when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvbank.cluster import dispatch
from kvbank.cluster.dispatch import Dispatch, RecentPrefixes
from kvbank.cluster.intake import JobSpec
from kvbank.cluster.job import Job
from kvbank.cluster.roster import Worker
from kvbank.errors import Cancelled, Unavailable

KEYS = b"".join(bytes([n]) * 32 for n in range(8))
FIRST, SECOND = (Worker(id=f"worker-{n}", boot=b"1", address=f"host:{n}") for n in range(2))


@pytest.fixture(autouse=True)
def nobody_looks_again_by_himself(monkeypatch) -> None:
    """Or what wakes those who wait would not be tested."""
    monkeypatch.setattr(dispatch, "LOOK_AGAIN_S", 3600.0)


async def soon(asked: asyncio.Task[Worker]) -> Worker:
    return await asyncio.wait_for(asked, 20)


class Town:
    """Workers, a clock, and a dispatch that sees both."""

    def __init__(self, *workers: Worker, choose: Callable[..., str] | None = None, lanes: int = 2) -> None:
        self.alive, self.now, self.held, self.listeners = list(workers), 0.0, {}, []
        members: Any = SimpleNamespace(workers=lambda: self.alive, holders=self._holders, on_change=self.listeners.append)
        self.dispatch = Dispatch(members, choose or self._least_pending, lanes_per_worker=lanes, suspect_s=1.0, no_worker_s=5.0,
                                 clock=lambda: self.now)

    async def _holders(self, keys: bytes) -> dict[str, int]:
        return dict(self.held)

    def _least_pending(self, workers: list[Worker], held: dict[str, int], tokens: int) -> str:
        return min(workers, key=lambda w: (-held.get(w.id, 0), w.tokens_pending, w.jobs_running, w.id)).id

    def change(self, *workers: Worker) -> None:
        self.alive = list(workers)
        for listener in self.listeners:
            listener()

    async def still_waits(self, asked: asyncio.Task[Worker]) -> None:
        """It looks once more, and finds nobody."""
        await asyncio.sleep(0)
        for listener in self.listeners:
            listener()
        for _ in range(10):                          # turns of the loop: more than waking up and looking take
            await asyncio.sleep(0)
        assert not asked.done()


def new_job(keys: bytes = b"", prompt_tokens: int = 100) -> Job:
    text: Any = SimpleNamespace()
    spec = JobSpec(tenant="t", prompt=b"")
    return Job(id="a", wire_id="a", spec=spec, text=text, seed=1, age=1.0, created=0.0, started_at=0.0, keys=keys,
               prompt_tokens=prompt_tokens)


def test_a_full_worker_is_waited_for_and_a_lane_that_comes_free_is_taken() -> None:
    async def story() -> None:
        town = Town(FIRST)
        lanes = [town.dispatch.lane(new_job(), FIRST) for _ in range(2)]
        for lane in lanes:
            lane.__enter__()
        job = new_job()
        asked = asyncio.create_task(town.dispatch.next_worker(job, ()))
        town.now = 100.0                             # far more than a job waits for a worker that is not there
        await town.still_waits(asked)
        assert job.homeless_since == 100.0
        lanes[0].__exit__(None, None, None)
        assert await soon(asked) == FIRST and town.dispatch.used() == {"host:0"}
        lanes[1].__exit__(None, None, None)
        assert town.dispatch.used() == set()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_jobs_that_come_together_do_not_share_a_last_lane() -> None:
    """Each asks the directory before it takes its lane, and all of them saw it free."""
    async def play() -> None:
        town = Town(FIRST, SECOND, lanes=2)
        most: dict[str, int] = {}

        async def run(job: Job) -> None:
            worker = await town.dispatch.next_worker(job, set())
            with town.dispatch.lane(job, worker):
                most[worker.id] = max(most.get(worker.id, 0), town.dispatch._lanes[worker.address])
                for _ in range(5):
                    await asyncio.sleep(0)

        await asyncio.wait_for(asyncio.gather(*(run(new_job(KEYS)) for _ in range(12))), 20)
        assert most == {FIRST.id: 2, SECOND.id: 2} and not town.dispatch.used()

    asyncio.run(play())


def test_without_anybody_a_job_waits_its_time_and_no_longer() -> None:
    async def story() -> None:
        town = Town()
        asked = asyncio.create_task(town.dispatch.next_worker(new_job(), ()))
        town.now = 4.9
        await town.still_waits(asked)
        town.change(FIRST)
        assert await soon(asked) == FIRST
        town.change()
        town.now = 5.1
        with pytest.raises(Unavailable, match="no model worker could be reached for 5 s"):
            await town.dispatch.next_worker(new_job(), ())

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_worker_that_lost_a_job_or_refused_it_gets_none_and_its_successor_does() -> None:
    async def story() -> None:
        town = Town(FIRST, SECOND)
        town.dispatch.suspect(FIRST)
        assert await town.dispatch.next_worker(new_job(), ()) == SECOND
        with pytest.raises(Unavailable):
            town.now = 5.0
            town.dispatch.suspect(FIRST)
            await town.dispatch.next_worker(new_job(), {(SECOND.id, SECOND.boot)})
        successor = Worker(id=FIRST.id, boot=b"2", address="host:9")
        town.change(successor, SECOND)
        assert await town.dispatch.next_worker(new_job(), {(SECOND.id, SECOND.boot)}) == successor
        town.change(FIRST)
        town.now = 6.1                               # the second of mistrust is over
        assert await town.dispatch.next_worker(new_job(), ()) == FIRST

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_job_that_is_asked_to_end_waits_no_more() -> None:
    async def story() -> None:
        town, job = Town(), new_job()
        asked = asyncio.create_task(town.dispatch.next_worker(job, ()))
        await asyncio.sleep(0)
        job.ending = "client"
        job.wake.set()
        with pytest.raises(Cancelled):
            await soon(asked)

    asyncio.run(asyncio.wait_for(story(), 60))


def test_what_was_sent_since_the_last_report_weighs_until_tokens_come() -> None:
    seen: list[tuple[int, int]] = []

    def choose(workers: list[Worker], _held: dict[str, int], _tokens: int) -> str:
        seen.append((workers[0].tokens_pending, workers[0].jobs_running))
        return workers[0].id

    async def story() -> None:
        town = Town(FIRST, SECOND, choose=choose, lanes=9)

        async def look() -> tuple[int, int]:
            await town.dispatch.next_worker(new_job(), ())
            return seen[-1]

        with town.dispatch.lane(new_job(prompt_tokens=10), FIRST) as settle:
            with pytest.raises(RuntimeError), town.dispatch.lane(new_job(prompt_tokens=500), FIRST):
                assert await look() == (510, 2)
                town.change(Worker(id=FIRST.id, boot=b"1", address="host:0", tokens_pending=600, jobs_waiting=1), SECOND)
                assert await look() == (600, 1), "its own report says more, and that one of the two waits"
                raise RuntimeError
            town.change(SECOND, FIRST)
            assert await look() == (0, 0), "what is at one worker is no other's"
            town.change(FIRST, SECOND)
            assert await look() == (10, 1)
            with town.dispatch.lane(new_job(prompt_tokens=7), FIRST):
                settle()
                settle()                             # every token says so; the prompt is taken out once
                assert await look() == (7, 2)
        assert await look() == (0, 0)

    asyncio.run(asyncio.wait_for(story(), 60))


def test_two_jobs_with_one_prefix_meet_before_the_directory_knows() -> None:
    async def story() -> None:
        town = Town(FIRST, SECOND)
        with town.dispatch.lane(new_job(KEYS, prompt_tokens=1000), SECOND):
            assert await town.dispatch.next_worker(new_job(KEYS), ()) == SECOND
            assert await town.dispatch.next_worker(new_job(b"x" * 64), ()) == FIRST
            town.held = {FIRST.id: 20}               # the directory knows of more there
            assert await town.dispatch.next_worker(new_job(KEYS), ()) == FIRST

    asyncio.run(asyncio.wait_for(story(), 60))


def test_recent_prefixes_know_the_process_and_forget_the_oldest() -> None:
    recent, again = RecentPrefixes(limit=6), Worker(id=FIRST.id, boot=b"2", address="")
    recent.note(KEYS[:4 * 32], FIRST)
    assert recent.leading(KEYS, FIRST) == 4 and recent.leading(KEYS, again) == 0
    recent.note(KEYS[:32], FIRST)                    # said again: the second block is the oldest now
    recent.note(b"".join(bytes([n]) * 32 for n in (100, 101, 102)), FIRST)
    assert recent.leading(KEYS, FIRST) == 1
