"""The engine beside transformers' `generate`: same weights, dtype, threads and prompts, interleaved medians in one run.

    python -m bench.engine [--quick] [--json] [--threads 2] [--dtype float32]        or: kvbank bench engine

The model: 8 layers, width 512, 8 heads over 4 KV heads, vocabulary 32,000, seeded random weights.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.report import Report, interleaved
from kvbank.workers.assembly import build_engine
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sequence import JobSpec

VOCAB = 32_000
NAMES = count()


def write_model(folder: Path) -> Path:
    write_random_model(folder, seed=0, hidden_size=512, num_layers=8, heads=8, kv_heads=4, vocab=VOCAB,
                       max_position_embeddings=32_768)
    return folder


class Ours:
    """kvbank's engine, in this process."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.engine: Engine = build_engine(WorkerConfig(model=str(folder), device_blocks=6144, dtype=dtype, max_batch=64))

    def prefill(self, tokens: list[int]) -> float:
        """Tokens per second until the first token, nothing cached."""
        self.engine.vault.drop_idle()
        self.engine.add(JobSpec(id=f"p{next(NAMES)}", prompt=tokens, max_tokens=1, ignore_eos=True))
        started = time.perf_counter()
        self.engine.run_until_idle()
        return len(tokens) / (time.perf_counter() - started)

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Tokens per second of all jobs together while all of them decode."""
        engine = self.engine
        engine.vault.drop_idle()
        for tokens in prompts:
            engine.add(JobSpec(id=f"d{next(NAMES)}", prompt=tokens, max_tokens=steps + 8, ignore_eos=True))
        engine.step()
        while engine.scheduler.waiting or any(not seq.is_decoding for seq in engine.scheduler.running):
            engine.step()
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        rate = len(prompts) * steps / (time.perf_counter() - started)
        engine.run_until_idle()
        return rate

    def overhead_ms(self) -> float:
        """Per step, all that is not the model's forward, attention or sampling."""
        counters = self.engine.counters
        steps, inside, outside = counters.steps, counters.forward_s, counters.step_s
        self.decode([[7] * 64 for _ in range(8)], 32)
        return 1e3 * ((counters.step_s - outside) - (counters.forward_s - inside)) / (counters.steps - steps)


class Theirs:
    """transformers, eager mode, its default attention (sdpa) and dynamic cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def _generate(self, prompts: list[list[int]], new: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - started

    def prefill(self, tokens: list[int]) -> float:
        return len(tokens) / self._generate([tokens], 1)

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        # Its prefill and first token are not decode. The shortest of three is the least disturbed one.
        first = min(self._generate(prompts, 1) for _ in range(3))
        rest = self._generate(prompts, steps + 1) - first
        return len(prompts) * steps / rest if rest > 0 else self.decode(prompts, steps)


def main(argv: list[str] | None = None) -> int:
    report = Report("engine", argv, ("--threads", {"type": int, "default": os.cpu_count() or 1}),
                    ("--dtype", {"default": "float32", "choices": ["float32", "bfloat16"]}))
    args = report.args
    torch.set_num_threads(args.threads)
    repeats, steps = (1, 16) if args.quick else (3, 48)
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(length)]

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        before = _rss()
        ours = Ours(model, args.dtype)
        theirs = Theirs(model, args.dtype)
        ours.decode([prompt(64)], 4)                       # warm-up of both
        theirs.decode([prompt(64)], 4)
        for batch in (1, 8, 32):
            prompts = [prompt(128) for _ in range(batch)]
            found = interleaved(repeats, kvbank=lambda p=prompts: ours.decode(p, steps),
                                transformers=lambda p=prompts: theirs.decode(p, steps))
            _note(report, figures, f"decode_b{batch}", found)
        for length in (4096,) if args.quick else (4096, 16_384):
            text = prompt(length)
            found = interleaved(1 if length > 8000 else repeats, kvbank=lambda t=text: ours.prefill(t),
                                transformers=lambda t=text: theirs.prefill(t))
            _note(report, figures, f"prefill_{length // 1024}k", found)
        for batch in () if args.quick else (1, 4):
            prompts = [prompt(16_000) for _ in range(batch)]
            found = interleaved(1, kvbank=lambda p=prompts: ours.decode(p, 16),
                                transformers=lambda p=prompts: theirs.decode(p, 16))
            _note(report, figures, f"decode_16k_b{batch}", found)
        figures["overhead_ms_per_step"] = round(ours.overhead_ms(), 3)
        figures["rss_growth_mb"] = round((_rss() - before) / 1e6)
    bf16 = args.dtype == "bfloat16"
    for name, goal in {"decode_b1_ratio": 1.4, "decode_b8_ratio": 1.8 if bf16 else 2.1, "decode_b32_ratio": 2.0,
                       "prefill_4k_ratio": 2.0}.items():
        report.goal(name, ">=", goal)
    figures |= {"threads": args.threads, "dtype": args.dtype}
    return report.finish(figures)


def _note(report: Report, figures: dict[str, Any], name: str, found: dict[str, float]) -> None:
    ratio = found["kvbank"] / found["transformers"]
    report.line(step=name, tokens_per_s={side: round(value, 1) for side, value in found.items()}, ratio=round(ratio, 2))
    figures[f"{name}_tokens_per_s"] = round(found["kvbank"], 1)
    figures[f"{name}_ratio"] = round(ratio, 2)


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    sys.exit(main())
