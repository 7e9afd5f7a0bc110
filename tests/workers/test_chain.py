"""A model cut into shards gives the tokens and logits of the whole; a lost shard ends its replica's jobs, no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from kvbank.errors import Unavailable
from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.store import BlockStore, build_store
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.vault import Vault
from kvbank.workers.assembly import Parts, build_engine, build_shard, layout_of, root_keys, widest_window
from kvbank.workers.chain import Chain, ChainTimings
from kvbank.workers.chain_bank import ChainBank
from kvbank.workers.chain_fetcher import ChainFetcher
from kvbank.workers.chain_frames import Books, Step
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine, Finished, Token
from kvbank.workers.fetcher import TierFetcher
from kvbank.workers.follower import Follower
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sampler import SamplingParams
from kvbank.workers.seams import NoBank
from kvbank.workers.sequence import JobSpec

TOKEN = "cd" * 16
BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])


def eventually(holds: Callable[[], bool], otherwise: str, within_s: float = 10.0) -> None:
    """Wait for what another thread is about to do."""
    give_up = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.002)


def shard_with_shelves(
    config: WorkerConfig, shelves: StoreConfig, wake: Callable[[], None]
) -> tuple[Parts, BlockStore | None, TierFetcher | None]:
    model = read_config(config.model)
    if not shelves.host_bytes and shelves.redis_url is None:
        return build_shard(config, model=model), None, None
    host = HostTier(shelves.host_bytes) if shelves.host_bytes else None
    store = build_store(shelves, layout_of(model, config), b"s" * 32, host=host)
    parts = build_shard(config, host=host, shelf=store, model=model)
    return parts, store, TierFetcher(store, parts.shard.load, staging_bytes=16 * parts.layout.slot_bytes, wait_s=1.0,
                                     clock=time.monotonic, wake=wake)


def close_shelves(store: BlockStore | None, fetcher: TierFetcher | None) -> None:
    if store is not None and fetcher is not None:
        fetcher.close()
        store.close()


class Member:
    """A follower with its server and its thread."""

    def __init__(self, config: WorkerConfig, likeness: tuple[tuple[str, str], ...], shelves: StoreConfig) -> None:
        self.parts, self.store, self.fetcher = shard_with_shelves(config, shelves, lambda: self.follower.fetched())
        self.follower = Follower(
            self.parts.shard, config.shard, config.shards, hidden_size=self.parts.model.hidden_size, badge=TOKEN,
            likeness=likeness, bank=NoBank(), fetcher=self.fetcher)
        self.server = rpc.server(TOKEN)
        self.server.add_generic_rpc_handlers((self.follower.service.handlers(),))
        self.address = f"127.0.0.1:{rpc.bind(self.server, '127.0.0.1:0')}"
        self.server.start()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        torch.set_num_threads(1)
        self.follower.run()

    def die(self) -> None:
        self.server.stop(grace=None)
        self.follower.stop()
        self.thread.join(10)
        close_shelves(self.store, self.fetcher)


class Replica:
    """All shards of one replica in this process, over loopback. The test thread is the leader's engine thread."""

    def __init__(self, model: Path, shards: int, *, host_bytes: int = 0, redis_url: str | None = None,
                 timings: ChainTimings | None = None, **settings: Any) -> None:
        torch.set_num_threads(1)
        self.config = {"model": str(model), "device_blocks": 1024, "shards": shards, **settings}
        self.shelves = StoreConfig(host_bytes=host_bytes, redis_url=redis_url, redis_bytes=64 << 20)
        self.likeness = (("shards", str(shards)), ("slots", str(WorkerConfig(**self.config).num_slots)))
        config = WorkerConfig(**self.config, shard=0)
        self.members: dict[int, Member | None] = {shard: self.start(shard) for shard in range(1, shards)}
        self.parts, self.store, self.fetcher = shard_with_shelves(config, self.shelves, lambda: self.engine.wake.set())
        self.chain = Chain(self.parts.shard, shards, badge=TOKEN, likeness=self.likeness, find=self.find,
                           wake=lambda: self.engine.wake.set(), timings=timings)
        vault = Vault(config.num_slots, blocks_per_span=self.parts.layout.blocks_per_span, on_evict=self.chain.spill,
                      on_scrub=self.chain.scrub)
        bank = ChainBank(NoBank(), self.chain, books=lambda: (vault.counts().free, vault.counts().held))
        roots = root_keys(b"s" * 32, "d", self.parts.layout, config)
        fetcher = ChainFetcher(self.fetcher, self.chain, wait_s=1.0) if self.fetcher is not None else None
        self.engine = Engine(config, vault, self.chain, clock=time.monotonic, root_of=roots, bank=bank, fetcher=fetcher,
                             window=widest_window(self.parts.model), capacity_tokens=lambda: 1 << 20)

    def start(self, shard: int) -> Member:
        return Member(WorkerConfig(**self.config, shard=shard), self.likeness, self.shelves)

    def find(self, shard: int) -> str | None:
        member = self.members[shard]
        return None if member is None else member.address

    def slots(self, shard: int) -> torch.Tensor:
        parts = self.parts if shard == 0 else self.members[shard].parts
        return parts.arena.view(parts.layout)

    def kill(self, shard: int) -> None:
        member, self.members[shard] = self.members[shard], None
        assert member is not None
        member.die()

    def stop(self) -> None:
        self.chain.close()
        close_shelves(self.store, self.fetcher)
        for member in self.members.values():
            if member is not None:
                member.die()


