"""Reading what jobs say while they say it: any number of jobs by one reader, who is woken once for all that a step brought.

    jobs --announce--> one event --> cursors --> [(which job, piece), ...]

A reader keeps a place in each job's output, so that none can slow another, and a late one begins anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from kvbank.cluster.job import Job


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a job's output: ids `index ..` and the text that they released."""

    index: int
    token_ids: list[int]
    text: str


END = Piece(-1, [], "")                  # follows the last piece of a job


class Cursor:
    """One reader's place in the output of one job."""

    def __init__(self, job: Job, first: int = 0) -> None:
        """first: index of the first token that is told; the next one that comes if there are not so many yet."""
        self._job, self._at = job, min(first, len(job.ids))
        self.ended = False

    def take(self) -> list[Piece]:
        """What came since, and END once the job is over."""
        job, pieces = self._job, []
        if self._at < len(job.ids):
            ids = job.ids[self._at :]
            pieces.append(Piece(self._at, ids, "".join(job.texts[self._at :])))
            self._at += len(ids)
        if job.over and not self.ended:
            self.ended = True
            if job.tail:
                pieces.append(Piece(self._at, [], job.tail))
            pieces.append(END)
        return pieces


async def follow(jobs: Sequence[Job], first: int = 0, *, quiet_s: float) -> AsyncGenerator[list[tuple[int, Piece]]]:
    """(number of the job, what it said next) of all that came at once, until each has ended; an empty list when `quiet_s`
    passed or only progress changed."""
    cursors, news = [Cursor(job, first) for job in jobs], asyncio.Event()
    loop = asyncio.get_running_loop()
    since: float | None = None                       # when it began to wait, if it waits

    def came() -> list[tuple[int, Piece]]:
        return [(number, piece) for number, cursor in enumerate(cursors) for piece in cursor.take()]

    timer: asyncio.TimerHandle

    def look() -> None:
        """Now and then: a timer for each wait costs more than the waits."""
        nonlocal timer
        left = quiet_s if since is None else since + quiet_s - loop.time()
        if left <= 0:
            news.set()
            left = quiet_s
        timer = loop.call_later(left, look)

    timer = loop.call_later(quiet_s, look)
    for job in jobs:
        job.watchers.add(news)
    try:
        if said := came():
            yield said
        while not all(cursor.ended for cursor in cursors):
            if not news.is_set():
                since = loop.time()
                await news.wait()
                since = None
            news.clear()
            yield came()
    finally:
        timer.cancel()
        for job in jobs:
            job.watchers.discard(news)
