"""A town with several model workers, each lender to the others, driven step by step by one thread; and its bad weather.

The members are real: gRPC between them, their own threads for sessions, bulk and attention, a Redis if its URL is given.
Only control and the engines' own threads are replaced, by the test's thread.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from kvbank.kvstore.hashing import model_digest
from kvbank.kvstore.ledger import RECALLED, SEALED
from kvbank.kvstore.loan_events import Drain, Need, PeerGone
from kvbank.kvstore.messages import Hello
from kvbank.kvstore.transport import wire
from kvbank.kvstore.transport.links import PUT
from kvbank.proto import control_pb2 as pb
from kvbank.workers.models.config_reader import read_config
from tests.workers.conftest import Town

SPAN, BLOCK = 32, 8                          # small spans: the same life in a quarter of the work
SLOT = 3 * 2 * 2 * SPAN * 16 * 4             # of the canary in float32


class City(Town):
    """`workers` model workers and `lenders` lenders. `self.worker` is the first."""

    def __init__(self, model: Path, *, workers: int = 2, lenders: int = 2, **settings: Any) -> None:
        self.workers: list[Any] = []
        super().__init__(model, lenders, **{"span_tokens": SPAN, "block_size": BLOCK, "workers": workers, **settings})
        self.workers = [self.worker, *(self._start("model", f"worker-{n}") for n in range(1, workers))]
        self.refresh()

    def config(self, kind: str, name: str, shard: int = 0) -> dict[str, Any]:
        folder = self.settings["model"]
        return {**super().config(kind, name, shard), "model_digest": model_digest(folder, read_config(folder).identity())}

    @property
    def living(self) -> list[Any]:
        return [*(self.workers or [self.worker]), *self.followers.values(), *self.lenders]

    @property
    def members(self) -> list[pb.Member]:
        return [pb.Member(id=m.id, boot=m.boot, kind=m.kind, address=m.address, slot_bytes=m.arena.slot_bytes,
                          slots_total=m.vault.num_slots) for m in [*self.lenders, *self.followers.values(), *self.workers]]

    def locate(self, keys: Sequence[bytes]) -> list[pb.Holding]:
        found = super().locate(keys)
        for member in self.workers:
            held = [i for i, key in enumerate(keys) if key in member.vault.index]
            found += [pb.Holding(id=member.id, first=i, count=1) for i in held]
        return found

    def refresh(self) -> None:
        super().refresh()
        from kvbank.workers.borrower import Lender
        for worker in self.workers:
            peers = [Lender(m.id, m.boot, m.address, m.ledger.lendable()) for m in self.workers if m is not worker]
            worker._lenders = [*self.lenders_now(), *peers]

    def born(self, name: str) -> Any:
        """A new lender."""
        self.lenders.append(self._start("lender", name))
        return self.lenders[-1]

    def step(self) -> list[tuple[Any, Any]]:
        """One step of every worker: (worker, event)."""
        self.refresh()
        return [(worker, event) for worker in self.workers for event in worker.engine.step()]

    def stop(self) -> None:
        for worker in self.workers[1:]:
            worker.stop()
        super().stop()


class Cut(grpc.RpcError):
    """The connection broke after the call was served."""


class Weather:
    """What goes wrong between members, and what happens to them. Shares of messages; all dice are one generator."""

    def __init__(self, city: City, rng: random.Random, *, audit: Any = None, lost: float = 0.02, twice: float = 0.05,
                 late: float = 0.03, garbled: float = 0.03, silent: float = 0.002) -> None:
        """audit: told of slots that rot in a city with verify_attend; without it none does."""
        self.city, self.rng, self.audit = city, rng, audit
        self.lost, self.twice, self.late, self.garbled, self.silent = lost, twice, late, garbled, silent
        self.did: Counter[str] = Counter()
        self._tapped: set[bytes] = set()
        self._timers: list[threading.Timer] = []
        self._garbled: set[bytes] = set()    # a Fetch twice garbled means that the lender's bytes are wrong: once each
        self._births = 0
        self.calm = False
        self.tap()

    def tap(self) -> None:
        """Stand between all members, those that are new too."""
        for member in self.city.living:
            if member.boot not in self._tapped:
                self._tapped.add(member.boot)
                self._tap(member)

    def clear(self) -> None:
        """From now on everything arrives."""
        self.calm = True
        for timer in self._timers:
            timer.join()

    def _dice(self, what: str, odds: float) -> bool:
        hit = not self.calm and self.rng.random() < odds
        self.did[what] += hit
        return hit

    def _tap(self, member: Any) -> None:
        banker, links = member.banker, member.banker.links
        arrived, bulk, hot = banker.arrived, links.bulk, links.hot

        def hear(data: bytes) -> None:
            if isinstance(wire.unpack(data).message, Hello):       # the session's own; it comes first and once
                arrived(data)
                return
            if self._dice("lost", self.lost):
                return
            for _ in range(2 if self._dice("twice", self.twice) else 1):
                if self._dice("late", self.late):
                    self._timers = [timer for timer in self._timers if timer.is_alive()]
                    self._timers.append(threading.Timer(self.rng.uniform(0.02, 1.2), arrived, (data,)))
                    self._timers[-1].daemon = True
                    self._timers[-1].start()
                else:
                    arrived(data)

        def call(boot: Any, method: str) -> Callable[..., Any]:
            return self._put(bulk(boot, method)) if method == PUT else self._fetch(bulk(boot, method))

        def stream(boot: Any, **options: Any) -> Any:
            return self._hot(hot(boot, **options))

        banker.arrived, links.bulk, links.hot = hear, call, stream

    def _put(self, real: Callable[..., bytes]) -> Callable[..., bytes]:
        def put(messages: Iterator[bytes], **options: Any) -> bytes:
            said = list(messages)
            sent = list(said)
            if self._dice("garbled Put", self.garbled) and len(sent) > 1:
                sent[-1] = _flipped(sent[-1], self.rng)
            elif self._dice("cut Put", self.garbled):
                sent = sent[:-1]
            answer = real(iter(sent), **options)
            if self._dice("Put twice", self.twice):
                answer = real(iter(said), **options)
            if self._dice("lost Sealed", self.lost):
                raise Cut
            return answer
        return put

    def _fetch(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def fetch(request: bytes, **options: Any) -> Iterator[bytes]:
            answer = list(real(request, **options))
            if len(answer) > 1 and request not in self._garbled and self._dice("garbled Fetch", 10 * self.garbled):
                self._garbled.add(request)
                answer[0] = answer[0][:1] + _flipped(answer[0][1:], self.rng)
            elif self._dice("cut Fetch", self.garbled):
                answer = answer[:-1]
            return iter(answer)
        return fetch

    def _hot(self, link: Any) -> Any:
        if not hasattr(link, "untapped"):
            link.untapped = link.receive
            spare: list[bytes] = []

            def receive() -> bytes:
                if spare:
                    return spare.pop()
                if self._dice("lost Partial", self.silent):
                    link.untapped()
                data = bytes(link.untapped())
                if self._dice("Partial twice", self.twice):
                    spare.append(data)
                return data

            link.receive = receive
        return link

    # -- what happens to members -------------------------------------------------------------------------------------

    def strike(self) -> None:
        """One thing happens to somebody. On the thread that drives the city."""
        rng, city = self.rng, self.city
        lender = rng.choice(city.lenders)
        match rng.randrange(14):
            case 0 if len(city.lenders) > 1:
                city.kill(city.lenders.index(lender))
                self.did["died"] += 1
            case 1 if len(city.lenders) < 4:
                city.born(f"lender-new-{self._births}")
                self._births += 1
                self.did["born"] += 1
            case 2:
                lender.banker.tell_ledger(Drain())
                self.did["drain"] += 1
            case 3 | 4 | 11:
                lender.banker.tell_ledger(Need(rng.randint(1, 3), (-1.0, "me"), rng.random() < 0.5))
                self.did["need"] += 1
            case 5:
                rng.choice(city.workers).banker.peer_gone(lender.boot)
                self.did["false alarm of a worker"] += 1
            case 10:                                               # its borrowers read on, and are told that it is stale
                lender.banker.tell_ledger(PeerGone(rng.choice(city.workers).boot))
                self.did["false alarm of a lender"] += 1
            case 6 | 12 if (store := rng.choice(city.workers).store) is not None and store._host is not None:
                self.did["spoiled host frame"] += spoil_host(store._host, rng)
            case 7 if city.settings["redis"]:
                self.did["spoiled Redis value"] += spoil_redis(city.settings["redis"], rng)
            case 8 | 9 if city.settings["verify_attend"] and self.audit is not None:
                self.did["rotten slot"] += rot(lender, self.audit, rng)
            case _:
                for member in city.lenders:
                    member.banker.tell_ledger(Drain(on=False))
        self.tap()


def rot(lender: Any, audit: Any, rng: random.Random) -> bool:
    """A byte of a sealed slot changes in the lender's memory."""
    with lender.vault.lock:
        sealed = [slot for slot in lender.ledger._lent.values() if slot.state in (SEALED, RECALLED) and not slot.pins]
        if not sealed:
            return False
        number = rng.choice(sealed).ref.slot
        audit.excused.add((lender.boot, number))
        lender.arena.slot(number)[rng.randrange(lender.layout.slot_bytes)] ^= 1 << rng.randrange(8)
    return True


def spoil_host(host: Any, rng: random.Random) -> int:
    """One byte each of some frames on the host tier changes; not of those that somebody reads or has parked there."""
    with host._lock:
        frames = [held for held in host._frames.values() if held.movable and not held.pins and not held.holds]
        for held in (chosen := rng.sample(frames, min(3, len(frames)))):
            held.memory[rng.randrange(held.size)] ^= 1 << rng.randrange(8)
    return len(chosen)


def spoil_redis(url: str, rng: random.Random) -> int:
    """Some values of ours are flipped, cut, or put under another's name."""
    import redis

    with redis.Redis.from_url(url) as server:
        names = sorted(name for name in server.scan_iter(match=b"kvb:*", count=1000) if server.type(name) == b"string")
        chosen = rng.sample(names, min(8, len(names)))
        values = {name: value for name in chosen if (value := server.get(name)) and len(value) > 500}
        for name, value in values.items():
            server.set(name, rng.choice([_flipped(value, rng), value[:-7], rng.choice(list(values.values()))]))
    return len(values)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
