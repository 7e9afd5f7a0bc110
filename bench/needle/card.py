"""The model card: python -m bench.needle.card RUN_FOLDER MODEL_FOLDER RESULTS.jsonl

Writes README.md and loss.svg beside the weights. Every number in it comes from the run's log and place, from the results
of evaluate.py, or from the files themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from string import Template
from typing import Any

from bench.needle import export, plot

GOALS = {"needle": (0.98, 0.90), "multi-key": (0.97, 0.90), "recall": (0.97, 0.90), "compare": (0.95, 0.90)}     # at 2k, 4k
PAGE = Path(__file__).with_name("card.md")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.needle.card", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args(argv)
    results = [json.loads(line) for line in args.results.read_text().splitlines()]
    (args.folder / "README.md").write_text(card(args.run, args.folder, results))
    plot.draw_loss(args.run / "log.jsonl", args.folder / "loss.svg")
    return 0


def card(run: Path, folder: Path, results: list[dict[str, Any]]) -> str:
    place = json.loads((run / "checkpoint" / "place.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    text = json.loads((run / "corpus.json").read_text())
    shape = json.loads((folder / "config.json").read_text())
    return Template(PAGE.read_text()).substitute(
        parameters=f"{sum(weight.numel() for weight in export.read_model(folder).parameters()):,}",
        layers=shape["num_hidden_layers"], width=shape["hidden_size"], heads=shape["num_attention_heads"],
        kv_heads=shape["num_key_value_heads"], theta=f"{shape['rope_theta']:,.0f}", vocab=shape["vocab_size"],
        tokens=f"{place['tokens'] / 1e6:.1f}", minutes=round(place["seconds"] / 60), seed=place["seed"], steps=place["step"],
        stages=_stages(log), **text, table=_table(results), depths=_depths(results), missed=_missed(results), text=_text(results))


def _stages(log: list[dict[str, Any]]) -> str:
    """One row per stage: where it ended and what was right in its last reports."""
    rows = ["| stage | until, M tokens | minutes | answers right in its last report |", "|---|---|---|---|"]
    last = {line["stage"]: line for line in log}
    for stage, line in last.items():
        right = ", ".join(f"{task} {share:.1%}" for task, share in line["right"].items())
        rows.append(f"| {stage} | {line['tokens'] / 1e6:.1f} | {line['seconds'] / 60:.0f} | {right} |")
    return "\n".join(rows)


def _table(results: list[dict[str, Any]]) -> str:
    """Tasks by length; needle over all depths, track by its hops."""
    cells: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for line in results:
        if "right" in line:
            name = line["task"] + (f", {line['hops']} step{'s' * (line['hops'] > 1)}" if "hops" in line else "")
            cells[name][line["length"]][0] += line["right"]
            cells[name][line["length"]][1] += line["of"]
    lengths = sorted({length for row in cells.values() for length in row})
    rows = ["| task | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, row in cells.items():
        rows.append(f"| {name} | " + " | ".join(_cell(*row[length]) if length in row else "" for length in lengths) + " |")
    return "\n".join(rows)


def _cell(right: int, of: int) -> str:
    return f"{right / of:.1%} of {of}"


def _depths(results: list[dict[str, Any]]) -> str:
    needle = [line for line in results if line["task"] == "needle"]
    depths = sorted({line["depth"] for line in needle})
    rows = ["| length | " + " | ".join(f"{depth:.0%}" for depth in depths) + " |", "|---" * (len(depths) + 1) + "|"]
    for length in sorted({line["length"] for line in needle}):
        shares = {line["depth"]: line["share"] for line in needle if line["length"] == length}
        rows.append(f"| {length:,} | " + " | ".join(f"{shares[depth]:.0%}" for depth in depths) + " |")
    return "\n".join(rows)


def _missed(results: list[dict[str, Any]]) -> str:
    """Which goals were missed at 2k and 4k; needle must hold at every depth."""
    said = []
    for task, goals in GOALS.items():
        for length, goal in zip((2048, 4096), goals, strict=True):
            shares = [line["share"] for line in results if line["task"] == task and line["length"] == length]
            if shares and min(shares) < goal:
                said.append(f"{task} at {length:,}: {min(shares):.1%}, wanted {goal:.0%}")
    return "Missed: " + "; ".join(said) + "." if said else "None is missed."


def _text(results: list[dict[str, Any]]) -> str:
    found = {line["length"]: line["bits_per_token"] for line in results if "bits_per_token" in line}
    return ", ".join(f"{bits:.2f} at {length:,}" for length, bits in sorted(found.items()))


if __name__ == "__main__":
    sys.exit(main())
