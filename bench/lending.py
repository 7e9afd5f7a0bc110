"""What lending costs, and what it buys: decode with half of a 4k prompt at lenders, and the largest prompt that runs.

    kvbank bench lending [--json] [--quick]

    local      one worker that holds everything
    lenders_1  a worker with room for half of it, one lender for the rest
    lenders_3  the same, the rest at three lenders

The three clusters stay up and take turns on the same prompt; receipts prove how much was where. The engine bench's model,
plain processes on one machine. There lending adds memory and no memory bandwidth: a borrowing step is slower than a local
one, always. What it buys is a prompt that runs at all, and is the second half of this bench.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.clocked import Clocked, clock, texts
from bench.engine import VOCAB, write_model
from bench.report import Report
from kvbank import Client, LocalCluster
from kvbank.errors import TooLong
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.random_model import write_random_model

SPAN_TOKENS, SPAN_BLOCKS = 128, 8
PROMPT_TOKENS = 4096
PLAIN = {"workers": 1, "host_bytes": 0, "redis": None, "launcher": "process"}
CAPACITY_LENDERS = 6
WATCHED_TOKENS, WATCHED_S = 384, 0.4


def main(argv: list[str] | None = None) -> int:
    report = Report("lending", argv)
    quick = report.args.quick
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder)) if quick else write_model(Path(folder) / "model")
        figures |= decode(report, model, repeats=2 if quick else 5, answer=48 if quick else 128)
        figures |= capacity(report, model, blocks=32 if quick else 128)
    report.goal("bytes_over_formula_1", "<=", 2.0)
    report.goal("bytes_over_formula_3", "<=", 2.0)
    report.goal("capacity_ratio", ">=", CAPACITY_LENDERS)
    return report.finish(figures)


def small_model(folder: Path) -> Path:
    return write_random_model(folder / "small", vocab=VOCAB, hidden_size=128, num_layers=4, heads=4, kv_heads=2)


# -- the price ---------------------------------------------------------------------------------------------------------

def decode(report: Report, model: Path, *, repeats: int, answer: int) -> dict[str, Any]:
    """Tokens per second by the client's clock, and bytes per step by the worker's own counters."""
    spans = -(-(PROMPT_TOKENS + answer) // SPAN_TOKENS)
    half = spans // 2
    sides: dict[str, dict[str, Any]] = {
        "local": {"device_blocks": (spans + 4) * SPAN_BLOCKS, "lenders": 0},
        "lenders_1": {"device_blocks": half * SPAN_BLOCKS, "lenders": 1, "lender_blocks": (half + 4) * SPAN_BLOCKS},
        "lenders_3": {"device_blocks": half * SPAN_BLOCKS, "lenders": 3, "lender_blocks": -(-(half + 4) // 3) * SPAN_BLOCKS},
    }
    prompt = texts(VOCAB)(PROMPT_TOKENS)
    with ExitStack() as stack:
        clients: dict[str, Client] = {}
        for name, settings in sides.items():
            cluster = stack.enter_context(LocalCluster(str(model), **PLAIN, **settings))
            clients[name] = stack.enter_context(Client(cluster.address))
        runs: dict[str, list[Clocked]] = {name: [clock(client, prompt, answer)] for name, client in clients.items()}
        for _ in range(repeats):
            for name, client in clients.items():
                runs[name].append(clock(client, prompt, answer))
        steps = {name: per_step(client, prompt) for name, client in clients.items()}
    figures: dict[str, Any] = {}
    for name, timed in runs.items():
        receipt = timed[-1].receipt
        rate = statistics.median(run.tokens_per_s for run in timed[1:])             # the first one warmed up
        figures |= {f"decode_tokens_per_s_{name}": round(rate, 2), f"borrowed_share_{name}": share(receipt.borrowed_blocks_peak)}
        report.line(where=name, decode_tokens_per_s=round(rate, 2), ttft_first_ms=round(timed[0].ttft_s * 1e3, 1),
                    borrowed_blocks=receipt.borrowed_blocks_peak, lenders=len(receipt.lenders), **steps[name])
    for name in ("lenders_1", "lenders_3"):
        lenders = len(runs[name][-1].receipt.lenders)
        figures |= price(lenders, figures["decode_tokens_per_s_local"], figures[f"decode_tokens_per_s_{name}"], name)
        calls, formula = lenders * read_config(model).num_layers, formula_bytes(model)
        figures |= {f"bytes_per_token_{name}": round(calls * steps[name]["bytes_per_call"]),
                    f"formula_bytes_{name}": calls * formula,
                    f"bytes_over_formula_{name[-1]}": round(steps[name]["bytes_per_call"] / formula, 3)}
    return figures


def share(blocks: int) -> float:
    return round(blocks * SPAN_TOKENS / SPAN_BLOCKS / PROMPT_TOKENS, 2)


def price(lenders: int, local: float, borrowing: float, name: str) -> dict[str, Any]:
    """What a step costs more than a local one, over the lenders that every step asks."""
    more_ms = 1e3 / borrowing - 1e3 / local
    return {f"ratio_to_local_{name}": round(borrowing / local, 3), f"ms_per_lender_and_step_{name}": round(more_ms / lenders, 2)}


def formula_bytes(model: Path) -> int:
    """Decode bytes per token, layer and lender: a query there, a float32 partial back."""
    spec = read_config(model)
    return spec.num_heads * spec.head_dim * (4 + 4)


def per_step(client: Client, prompt: list[int]) -> dict[str, float]:
    """One more run, watched by the worker's counters while nothing but decoding happens; cancelled once it was seen."""
    job = client.submit(prompt, max_tokens=WATCHED_TOKENS, ignore_eos=True)
    next(delta for delta in job.stream() if delta.token_ids)
    first = client.status().workers[0].counters
    time.sleep(WATCHED_S)
    last = client.status().workers[0].counters
    job.cancel()
    names = ("steps", "step_s", "remote_attention_calls", "attend_bytes_sent", "attend_bytes_received")
    more = {name: last[name] - first[name] for name in names}
    assert more["steps"] > 0, "the job ended before it was watched"
    gone = more["attend_bytes_sent"] + more["attend_bytes_received"]     # the looks fall into steps: so by whole calls
    return {"bytes_per_call": round(gone / max(1.0, more["remote_attention_calls"])), "steps_watched": more["steps"],
            "worker_step_ms": round(more["step_s"] / more["steps"] * 1e3, 2)}


