"""Turns: slow work on a few threads beside one event loop, the tenants by turns: one's load holds up another's by one piece.

    run(tenant, work) --[all threads busy: queue of this tenant]--> a thread --> the next tenant's oldest
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from kvbank.errors import Overloaded

T = TypeVar("T")


class Turns:
    """All methods run on the event loop."""

    def __init__(self, what: str, *, threads: int = 2, waiting: int = 1024) -> None:
        """what: is done here, as an error says it. waiting: pieces of one tenant that may wait; one more is Overloaded."""
        self._what, self._limit, self._free = what, waiting, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=what.replace(" ", "-"))
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()      # who is next stands first; none is empty

    async def run(self, tenant: str, work: Callable[..., T], *given: Any) -> T:
        """What `work(*given)` gives, on a thread of ours. Raises Overloaded, and what it raises."""
        await self._turn(tenant)
        loop = asyncio.get_running_loop()

        def ended(_work: Future[T]) -> None:         # not when nobody waits any more: the thread is busy until then
            with suppress(RuntimeError):             # the loop has closed
                loop.call_soon_threadsafe(self._pass_on)

        future = self._pool.submit(work, *given)
        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    async def _turn(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            return
        mine = self._queues.setdefault(tenant, deque())
        if len(mine) >= self._limit:
            raise Overloaded(f"{self._limit} requests of yours wait for {self._what} already; retry in a moment")
        turn = asyncio.get_running_loop().create_future()
        mine.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():                 # it was our turn, just now
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """A thread is free: the next one's turn."""
        while self._queues:
            tenant, mine = self._queues.popitem(last=False)
            turn = mine.popleft()
            if mine:
                self._queues[tenant] = mine          # behind the others
            if not turn.done():                      # else it has gone away
                turn.set_result(None)
                return
        self._free += 1
