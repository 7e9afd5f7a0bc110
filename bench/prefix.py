"""What a cached prefix saves, through the whole stack: client, HTTP, gateway, gRPC, worker and back.

    kvbank bench prefix --json [--quick] [--threads N]

Each round submits a new prompt (cold) and the same one again (warm) and clocks the first token at the client. The engine
bench's model: 8 layers, width 512, 8 heads, 4 KV heads, vocabulary 32,000, random weights, float32.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench.engine import VOCAB, write_model
from bench.report import Report
from kvbank import Client, LocalCluster, Receipt

ANSWER_TOKENS = 4
WARM_GOAL_MS = 25.0                  # the first token of a repeated 4k prompt, after its submission


def main(argv: list[str] | None = None) -> int:
    report = Report("prefix", argv, ("--threads", {"type": int, "default": os.cpu_count() or 1}))
    args = report.args
    lengths, rounds = ((4096,), 3) if args.quick else ((1024, 4096, 16_384), 7)
    blocks = sum(lengths) * 2 // 16 + 64
    rng = random.Random(0)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        with (
            LocalCluster(str(model), workers=1, device_blocks=blocks, host_bytes=0, redis=None, launcher="process",
                         torch_threads=args.threads) as cluster,
            Client(cluster.address) as client,
        ):
            _first_token(client, [rng.randrange(VOCAB) for _ in range(64)])
            for length in lengths:
                cold, warm, reused = [], [], []
                for _ in range(rounds):
                    prompt = [rng.randrange(VOCAB) for _ in range(length)]
                    for kept in (cold, warm):
                        seconds, receipt = _first_token(client, prompt)
                        kept.append(seconds * 1e3)
                    reused.append(sum(receipt.reused.values()) / length)
                name = f"{length // 1024}k"
                found = {f"ttft_cold_ms_{name}": statistics.median(cold), f"ttft_warm_ms_{name}": statistics.median(warm),
                         f"ratio_{name}": statistics.median(cold) / statistics.median(warm),
                         f"reused_share_{name}": min(reused)}
                figures |= {key: round(value, 4) for key, value in found.items()}
                report.line(prompt_tokens=length, rounds=rounds, warm_best_ms=round(min(warm), 2), **figures)
    report.goal("ttft_warm_ms_4k", "<=", WARM_GOAL_MS)
    report.goal("reused_share_4k", ">=", 0.99)
    return report.finish(figures)


def _first_token(client: Client, prompt: list[int]) -> tuple[float, Receipt]:
    """Seconds from before `submit` to the first delta that brings a token, and the job's receipt."""
    began = time.perf_counter()
    job = client.submit(prompt, max_tokens=ANSWER_TOKENS)
    for delta in job.stream():
        if delta.token_ids:
            break
    seconds = time.perf_counter() - began
    return seconds, job.result().receipt


if __name__ == "__main__":
    raise SystemExit(main())
