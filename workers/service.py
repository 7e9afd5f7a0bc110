"""Worker: one member that holds slots, with a model or without, as a gRPC service. Owns its threads and stops them.

    grpc threads   Jobs, Bank: forward into inboxes, or read and write slots whose loan they hold
    engine         model, scheduler, sequences                         (members with a model)
    bank-timers    loan timers and renewals        advice   asks control who could lend, four times a second
    bulk, probe    spans on their way, doubts about peers

Wires parts together and reports; decides nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grpc
import psutil
import torch

from kvbank.errors import KVBankError
from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.layout import BlockKey, Boot, Layout
from kvbank.kvstore.ledger import LoanLedger
from kvbank.kvstore.logged_errors import OF_THIS_PROCESS
from kvbank.kvstore.messages import Compat
from kvbank.kvstore.store import BlockStore
from kvbank.kvstore.timings import LoanTimings
from kvbank.kvstore.traces import open_traces
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.kvstore.transport.links import Links
from kvbank.kvstore.vault import Arena, LendPool, Vault
from kvbank.proto import control_pb2 as control_pb
from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.assembly import layout_of, numerics_id, root_keys
from kvbank.workers.attend_server import AttendServer
from kvbank.workers.bank_service import BankService, LedgerPins, layout_from
from kvbank.workers.borrower import Lender
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine
from kvbank.workers.jobs_service import JobsService
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.ops_service import OpsService

log = logging.getLogger(__name__)

ADVICE_S = 0.25
SERVER_THREADS = 600                         # a stream of a gateway or a peer holds one each; idle ones cost little
TIMINGS = ("term_s", "renew_s", "fill_s", "borrow_retry_s", "borrow_give_up_s", "put_retry_s", "put_give_up_s",
           "attend_hedge_s", "attend_lost_s", "recall_urgent_s", "recall_calm_s", "recall_drain_s", "recall_repeat_s")


class ControlLine(Protocol):
    """What a worker asks the control plane; answers may be empty, never late (cluster/heartbeat.py)."""

    @property
    def members(self) -> Sequence[control_pb.Member]: ...

    def lenders(self, slots: int, slot_bytes: int) -> Sequence[control_pb.Candidate]: ...

    def locate(self, keys: Sequence[bytes]) -> Sequence[control_pb.Holding]: ...

    def beat_now(self, within_s: float) -> None: ...


def build_worker(config: Mapping[str, Any], line: ControlLine | None) -> Worker:
    """The part of a model or lender member. Raises ConfigError, ModelError."""
    if config["kind"] != "model":
        return Worker(config, line)
    if config.get("shard", 0):
        from kvbank.workers.follower_worker import FollowerWorker  # it needs this file first

        return FollowerWorker(config, line)
    return ModelWorker(config, line)


def worker_config(config: Mapping[str, Any]) -> WorkerConfig:
    """This member's own settings out of the cluster's. A lender's slots are those of one shard, as its borrowers' are."""
    s = config["settings"]
    blocks = s["device_blocks"] if config["kind"] == "model" else s["lender_blocks"] or s["device_blocks"]
    names = ("model", "dtype", "exactness", "device", "block_size", "span_tokens", "prefill_chunk_tokens", "max_batch",
             "max_queue", "stall_s", "fetch_wait_s", "staging_spans")
    return WorkerConfig(**{name: s[name] for name in names}, device_blocks=blocks, shards=s["shards"],
                        shard=config.get("shard", 0))


def loan_timings(settings: Mapping[str, Any]) -> LoanTimings:
    return LoanTimings(**{name: settings[name] for name in TIMINGS}, quarantine_s=settings["avoid_s"])


def set_threads(settings: Mapping[str, Any]) -> int:
    """Torch threads of this process: as configured, else the host's cores over its model workers, at least 1."""
    threads = settings["torch_threads"] or max(1, (os.cpu_count() or 1) // (settings["workers"] * settings["shards"]))
    torch.set_num_threads(threads)
    return int(threads)


def add_tiers(status: pb.WorkerStatus, store: BlockStore | None) -> None:
    """What the shelves below the device hold."""
    for tier in store.status() if store is not None else ():
        status.tiers.add(name=tier.name, bytes_used=tier.bytes_used, bytes_limit=tier.bytes_limit, frames=tier.frames,
                         state=tier.state, counters=tier.counters)


class Worker:
    """A member that only lends. With a model: ModelWorker."""

    def __init__(self, config: Mapping[str, Any], line: ControlLine | None) -> None:
        self.id: str = config["id"]
        self.kind: str = config["kind"]
        self._config, self._line = config, line
        self._settings: Mapping[str, Any] = config["settings"]
        self.boot = Boot(bytes.fromhex(config["boot"]))
        self.worker_config = worker_config(config)
        self.timings = loan_timings(self._settings)
        set_threads(self._settings)
        self.badge = Badge.of_member(config)
        self._server = rpc.server(self.badge, threads=SERVER_THREADS)
        self._links = Links(self.boot, self.badge)
        self._boots: dict[str, Boot] = {}
        self._lenders: list[Lender] = []
        self._stopping = threading.Event()
        self.address = ""
        self.traces = open_traces(self.id, self._settings)
        self._build()

    def _build(self) -> None:
        """Slots, books and the lender's door."""
        model = read_config(self.worker_config.model)
        shards = range(self.worker_config.shards)
        layouts = [layout_of(model, self.worker_config, shard) for shard in shards]
        self.layout: Layout = max(layouts, key=lambda layout: layout.slot_bytes)
        self.arena = Arena(self.worker_config.num_slots, self.layout.slot_bytes, self.worker_config.device)
        self.vault = Vault(self.worker_config.num_slots, blocks_per_span=self.layout.blocks_per_span, lend_cap=self.lend_cap(),
                           on_scrub=self.arena.scrub)
        self._open_bank(book=None, data=None, on_engine=None)

    def lend_cap(self) -> int:
        """Slots that may be lent at once."""
        if self.kind == "model" and self.worker_config.shards > 1:
            return 0                                            # such a replica only borrows: docs/decisions/
        share = self._settings["lend_cap"]
        if share is None:
            share = 1.0 if self.kind == "lender" else 0.5
        return int(share * self.worker_config.num_slots)

    def _open_bank(self, *, book: DebtBook | None, data: Any, on_engine: Callable[[list[Any]], None] | None) -> None:
        self.ledger = LoanLedger(self.boot, self._compat(), LendPool(self.vault, self.arena), lend_cap=self.vault.lend_cap,
                                 timings=self.timings)
        self.banker = Banker(self.id, self.boot, self._compat(), self._links, self.vault.lock, time.monotonic,
                             ledger=self.ledger, book=book, data=data, on_engine=on_engine)
        pins = LedgerPins(self.banker, self.ledger, self.vault.lock)
        self.attend = AttendServer(self.arena, pins, lambda borrower: layout_from(self.banker, borrower),
                                  verify=self._settings["verify_attend"], traces=self.traces)
        bank = BankService(self.banker, self.arena, self.attend, self.vault.lock, traces=self.traces)
        self.ops = OpsService(self.banker, self.vault, self._shelf, blocks_per_span=self.layout.blocks_per_span,
                              leads=self.worker_config.shard == 0)
        self._server.add_generic_rpc_handlers((bank.handlers(), self.ops.handlers()))

    def _shelf(self) -> BlockStore | None:
        """What lies below the device here."""
        return None

    def _compat(self) -> Compat:
        layout = self.layout
        return Compat(
            model_digest=self._config.get("model_digest", ""), layer_first=layout.layer_first, layer_last=layout.layer_last,
            kv_heads=layout.kv_heads, head_dim=layout.head_dim, dtype=layout.dtype, block_size=layout.block_size,
            span_tokens=layout.span_tokens, numerics=numerics_id(self.worker_config), slot_bytes=layout.slot_bytes,
        )

    # -- cluster.member.Banker ---------------------------------------------------------------------------------------

    def start(self, address: str) -> str:
        """Serve on `host:port`. Raises OSError as ConfigError's cause when the port is taken."""
        host = address.rsplit(":", 1)[0]
        self._add_handlers()
        self.address = f"{host}:{rpc.bind(self._server, address)}"
        self._server.start()
        self.banker.start()
        self._start_threads()
        return self.address

    def stop(self) -> None:
        self._stopping.set()
        self.banker.stop()
        self._server.stop(grace=0.2).wait(1.0)
        if self.traces is not None:
            self.traces.close()

    def identity(self) -> Mapping[str, Any]:
        return {"numerics": numerics_id(self.worker_config), "slot_bytes": self.arena.slot_bytes,
                "slots_total": self.vault.num_slots}

    def report(self, full: bool) -> Mapping[str, Any]:
        with self.vault.lock:
            counts = self.vault.counts()
            added, removed = self.vault.index.take_changes()
            if full:
                added, removed = self.vault.index.keys(), []
            lendable = self.ledger.lendable()
        return {"slots_free": counts.free, "slots_lendable": lendable, "slots_lent": counts.lent,
                "keys_added": b"".join(added), "keys_removed": b"".join(removed), "draining": self.ops.draining,
                **self._load()}

    def on_members(self, members: Sequence[control_pb.Member]) -> None:
        """A member that came back with another boot has lost all it held for us."""
        for member in members:
            boot = Boot(member.boot)
            old = self._boots.get(member.id)
            if old is not None and old != boot:
                self.banker.peer_gone(old)
            self._boots[member.id] = boot
            if boot != self.boot and member.address:
                self._links.know(boot, member.address)

    def _load(self) -> Mapping[str, Any]:
        return {}

    def _add_handlers(self) -> None:
        """Jobs.Status, which every member answers."""
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kvbank.Jobs", {
            "Status": grpc.unary_unary_rpc_method_handler(
                lambda _request, _context: self.status(), request_deserializer=pb.StatusRequest.FromString,
                response_serializer=pb.WorkerStatus.SerializeToString)}),))

    def _start_threads(self) -> None:
        """Nothing more to run."""

    # -- what a borrower's parts ask ---------------------------------------------------------------------------------

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def cache_secret(self) -> bytes:
        return bytes.fromhex(self._config["cache_secret"])

    def lenders(self) -> list[Lender]:
        """By the latest advice; never waits."""
        return self._lenders

    def peers(self) -> list[Lender]:
        """Who could lend if they had room, cache-only members first; never waits."""
        members = sorted(self._could_lend(), key=lambda member: member.kind == "model")
        return [Lender(member.id, Boot(member.boot), member.address, 0) for member in members]

    def _could_lend(self) -> list[control_pb.Member]:
        """Members whose slots hold our spans. Sharded replicas neither lend nor are lent to by other workers."""
        shards, members = self.worker_config.shards, self._line.members if self._line is not None else ()
        return [member for member in members if member.id != self.id and member.slot_bytes >= self.layout.slot_bytes
                and not (shards > 1 and member.kind == "model")]

    def _run_advice(self) -> None:
        assert self._line is not None
        while not self._stopping.wait(ADVICE_S):
            candidates = self._line.lenders(self.vault.num_slots, self.layout.slot_bytes)
            self._lenders = [Lender(c.id, Boot(c.boot), c.address, c.slots_lendable) for c in candidates]

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self) -> pb.WorkerStatus:
        per_span = self.layout.blocks_per_span
        with self.vault.lock:
            counts = self.vault.counts()
            lent = self.ledger.loans(time.monotonic())
        status = pb.WorkerStatus(
            id=self.id, kind=self.kind, replica=self._config.get("replica", 0), shard=self.worker_config.shard,
            host=socket.gethostname(), pid=os.getpid(), blocks_total=counts.total * per_span, blocks_free=counts.free * per_span,
            blocks_used=counts.held * per_span, blocks_lent=counts.lent * per_span, counters=self._counters(),
            blocks_idle=counts.idle * per_span, draining=self.ops.draining,
        )
        names = {boot: name for name, boot in self._boots.items()}
        for loan in lent:
            borrower = names.get(loan.borrower, loan.node)
            status.loans.add(id=f"{borrower}>{self.id}#{loan.number}", lender=self.id, borrower=borrower,
                             blocks=loan.slots * per_span, term_s=self.timings.term_s, age_s=loan.age_s,
                             recalled_blocks=loan.recalled * per_span)
        return status

    def _counters(self) -> dict[str, float]:
        attend = self.attend.counters
        counters = {"remote_attention_served": attend.calls, "remote_attention_rows": attend.rows,
                    "attend_bytes_in": attend.bytes_in, "attend_bytes_out": attend.bytes_out, "attend_stale": attend.stale,
                    "attend_tainted": attend.tainted, "resident_bytes": psutil.Process().memory_info().rss,
                    "logged_errors": OF_THIS_PROCESS.count}
        with self.vault.lock:
            counters["blocks_pinned"] = self.vault.num_pinned * self.layout.blocks_per_span
            counters |= {f"ledger_{name}": value for name, value in self.ledger.counters.items()}
        return {name: float(value) for name, value in counters.items()}