@pytest.fixture()
def replica(small_model: Path) -> Iterator[Callable[..., Replica]]:
    """replica(shards, **worker settings): started, and stopped at the end."""
    made: list[Replica] = []

    def start(shards: int = 2, **settings: Any) -> Replica:
        made.append(Replica(small_model, shards, **settings))
        return made[-1]

    yield start
    for one in made:
        one.stop()


@BOTH
@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cut_model_gives_the_logits_of_the_whole_bit_for_bit(
    replica, alone, run_jobs, prompt, exactness, shards, dtype
) -> None:
    job = JobSpec(id="a", prompt=prompt(600), max_tokens=16, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness, dtype=dtype), job)
    assert len(set(want.tokens["a"])) > 3, "a degenerate model proves nothing"
    chain = replica(shards, exactness=exactness, dtype=dtype)
    got = run_jobs(chain.engine, job)
    assert got.tokens == want.tokens
    assert torch.equal(got.logits["a"], want.logits["a"])
    assert chain.engine.vault.counts().held == 0


KINDS = {
    "windows": {"model_type": "mistral", "sliding_window": 200},
    "windows on some layers": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 150, "max_window_layers": 2},
    "tied embeddings, q and k norms": {"model_type": "qwen3", "tie_word_embeddings": True},
    "layers that do not divide evenly": {"num_layers": 5},
}


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_cut(tmp_path, run_jobs, exactness, kind) -> None:
    write_random_model(tmp_path / "m", seed=3, vocab=512, **KINDS[kind])
    text = [(i * 7919) % 500 + 3 for i in range(1100)]
    job = JobSpec(id="a", prompt=text, max_tokens=10, ignore_eos=True)
    settings = {"exactness": exactness, "prefill_chunk_tokens": 128}
    torch.set_num_threads(1)
    whole = build_engine(WorkerConfig(model=str(tmp_path / "m"), device_blocks=1024, **settings))
    want = run_jobs(whole, job)
    chain = Replica(tmp_path / "m", 2, device_blocks=56 if kind == "windows" else 1024, **settings)
    try:
        got = run_jobs(chain.engine, job)
    finally:
        chain.stop()
    assert got.tokens == want.tokens
    assert torch.equal(got.logits["a"], want.logits["a"])
    assert chain.engine.room.preemptions == 0 and not chain.engine.vault.check()


@BOTH
def test_company_chunks_and_sampling_are_those_of_one_worker(replica, alone, run_jobs, prompt, exactness) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=11)
    jobs = [JobSpec(id=f"j{i}", prompt=prompt(120 + 90 * i, i), max_tokens=12, age=i, sampling=params, ignore_eos=True)
            for i in range(5)]
    want = run_jobs(alone(exactness=exactness, prefill_chunk_tokens=100), *jobs)
    got = run_jobs(replica(2, exactness=exactness, prefill_chunk_tokens=100).engine, *jobs)
    assert got.tokens == want.tokens
    for job in jobs:
        assert torch.equal(got.logits[job.id], want.logits[job.id])


def test_log_probabilities_come_from_the_last_shard_as_from_the_whole(replica, alone, prompt) -> None:
    params = SamplingParams(temperature=0.8, seed=11)
    jobs = [JobSpec(id=f"j{i}", prompt=prompt(60 + 30 * i, i), max_tokens=6, age=i, sampling=params, ignore_eos=True,
                    logprobs=(None, 0, 5)[i]) for i in range(3)]

    def told(engine: Engine) -> list[Any]:
        for job in jobs:
            engine.add(job)
        return sorted((event for event in engine.run_until_idle() if isinstance(event, Token)), key=lambda e: (e.job, e.index))

    got, want = told(replica(2, exactness="bitwise").engine), told(alone(exactness="bitwise"))
    assert got == want and len(got) == 18
    assert [len(event.logprobs.top_ids) for event in got[6:]] == [0] * 6 + [5] * 6 and got[0].logprobs is None


