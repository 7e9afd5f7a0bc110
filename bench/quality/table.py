"""The results as one Markdown page: which tasks tell anything, then every policy and budget, in groups that may be compared."""

from __future__ import annotations

from typing import Any

TEXT = "text"
SHORT, LONG = 1 / 8, 1.0                 # of a context's tokens: the answers that the footprint is told for


def page(results: dict[str, Any]) -> str:
    config, tasks = results["config"], list(results["tasks"])
    parts = [
        "# Quality\n",
        f"Pages of {config['context']} tokens, {config['answers']} answers or more of each task, seed {config['seed']}, "
        f"{config['dtype']}, {config['threads']} thread. In brackets the 95 % interval. Words: docs/quality.md.\n",
        *_gates(results, tasks)]
    for aware, title in ((False, "Without seeing the question"), (True, "Having seen it: what is kept serves no other")):
        names = [name for name, sees in config["query_aware"].items() if sees is aware]
        if names:
            parts += [f"\n## {title}\n", *_group(results, tasks, names)]
    return "\n".join(parts) + "\n"


def _gates(results: dict[str, Any], tasks: list[str]) -> list[str]:
    """One line per task: what it was measured on, and whether it may be used to compare."""
    least = min(results["config"]["budgets"])
    lines = [f"| task | answers | pages | context | chance | full | random eviction, {least:.2%} | verdict |",
             "|---|---|---|---|---|---|---|---|"]
    for task in tasks:
        full, random = _row(results, task, "full", 1.0), _row(results, task, "random-eviction", least)
        said = results["tasks"][task]
        told = f"not discriminative: {said['not_discriminative']}" if said["not_discriminative"] else "tells"
        lines.append(f"| {task} | {full['of']} | {full['pages']} | {full['context']:.0f} | {said['chance']:.0%} | {_cell(full)} "
                     f"| {_cell(random)} | {told} |")
    return lines


def _group(results: dict[str, Any], tasks: list[str], names: list[str]) -> list[str]:
    """By falling budget; full attention first, then the controls in their order. Starred: not discriminative."""
    titles = [("×ppl " if task == TEXT else "") + task + ("\\*" if results["tasks"][task]["not_discriminative"] else "")
              for task in tasks]
    lines = [f"| budget | policy | device B/token | host B/token | footprint | {' | '.join(titles)} | lift | KL | top-1 "
             "| output error | decode tok/s |",
             "|---" * (len(titles) + 10) + "|"]
    for budget in sorted({1.0, *results["config"]["budgets"]}, reverse=True):
        for name in names:
            rows = [row for row in results["rows"] if row["policy"] == name and row["budget"] == budget]
            if rows:
                lines.append(_line(results, rows, name, budget))
    return lines


def _line(results: dict[str, Any], rows: list[dict[str, Any]], name: str, budget: float) -> str:
    lifts = [row["lift"] for row in rows
             if row["lift"] is not None and row["task"] != TEXT and not results["tasks"][row["task"]]["not_discriminative"]]
    lift = f"{mean(lifts):.2f}" if lifts else ""
    held = mean([row["device_bytes_per_token"] / _row(results, row["task"], "full", 1.0)["device_bytes_per_token"]
                 for row in rows])
    speed = results["speed"].get(name, {}).get(f"{budget:g}")
    return (f"| {budget:.2%} | {name} | {mean([row['device_bytes_per_token'] for row in rows]):.0f} | "
            f"{mean([row['host_bytes_per_token'] for row in rows]):.0f} | "
            f"{footprint(held, SHORT):.2f} to {footprint(held, LONG):.2f} | {' | '.join(_cell(row) for row in rows)} | {lift} | "
            f"{mean([row['kl'] for row in rows]):.3g} | {mean([row['agree'] for row in rows]):.1%} | "
            f"{mean([mean(row['output_error']) for row in rows]):.3g} | {speed or ''} |")


def footprint(held: float, answer: float) -> float:
    """Live KV bytes summed over every token that is computed, of the context and then of the answer, over full attention's.

    held: bytes kept of the context, over all of them. answer: its tokens, over the context's. A context is computed whole.
    """
    return (1 + 2 * answer * held + answer**2) / (1 + answer) ** 2


def _cell(row: dict[str, Any]) -> str:
    if row["task"] == TEXT:
        return f"{row['ppl_ratio']:.3f} ({row['ppl_low']:.3f}–{row['ppl_high']:.3f})"
    return f"{row['share']:.1%} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"


def _row(results: dict[str, Any], task: str, policy: str, budget: float) -> dict[str, Any]:
    return next(row for row in results["rows"] if (row["task"], row["policy"], row["budget"]) == (task, policy, budget))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