class ModelWorker(Worker):
    """A member that runs a model, borrows, and lends what it can spare."""

    engine: Engine

    def _build(self) -> None:
        from kvbank.workers.leader import build_leader  # the decoder is imported only where a model runs

        leader = build_leader(self)
        self.layout, self.arena, self.vault = leader.parts.layout, leader.parts.arena, leader.vault
        self.borrower, self.parts, self.remote = leader.borrower, leader.parts, leader.remote
        self.store, self._fetcher = leader.store, leader.fetcher
        self.chain = leader.chain
        self._open_bank(book=leader.book, data=leader.borrower, on_engine=leader.borrower.from_banker)
        self.borrower.connect(self.banker)
        self.book = leader.book
        self.engine = leader.engine
        self.jobs = JobsService(self.engine, self.id, vocab_size=self.parts.model.vocab_size, status=self.status,
                                clock=time.monotonic, hear_control=self._hear_control, resting=lambda: self.ops.draining,
                                traces=self.traces)
        self.engine.meanwhile = self.jobs.tell
        if self.traces is not None:
            self.borrower.trace_of = self.jobs.trace_of

    def _shelf(self) -> BlockStore | None:
        return self.store

    def root_of(self, layout: Layout) -> Callable[[str], BlockKey]:
        return root_keys(self.cache_secret, self._config.get("model_digest", ""), layout, self.worker_config)

    def find_shard(self, shard: int) -> str | None:
        """Where another shard of this replica listens now, by membership; never waits."""
        members = self._line.members if self._line is not None else ()
        return next((member.address for member in members if member.id == f"{self.id}.{shard}"), None)

    def locate(self, keys: Sequence[BlockKey]) -> list[tuple[Lender, list[BlockKey]]]:
        """Who holds which of these keys; asks control."""
        if self._line is None:
            return []
        members = {member.id: member for member in self._line.members}
        found = []
        for holding in self._line.locate(keys):
            member = members.get(holding.id)
            if member is not None and member.slot_bytes >= self.layout.slot_bytes:
                lender = Lender(member.id, Boot(member.boot), member.address, 0)
                found.append((lender, list(keys[holding.first : holding.first + holding.count])))
        return found

    def _hear_control(self, within_s: float) -> None:
        if self._line is not None:
            self._line.beat_now(within_s)

    def capacity_tokens(self) -> int:
        """KV tokens that this replica could have at once: own slots, neighbours' to lend, and the host tier."""
        own, shards = self.vault.num_slots, self.worker_config.shards
        share = self._settings["lend_cap"]
        lent = 0
        for member in self._could_lend():
            default = 1.0 if member.kind == "lender" else 0.5
            lent += int(member.slots_total * (default if share is None else share))
        lent //= shards                                         # a span takes a slot for each shard
        parked = self._settings["host_bytes"] // (self.layout.slot_bytes + 8192)
        return int(own + lent + parked) * self.layout.span_tokens

    def stop(self) -> None:
        super().stop()
        self.engine.wake.set()
        if self.chain is not None:
            self.chain.close()
        self.borrower.close()
        if self._fetcher is not None:
            self._fetcher.close()
        if self.store is not None:
            self.store.close()

    def _add_handlers(self) -> None:
        self._server.add_generic_rpc_handlers((self.jobs.handlers(),))

    def _start_threads(self) -> None:
        threading.Thread(target=self._run_engine, name="engine", daemon=True).start()
        if self._line is not None:
            threading.Thread(target=self._run_advice, name="advice", daemon=True).start()

    def _run_engine(self) -> None:
        set_threads(self._settings)                            # OpenMP counts threads per calling thread
        engine = self.engine
        while not self._stopping.is_set():
            steps = engine.counters.steps
            try:
                events = engine.step()
            except Exception:                                  # a bug must cost its jobs, never the worker
                log.exception("engine_step_failed")
                events = engine.fail_all(KVBankError("the worker met an internal error; retry the job"))
            self.jobs.deliver(events)
            if not events and engine.counters.steps == steps:
                engine.wake.wait(0.01 if engine.busy else 0.5)
        self.jobs.tell()

    def report(self, full: bool) -> Mapping[str, Any]:
        report = super().report(full)
        if self.chain is not None:                              # a hit counts only where every shard reports it
            self.chain.note_keys(report["keys_added"], report["keys_removed"], whole=full)
        return report

    def _load(self) -> Mapping[str, Any]:
        scheduler = self.engine.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        pending = sum(len(seq.table.holes) for seq in [*running, *waiting])
        return {"slots_borrowed": self.borrower.num_borrowed, "jobs_running": len(running), "jobs_waiting": len(waiting),
                "tokens_pending": pending}

    def status(self) -> pb.WorkerStatus:
        status = super().status()
        status.blocks_borrowed = self.borrower.num_borrowed * self.layout.blocks_per_span
        for seq in self.engine.jobs():
            status.jobs.add(id=seq.job.id.rsplit("#", 1)[0], state=seq.state, prompt_tokens=seq.num_prompt,
                            output_tokens=seq.num_output, computed=seq.prompt_computed, waits_for=seq.waits_for,
                            borrowed_blocks=seq.num_remote * self.layout.blocks_per_span)
        add_tiers(status, self.store)
        return status

    def _counters(self) -> dict[str, float]:
        counters = super()._counters()
        engine = self.engine.counters
        counters |= {"steps": engine.steps, "forward_rows": engine.forward_rows, "forward_s": engine.forward_s,
                     "step_s": engine.step_s, "remote_attention_calls": self.remote.calls,
                     "attend_bytes_sent": self.remote.bytes_sent, "attend_bytes_received": self.remote.bytes_received,
                     "preemptions": self.engine.room.preemptions,
                     "replayed_tokens": self.engine.scheduler.replayed_tokens}
        load = self._load()
        counters |= {name: float(load[name]) for name in ("jobs_running", "jobs_waiting", "tokens_pending")}
        if self.store is not None:
            counters |= {f"store_{name}": float(value) for name, value in self.store.counters().items()
                         if name.startswith("missed_")}
        with self.vault.lock:
            counters |= {f"book_{name}": float(value) for name, value in self.book.counters.items()}
        return counters
