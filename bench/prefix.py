"""What a prefix saves that was computed before, through the whole stack: client, HTTP, gateway, gRPC, worker and back.

    kvbank bench prefix [--json] [--quick] [--threads N]

Every prompt is submitted twice, cold and warm, and the client clocks its first token. Cold and warm runs take turns. Where
the prefix lay is forced by how much room there is, and proved by the receipt; what it does not prove is not reported.

    device   the worker holds it still: the same prompt again at once
    peer     the worker has room for an eighth of it; a lender keeps the rest as its cache and attends to it there
    host     another prompt came between and took the room; it is copied back from host memory
    redis    the same without a host tier

The model is the engine bench's (8 layers, width 512, 8 heads over 4 KV heads, vocabulary 32,000, random weights, float32);
--quick takes a smaller one and states no goal for milliseconds.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.clocked import Clocked, clock, texts
from bench.engine import VOCAB, write_model
from bench.report import Report
from kvbank import Client, LocalCluster
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.random_model import write_random_model

SPAN_TOKENS, SPAN_BLOCKS, BLOCK_TOKENS = 128, 8, 16
PROMPT_TOKENS = 4096
PROMPT_SPANS = PROMPT_TOKENS // SPAN_TOKENS + 1                   # and the answer
ANSWER_TOKENS = 4
WARM_GOAL_MS = 25.0                  # the first token of a repeated 4k prompt, after its submission
MEMORY_GOAL_MB = 600
PROVED = 0.8                         # of the prompt from one place makes it that place's figure
SETTLED_S = 0.3                      # nothing new in the tiers for so long: what was on its way has arrived


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prefix lies when it is asked for again, and the cluster that makes it lie there."""

    name: str
    settings: dict[str, Any]
    at_once: bool = True             # ask again at once; else after the next prompt has taken the room
    lengths: tuple[int, ...] = (PROMPT_TOKENS,)


def main(argv: list[str] | None = None) -> int:
    report = Report("prefix", argv, ("--threads", {"type": int, "default": os.cpu_count() or 1}))
    quick, rounds = report.args.quick, 2 if report.args.quick else 7
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder)) if quick else write_model(Path(folder) / "model")
        for place in places(span_bytes(model), rounds, lengths=(PROMPT_TOKENS,) if quick else (1024, PROMPT_TOKENS, 16_384)):
            figures |= visit(report, model, place, rounds)
    figures["worker_memory_beyond_mb"] = max(value for name, value in figures.items() if name.startswith("memory_beyond_mb_"))
    if not quick:
        report.goal("ttft_warm_ms", "<=", WARM_GOAL_MS)
    report.goal("reused_share", ">=", 0.99)
    report.goal("worker_memory_beyond_mb", "<=", MEMORY_GOAL_MB)
    return report.finish(figures | {"threads": report.args.threads, "rounds": rounds})


def small_model(folder: Path) -> Path:
    return write_random_model(folder / "small", vocab=VOCAB, hidden_size=128, num_layers=4, heads=4, kv_heads=2)