def test_a_second_submission_reuses_what_all_shards_hold(replica, run_jobs, prompt) -> None:
    chain, text = replica(3), prompt(1000)
    first = run_jobs(chain.engine, JobSpec(id="a", prompt=text, max_tokens=4, ignore_eos=True))
    rows = chain.engine.counters.forward_rows
    again = run_jobs(chain.engine, JobSpec(id="b", prompt=text, max_tokens=4, ignore_eos=True))
    assert again.tokens["b"] == first.tokens["a"]
    assert again.tally["b"].reused["device"] == 992
    assert again.tally["b"].computed_tokens == chain.engine.counters.forward_rows - rows == 1000 - 992 + 3


def test_part_of_a_span_is_copied_on_every_shard(replica, alone, run_jobs, prompt) -> None:
    text, other = prompt(600), prompt(600, 1)
    jobs = [JobSpec(id="a", prompt=text, max_tokens=2, ignore_eos=True),
            JobSpec(id="b", prompt=[*text[:450], *other[:100]], max_tokens=6, ignore_eos=True)]
    want = run_jobs(alone(exactness="bitwise"), jobs[1])
    chain = replica(2, exactness="bitwise")
    run_jobs(chain.engine, jobs[0])
    got = run_jobs(chain.engine, jobs[1])
    assert got.tally["b"].reused["device"] == 448
    assert torch.equal(got.logits["b"], want.logits["b"])


@BOTH
def test_a_preempted_job_resumes_with_the_same_tokens(replica, alone, run_jobs, prompt, exactness) -> None:
    jobs = [JobSpec(id=f"j{i}", prompt=prompt(250, i), max_tokens=150, age=i, ignore_eos=True) for i in range(4)]
    want = run_jobs(alone(exactness=exactness), *jobs)
    chain = replica(2, exactness=exactness, device_blocks=80)
    got = run_jobs(chain.engine, *jobs)
    assert chain.engine.room.preemptions > 0, "nothing was preempted"
    assert got.tokens == want.tokens
    assert chain.engine.vault.counts().held == 0 and not chain.engine.vault.check()


@BOTH
def test_spans_are_parked_on_every_shard_and_read_there(replica, alone, run_jobs, prompt, exactness) -> None:
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=8, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    chain = replica(2, exactness=exactness, device_blocks=48, host_bytes=64 << 20)
    got = run_jobs(chain.engine, job)
    assert got.tally["a"].parked_blocks_peak > 40
    assert got.tokens == want.tokens
    if exactness == "bitwise":
        assert torch.equal(got.logits["a"], want.logits["a"])
    host = chain.members[1].parts.host
    eventually(lambda: host.status().counters.get("bytes_pinned", 0) == 0, "the other shard keeps its part pinned")


@BOTH
@pytest.mark.parametrize("shards", [2, 3])
def test_what_was_spilled_comes_back_on_every_shard(replica, alone, run_jobs, prompt, exactness, shards) -> None:
    chain = replica(shards, exactness=exactness, device_blocks=80, host_bytes=64 << 20)
    want = run_jobs(alone(exactness=exactness), JobSpec(id="a", prompt=prompt(900), max_tokens=6, ignore_eos=True))
    run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(900), max_tokens=6, ignore_eos=True))
    run_jobs(chain.engine, JobSpec(id="x", prompt=prompt(1100, 1), max_tokens=2, ignore_eos=True))
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=prompt(900), max_tokens=6, ignore_eos=True))
    reused = got.tally["b"].reused
    assert reused["host"] >= 700 and sum(reused.values()) == 896, (reused, got.tally["b"].missed)
    assert got.tokens["b"] == want.tokens["a"]
    if exactness == "bitwise":
        assert torch.equal(got.logits["b"], want.logits["a"])


def test_everything_restarts_and_redis_still_has_every_shards_part(replica, run_jobs, prompt) -> None:
    with EmbeddedRedis(64 << 20) as redis:
        first = replica(2, exactness="bitwise", redis_url=redis.url, device_blocks=80)
        want = run_jobs(first.engine, JobSpec(id="a", prompt=prompt(1000), max_tokens=6, ignore_eos=True))
        first.engine.vault.drop_idle_spilled()
        run_jobs(first.engine, JobSpec(id="z", prompt=prompt(3, 9), max_tokens=1, ignore_eos=True))     # said after it
        assert first.store.flush(5.0) and first.members[1].store.flush(5.0)
        second = replica(2, exactness="bitwise", redis_url=redis.url, device_blocks=80)
        got = run_jobs(second.engine, JobSpec(id="b", prompt=prompt(1000), max_tokens=6, ignore_eos=True))
    assert got.tally["b"].reused["redis"] >= 0.8 * 1000, got.tally["b"]
    assert got.tokens["b"] == want.tokens["a"]
    assert torch.equal(got.logits["b"], want.logits["a"])