# -- the gain ----------------------------------------------------------------------------------------------------------

def capacity(report: Report, model: Path, *, blocks: int) -> dict[str, Any]:
    """The largest prompt that one worker answers alone, and with six lenders of its own size."""
    figures: dict[str, Any] = {}
    for name, lenders in (("alone", 0), ("borrowing", CAPACITY_LENDERS)):
        with (LocalCluster(str(model), **PLAIN, device_blocks=blocks, lenders=lenders) as cluster,
              Client(cluster.address) as client):
            length, run = largest(client, texts(VOCAB, 1), (1 + lenders) * blocks * SPAN_TOKENS // SPAN_BLOCKS)
            report.line(capacity=name, device_blocks=blocks, lenders=lenders, prompt_tokens=length,
                        ttft_s=round(run.ttft_s, 2), borrowed_blocks=run.receipt.borrowed_blocks_peak)
            figures[f"capacity_tokens_{name}"] = length
    figures["capacity_ratio"] = round(figures["capacity_tokens_borrowing"] / figures["capacity_tokens_alone"], 2)
    return figures


def largest(client: Client, text: Any, at_most: int, answer: int = 8) -> tuple[int, Clocked]:
    """The longest prompt that is admitted, run to its end: what is admitted must run, or this bench fails."""
    prompt = text(at_most)
    for length in range(at_most - answer, 0, -SPAN_TOKENS):
        try:
            return length, clock(client, prompt[:length], answer)
        except TooLong:
            continue
    raise AssertionError("no prompt is short enough")


if __name__ == "__main__":
    raise SystemExit(main())
