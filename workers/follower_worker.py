"""FollowerWorker: a member whose shard does not lead, as a gRPC service. Serves Shard; borrows for its own layers.

    grpc threads   Shard: forward into the follower's inbox, and hidden states to who waits for them
    shard          model, slots, loans (workers/follower.py)
    bank-timers, bulk, probe, advice    as on every member that borrows

Its numbers are its leader's: slots are in lockstep, and only the leader keeps books of them. It lends nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.vault import Vault
from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.assembly import build_shard
from kvbank.workers.borrower import Borrower
from kvbank.workers.follower import Follower
from kvbank.workers.leader import likeness
from kvbank.workers.remote_attention import RemoteAttention
from kvbank.workers.service import Worker, set_threads


class FollowerWorker(Worker):
    """Shard 1 or later of a replica."""

    follower: Follower

    def _build(self) -> None:
        config = self.worker_config
        host = HostTier(self.settings["host_bytes"]) if self.settings["host_bytes"] else None
        self.parts = build_shard(config, host=host)
        self.layout, self.arena = self.parts.layout, self.parts.arena
        self.vault = Vault(config.num_slots, blocks_per_span=self.layout.blocks_per_span, lend_cap=self.lend_cap())
        self.book = DebtBook(self.boot, timings=self.timings)
        self.borrower = Borrower(self.arena, self.layout.slot_bytes, timings=self.timings, lenders=self.lenders,
                                 wake=lambda: self.follower.wake())
        self.remote = RemoteAttention(self.parts.shape, self.layout.head_dim, self.borrower)
        self.parts.shard.attention.remote = self.remote
        self._open_bank(book=self.book, data=self.borrower, on_engine=self.borrower.from_banker)
        self.borrower.connect(self.banker)
        self.follower = Follower(
            self.parts.shard, config.shard, config.shards, hidden_size=self.parts.model.hidden_size,
            token=self.config["token"], likeness=likeness(self), bank=self.borrower)

    def stop(self) -> None:
        self.follower.stop()
        super().stop()

    def report(self, full: bool) -> Mapping[str, Any]:
        added, removed = self.follower.keys.take_changes(full=full)
        return {"slots_free": self.follower.books.free, "slots_lendable": 0, "slots_lent": 0,
                "slots_borrowed": self.borrower.num_borrowed, "keys_added": added, "keys_removed": removed}

    def status(self) -> pb.WorkerStatus:
        status, per_span, books = super().status(), self.layout.blocks_per_span, self.follower.books
        status.blocks_free, status.blocks_used = books.free * per_span, books.held * per_span
        status.blocks_borrowed = self.borrower.num_borrowed * per_span
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