def test_a_hit_on_one_shard_alone_is_a_miss(replica, run_jobs, prompt) -> None:
    chain = replica(2, exactness="bitwise", device_blocks=80, host_bytes=64 << 20)
    text = prompt(900)
    want = run_jobs(chain.engine, JobSpec(id="a", prompt=text, max_tokens=6, ignore_eos=True))
    chain.engine.vault.drop_idle_spilled()
    run_jobs(chain.engine, JobSpec(id="z", prompt=prompt(3, 9), max_tokens=1, ignore_eos=True))
    host = chain.members[1].parts.host
    host.delete(host.held_keys()[:2])
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=text, max_tokens=6, ignore_eos=True))
    tally = got.tally["b"]
    assert 0 < tally.reused["host"] < 896 - 128 and tally.missed["evicted"] + tally.missed["never_seen"] >= 128, tally
    assert torch.equal(got.logits["b"], want.logits["a"])
    assert chain.fetcher.staged_bytes == 0
    eventually(lambda: chain.members[1].fetcher.staged_bytes == 0, "the other shard keeps frames staged")


@pytest.mark.parametrize("shard", [0, 1])
def test_a_wrong_span_on_any_shard_changes_the_logits(replica, run_jobs, prompt, shard) -> None:
    """The negative control of every identity above."""
    chain = replica(2)
    want = run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(600), max_tokens=1, ignore_eos=True))
    chain.slots(shard)[2].zero_()
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=prompt(600), max_tokens=1, ignore_eos=True))
    assert (got.logits["b"] - want.logits["a"]).abs().max() > 1e-2


@pytest.mark.parametrize(("shards", "victim"), [(2, 1), (3, 1), (3, 2)])
def test_a_lost_shard_ends_the_jobs_and_a_new_one_starts_with_blank_slots(
    replica, alone, run_jobs, prompt, shards, victim
) -> None:
    text = prompt(500)
    want = run_jobs(alone(), JobSpec(id="a", prompt=text, max_tokens=8, ignore_eos=True))
    chain = replica(shards)
    steps = [0]

    def kill_once() -> None:
        steps[0] += 1
        if steps[0] == 4:
            chain.kill(victim)

    lost = run_jobs(chain.engine, JobSpec(id="a", prompt=text, max_tokens=400, ignore_eos=True),
                    JobSpec(id="w", prompt=text, max_tokens=400, ignore_eos=True), each_step=kill_once)
    assert isinstance(lost.errors["a"], Unavailable) and isinstance(lost.errors["w"], Unavailable)
    counts = chain.engine.vault.counts()
    assert counts.held == counts.idle == 0 and not chain.engine.vault.check()
    chain.members[victim] = chain.start(victim)
    chain.slots(victim)[:] = float("nan")                     # blank means: nothing that lies there is ever read
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=text, max_tokens=8, ignore_eos=True))
    assert not got.errors
    assert not got.tally["b"].reused
    assert got.tokens["b"] == want.tokens["a"]
    assert torch.equal(got.logits["b"], want.logits["a"])


def test_an_idle_replica_forgets_its_cache_when_a_shard_goes(replica, run_jobs, prompt) -> None:
    chain = replica(2)
    run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(500), max_tokens=2, ignore_eos=True))
    assert chain.engine.vault.counts().idle
    chain.engine.wake.clear()
    chain.kill(1)
    assert chain.engine.wake.wait(10), "the engine sleeps through it"
    chain.engine.step()
    assert not chain.engine.vault.counts().idle


def test_a_chain_without_a_shard_gives_up_in_time(replica, run_jobs, prompt) -> None:
    chain = replica(2, timings=ChainTimings(connect_s=0.3))
    chain.kill(1)
    got = run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(50), max_tokens=2))
    assert isinstance(got.errors["a"], Unavailable) and "shard 1" in str(got.errors["a"])


