"""How much of a context may go before answers do: policies and controls on the shipped model, with full attention beside.

    kvbank bench quality [--policy NAME ...] [--context N] [--out FOLDER] [--json] [--quick] [--model FOLDER]

Prints a JSON line per task, policy and budget; with --out also results.json, table.md, needle.svg and pareto.svg. Every
word of it is defined in docs/quality.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bench.quality import suite
from bench.quality.policies import CONTROLS, POLICIES
from bench.quality.tasks import cells
from bench.report import ROOT, Report, commit, machine
from kvbank.errors import NotFound

SHIPPED = ROOT / "bench" / "needle" / "model"
TASKS = [*dict.fromkeys(cell.task for cell in cells(2048))]


def main(argv: list[str] | None = None) -> int:
    report = Report(
        "quality", argv,
        ("--policy", {"nargs": "+", "default": [], "metavar": "NAME", "help": f"beside the controls: {', '.join(POLICIES)}"}),
        ("--context", {"type": int, "default": 2048, "help": "tokens of a page, its questions included"}),
        ("--budgets", {"type": float, "nargs": "+", "default": suite.BUDGETS, "metavar": "SHARE"}),
        ("--tasks", {"nargs": "+", "default": [], "choices": TASKS, "metavar": "TASK", "help": ", ".join(TASKS)}),
        ("--answers", {"type": int, "default": suite.ANSWERS, "help": "of each task, policy and budget, at least"}),
        ("--seed", {"type": int, "default": 1000}),
        ("--model", {"type": Path, "default": SHIPPED, "help": "a folder that bench/needle/export.py wrote"}),
        ("--out", {"type": Path, "metavar": "FOLDER", "help": "where the results, the table and the figures go"}),
    )
    args = report.args
    if not (args.model / "tokenizer.json").is_file():
        raise NotFound(f"no model in {args.model}: name one with --model")
    torch.set_num_threads(1)
    results = suite.measure(args.model, policies=args.policy, context=args.context, budgets=args.budgets, answers=args.answers,
                            seed=args.seed, quick=args.quick, only=args.tasks, tell=lambda line: report.line(**line))
    if args.out:
        results.config |= {"commit": commit(), "machine": machine()}
        suite.write(results.as_json(), args.out)
    report.goal("identity", "<=", 0.0)
    report.goal("tasks_that_tell", ">=", 1)
    return report.finish(figures(results))


def figures(results: suite.Results) -> dict[str, float]:
    """One number per task, policy and budget: a share, or what perplexity is multiplied by."""
    found = {f"{row['task']}_{row['policy']}_{row['budget']:.4g}".replace("-", "_"):
             round(row["ppl_ratio" if row["task"] == "text" else "share"], 4) for row in results.rows}
    controls = [kind().name for kind in CONTROLS]
    return found | {
        "identity": max((results.identity[name] for name in controls if name in results.identity), default=0.0),
        "tasks_that_tell": sum(not said["not_discriminative"] for said in results.tasks.values())}


if __name__ == "__main__":
    raise SystemExit(main())
