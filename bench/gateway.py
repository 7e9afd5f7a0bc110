"""What the way through HTTP costs: the same jobs by the gateway of a cluster and by its engine called directly, in turns.

    kvbank bench gateway [--json] [--quick]

Decode: eight streams at once, all from one request to /v1/completions, against the steps of the engine in the same worker, on
the same thread; tokens of all turns by the seconds of all, whole answers counted; once more with every job traced into files.
The same engine on purpose: two processes with the same weights differ by 5 % for as long as they live, by where their memory
lies. Five clusters one after the other for each, and before each of them an engine alone in a process of its own, which tells
what a worker's process costs beside it (ten against ten, so to 1 or 2 %). Nothing else runs: a cluster that only rests takes
2 % of a core. The first turn of each is not counted: within it a thread gets its memory from the system, page by page, for
hundreds of steps, and never again.

First token: one short prompt at a time on a small model, until its first chunk against until its first event, in turns; here
the engine is this process's. That is done eight times, some seconds apart: what neighbours on a shared machine do to a process
that has rested drifts by two within a minute. The goal is for the time when the engine's own first token was quickest, and the
median of the eight is told beside it. Leaving: from a reader's hang-up until the worker's blocks are free, as /v1/status tells
it. All sides run on one thread; the gateway and this client take what is left, and the client takes little: bytes of a socket,
read as HTTP and JSON when the clock has stopped.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.direct import BLOCKS, PROGRAM, STREAMS, Direct, alone, unseen
from bench.engine import VOCAB, write_model
from bench.report import Report, interleaved
from kvbank import LocalCluster
from kvbank.cluster.processes import MEMBER_PROGRAM
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Token
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sequence import JobSpec

SMALL_VOCAB = 512
REST_S = 0.01                        # before a first token is clocked: processes and caches are as cold on both sides
TOKEN = re.compile(rb'"token_ids":\[\d')
APART_S = 8.0                        # one look at first tokens and the next
IDLE_S = 10                          # a connection is used again within it; the gateway closes those that rest for 30
LAST_CHUNK = b"0\r\n\r\n"


class Reader:
    """One client of a gateway, over one connection."""

    def __init__(self, address: str, vocab: int) -> None:
        self._address = address.removeprefix("http://")
        self._socket, self._eye = self._connect(), http.client.HTTPConnection(self._address, timeout=120)
        self._rng, self._vocab, self._used_at = random.Random(vocab), vocab, time.monotonic()

    def _connect(self) -> socket.socket:
        host, port = self._address.rsplit(":", 1)
        made = socket.create_connection((host, int(port)), timeout=120)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def _prompts(self, count: int) -> list[list[int]]:
        return [unseen(self._rng, self._vocab) for _ in range(count)]

    def decode(self, tokens: int) -> float:
        """As Direct.decode, through HTTP."""
        request = self._request(self._prompts(STREAMS), tokens)
        began = time.perf_counter()
        answer = b"".join(self._answer(request))
        seconds = time.perf_counter() - began
        if (got := _tokens(answer)) != STREAMS * tokens:
            raise RuntimeError(f"{got} tokens came instead of {STREAMS * tokens}: {answer[:200]!r}")
        return got / seconds

    def first(self) -> float:
        """Milliseconds to a first token."""
        request, answer, arrived = self._request(self._prompts(1), 1), b"", 0.0
        time.sleep(REST_S)
        began = time.perf_counter()
        for piece in self._answer(request):
            answer += piece
            if not arrived and TOKEN.search(answer):
                arrived = time.perf_counter()
        if _tokens(answer) != 1:
            raise RuntimeError(f"no single token came: {answer[:200]!r}")
        return 1e3 * (arrived - began)

    def left(self) -> float:
        """Milliseconds from hanging up in the middle of an answer to no block in use."""
        answer, pieces = b"", self._answer(self._request(self._prompts(1), 4000))
        while not TOKEN.search(answer):
            answer += next(pieces)
        while not self._used():                      # the status is up to 0.1 s old
            time.sleep(0.005)
        self._socket.close()
        began, self._socket = time.perf_counter(), self._connect()
        while self._used():
            time.sleep(0.005)
        return 1e3 * (time.perf_counter() - began)

    def _used(self) -> int:
        self._eye.request("GET", "/v1/status")
        return sum(worker["blocks_used"] for worker in json.loads(self._eye.getresponse().read())["workers"])

    def _request(self, prompts: list[list[int]], tokens: int) -> bytes:
        if time.monotonic() > self._used_at + IDLE_S:
            self._socket.close()
            self._socket = self._connect()
        body = json.dumps({"prompt": prompts, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                           "return_token_ids": True})
        return (f"POST /v1/completions HTTP/1.1\r\nHost: {self._address}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}").encode()

    def _answer(self, request: bytes) -> Iterator[bytes]:
        """Its bytes as they come, to the last chunk."""
        self._socket.sendall(request)
        answer = b""
        while not answer.endswith(LAST_CHUNK):
            piece = self._socket.recv(1 << 16)
            answer += piece
            if not piece or not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"no answer, or no end of it: {answer[:200]!r}")
            yield piece
        self._used_at = time.monotonic()


def _tokens(answer: bytes) -> int:
    """How many came."""
    chunks = [json.loads(line) for line in re.findall(rb"data: (\{.*\})\n", answer)]
    return sum(len(choice["token_ids"]) for chunk in chunks for choice in chunk.get("choices", ()))     # an error has none


class Engine:
    """One in this process."""

    def __init__(self, folder: Path, vocab: int) -> None:
        self._engine = build_engine(WorkerConfig(model=str(folder), device_blocks=BLOCKS))
        self._rng, self._vocab, self._names = random.Random(folder.name), vocab, count()

    def first(self) -> float:
        """As Reader.first, called directly."""
        job = JobSpec(id=f"f{next(self._names)}", prompt=unseen(self._rng, self._vocab), max_tokens=1, ignore_eos=True)
        time.sleep(REST_S)
        began = time.perf_counter()
        self._engine.add(job)
        while not any(isinstance(event, Token) for event in self._engine.step()):
            pass
        return 1e3 * (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> int:
    report = Report("gateway", argv)
    torch.set_num_threads(1)
    clusters, repeats, tokens, looks, firsts = (1, 3, 24, 1, 20) if report.args.quick else (5, 3, 128, 8, 60)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temp, tempfile.TemporaryDirectory(dir="/tmp") as short:      # a socket's path is short
        folder = write_model(Path(temp) / "model")
        tracing = {"exporter": "file", "trace_dir": str(Path(temp) / "traces")}
        seen: dict[str, list[dict[str, float]]] = {"decode": [], "traced decode": []}
        for kind, settings in (("decode", {}), ("traced decode", tracing)):
            for _ in range(clusters):
                seen[kind].append(_decode(folder, Path(short) / "engine", repeats, tokens, **settings))
                report.line(step=kind, streams=STREAMS, tokens=tokens, **{k: round(v, 1) for k, v in seen[kind][-1].items()})
        small = write_random_model(Path(temp) / "small", seed=7, vocab=SMALL_VOCAB)
        with _cluster(small) as cluster:
            engine, reader = Engine(small, SMALL_VOCAB), Reader(cluster.address, SMALL_VOCAB)
            engine.first(), reader.first()
            first: list[dict[str, float]] = []
            for look in range(looks):
                time.sleep(APART_S if look else 0.0)
                first.append(interleaved(firsts, engine=engine.first, gateway=reader.first))
                report.line(step="first token", **{f"{side}_ms": round(ms, 2) for side, ms in first[-1].items()})
            left = [reader.left() for _ in range(5)]
        quiet = min(first, key=lambda look: look["engine"])
    decode, traced = seen.values()
    alike = decode + traced                              # an engine that is called directly traces nothing
    figures["decode_engine_tokens_per_s"] = round(_rate(decode, "engine"), 1)
    figures["decode_gateway_tokens_per_s"] = round(_rate(decode, "gateway"), 1)
    figures["decode_loss"] = _loss(decode)
    figures["decode_loss_traced"] = _loss(traced)
    figures["decode_loss_in_workers_process"] = round(1 - _rate(alike, "engine") / _rate(alike, "alone"), 4)
    figures["ttft_added_ms"] = round(quiet["gateway"] - quiet["engine"], 2)
    figures["ttft_added_ms_median"] = round(statistics.median(look["gateway"] - look["engine"] for look in first), 2)
    figures["freed_after_leaving_ms_max"] = round(max(left), 1)
    figures["freed_after_leaving_ms"] = round(statistics.median(left), 1)
    report.goal("decode_loss", "<=", 0.05)
    report.goal("decode_loss_traced", "<=", 0.08)
    report.goal("decode_loss_in_workers_process", "<=", 0.05)
    report.goal("ttft_added_ms", "<=", 3.0)
    report.goal("freed_after_leaving_ms_max", "<=", 1000.0)
    return report.finish(figures)


def _decode(folder: Path, path: Path, repeats: int, tokens: int, **settings: Any) -> dict[str, float]:
    """Tokens per second of each side over all turns: an engine alone, then, in turns, a worker's engine and its gateway. path:
    of the socket that both listen at, one after the other."""
    with alone(path, folder) as engine:
        engine.decode(tokens)                            # warm-up
        by_itself = statistics.harmonic_mean([engine.decode(tokens) for _ in range(repeats)])
    with _cluster(folder, path, **settings) as cluster, closing(Direct(path)) as direct:
        reader = Reader(cluster.address, VOCAB)
        direct.decode(tokens), reader.decode(tokens)     # warm-up of both
        rates = interleaved(repeats, middle=statistics.harmonic_mean, engine=lambda: direct.decode(tokens),
                            gateway=lambda: reader.decode(tokens))
    return {"alone": by_itself, **rates}


def _rate(turns: list[dict[str, float]], side: str) -> float:
    """Over all of them: as many tokens each turn, so it is the harmonic mean."""
    return statistics.harmonic_mean([rates[side] for rates in turns])


def _loss(turns: list[dict[str, float]]) -> float:
    return round(1 - _rate(turns, "gateway") / _rate(turns, "engine"), 4)


def _cluster(folder: Path, direct: Path | None = None, **settings: Any) -> LocalCluster:
    """One worker. `direct`: the socket at which its engine is called."""

    class Cluster(LocalCluster):
        member_program = MEMBER_PROGRAM if direct is None else ("-P", PROGRAM, str(direct))

    return Cluster(model=str(folder), workers=1, launcher="process", device_blocks=BLOCKS, redis=None, host_bytes=0,
                   torch_threads=1, **settings)


if __name__ == "__main__":
    raise SystemExit(main())