def places(bytes_of_span: int, rounds: int, *, lengths: tuple[int, ...]) -> list[Place]:
    tight = (PROMPT_SPANS + 1) * SPAN_BLOCKS                      # one prompt, and hardly anything of another
    frames = (rounds + 1) * PROMPT_SPANS * (bytes_of_span + 65536)
    none: dict[str, Any] = {"host_bytes": 0, "redis": None}
    return [
        Place("device", {"device_blocks": sum(lengths) // BLOCK_TOKENS + 16 * SPAN_BLOCKS, **none}, lengths=lengths),
        Place("peer", {"device_blocks": 5 * SPAN_BLOCKS, "lenders": 1, "lender_blocks": 2 * tight, **none}),
        Place("host", {"device_blocks": tight, "host_bytes": frames, "redis": None}, at_once=False),
        Place("redis", {"device_blocks": tight, "host_bytes": 0, "redis": "embedded", "redis_bytes": frames}, at_once=False),
    ]


# -- one place ---------------------------------------------------------------------------------------------------------

def visit(report: Report, model: Path, place: Place, rounds: int) -> dict[str, Any]:
    """Its figures: cold and warm medians, their ratio, the share of the prompt that was reused, and the worker's memory."""
    figures: dict[str, Any] = {}
    text = texts(VOCAB)
    with (LocalCluster(str(model), workers=1, launcher="process", torch_threads=report.args.threads, **place.settings) as cluster,
          Client(cluster.address) as client):
        clock(client, text(SPAN_TOKENS), ANSWER_TOKENS)           # warm-up, of the cluster and of its connections
        for length in place.lengths:
            pairs = in_turns(client, lambda n=length: text(n), rounds if length <= PROMPT_TOKENS else 2, place.at_once)
            figures |= told(report, place, length, pairs)
        figures[f"memory_beyond_mb_{place.name}"] = beyond_mb(cluster, client, model)
    return figures


def in_turns(client: Client, text: Callable[[], list[int]], rounds: int, at_once: bool) -> list[tuple[Clocked, Clocked]]:
    """(cold, warm) of `rounds` prompts; when not at once, a prompt's warm run follows the next one's cold run."""
    pairs: list[tuple[Clocked, Clocked]] = []
    before: tuple[list[int], Clocked] | None = None
    for _ in range(rounds + (not at_once)):
        prompt = text()
        cold = clock(client, prompt, ANSWER_TOKENS)
        settle(client)
        again = (prompt, cold) if at_once else before
        before = (prompt, cold)
        if again is not None:
            pairs.append((again[1], clock(client, again[0], ANSWER_TOKENS)))
            settle(client)
    return pairs


def settle(client: Client) -> None:
    """Wait until no frame is on its way to a tier and no span to a lender."""
    def look() -> list[Any]:
        status = client.status()
        return [(tier.bytes_used, tier.counters.get("puts")) for tier in status.tiers] + [len(status.loans)]

    seen = look()
    while True:
        time.sleep(SETTLED_S)
        if seen == (seen := look()):
            return


def told(report: Report, place: Place, length: int, pairs: list[tuple[Clocked, Clocked]]) -> dict[str, Any]:
    """Figures of one length, if the receipts prove the place. The one of 4k on the device goes without a suffix."""
    receipts = [warm.receipt for _, warm in pairs]
    reused = min(sum(receipt.reused.values()) / length for receipt in receipts)
    from_place = min(receipt.reused.get(place.name, 0) / length for receipt in receipts)
    cold, warm = (statistics.median(run.ttft_s for run in runs) * 1e3 for runs in zip(*pairs, strict=True))
    report.line(prefix_on=place.name, prompt_tokens=length, rounds=len(pairs), ttft_cold_ms=round(cold, 2),
                ttft_warm_ms=round(warm, 2), warm_best_ms=round(min(run.ttft_s for _, run in pairs) * 1e3, 2),
                ratio=round(cold / warm, 1), reused_share=round(reused, 4), share_from_there=round(from_place, 4),
                reused=receipts[-1].reused, missed=receipts[-1].missed, proved=from_place >= PROVED)
    if from_place < PROVED:
        return {}
    suffix = ("" if place.name == "device" else f"_{place.name}") + ("" if length == PROMPT_TOKENS else f"_{length // 1024}k")
    found = {"ttft_cold_ms": round(cold, 2), "ttft_warm_ms": round(warm, 2), "ratio": round(cold / warm, 1),
             "reused_share": round(reused, 4)}
    return {name + suffix: value for name, value in found.items()}


# -- memory ------------------------------------------------------------------------------------------------------------

def beyond_mb(cluster: LocalCluster, client: Client, model: Path) -> float:
    """The worker's resident memory without weights, KV slots and what its own tiers hold. By now every slot was used."""
    (worker,) = (worker for worker in client.status().workers if worker.kind == "model")
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    slots = worker.blocks_total // SPAN_BLOCKS * span_bytes(model)
    tiers = sum(tier.bytes_used for tier in worker.tiers if tier.name != "redis")
    return round((psutil.Process(cluster.processes["worker-0"]).memory_info().rss - weights - slots - tiers) / 1e6, 1)


def span_bytes(model: Path) -> int:
    spec = read_config(model)
    return spec.num_layers * 2 * spec.num_kv_heads * SPAN_TOKENS * spec.head_dim * 4


if __name__ == "__main__":
    raise SystemExit(main())