def test_a_shard_that_hangs_costs_one_bounded_wait(replica, run_jobs, prompt) -> None:
    chain = replica(2, timings=ChainTimings(step_s=0.5))
    run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(50), max_tokens=2, ignore_eos=True))
    follower, released = chain.members[1].follower, threading.Event()
    work = follower._obey[Step]
    follower._obey[Step] = lambda session, message: (released.wait(20), work(session, message))
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=prompt(50), max_tokens=2, ignore_eos=True))
    assert isinstance(got.errors["b"], Unavailable) and "0." in str(got.errors["b"])
    released.set()
    follower._obey[Step] = work
    again = run_jobs(chain.engine, JobSpec(id="c", prompt=prompt(50), max_tokens=2, ignore_eos=True))
    assert not again.errors and len(again.tokens["c"]) == 2


def test_a_bug_in_a_follower_costs_the_jobs_and_not_the_follower(replica, run_jobs, prompt) -> None:
    chain = replica(2)
    follower = chain.members[1].follower
    forward, follower.shard.forward = follower.shard.forward, lambda *_: 1 / 0
    got = run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(50), max_tokens=2))
    assert isinstance(got.errors["a"], Unavailable) and "ZeroDivisionError" in str(got.errors["a"])
    follower.shard.forward = forward
    take_events, follower.loans.take_events = follower.loans.take_events, lambda: 1 / 0
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=prompt(50), max_tokens=2))
    follower.loans.take_events = take_events
    again = run_jobs(chain.engine, JobSpec(id="c", prompt=prompt(50), max_tokens=2, ignore_eos=True))
    assert len(again.tokens["c"]) == 2


def test_a_bug_in_the_leader_leaves_no_shard_in_the_middle_of_a_step(replica, alone, run_jobs, prompt) -> None:
    text = prompt(400)
    want = run_jobs(alone(exactness="bitwise"), JobSpec(id="a", prompt=text, max_tokens=4, ignore_eos=True))
    chain = replica(2, exactness="bitwise")
    run_jobs(chain.engine, JobSpec(id="x", prompt=text, max_tokens=4, ignore_eos=True))
    forward, chain.parts.shard.forward = chain.parts.shard.forward, lambda *_: 1 / 0
    got = run_jobs(chain.engine, JobSpec(id="b", prompt=text, max_tokens=4))
    assert isinstance(got.errors["b"], Unavailable) and not chain.engine.vault.counts().idle
    chain.parts.shard.forward = forward
    again = run_jobs(chain.engine, JobSpec(id="c", prompt=text, max_tokens=4, ignore_eos=True))
    assert torch.equal(again.logits["c"], want.logits["a"]) and not again.tally["c"].reused


def test_once_in_each_step_the_leader_has_time_for_other_things_while_the_others_compute(replica, prompt) -> None:
    chain, log = replica(3), []
    chain.engine.meanwhile = lambda: log.append("meanwhile")
    forward, answer = chain.parts.shard.forward, chain.chain._result
    chain.parts.shard.forward = lambda *args: (log.append("layers"), forward(*args))[1]
    chain.chain._result = lambda *args: (answer(*args), log.append("answered"))[0]
    chain.engine.add(JobSpec(id="a", prompt=prompt(1), max_tokens=3, ignore_eos=True))
    while not any(isinstance(event, Finished) for event in chain.engine.step()):
        log.append("next")
    step = ["layers", "meanwhile", "answered", "answered"]
    assert log == ["meanwhile", *step, "next", *step, "next", *step]     # the first: of the step that takes the job up


def test_shards_that_are_not_alike_refuse_each_other_by_name(replica, run_jobs, prompt) -> None:
    chain = replica(2, timings=ChainTimings(connect_s=0.3))
    chain.members[1].follower._likeness = (("shards", "2"), ("slots", "7"))
    got = run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(50), max_tokens=2))
    assert "slots 7" in str(got.errors["a"])


def test_a_stranger_may_not_lead(replica, prompt) -> None:
    chain = replica(2)
    channel = rpc.channel(chain.members[1].address, "00" * 16)
    with pytest.raises(grpc.RpcError) as refused:
        next(channel.stream_stream("/kvbank.Shard/Lead")(iter([b"x"])))
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    channel.close()


def test_status_of_a_follower_shows_the_leaders_books(replica, run_jobs, prompt) -> None:
    chain = replica(2)
    follower, seen = chain.members[1].follower, []
    run_jobs(chain.engine, JobSpec(id="a", prompt=prompt(700), max_tokens=6, ignore_eos=True),
             each_step=lambda: seen.append(follower.books.held))
    assert max(seen) > 0
    chain.engine.step()
    eventually(lambda: follower.books == Books(chain.engine.vault.num_slots, 0), "the books do not agree after the job")
