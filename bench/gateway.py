"""What the way through HTTP costs: the same jobs by the gateway of a cluster and by an engine in this process, in turns.

    kvbank bench gateway [--json] [--quick]

Decode: eight streams at once, all from one request to /v1/completions, against the engine's own steps; tokens of all turns by
the seconds of all, whole answers counted; once more with every job traced into files. First token: one short prompt at a time
on a small model, until its first chunk against until its first event. Leaving: from a reader's hang-up until the worker's
blocks are free, as /v1/status tells it. Both sides run on one thread; the gateway and this client take what is left.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Generator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.engine import write_model
from bench.report import Report, interleaved
from kvbank import LocalCluster
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine, Token
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sequence import JobSpec

STREAMS, PROMPT_TOKENS, SMALL_VOCAB = 8, 16, 512
REST_S = 0.01                        # before a first token is clocked: processes and caches are as cold on both sides
BLOCKS = 1024
NAMES = count()


class Ours:
    """An engine in this process, and a cluster of one worker beside it that serves the same folder."""

    def __init__(self, folder: Path, address: str, vocab: int) -> None:
        self.engine: Engine = build_engine(WorkerConfig(model=str(folder), device_blocks=BLOCKS))
        self._address = address.removeprefix("http://")
        self._http, self._eye = self._connect(), self._connect()
        self._rng, self._vocab = random.Random(vocab), vocab

    def _connect(self) -> http.client.HTTPConnection:
        # Python's own client: httpx would add a millisecond of its own to each request.
        return http.client.HTTPConnection(self._address, timeout=120)

    def prompt(self) -> list[int]:
        """One that nobody has seen."""
        return [self._rng.randrange(self._vocab) for _ in range(PROMPT_TOKENS)]

    def by_engine(self, tokens: int) -> float:
        """Tokens per second of STREAMS jobs together."""
        for _ in range(STREAMS):
            self.engine.add(JobSpec(id=f"d{next(NAMES)}", prompt=self.prompt(), max_tokens=tokens, ignore_eos=True))
        began = time.perf_counter()
        self.engine.run_until_idle()
        return STREAMS * tokens / (time.perf_counter() - began)

    def by_gateway(self, tokens: int) -> float:
        """As by_engine, through HTTP."""
        prompts = [self.prompt() for _ in range(STREAMS)]
        began = time.perf_counter()
        got = sum(len(choice["token_ids"]) for chunk in self._chunks(prompts, tokens) for choice in chunk["choices"])
        if got != STREAMS * tokens:
            raise RuntimeError(f"{got} tokens came instead of {STREAMS * tokens}")
        return got / (time.perf_counter() - began)

    def first_by_engine(self) -> float:
        """Milliseconds to a first token."""
        job = JobSpec(id=f"f{next(NAMES)}", prompt=self.prompt(), max_tokens=1, ignore_eos=True)
        time.sleep(REST_S)
        began = time.perf_counter()
        self.engine.add(job)
        while not any(isinstance(event, Token) for event in self.engine.step()):
            pass
        return 1e3 * (time.perf_counter() - began)

    def first_by_gateway(self) -> float:
        """As first_by_engine, through HTTP."""
        prompt = self.prompt()
        time.sleep(REST_S)
        began = time.perf_counter()
        arrived = [time.perf_counter() for chunk in self._chunks([prompt], 1) if chunk["choices"][0]["token_ids"]]
        return 1e3 * (arrived[0] - began)

    def left(self) -> float:
        """Milliseconds from hanging up in the middle of an answer to no block in use."""
        chunks = self._chunks([self.prompt()], 4000)
        next(chunks)
        while not self._used():                      # the status is up to 0.1 s old
            time.sleep(0.005)
        chunks.close()
        self._http.close()
        began, self._http = time.perf_counter(), self._connect()
        while self._used():
            time.sleep(0.005)
        return 1e3 * (time.perf_counter() - began)

    def _used(self) -> int:
        self._eye.request("GET", "/v1/status")
        return sum(worker["blocks_used"] for worker in json.loads(self._eye.getresponse().read())["workers"])

    def _chunks(self, prompts: list[list[int]], tokens: int) -> Generator[dict[str, Any], None, None]:
        body = {"prompt": prompts, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "return_token_ids": True}
        self._http.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        with answer:
            while line := answer.readline():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])


def main(argv: list[str] | None = None) -> int:
    report = Report("gateway", argv)
    torch.set_num_threads(1)
    repeats, tokens, firsts = (3, 24, 20) if report.args.quick else (16, 128, 60)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temp:
        folder = write_model(Path(temp) / "model")
        tracing = {"exporter": "file", "trace_dir": str(Path(temp) / "traces")}
        with _cluster(folder) as cluster, _cluster(folder, **tracing) as traced:
            ours, other = Ours(folder, cluster.address, 32_000), Ours(folder, traced.address, 32_000)
            ours.by_engine(8), ours.by_gateway(8), other.by_gateway(8)           # warm-up of all
            # As many tokens each turn: the harmonic mean of rates is the rate over all turns.
            decode = interleaved(repeats, middle=statistics.harmonic_mean, engine=lambda: ours.by_engine(tokens),
                                 gateway=lambda: ours.by_gateway(tokens), traced=lambda: other.by_gateway(tokens))
        report.line(step="decode", streams=STREAMS, tokens=tokens, **{side: round(rate, 1) for side, rate in decode.items()})
        small = write_random_model(Path(temp) / "small", seed=7, vocab=SMALL_VOCAB)
        with _cluster(small) as cluster:
            ours = Ours(small, cluster.address, SMALL_VOCAB)
            ours.first_by_engine(), ours.first_by_gateway()
            first = interleaved(firsts, engine=ours.first_by_engine, gateway=ours.first_by_gateway)
            left = [ours.left() for _ in range(5)]
        report.line(step="first token", **{f"{side}_ms": round(ms, 2) for side, ms in first.items()})
    figures["decode_engine_tokens_per_s"] = round(decode["engine"], 1)
    figures["decode_gateway_tokens_per_s"] = round(decode["gateway"], 1)
    figures["decode_loss"] = round(1 - decode["gateway"] / decode["engine"], 4)
    figures["decode_loss_traced"] = round(1 - decode["traced"] / decode["engine"], 4)
    figures["ttft_added_ms"] = round(first["gateway"] - first["engine"], 2)
    figures["freed_after_leaving_ms_max"] = round(max(left), 1)
    figures["freed_after_leaving_ms"] = round(statistics.median(left), 1)
    report.goal("decode_loss", "<=", 0.05)
    report.goal("decode_loss_traced", "<=", 0.08)
    report.goal("ttft_added_ms", "<=", 3.0)
    report.goal("freed_after_leaving_ms_max", "<=", 1000.0)
    return report.finish(figures)


def _cluster(folder: Path, **settings: Any) -> LocalCluster:
    return LocalCluster(model=str(folder), workers=1, launcher="process", device_blocks=BLOCKS, redis=None, host_bytes=0,
                        torch_threads=1, **settings)


if __name__ == "__main__":
    raise SystemExit(main())
