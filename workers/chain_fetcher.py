"""ChainFetcher: a tier hit of a replica with several shards: every shard has its own layers of it, or it is a miss.

    want --> own TierFetcher, and Want to the others          Found (here | why not) <-- each of them, by and by
    load --> own slot, and Load to the others                  what one shard misses is dropped everywhere

Each shard fetches its layers from its own host tier or Redis, ahead of need, into staging of its own. Knows keys and what
was said about them. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.workers.chain_frames import Ask, Drop, Forget, Found, Load, Message, Want
from kvbank.workers.seams import Fetcher


class Followers(Protocol):
    """The other shards (workers/chain.py)."""

    shards: int
    on_reset: list[Callable[[], None]]

    def send(self, message: Message) -> None: ...

    def take_found(self) -> list[tuple[int, Found]]: ...


@dataclass(slots=True)
class _Told:
    """One `want` of one job."""

    name: str                                # its name on the wires: an answer to an earlier want is not taken for one to this
    progress_at: float
    asked: set[BlockKey] = field(default_factory=set)
    found: dict[BlockKey, dict[int, str]] = field(default_factory=dict)      # key -> shard -> 'here' or why not
    missed: dict[BlockKey, str] = field(default_factory=dict)


class ChainFetcher:
    """Fills workers.seams.Fetcher. `local` is shard 0's own."""

    def __init__(self, local: Fetcher, chain: Followers, *, wait_s: float) -> None:
        """wait_s: how long the others may say nothing new about what a job waits for."""
        self._local, self._chain, self._wait_s = local, chain, wait_s
        self._jobs: dict[str, _Told] = {}
        self._names: dict[str, _Told] = {}
        self._numbers = count(1)
        chain.on_reset.append(self._reset)

    def want(self, job: str, keys: Sequence[BlockKey], tokens: Sequence[bytes], *, now: float) -> None:
        self.forget(job)
        told = self._begin(job, now)
        told.asked.update(keys)
        self._local.want(job, keys, tokens, now=now)
        self._chain.send(Want(told.name, tuple(keys), tuple(tokens)))

    def state(self, job: str, key: BlockKey, *, now: float) -> str:
        self._hear(now)
        told = self._jobs.get(job) or self._begin(job, now)
        if key in told.missed:
            return told.missed[key]
        mine = self._local.state(job, key, now=now)
        if mine == "coming":
            return mine
        if mine != "here":
            return self._miss(job, told, key, mine)
        if key not in told.asked:                          # nobody asked for it ahead: a lost span, or part of one
            told.asked.add(key)
            told.progress_at = now
            self._chain.send(Ask(told.name, key))
        states = told.found.get(key, {})
        wrong = next((state for state in states.values() if state != "here"), None)
        if wrong is not None:
            return self._miss(job, told, key, wrong)
        if len(states) == self._chain.shards - 1:
            return "here"
        return "coming" if now < told.progress_at + self._wait_s else self._miss(job, told, key, "timeout")

    def load(self, job: str, key: BlockKey, slot: SlotId, start: int) -> str | None:
        told = self._jobs[job]
        source = self._local.load(job, key, slot, start)
        if source is None:
            self._miss(job, told, key, "evicted")
            return None
        told.found.pop(key, None)
        told.asked.discard(key)
        self._chain.send(Load(told.name, key, slot, start))
        return source

    def drop(self, job: str, key: BlockKey) -> None:
        """It counts as missed from now on: asked again under the same name, an answer under way to the first question could
        be taken for one to the second."""
        told = self._jobs.get(job)
        if told is not None and key not in told.missed:
            self._miss(job, told, key, "evicted")

    def forget(self, job: str) -> None:
        self._local.forget(job)
        if (told := self._jobs.pop(job, None)) is not None:
            del self._names[told.name]
            self._chain.send(Forget(told.name))

    def _begin(self, job: str, now: float) -> _Told:
        told = self._jobs[job] = _Told(f"{job}/{next(self._numbers)}", now)
        self._names[told.name] = told
        return told

    def _hear(self, now: float) -> None:
        for shard, found in self._chain.take_found():
            if (told := self._names.get(found.name)) is not None and found.key in told.asked:
                told.found.setdefault(BlockKey(found.key), {})[shard] = found.state
                told.progress_at = now

    def _miss(self, job: str, told: _Told, key: BlockKey, reason: str) -> str:
        """It will not be loaded: nobody needs to keep it staged."""
        told.missed[key] = reason
        told.found.pop(key, None)
        self._local.drop(job, key)
        if key in told.asked:
            told.asked.discard(key)
            self._chain.send(Drop(told.name, key))
        return reason

    def _reset(self) -> None:
        """The other shards are gone, and every job here with them."""
        self._jobs.clear()
        self._names.clear()
