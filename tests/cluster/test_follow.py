"""One reader of many jobs hears every token of each once and in order, whatever the two do meanwhile."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from kvbank.cluster.follow import END, Piece, follow
from kvbank.cluster.job import Job

TAIL = "!"


def new_job() -> Job:
    text: Any = SimpleNamespace(stopped=False, push=lambda ids: f"<{ids[0]}>", finish=lambda: TAIL)
    spec: Any = SimpleNamespace(logprobs=None)
    return Job(id="a", wire_id="a", spec=spec, text=text, seed=1, age=1.0, created=0.0, started_at=0.0)


def say_next(job: Job) -> None:
    job.take(len(job.ids), 1.0)
    job.announce()


def end(job: Job) -> None:
    job.tail, job.ended_at = TAIL, 1.0
    job.announce()


async def play(rng: Random) -> None:
    jobs, first = [new_job() for _ in range(rng.randint(1, 5))], rng.choice((0, 0, 2))
    lengths = [rng.randint(0, 6) for _ in jobs]
    for job, length in zip(jobs, lengths, strict=True):
        for _ in range(rng.randint(0, length)):
            say_next(job)
    begins = [min(first, len(job.ids)) for job in jobs]
    heard: list[list[Piece]] = [[] for _ in jobs]

    async def read() -> None:
        async for said in follow(jobs, first, quiet_s=rng.choice((0.002, 60.0))):
            for number, piece in said:
                heard[number].append(piece)
            if rng.random() < 0.5:                   # a slow reader
                await asyncio.sleep(rng.random() * 0.001)

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)                           # it has taken its places
    running = list(zip(jobs, lengths, strict=True))
    while running:
        job, length = running[at := rng.randrange(len(running))]
        if len(job.ids) < length:
            say_next(job)
        else:
            end(job)
            del running[at]
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.wait_for(reader, 10)
    for job, pieces, begin, length in zip(jobs, heard, begins, lengths, strict=True):
        assert pieces[-1] is END and END not in pieces[:-1] and not job.watchers
        assert [token for piece in pieces for token in piece.token_ids] == list(range(begin, length))
        assert "".join(piece.text for piece in pieces) == "".join(f"<{n}>" for n in range(begin, length)) + TAIL


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_missed_or_told_twice(seed: int) -> None:
    async def several() -> None:
        rng = Random(seed)
        for _ in range(20):
            await play(rng)

    asyncio.run(several())


def test_a_quiet_time_and_a_change_without_tokens_are_told_as_nothing() -> None:
    async def read() -> None:
        job = new_job()
        news = follow([job], quiet_s=0.01)
        assert await anext(news) == []               # quiet
        slow = follow([job], quiet_s=60)
        waiting = asyncio.ensure_future(anext(slow))
        await asyncio.sleep(0)
        job.announce()                               # progress
        assert await asyncio.wait_for(waiting, 10) == []
        await news.aclose()
        await slow.aclose()
        assert not job.watchers

    asyncio.run(read())


def test_a_reader_that_is_busy_is_not_told_that_it_is_quiet() -> None:
    async def read() -> list[int]:
        job, told, loop = new_job(), [], asyncio.get_running_loop()
        loop.call_soon(say_next, job)
        async for said in follow([job], quiet_s=0.02):
            told.append(len(said))
            if len(told) == 3:
                break
            await asyncio.sleep(0.1)                 # longer than a quiet time
            loop.call_soon(say_next, job)
        return told

    assert asyncio.run(asyncio.wait_for(read(), 10)) == [1, 1, 1]
