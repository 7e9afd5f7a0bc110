"""The hot stream alone: one Attend round trip, 16 KiB each way, beside a bare gRPC echo of the same sizes in the same run.

    kvbank bench attend [--json] [--quick]

    echo       the same channel settings, the same bytes, no meaning: one thread writes and reads
    attend     our stream as RemoteAttention uses it: packed, sent, answered by an AttendServer, received, unpacked;
               the answer is ready, nothing is computed
    attended   the same with the attention itself, over 1 and over 16 spans (one layer, 8 heads over 4 KV heads)
    locked     attended, with certificates: both sides proved, all bytes encrypted

The lender is a process of its own. They take turns in blocks of rounds, so that a drifting machine hits all alike.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from bench.report import Report
from kvbank.cluster.certs import make_certificates
from kvbank.kvstore.layout import Boot, Layout
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge, Certificates
from kvbank.kvstore.transport.hot import Attend, HotPlan, Partial, PlanItem, unpack
from kvbank.kvstore.transport.links import HotLink
from kvbank.kvstore.vault import Arena
from kvbank.workers.attend_server import AttendServer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "0" * 32
HEADS, KV_HEADS, DIM, ROWS, SPANS = 8, 4, 64, 8, 16              # 8 rows of 8 heads of 64 floats: 16 KiB of queries
LAYOUT = Layout(num_layers=1, layer_first=0, layer_last=1, kv_heads=KV_HEADS, head_dim=DIM)
FIRST_POSITION = SPANS * LAYOUT.span_tokens
BOOT = Boot(bytes(16))
OUT_BYTES, LSE_BYTES = ROWS * HEADS * DIM * 4, ROWS * HEADS * 4
SERVICE = "kvbank.Bank"                                           # one that a worker's certificate may call
ECHO, READY, ATTEND = (f"/{SERVICE}/{name}" for name in ("Echo", "Ready", "Attend"))
LAYERS = 8                                                        # that share a step
GOAL = 1.1                                                        # of the echo's median
LOCKED_GOAL = 1.3                                                 # of the median without certificates


def main(argv: list[str] | None = None) -> int:
    report = Report("attend", argv, ("--rounds", {"type": int, "default": 0, "help": "of each kind; 0: as usual"}),
                    ("--lender", {"type": Path, "help": argparse.SUPPRESS}))
    if report.args.lender:
        return lend(report.args.lender)
    rounds = report.args.rounds or (2_000 if report.args.quick else 10_000)
    found = measure(rounds, blocks=10)
    figures: dict[str, Any] = {}
    for name, times in found.items():
        p50, p99 = statistics.median(times), sorted(times)[int(0.99 * len(times))]
        figures |= {f"{name}_p50_us": round(p50 * 1e6, 1), f"{name}_p99_us": round(p99 * 1e6, 1)}
        report.line(what=name, rounds=len(times), p50_us=figures[f"{name}_p50_us"], p99_us=figures[f"{name}_p99_us"])
    for quantile in ("p50", "p99"):
        figures[f"ratio_{quantile}"] = round(figures[f"attend_{quantile}_us"] / figures[f"echo_{quantile}_us"], 2)
    for spans in ("1_span", "16_spans"):
        figures[f"locked_ratio_p50_{spans}"] = round(
            figures[f"locked_{spans}_p50_us"] / figures[f"attended_{spans}_p50_us"], 2)
    figures |= {"bytes_there": len(question(0)), "bytes_back": len(answer(0).pack()), "rounds": rounds}
    report.goal("ratio_p50", "<=", GOAL)
    report.goal("locked_ratio_p50_1_span", "<=", LOCKED_GOAL)
    report.goal("locked_ratio_p50_16_spans", "<=", LOCKED_GOAL)
    return report.finish(figures)


def measure(rounds: int, blocks: int) -> dict[str, list[float]]:
    """Seconds of every round, by what was measured."""
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            [sys.executable, "-m", "bench.attend", "--lender", _certificates(folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True) as lender:
        try:
            assert lender.stdout is not None
            plain, locked = (f"127.0.0.1:{int(lender.stdout.readline())}" for _ in range(2))
            with rpc.channel(plain, TOKEN) as channel, rpc.channel(locked, _badge(folder)) as safe:
                ready, attended, behind = _Hot(channel, READY), _Hot(channel, ATTEND), _Hot(safe, ATTEND)
                sides: dict[str, Callable[[int], None]] = {
                    "echo": _Echo(channel).round, "attend": ready.round,
                    "attended_1_span": lambda number: attended.round(number, 1),
                    "attended_16_spans": lambda number: attended.round(number, SPANS),
                    "locked_1_span": lambda number: behind.round(number, 1),
                    "locked_16_spans": lambda number: behind.round(number, SPANS),
                }
                return take_turns(sides, rounds, blocks)
        finally:
            lender.kill()


def take_turns(sides: dict[str, Callable[[int], None]], rounds: int, blocks: int) -> dict[str, list[float]]:
    """`rounds` of each side in `blocks` turns; the first tenth of each turn is warm-up and not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    each, numbers = max(10, rounds // blocks), count()
    for _ in range(blocks):
        for name, side in sides.items():
            for turn in range(each + each // 10):
                began = time.perf_counter()
                side(next(numbers))
                if turn >= each // 10:
                    found[name].append(time.perf_counter() - began)
    return found


# -- the borrower's side -----------------------------------------------------------------------------------------------

def question(step: int, plan: int = 1) -> bytes:
    positions = np.arange(FIRST_POSITION, FIRST_POSITION + ROWS, dtype=np.int64)
    return Attend(plan, step, 0, None, positions, QUERIES.numpy().tobytes()).pack()


class _Hot:
    """One of our hot streams: what RemoteAttention does for one part of one layer."""

    def __init__(self, channel: grpc.Channel, path: str) -> None:
        self._link = HotLink(channel.stream_stream(path), BOOT, slow_s=5.0, lost_s=10.0, on_slow=lambda: None)
        for spans in (1, SPANS):
            refs = tuple((index, 1, index, 1) for index in range(spans))
            self._link.send(HotPlan(spans, HEADS, KV_HEADS, DIM, DIM**-0.5, "fast", (PlanItem(ROWS, refs),)).pack())

    def round(self, number: int, spans: int = 1) -> None:
        step = number // LAYERS                      # the lender prepares a step once for all its layers
        self._link.send(question(step, spans))
        partial = unpack(self._link.receive(), lse_per_row=HEADS, out_per_row=HEADS * DIM)
        assert isinstance(partial, Partial) and partial.step == step and len(partial.out) == OUT_BYTES


class _Echo:
    """The best a synchronous Python program gets of a bidirectional stream with these sizes."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._bytes = question(0)
        self._answers = channel.stream_stream(ECHO)(iter(self._outbox.get, None))

    def round(self, number: int) -> None:
        self._outbox.put(self._bytes)
        assert len(next(self._answers)) > OUT_BYTES


# -- the lender's side -------------------------------------------------------------------------------------------------

def _certificates(folder: str) -> str:
    make_certificates(Path(folder))
    return folder


def _badge(folder: str | Path) -> Badge:
    return Badge(TOKEN, Certificates(Path(folder), "worker"))


def lend(folder: Path) -> int:
    """Serve until standard input ends, in clear and with certificates; two lines on standard output are the ports."""
    torch.set_num_threads(1)
    arena = Arena(SPANS, LAYOUT.slot_bytes)
    arena.bytes.view(torch.float32).normal_()
    handlers = {"Echo": echo, "Ready": _answering(_Ready(arena, _Open(), lambda boot: LAYOUT)),
                "Attend": _answering(AttendServer(arena, _Open(), lambda boot: LAYOUT))}
    servers = [rpc.server(shown) for shown in (TOKEN, _badge(folder))]
    for server in servers:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            SERVICE, {name: grpc.stream_stream_rpc_method_handler(handler) for name, handler in handlers.items()}),))
        port = rpc.bind(server, "127.0.0.1:0")
        server.start()
        print(port, flush=True)
    sys.stdin.read()
    for server in servers:
        server.stop(0)
    return 0


def echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    back = answer(0).pack()
    for _ in messages:
        yield back


def answer(step: int) -> Partial:
    empty = np.zeros((0, 4), np.int32)
    return Partial(1, step, 0, empty, np.zeros((0, 2), np.int32), bytes(OUT_BYTES), bytes(LSE_BYTES))


def _answering(server: AttendServer) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
    return lambda messages, context: server.serve(BOOT, messages)


class _Open:
    """Pins of a lender whose every promise is good."""

    def pin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> list[bool]:
        return [True] * len(refs)

    def unpin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> None: ...

    def digest(self, borrower: bytes, ref: tuple[int, int, int]) -> bytes | None: ...

    def taint(self, borrower: bytes, ref: tuple[int, int, int]) -> None: ...


class _Ready(AttendServer):
    """Everything but the attention."""

    def _compute_partials(self, *_: Any) -> tuple[np.ndarray, bytes, bytes]:
        return np.zeros((0, 4), np.int32), bytes(OUT_BYTES), bytes(LSE_BYTES)


QUERIES = torch.randn(ROWS, HEADS, DIM, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    sys.exit(main())
