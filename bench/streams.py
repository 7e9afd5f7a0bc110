"""Many clients that stream at once, for minutes: is every token right, and does memory stay where it is?

    kvbank bench streams [--json] [--quick] [--clients N] [--seconds S]

The model is the canary: one wrong byte of KV anywhere changes its answer, and what it answers without a cache is computed
beside it. Each client streams one job after the other, texts that share beginnings with others', over HTTP from its own
connection. Resident memory of the gateway and of every member is looked at each second; its median in the last tenth of the
run is compared with that in the ten seconds after the warm-up (60 s, or a fifth of the run).
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.report import Report
from kvbank import LocalCluster
from kvbank.workers.canary import write_canary
from kvbank.workers.canary_alone import CanaryAlone

SETTINGS: dict[str, Any] = {
    "workers": 2, "lenders": 1, "launcher": "process", "device_blocks": 512, "host_bytes": "16MiB", "redis": "embedded",
    "redis_bytes": "32MiB", "keep_jobs_s": 5.0}
TEXTS, OUTPUTS = 48, 24


class Load:
    """What all clients share."""

    def __init__(self, address: str, folder: Path) -> None:
        alone, rng = CanaryAlone(folder), random.Random(7)
        stems = [[rng.randrange(3, 60000) for _ in range(length)] for length in (0, 128, 300)]
        self.prompts = [rng.choice(stems) + [rng.randrange(3, 60000) for _ in range(rng.choice((5, 40, 130)))]
                        for _ in range(TEXTS)]
        self.right = [alone.answer(prompt, OUTPUTS, tenant="default") for prompt in self.prompts]
        self.address, self.errors, self.done = address, Counter[str](), 0
        self.first_s: list[float] = []
        self.tokens = 0

    async def client(self, number: int, until: float) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=self.address, timeout=60.0, trust_env=False) as http:
            while time.monotonic() < until:
                which = rng.randrange(TEXTS)
                try:
                    await self._one(http, which)
                except Exception as error:               # whatever it is, it is an error of this run
                    self.errors[type(error).__name__] += 1

    async def _one(self, http: httpx.AsyncClient, which: int) -> None:
        body = {"prompt": self.prompts[which], "max_tokens": OUTPUTS, "temperature": 0, "ignore_eos": True, "stream": True,
                "return_token_ids": True}
        began, got = time.perf_counter(), []
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.errors[f"status {answer.status_code}"] += 1
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.errors[chunk["error"]["code"]] += 1
                    return
                ids = [token for choice in chunk["choices"] for token in choice.get("token_ids", ())]
                if ids and not got:
                    self.first_s.append(time.perf_counter() - began)
                got += ids
        self.tokens += len(got)
        self.done += 1
        if got != self.right[which]:
            self.errors["wrong tokens"] += 1


def main(argv: list[str] | None = None) -> int:
    report = Report("streams", argv, ("--clients", {"type": int, "default": 200}),
                    ("--seconds", {"type": float, "default": 300.0}))
    seconds = 25.0 if report.args.quick else report.args.seconds
    with tempfile.TemporaryDirectory() as folder:
        model = write_canary(Path(folder) / "canary", num_layers=2)
        with LocalCluster(model=str(model), **SETTINGS) as cluster:
            load = Load(cluster.address, model)
            pids = {name: int(pid) for name, pid in cluster.processes.items()}
            memory = asyncio.run(_run(load, pids, report.args.clients, seconds))
    warm = min(60.0, seconds / 5)
    growth = {}
    for name, seen in memory.items():
        first = statistics.median(rss for at, rss in seen if warm <= at < warm + 10.0)
        last = statistics.median(rss for at, rss in seen if at >= seconds * 0.9)
        growth[name] = round(last / first, 4)
        report.line(member=name, mib_after_warm_up=round(first / 2**20, 1), mib_at_the_end=round(last / 2**20, 1))
    for what, number in load.errors.items():
        report.line(error=what, times=number)
    report.goal("errors", "==", 0)
    report.goal("memory_growth", "<=", 1.05)
    return report.finish({
        "errors": sum(load.errors.values()), "streams": load.done, "memory_growth": max(growth.values()),
        "tokens_per_s": round(load.tokens / seconds, 1), "ttft_p50_ms": round(1e3 * statistics.median(load.first_s), 1),
        "clients": report.args.clients, "seconds_run": seconds})


async def _run(load: Load, pids: dict[str, int], clients: int, seconds: float) -> dict[str, list[tuple[float, int]]]:
    began = time.monotonic()
    watched = {name: psutil.Process(pid) for name, pid in pids.items()}
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in watched}
    running = asyncio.gather(*(load.client(number, began + seconds) for number in range(clients)))
    while not running.done():
        for name, process in watched.items():
            seen[name].append((time.monotonic() - began, process.memory_info().rss))
        await asyncio.wait({running}, timeout=1.0)
    await running
    return seen
