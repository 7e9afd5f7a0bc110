"""Builds what leads a replica: the engine of shard 0 with its store, its bank and, with several shards, its chain."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.vault import Vault
from kvbank.workers.assembly import Parts, build_shard, widest_window
from kvbank.workers.borrower import Borrower
from kvbank.workers.engine import Engine
from kvbank.workers.remote_attention import RemoteAttention

if TYPE_CHECKING:
    from kvbank.workers.service import ModelWorker


@dataclass(slots=True)
class Leader:
    """The parts of a model worker."""

    parts: Parts
    vault: Vault
    book: DebtBook
    borrower: Borrower
    remote: RemoteAttention
    engine: Engine
    store: Any


def build_leader(worker: ModelWorker) -> Leader:
    """Build in order: store, shard, vault, bank, engine. Raises ConfigError, ModelError."""
    config = worker.worker_config
    store, fetcher = None, None
    parts = build_shard(config, host=store.host if store else None, shelf=store)
    vault = Vault(config.num_slots, blocks_per_span=parts.layout.blocks_per_span, lend_cap=worker.lend_cap(),
                  on_evict=parts.shard.spill, on_scrub=parts.shard.scrub)
    book = DebtBook(worker.boot, timings=worker.timings)
    engine: Engine | None = None

    def wake() -> None:
        if engine is not None:
            engine.wake.set()

    borrower = Borrower(parts.arena, parts.layout.slot_bytes, timings=worker.timings, wake=wake, lenders=worker.lenders,
                        locate=worker.locate)
    remote = RemoteAttention(parts.shape, parts.layout.head_dim, borrower)
    parts.shard.attention.remote = remote
    engine = Engine(
        config, vault, parts.shard, clock=time.monotonic, root_of=worker.root_of(parts.layout), eos_ids=parts.model.eos_ids,
        max_position=parts.model.max_position, window=widest_window(parts.model), bank=borrower, fetcher=fetcher,
        capacity_tokens=worker.capacity_tokens,
    )
    return Leader(parts, vault, book, borrower, remote, engine, store)
