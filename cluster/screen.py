"""Screen: the cluster's state and a job's receipt as tables for people. Only draws; knows no client and no cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvbank.cluster.answers import Receipt, Status, TierStatus

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes for people."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: int = 0, whole: bool = False) -> Table:
    """A table whose columns from `right` on hold numbers. whole: text goes on below where it has no room, to be copied."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number >= right else "left", no_wrap=number == 0,
                        overflow="fold" if whole and number else "ellipsis")
    for row in rows:
        made.add_row(*[cell if isinstance(cell, Text) else str(cell) for cell in row])
    return made


def status_view(status: Status) -> Group:
    """Everything `client.status()` tells."""
    workers = [
        (w.id, w.kind, w.state, w.pid, w.blocks_total, w.blocks_free, w.blocks_used, w.blocks_lent, w.blocks_borrowed)
        for w in status.workers
    ]
    parts = [table("members", ("id", "kind", "state", "pid", "blocks", "free", "used", "lent", "borrowed"), workers,
                   right=3)]
    if status.loans:
        loans = [(n.lender, n.borrower, n.blocks, f"{n.age_s:.1f} s", f"{n.term_s:.1f} s") for n in status.loans]
        parts.append(table("loans", ("lender", "borrower", "blocks", "age", "term"), loans, right=2))
    if status.tiers:
        parts.append(table("tiers", ("tier", "state", "used", "limit", "frames", "hits", "misses"),
                           [_tier_row(tier) for tier in status.tiers], right=2))
    if status.jobs:
        jobs = [(job.id, job.state, job.phase, job.waits_for or "-", job.worker,
                 f"{job.computed}/{job.prompt_tokens}", job.output_tokens) for job in status.jobs]
        parts.append(table("jobs", ("id", "state", "phase", "waits for", "worker", "prompt", "output"), jobs, right=5))
    spaced: list[Any] = []
    for part in parts:
        spaced += [part, ""]
    return Group(*spaced[:-1])


def _tier_row(tier: TierStatus) -> tuple[Any, ...]:
    hits, misses = tier.counters.get("hits", 0), tier.counters.get("misses", 0)
    return (tier.name, tier.state, size(tier.bytes_used), size(tier.bytes_limit), tier.frames, int(hits), int(misses))


def receipt_view(receipt: Receipt, title: str = "receipt") -> Table:
    """One job's receipt, the zero lines left out."""
    rows: list[tuple[str, str]] = [
        ("prompt", f"{receipt.prompt_tokens} tokens"), ("output", f"{receipt.output_tokens} tokens"),
        ("computed", f"{receipt.computed_tokens} tokens"),
    ]
    for words, counts in (("reused from", receipt.reused), ("missed:", receipt.missed)):
        rows += [(f"{words} {name}", f"{tokens} tokens") for name, tokens in sorted(counts.items()) if tokens]
    if receipt.borrowed_blocks_peak:
        rows.append(("borrowed", f"{receipt.borrowed_blocks_peak} blocks at most, from {', '.join(receipt.lenders)}"))
        rows.append(("attended remotely", f"{receipt.remote_attention_calls} calls"))
    if receipt.parked_blocks_peak:
        rows.append(("parked on the host", f"{receipt.parked_blocks_peak} blocks at most"))
    if receipt.attempts > 1:
        rows.append(("attempts", f"{receipt.attempts}, {receipt.recomputed_after_fault} tokens computed again"))
    rows += [("first token", f"{receipt.ttft_s:.3f} s"), ("whole job", f"{receipt.total_s:.3f} s")]
    made = table(title, ("what", "how much"), rows, right=2)
    made.show_header = False
    return made


def console(*, to_stderr: bool = False) -> Console:
    return Console(stderr=to_stderr, highlight=False)


def print_json(body: Any) -> None:
    print(json.dumps(body, ensure_ascii=False), flush=True)
