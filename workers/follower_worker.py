"""FollowerWorker: a member whose shard does not lead, as a gRPC service. Serves Shard; borrows for its own layers.

    grpc threads   Shard: forward into the follower's inbox, and hidden states to who waits for them
    shard          model, slots, loans (workers/follower.py)
    bank-timers, bulk, probe, advice    as on every member that borrows

Its numbers are its leader's: slots are in lockstep, and only the leader keeps books of them. It lends nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.store import BlockStore
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.vault import Vault
from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.assembly import build_shard, layout_of
from kvbank.workers.borrower import Borrower
from kvbank.workers.fetcher import TierFetcher
from kvbank.workers.follower import Follower
from kvbank.workers.leader import likeness, open_store
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.remote_attention import RemoteAttention
from kvbank.workers.service import Worker, add_tiers, set_threads


class FollowerWorker(Worker):
    """Shard 1 or later of a replica."""

    follower: Follower

    def _build(self) -> None:
        config = self.worker_config
        host = HostTier(self.settings["host_bytes"]) if self.settings["host_bytes"] else None
        model = read_config(config.model)
        self.layout = layout_of(model, config)
        self.store = open_store(self, self.layout, host)
        self.parts = build_shard(config, host=host, shelf=self.store, model=model)
        self.arena = self.parts.arena
        self._fetcher = TierFetcher(
            self.store, self.parts.shard.load, staging_bytes=config.staging_spans * self.layout.slot_bytes,
            wait_s=config.fetch_wait_s, clock=time.monotonic, wake=lambda: self.follower.fetched()) if self.store else None
        self.vault = Vault(config.num_slots, blocks_per_span=self.layout.blocks_per_span, lend_cap=self.lend_cap())
        self.book = DebtBook(self.boot, timings=self.timings)
        self.borrower = Borrower(self.arena, self.layout.slot_bytes, timings=self.timings, wake=lambda: self.follower.wake(),
                                 lenders=self.lenders, peers=self.peers, staging_spans=config.staging_spans)
        self.remote = RemoteAttention(self.parts.shape, self.layout.head_dim, self.borrower,
                                      staging_spans=self.worker_config.staging_spans)
        self.parts.shard.attention.remote = self.remote
        self._open_bank(book=self.book, data=self.borrower, on_engine=self.borrower.from_banker)
        self.borrower.connect(self.banker)
        self.follower = Follower(
            self.parts.shard, config.shard, config.shards, hidden_size=self.parts.model.hidden_size,
            badge=self.badge, likeness=likeness(self), bank=self.borrower,
            fetcher=self._fetcher)

    def _shelf(self) -> BlockStore | None:
        return self.store

    def stop(self) -> None:
        self.follower.stop()
        super().stop()
        if self._fetcher is not None:
            self._fetcher.close()
        if self.store is not None:
            self.store.close()

    def report(self, full: bool) -> Mapping[str, Any]:
        added, removed = self.follower.keys.take_changes(full=full)
        return {"slots_free": self.follower.books.free, "slots_lendable": 0, "slots_lent": 0,
                "slots_borrowed": self.borrower.num_borrowed, "keys_added": added, "keys_removed": removed}

    def status(self) -> pb.WorkerStatus:
        status, per_span, books = super().status(), self.layout.blocks_per_span, self.follower.books
        status.blocks_free, status.blocks_used = books.free * per_span, books.held * per_span
        status.blocks_borrowed = self.borrower.num_borrowed * per_span
        add_tiers(status, self.store)
        return status

    def _add_handlers(self) -> None:
        super()._add_handlers()
        self._server.add_generic_rpc_handlers((self.follower.service.handlers(),))

    def _start_threads(self) -> None:
        threading.Thread(target=self._run_shard, name="shard", daemon=True).start()
        if self._line is not None:
            threading.Thread(target=self._run_advice, name="advice", daemon=True).start()

    def _run_shard(self) -> None:
        set_threads(self.settings)                             # OpenMP counts threads per calling thread
        self.follower.run()

    def _counters(self) -> dict[str, float]:
        counters, mine = super()._counters(), self.follower.counters
        counters |= {"steps": mine.steps, "forward_rows": mine.rows, "forward_s": mine.forward_s,
                     "sessions": mine.sessions,
                     "remote_attention_calls": self.remote.calls, "attend_bytes_sent": self.remote.bytes_sent,
                     "attend_bytes_received": self.remote.bytes_received}
        with self.vault.lock:
            counters |= {f"book_{name}": float(value) for name, value in self.book.counters.items()}
        return counters
