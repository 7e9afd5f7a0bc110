"""Builds what leads a replica: the engine of shard 0 with its store, its bank and, with several shards, its chain."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.layout import Layout
from kvbank.kvstore.store import BlockStore, build_store
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.vault import Vault
from kvbank.workers.assembly import Parts, build_shard, layout_of, numerics_id, widest_window
from kvbank.workers.borrower import Borrower
from kvbank.workers.chain import Chain
from kvbank.workers.chain_bank import ChainBank
from kvbank.workers.chain_fetcher import ChainFetcher
from kvbank.workers.engine import Engine
from kvbank.workers.fetcher import TierFetcher
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.remote_attention import RemoteAttention
from kvbank.workers.seams import Bank, Fetcher, spill_all

if TYPE_CHECKING:
    from kvbank.workers.service import ModelWorker, Worker


@dataclass(slots=True)
class Leader:
    """The parts of a model worker."""

    parts: Parts
    vault: Vault
    book: DebtBook
    borrower: Borrower
    remote: RemoteAttention
    engine: Engine
    store: BlockStore | None
    fetcher: TierFetcher | None
    chain: Chain | None


def build_leader(worker: ModelWorker) -> Leader:
    """Build in order: store, shard, vault, bank, engine. Raises ConfigError, ModelError."""
    config = worker.worker_config
    engine: Engine | None = None

    def wake() -> None:
        if engine is not None:
            engine.wake.set()

    model = read_config(config.model)
    layout = layout_of(model, config)
    host = HostTier(worker.settings["host_bytes"]) if worker.settings["host_bytes"] else None
    store = open_store(worker, layout, host)
    parts = build_shard(config, host=host, shelf=store, model=model)
    chain = Chain(parts.shard, config.shards, badge=worker.badge, likeness=likeness(worker),
                  find=worker.find_shard, wake=wake) if config.shards > 1 else None
    backend = chain or parts.shard
    fetcher = TierFetcher(
        store, parts.shard.load, staging_bytes=config.staging_spans * layout.slot_bytes, wait_s=config.fetch_wait_s,
        clock=time.monotonic, wake=wake, traces=worker.traces) if store else None
    share = worker.settings["tenant_share"]
    vault = Vault(config.num_slots, blocks_per_span=parts.layout.blocks_per_span, lend_cap=worker.lend_cap(),
                  guarantee=max(1, int(share * config.num_slots)) if share else 0,
                  on_evict=spill_all(backend, layout.blocks_per_span), on_scrub=backend.scrub)
    book = DebtBook(worker.boot, timings=worker.timings)
    borrower = Borrower(parts.arena, parts.layout.slot_bytes, timings=worker.timings, wake=wake, lenders=worker.lenders,
                        peers=worker.peers, locate=worker.locate, staging_spans=config.staging_spans)
    remote = RemoteAttention(parts.shape, parts.layout.head_dim, borrower, staging_spans=config.staging_spans)
    parts.shard.attention.remote = remote
    bank: Bank = borrower if chain is None else ChainBank(borrower, chain, books=lambda: _free_and_held(vault))
    seen: Fetcher | None = fetcher
    if chain is not None and fetcher is not None:
        seen = ChainFetcher(fetcher, chain, wait_s=config.fetch_wait_s)
    engine = Engine(
        config, vault, backend, clock=time.monotonic, root_of=worker.root_of(parts.layout), eos_ids=parts.model.eos_ids,
        max_position=parts.model.max_position, window=widest_window(parts.model), bank=bank, fetcher=seen,
        capacity_tokens=worker.capacity_tokens,
    )
    return Leader(parts, vault, book, borrower, remote, engine, store, fetcher, chain)


def likeness(worker: Worker) -> tuple[tuple[str, str], ...]:
    """What the shards of one replica must have alike, by name."""
    config = worker.worker_config
    alike = {"shards": config.shards, "slots": config.num_slots, "span_tokens": config.span_tokens,
             "block_size": config.block_size, "dtype": config.dtype, "exactness": config.exactness,
             "numerics": numerics_id(config), "model_digest": worker.config.get("model_digest", "")}
    return tuple((name, str(value)) for name, value in alike.items())


def _free_and_held(vault: Vault) -> tuple[int, int]:
    counts = vault.counts()
    return counts.free, counts.held


def open_store(worker: Worker, layout: Layout, host: HostTier | None) -> BlockStore | None:
    """The shelves below the device; None when there are none."""
    settings = worker.settings
    if host is None and settings["redis"] is None:
        return None
    config = StoreConfig(host_bytes=settings["host_bytes"], redis_url=settings["redis"], redis_bytes=settings["redis_bytes"],
                         redis_ttl_s=settings["redis_ttl_s"])
    return build_store(config, layout, worker.cache_secret, host=host)
