"""Who gets a thread, when there are too few; and nobody who went away keeps one."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kvbank.cluster.turns import Turns
from kvbank.errors import Overloaded


def play(story: Any) -> Any:
    return asyncio.run(asyncio.wait_for(story, 20))


class Gate:
    """Work that waits until it may go on, and notes when it began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.goes = threading.Semaphore(0)

    def work(self, name: str) -> str:
        self.began.append(name)
        assert self.goes.acquire(timeout=20)
        return name


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_tenants_take_turns_whatever_one_of_them_sends() -> None:
    async def story() -> None:
        turns, gate = Turns("reading", threads=1), Gate()
        asked = [asyncio.ensure_future(turns.run("alice", gate.work, f"a{n}")) for n in range(5)]
        await asyncio.sleep(0)
        asked += [asyncio.ensure_future(turns.run(who, gate.work, f"{who[0]}{n}")) for n in range(2) for who in ("bob", "carol")]
        await until(lambda: len(gate.began) == 1)
        gate.goes.release(len(asked))
        assert await asyncio.gather(*asked) == ["a0", "a1", "a2", "a3", "a4", "b0", "c0", "b1", "c1"]
        assert gate.began == ["a0", "a1", "b0", "c0", "a2", "b1", "c1", "a3", "a4"]
        assert turns._free == 1 and not turns._queues

    play(story())


def test_too_much_of_one_tenant_is_refused_and_another_is_not() -> None:
    async def story() -> None:
        turns, gate = Turns("reading", threads=1, waiting=2), Gate()
        asked = [asyncio.ensure_future(turns.run("alice", gate.work, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests of yours wait for reading"):
            await turns.run("alice", gate.work, "a")
        asked.append(asyncio.ensure_future(turns.run("bob", gate.work, "b")))
        gate.goes.release(4)
        assert await asyncio.gather(*asked) == ["a", "a", "a", "b"]

    play(story())


@pytest.mark.parametrize("moment", ["waiting", "working", "called"])
def test_who_goes_away_keeps_no_turn(moment: str) -> None:
    async def story() -> None:
        turns, gate = Turns("reading", threads=1), Gate()
        first, second, third = (asyncio.ensure_future(turns.run(who, gate.work, who)) for who in ("alice", "bob", "carol"))
        await until(lambda: gate.began == ["alice"])
        if moment == "called":                       # its turn comes, and it is cancelled before it hears of it
            turns._free = -1
            turns._pass_on()
            second.cancel()
        else:
            (second if moment == "waiting" else first).cancel()
        gate.goes.release(3)
        told = await asyncio.gather(first, second, third, return_exceptions=True)
        gone = 0 if moment == "working" else 1
        assert isinstance(told[gone], asyncio.CancelledError) and told[2] == "carol"
        assert gate.began == (["alice", "bob", "carol"] if moment == "working" else ["alice", "carol"])
        await until(lambda: turns._free == 1)
        assert not turns._queues

    play(story())


def test_what_the_work_raises_is_raised_and_frees_the_thread() -> None:
    async def story() -> None:
        turns = Turns("reading", threads=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await turns.run("alice", lambda: 1 // 0)
        assert turns._free == 1

    play(story())
