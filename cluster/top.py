"""Top: a cluster as it works, again and again: members, tiers, loans, jobs, and what moved since the last look.

    status, a moment later status -> Look(now, rates) -> a screen, one JSON object a line, or one of either with --once

Asks `Client.status()` only, so it sees what its key may see. Ends with Ctrl-C, and when the cluster has gone.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kvbank.cluster.answers import Status, TierStatus, WorkerStatus
from kvbank.cluster.screen import console, size, table
from kvbank.errors import DeadlineExceeded, Unavailable

INTERVAL_S = 1.0
GONE_S = 5.0                         # a cluster that does not answer this long has gone; a gateway is started again sooner
ROWS = 12                            # of loans and jobs; a screen is not longer
_BAR = 16
_NARROW = 106                        # a screen of fewer columns has no room for all of them
_RATES = {"rows": "forward_rows", "steps": "steps", "replayed": "replayed_tokens", "asked": "remote_attention_calls",
          "served": "remote_attention_served"}                # what is shown: the member's counter
_STATES = {"ok": "green", "silent": "red", "open": "red", "half_open": "yellow", "off": "dim"}


class Source(Protocol):
    """A client, as far as it is needed."""

    def status(self) -> Status: ...


@dataclass(frozen=True, slots=True)
class Look:
    """A status and what happened since the one before. Rates are per second; without a status before there are none."""

    status: Status
    members: Mapping[str, Mapping[str, float]]       # id -> rows, steps, replayed, asked, served
    hits: Mapping[str, float]                        # tier -> share of lookups that came, where there were any

    def body(self) -> dict[str, Any]:
        return {**asdict(self.status), "rates": {"members": self.members, "tier_hit_ratio": self.hits}}


def compare(now: Status, before: Status | None, seconds: float) -> Look:
    """A counter that fell belongs to a member that was started again: it counts from 0."""
    old = {worker.id: worker for worker in before.workers} if before is not None else {}
    members = {
        worker.id: {name: _grown(worker.counters, old[worker.id].counters, said) / seconds for name, said in _RATES.items()}
        for worker in now.workers if worker.id in old and worker.state == "ok" and old[worker.id].state == "ok"
    } if seconds > 0 else {}
    tiers = {tier.name: tier for tier in before.tiers} if before is not None else {}
    hits = {}
    for tier in now.tiers:
        then: Mapping[str, float] = tiers[tier.name].counters if tier.name in tiers else {}
        if (asked := _grown(tier.counters, then, "lookups")) > 0:
            hits[tier.name] = _grown(tier.counters, then, "found") / asked
    return Look(now, members, hits)


def run(client: Source, *, once: bool, as_json: bool, interval_s: float = INTERVAL_S, out: Console | None = None) -> int:
    """Show it until somebody or the cluster ends it; the exit status. Raises the error of the very first question."""
    screen = out or console()
    looks = watch(client, interval_s=interval_s)
    with contextlib.suppress(KeyboardInterrupt):
        if screen.is_terminal and not as_json and not once:
            with Live(console=screen, screen=True, auto_refresh=False) as live:
                for look in looks:
                    live.update(view(look, screen.width), refresh=True)
        else:                                        # into a file or a pipe: one after the other
            for look in looks:
                if as_json:
                    print(json.dumps(look.body(), ensure_ascii=False), flush=True)
                else:
                    screen.print(view(look, screen.width), "")
                if once:
                    return 0
        print("the cluster has gone", file=sys.stderr)
    return 0


def watch(
    client: Source, *, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Look]:
    """A Look every interval, the first one after one. Ends once the cluster has not answered for GONE_S."""
    before, heard_at = client.status(), clock()
    asked_at = heard_at
    while True:
        sleep(max(0.0, interval_s - (clock() - asked_at)))
        asked_at = clock()
        try:
            now = client.status()
        except (Unavailable, DeadlineExceeded):
            if clock() - heard_at >= GONE_S:
                return
            continue
        yield compare(now, before, clock() - heard_at)
        before, heard_at = now, clock()


def view(look: Look, width: int = _NARROW) -> Group:
    """One screen of so many columns."""
    status = look.status
    states = [worker.state for worker in status.workers]
    running = sum(job.state == "running" for job in status.jobs)
    total = {name: sum(rates[name] for rates in look.members.values()) for name in _RATES}
    head = Text(f"members {states.count('ok')} of {len(states)}   jobs {running} running, {len(status.jobs) - running} queued   "
                f"loans {len(status.loans)}   rows/s {total['rows']:.0f}   replayed/s {total['replayed']:.0f}", style="bold")
    columns: tuple[str, ...] = ("member", "kind", "state", "", "used", "lent", "borrowed", "jobs", "rows/s", "steps/s", "asks/s",
                                "answers/s")
    members = [_member(worker, look.members.get(worker.id, {})) for worker in status.workers]
    if narrow := width < _NARROW:
        columns, members = _without(("", "kind", "steps/s", "asks/s", "answers/s"), columns, members)
    parts: list[Any] = [head, "", table("members", columns, members, right=columns.index("used"))]
    if status.tiers:
        parts += ["", table("tiers", ("tier", "state", "used", "limit", "frames", "hits"),
                            [_tier(tier, look.hits) for tier in status.tiers], right=2)]
    if status.loans:
        oldest = sorted(status.loans, key=lambda loan: -loan.age_s)
        rows = [(loan.lender, loan.borrower, loan.blocks, f"{loan.age_s:.1f} s") for loan in oldest[:ROWS]]
        parts += ["", table(_of("loans", len(rows), len(oldest)), ("lender", "borrower", "blocks", "age"), rows, right=2)]
    if status.jobs:
        rows_ = [(job.id, job.state, job.phase, job.waits_for or "-", job.worker, f"{job.computed}/{job.prompt_tokens}",
                  job.output_tokens) for job in status.jobs[:ROWS]]
        titles: tuple[str, ...] = ("job", "state", "phase", "waits for", "worker", "prompt", "output")
        if narrow:
            titles, rows_ = _without(("phase", "waits for"), titles, rows_)
        parts += ["", table(_of("your jobs", len(rows_), len(status.jobs)), titles, rows_, right=titles.index("prompt"))]
    return Group(*parts)


def _without(left_out: tuple[str, ...], columns: tuple[str, ...], rows: list[Any]) -> tuple[tuple[str, ...], list[Any]]:
    shown = [number for number, column in enumerate(columns) if column not in left_out]
    return tuple(columns[n] for n in shown), [tuple(row[n] for n in shown) for row in rows]


def _member(worker: WorkerStatus, rates: Mapping[str, float]) -> tuple[Any, ...]:
    jobs = "-" if worker.kind != "model" else (
        f"{worker.counters.get('jobs_running', 0):.0f}+{worker.counters.get('jobs_waiting', 0):.0f}")
    shown = [f"{rates[name]:.0f}" if name in rates else "-" for name in ("rows", "steps", "asked", "served")]
    return (worker.id, worker.kind, Text(worker.state, style=_STATES.get(worker.state, "")), _bar(worker), worker.blocks_used,
            worker.blocks_lent, worker.blocks_borrowed, jobs, *shown)


def _bar(worker: WorkerStatus) -> Text:
    """The device's blocks: used, lent, free."""
    total = max(1, worker.blocks_total)
    used = round(_BAR * worker.blocks_used / total)
    lent = min(_BAR - used, round(_BAR * worker.blocks_lent / total))
    return Text.assemble(("#" * used, "green"), ("=" * lent, "yellow"), ("." * (_BAR - used - lent), "dim"))


def _tier(tier: TierStatus, hits: Mapping[str, float]) -> tuple[Any, ...]:
    ratio = f"{hits[tier.name]:.0%}" if tier.name in hits else "-"
    return (tier.name, Text(tier.state, style=_STATES.get(tier.state, "")), size(tier.bytes_used), size(tier.bytes_limit),
            tier.frames, ratio)


def _of(what: str, shown: int, there: int) -> str:
    return what if shown == there else f"{what} ({shown} of {there})"


def _grown(now: Mapping[str, float], before: Mapping[str, float], name: str) -> float:
    new, old = now.get(name, 0.0), before.get(name, 0.0)
    return new - old if new >= old else new
