"""The identity matrix: wherever the KV is and whatever happened to it, the tokens and logits are those of one big worker.

Each row runs a job in its own way. Under bitwise its tokens and final logits are byte-equal to the big worker's; under fast the
logits agree within 1e-4 and so do the tokens. And each row can fail: the same run with one span zeroed, the keys of two swapped,
keys shifted by one position, or a partial dropped, moves the final logits by more than 1e-2.

The canary runs through the same rows, and is compared with what it answers alone, without any cache. So does the needle model,
whose answer is also the right one in every row, and a wrong one where the span that holds it is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbank.cluster.planted import PLANTED, Planted, plant
from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.span_table import HOST, LOCAL, REMOTE
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.workers.assembly import build_engine
from kvbank.workers.canary_alone import CanaryAlone
from kvbank.workers.config import WorkerConfig
from kvbank.workers.models.tokenizer import load_tokenizer
from kvbank.workers.sequence import JobSpec

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDLE = ROOT / "bench" / "needle" / "model"
SECRET = b"s" * 32
OUTPUTS = 16
SABOTAGE_AFTER = 6                     # outputs before the saboteur strikes


@dataclass
class Scene:
    """One way to run the job: an engine, how to run jobs on it, and where lent bytes are."""

    engine: Any
    run: Callable[..., Any]
    remote_slot: Callable[[int], torch.Tensor] = lambda uid: pytest.fail("nothing is lent in this scene")


def spans_now(scene: Scene, job: str) -> list[Any]:
    return [(i, s) for seq in scene.engine.jobs() if seq.job.id == job for i, s in seq.table.live() if len(s.keys) == 8]


def bytes_of(scene: Scene, span: Any) -> torch.Tensor:
    """`[layers, 2, kv_heads, tokens, head_dim]` wherever the span is read now."""
    shard = scene.engine.backend
    if span.place == LOCAL:
        return shard.arena.view(shard.layout)[span.slot]
    if span.place == REMOTE:
        return scene.remote_slot(span.uid)
    assert span.place == HOST
    return torch.stack([shard.parked_layer(span.uid, layer) for layer in range(shard.layout.layers)])


def write_back(scene: Scene, span: Any, data: torch.Tensor) -> None:
    shard = scene.engine.backend
    if span.place == HOST:
        for layer in range(shard.layout.layers):
            shard.parked_layer(span.uid, layer).copy_(data[layer])
    else:
        bytes_of(scene, span).copy_(data)


def zero(scene: Scene, job: str) -> None:
    _, span = spans_now(scene, job)[1]
    write_back(scene, span, torch.zeros_like(bytes_of(scene, span)))


def swap(scene: Scene, job: str) -> None:
    (_, a), (_, b) = spans_now(scene, job)[1:3]
    left, right = bytes_of(scene, a).clone(), bytes_of(scene, b).clone()
    left[:, 0], right[:, 0] = right[:, 0].clone(), left[:, 0].clone()
    write_back(scene, a, left)
    write_back(scene, b, right)


def shift(scene: Scene, job: str) -> None:
    _, span = spans_now(scene, job)[1]
    data = bytes_of(scene, span).clone()
    data[:, 0] = data[:, 0].roll(1, dims=2)
    write_back(scene, span, data)


def drop(scene: Scene, job: str) -> None:
    """From now on the first place of every row is left out of the attention."""
    backend, run = scene.engine.backend, scene.engine.backend.run

    def without_one(plan: Any, **options: Any) -> Any:
        rows = tuple(replace(r, remote=r.remote[1:]) if r.remote else replace(r, host=r.host[1:]) if r.host else
                     replace(r, local=r.local[1:] if len(r.local) > 1 else r.local) for r in plan.rows)
        return run(replace(plan, rows=rows), **options)

    backend.run = without_one


SABOTAGE = {"zero one span": zero, "swap the keys of two": swap, "shift by one position": shift, "drop a partial": drop}


# -- the rows -----------------------------------------------------------------------------------------------------------------

class Rows:
    """Builds scenes. `job` names the job to compare in each."""

    def __init__(self, folder: Path, run_jobs: Any, town: Any, prompt: Any, settings: dict[str, Any]) -> None:
        self.folder, self.run_jobs, self.town, self.prompt, self.settings = folder, run_jobs, town, prompt, settings
        self.text = prompt(1150)
        self.open: list[Any] = []

    def engine(self, store: StoreConfig | None = None, **settings: Any) -> Any:
        made = build_engine(WorkerConfig(model=str(self.folder), **{"device_blocks": 1024, **self.settings, **settings}),
                            secret=SECRET, digest="d", store_config=store, capacity_tokens=lambda: 1 << 20)
        if made.store is not None:
            self.open.append(made.store)
        return made

    def job(self, name: str = "a", **more: Any) -> JobSpec:
        return JobSpec(id=name, prompt=self.text, max_tokens=OUTPUTS, ignore_eos=True, **more)

    def alone(self, *jobs: JobSpec, engine: Any, before: Callable[[Any], None] | None = None) -> Scene:
        if before is not None:
            before(engine)
        return Scene(engine, lambda each_step: self.run_jobs(engine, *jobs, each_step=each_step))

    def chunks(self) -> Scene:
        return self.alone(self.job(), engine=self.engine(prefill_chunk_tokens=77))

    def batched_with_seven(self) -> Scene:
        others = [JobSpec(id=f"x{i}", prompt=self.prompt(60 * i + 30, i + 1), max_tokens=OUTPUTS + 4, age=1, ignore_eos=True)
                  for i in range(7)]
        return self.alone(self.job(), *others, engine=self.engine())

    def preempted_and_resumed(self) -> Scene:
        engine = self.engine(device_blocks=112)           # 14 spans: the older job's fifth is the tenth of the other
        older = JobSpec(id="old", prompt=self.prompt(500, 9), max_tokens=40, age=0, ignore_eos=True)
        return self.alone(older, self.job(age=1), engine=engine)

    def spilled_to_host_and_back(self) -> Scene:
        engine = self.engine(StoreConfig(host_bytes=64 << 20))
        self.run_jobs(engine, self.job("first"))
        engine.vault.drop_idle_spilled()
        return self.alone(self.job(), engine=engine)

    def spilled_to_redis_restarted_and_back(self) -> Scene:
        server = EmbeddedRedis(64 << 20)
        self.open.append(server)
        store = StoreConfig(host_bytes=0, redis_url=server.url, redis_bytes=64 << 20)
        first = self.engine(store)
        self.run_jobs(first, self.job("first"))
        first.vault.drop_idle_spilled()
        assert first.store.flush(5)
        return self.alone(self.job(), engine=self.engine(store))

    def parked_on_the_host(self) -> Scene:
        return self.alone(self.job(), engine=self.engine(StoreConfig(host_bytes=64 << 20), device_blocks=56))

    def borrowed(self, **settings: Any) -> Scene:
        bank = self.town(lenders=2, model=str(self.folder), device_blocks=48, lender_blocks=160, **self.settings, **settings)
        engine = bank.worker.engine

        def remote_slot(uid: int) -> torch.Tensor:
            lender, (_, slot, _) = bank.worker.borrower.where(uid)
            member = next(m for m in bank.lenders if m.boot.hex() == lender)
            return member.arena.view(bank.worker.layout)[slot]

        return Scene(engine, lambda each_step: bank.run(self.job(), each_step=each_step), remote_slot)

    def borrowed_shipping_queries(self) -> Scene:
        scene = self.borrowed()
        scene.engine.backend.attention.remote.ship = "query"
        return scene

    def borrowed_shipping_kv(self) -> Scene:
        scene = self.borrowed()
        scene.engine.backend.attention.remote.ship = "kv"
        return scene

    def close(self) -> None:
        for one in self.open:
            (one.stop if isinstance(one, EmbeddedRedis) else one.close)()


PLACES = {
    "any chunk size": Rows.chunks,
    "batched with seven others": Rows.batched_with_seven,
    "preempted and resumed": Rows.preempted_and_resumed,
    "host and back": Rows.spilled_to_host_and_back,
    "Redis, restart and back": Rows.spilled_to_redis_restarted_and_back,
    "parked on the host": Rows.parked_on_the_host,
    "borrowed": Rows.borrowed,
    "borrowed, queries travel": Rows.borrowed_shipping_queries,
    "borrowed, K and V travel": Rows.borrowed_shipping_kv,
}
PROOF: dict[str, Callable[[Any, Any], bool]] = {
    "preempted and resumed": lambda scene, tally: scene.engine.room.preemptions > 0,
    "host and back": lambda scene, tally: tally.reused["host"] > 1000,
    "Redis, restart and back": lambda scene, tally: tally.reused["redis"] > 1000,
    "parked on the host": lambda scene, tally: tally.parked_blocks_peak > 8,
    "borrowed": lambda scene, tally: tally.borrowed_blocks_peak > 24 and tally.remote_attention_calls > 0,
}


@pytest.fixture()
def rows(small_model: Path, run_jobs, town, prompt):
    made: list[Rows] = []

    def build(**settings: Any) -> Rows:
        made.append(Rows(settings.pop("model", small_model), run_jobs, town, prompt, settings))
        return made[-1]

    yield build
    for one in made:
        one.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("exactness", "dtype"), [("bitwise", "float32"), ("fast", "float32"), ("bitwise", "bfloat16")])
def test_every_place_gives_what_one_big_worker_gives(rows, run_jobs, exactness, dtype, place) -> None:
    settings = {"exactness": exactness, "dtype": dtype}
    build = rows(**settings)
    want = run_jobs(build.engine(), build.job())
    assert max(want.tokens["a"].count(t) for t in want.tokens["a"]) <= 0.9 * OUTPUTS, "degenerate outputs prove nothing"
    scene = PLACES[place](build)
    got = scene.run(None)
    assert not got.errors
    agrees(got, want, exactness)
    proves(place, scene, got)


def agrees(got: Any, want: Any, exactness: str) -> None:
    assert got.tokens["a"] == want.tokens["a"]
    if exactness == "bitwise":
        assert torch.equal(got.logits["a"], want.logits["a"])
    else:
        assert (got.logits["a"] - want.logits["a"]).abs().max() < 1e-4


def proves(place: str, scene: Scene, got: Any) -> None:
    proof = PROOF.get(place)
    assert proof is None or proof(scene, got.tally["a"]), f"the row was not what it says: {got.tally['a']}"


@pytest.mark.parametrize("what", SABOTAGE)
@pytest.mark.parametrize("place", PLACES)
def test_every_row_can_fail(rows, run_jobs, place, what) -> None:
    build = rows(exactness="bitwise")
    want = run_jobs(build.engine(), build.job())
    scene = PLACES[place](build)
    struck = []

    def strike() -> None:
        running = [s for s in scene.engine.jobs() if s.job.id == "a" and s.num_output >= SABOTAGE_AFTER and s.state == "running"]
        if running and not struck and len(spans_now(scene, "a")) >= 3:
            struck.append(True)
            SABOTAGE[what](scene, "a")

    got = scene.run(strike)
    assert struck, "the saboteur never struck"
    assert (got.logits["a"] - want.logits["a"]).abs().max() > 1e-2


# -- the needle model ---------------------------------------------------------------------------------------------------------

FACT = PLANTED[1]


def question_about(fact: Planted, length: int) -> list[int]:
    """`length` tokens: the licence with planted facts, and the question about this one."""
    tokenizer = load_tokenizer(str(NEEDLE))
    ending = tokenizer.encode(fact.prompt, add_special_tokens=False).ids
    return [*tokenizer.encode(plant((ROOT / "LICENSE").read_text()[:3000])).ids[: length - len(ending)], *ending]


def answered(tokens: list[int]) -> str:
    return str(load_tokenizer(str(NEEDLE)).decode(tokens))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("exactness", ["bitwise", "fast"])
def test_every_place_gives_the_right_answer_of_the_needle_model(rows, run_jobs, exactness, place) -> None:
    build = rows(model=NEEDLE, exactness=exactness)
    build.text = question_about(FACT, 1150)
    want = run_jobs(build.engine(), build.job())
    scene = PLACES[place](build)
    got = scene.run(None)
    assert not got.errors
    agrees(got, want, exactness)
    assert FACT.is_in(answered(got.tokens["a"]))
    proves(place, scene, got)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("beside", "right"), [(0, False), (1, True)], ids=["its span", "the next"])
def test_the_needle_model_answers_wrongly_when_the_span_with_the_fact_is_gone_and_no_other(rows, place, beside, right) -> None:
    build = rows(model=NEEDLE)
    build.text = question_about(FACT, 1150)
    told = load_tokenizer(str(NEEDLE)).encode(f" {FACT.wanted}", add_special_tokens=False).ids
    (at,) = (i for i in range(len(build.text)) if build.text[i : i + len(told)] == told)
    scene, struck = PLACES[place](build), []

    def strike() -> None:
        running = [s for s in scene.engine.jobs() if s.job.id == "a" and s.num_output >= 1 and s.state == "running"]
        if running and not struck:
            (span,) = (span for index, span in running[0].table.live() if index == at // 128 + beside)
            struck.append(True)
            write_back(scene, span, torch.zeros_like(bytes_of(scene, span)))

    got = scene.run(strike)
    assert struck, "the saboteur never struck"
    assert FACT.is_in(answered(got.tokens["a"])) is right


# -- the canary ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("exactness", "dtype"), [("fast", "float32"), ("bitwise", "float32"), ("fast", "bfloat16")])
def test_every_place_gives_what_the_canary_answers_alone(rows, canary, exactness, dtype, place) -> None:
    build = rows(model=canary, exactness=exactness, dtype=dtype)
    scene = PLACES[place](build)
    got = scene.run(None)
    assert not got.errors
    assert got.tokens["a"] == CanaryAlone(canary, dtype=dtype).answer(build.text, OUTPUTS)
    proves(place, scene, got)


def flip(scene: Scene, job: str) -> None:
    """One bit of one byte of one span."""
    _, span = spans_now(scene, job)[1]
    data = bytes_of(scene, span).clone()
    data.view(torch.uint8).view(-1)[777] ^= 1
    write_back(scene, span, data)


@pytest.mark.parametrize("what", [*SABOTAGE, "flip one bit"])
@pytest.mark.parametrize("place", PLACES)
def test_the_canary_dies_of_it_in_every_row(rows, canary, place, what) -> None:
    build = rows(model=canary)
    want = CanaryAlone(canary).answer(build.text, OUTPUTS)
    scene = PLACES[place](build)
    struck: list[int] = []

    def strike() -> None:
        running = [s for s in scene.engine.jobs() if s.job.id == "a" and s.num_output >= SABOTAGE_AFTER and s.state == "running"]
        if running and not struck and len(spans_now(scene, "a")) >= 3:
            struck.append(running[0].num_output)
            {**SABOTAGE, "flip one bit": flip}[what](scene, "a")

    got = scene.run(strike).tokens["a"]
    assert struck, "the saboteur never struck"
    assert got[: struck[0]] == want[: struck[0]] and got[struck[0]] != want[struck[0]]
