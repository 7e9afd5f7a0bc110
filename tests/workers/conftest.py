"""Engines and small banks in one process: real gRPC, real slots, a small random model. Control is a list."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbank.cluster.config import load
from kvbank.proto import control_pb2 as pb
from kvbank.workers.canary import write_canary
from kvbank.workers.engine import Engine, EngineEvent, Failed, Finished, Token
from kvbank.workers.follower_worker import FollowerWorker
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sequence import JobSpec
from kvbank.workers.service import ModelWorker, build_worker

TOKEN = "ab" * 16
VOCAB = 512


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, hidden 128, 4 heads over 2 KV heads, random weights wide enough that outputs do not degenerate."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, seed=7, vocab=VOCAB)
    return folder


@pytest.fixture(scope="session")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the model that dies of one wrong byte: 3 layers, 2 KV heads of 16, slots of 96 KiB in float32."""
    return write_canary(tmp_path_factory.mktemp("canary"))


@pytest.fixture()
def prompt() -> Callable[[int, int], list[int]]:
    """prompt(length, seed): token ids."""
    def make(length: int, seed: int = 0) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(3, VOCAB) for _ in range(length)]
    return make


class Ran:
    """What an engine's events said, by job."""

    def __init__(self, events: Sequence[EngineEvent], engine: Engine) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.tally: dict[str, Any] = {}
        self.errors: dict[str, Exception] = {}
        self.logits = dict(engine.counters.last_logits)
        for event in events:
            if isinstance(event, Token):
                self.tokens.setdefault(event.job, []).append(event.token)
            elif isinstance(event, Finished):
                self.tally[event.job] = event.tally
            elif isinstance(event, Failed):
                self.errors[event.job] = event.error


def run(engine: Engine, *jobs: JobSpec, each_step: Callable[[], None] | None = None) -> Ran:
    """Run jobs to their end on this thread."""
    engine.keep_logits = True
    for job in jobs:
        engine.add(job)
    events: list[EngineEvent] = []
    give_up = time.monotonic() + 120
    while engine.busy:
        made = engine.step()
        events += made
        if each_step is not None:
            each_step()
        if not made:
            engine.wake.wait(0.002)
        assert time.monotonic() < give_up, [(s.job.id, s.state, s.waits_for) for s in engine.jobs()]
    return Ran(events, engine)


class Town:
    """Replicas (one, unless said otherwise), some lenders, and a control plane that is this object. The test thread is the
    engine thread of every leader."""

    def __init__(self, model: Path, lenders: int, *, replicas: int = 1, **settings: Any) -> None:
        values = {"model": str(model), "device_blocks": 48, "redis": None, "host_bytes": 0, "torch_threads": 1,
                  "term_s": 30.0, **settings}
        self.settings = load(overrides=values, environ={}).flat()
        self.lenders = [self._start("lender", f"lender-{i}") for i in range(lenders)]
        shards = range(1, self.settings["shards"])
        self.followers = {shard: self._start("model", f"worker-0.{shard}", shard) for shard in shards}
        self.workers: list[ModelWorker] = [self._start("model", f"worker-{number}") for number in range(replicas)]
        self.worker = self.workers[0]
        self.refresh()

    def config(self, kind: str, name: str, shard: int = 0) -> dict[str, Any]:
        """What `build_worker` makes a member of this town from, in this process or another."""
        return {"kind": kind, "id": name, "token": TOKEN, "boot": os.urandom(16).hex(), "cache_secret": "11" * 32,
                "model_digest": "test", "settings": self.settings, "replica": 0, "shard": shard,
                "shards": self.settings["shards"] if kind == "model" else 1}

    def _start(self, kind: str, name: str, shard: int = 0) -> Any:
        member = build_worker(self.config(kind, name, shard), self if kind == "model" else None)
        if isinstance(member, FollowerWorker):
            run_shard = threading.Thread(target=member._run_shard, daemon=True)
            member._start_threads = run_shard.start       # type: ignore[method-assign]  # advice comes from `refresh`
        elif kind == "model":
            member._start_threads = lambda: None          # type: ignore[method-assign]  # the test drives the engine
        member.start("127.0.0.1:0")
        return member

    # -- ControlLine ------------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[pb.Member]:
        everybody = [*self.lenders, *self.followers.values(), *self.workers[1:]]
        return [pb.Member(id=m.id, boot=m.boot, kind=m.kind, address=m.address, slot_bytes=m.arena.slot_bytes,
                          slots_total=m.vault.num_slots) for m in everybody]

    def lenders_now(self, asker: Any = None) -> list[Any]:
        from kvbank.workers.borrower import Lender
        others = [w for w in self.workers if w is not asker and not w.borrower.num_borrowed and w.ledger.lendable()]
        if len(self.workers) == 1:
            others = []
        return [Lender(m.id, m.boot, m.address, m.ledger.lendable()) for m in [*self.lenders, *others]]

    def locate(self, keys: Sequence[bytes]) -> list[pb.Holding]:
        found = []
        for member in self.lenders:
            held = [i for i, key in enumerate(keys) if key in member.vault.index]
            found += [pb.Holding(id=member.id, first=i, count=1) for i in held]
        return found

    def beat_now(self, within_s: float) -> None:
        """Who is there is known at any time."""

    def refresh(self) -> None:
        """The advice thread's work."""
        for member in [*self.workers, *self.followers.values()]:
            member._lenders = self.lenders_now(member)

    def run(self, *jobs: JobSpec, each_step: Callable[[], None] | None = None) -> Ran:
        def step() -> None:
            self.refresh()
            if each_step is not None:
                each_step()
        return run(self.worker.engine, *jobs, each_step=step)

    def settle(self, within_s: float = 5.0) -> None:
        """Wait until nothing is lent any more."""
        give_up = time.monotonic() + within_s
        while any(m.vault.counts().lent for m in [*self.lenders, *self.workers]):
            for worker in self.workers:
                worker.engine.step()
            assert time.monotonic() < give_up, [m.vault.counts() for m in self.lenders]
            time.sleep(0.01)                              # sessions answer on threads of their own

    def kill(self, index: int) -> None:
        """A lender dies: its server stops answering and its port closes."""
        member = self.lenders.pop(index)
        member._server.stop(grace=None)
        member.banker.stop()

    def stop(self) -> None:
        for member in [*self.workers, *self.followers.values(), *self.lenders]:
            member.stop()


@pytest.fixture()
def town(small_model: Path) -> Iterator[Callable[..., Town]]:
    """town(lenders=2, model=..., **settings): started, and stopped at the end."""
    made: list[Town] = []

    def start(lenders: int = 2, **settings: Any) -> Town:
        made.append(Town(settings.pop("model", small_model), lenders, **settings))
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture()
def alone(small_model: Path) -> Callable[..., Engine]:
    """alone(**worker settings): the engine of one big worker without neighbours, for comparison."""
    from kvbank.workers.assembly import build_engine
    from kvbank.workers.config import WorkerConfig

    torch.set_num_threads(1)

    def build(**settings: Any) -> Engine:
        return build_engine(WorkerConfig(model=str(small_model), **{"device_blocks": 1024, **settings}))
    return build


@pytest.fixture()
def run_jobs() -> Callable[..., Ran]:
    return run
