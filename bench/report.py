"""What every bench prints: JSON lines, the last one with figures, goals, machine and commit.

    bench = Report("engine", argv)
    bench.line(step="prefill", tokens=4096, kvbank=..., transformers=...)
    bench.goal("decode_b1_ratio", ">=", 1.4)
    return bench.finish({"decode_b1_ratio": 1.6})
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPARE = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b}


class Report:
    """One run of one bench."""

    def __init__(self, name: str, argv: list[str] | None, *options: tuple[str, dict[str, Any]]) -> None:
        parser = argparse.ArgumentParser(prog=f"kvbank bench {name}")
        parser.add_argument("--json", action="store_true", help="print only JSON lines")
        parser.add_argument("--quick", action="store_true", help="end within 60 s")
        for flag, settings in options:
            parser.add_argument(flag, **settings)
        self.name, self.args = name, parser.parse_args(argv)
        self.goals: dict[str, tuple[str, float]] = {}
        self.started, self.load = time.monotonic(), load()

    def line(self, **fields: Any) -> None:
        """One intermediate result."""
        print(json.dumps({"bench": self.name, **fields}), flush=True)

    def goal(self, figure: str, compare: str, value: float) -> None:
        self.goals[figure] = (compare, value)

    def finish(self, figures: dict[str, Any]) -> int:
        """Print the last line. Returns the exit status: 0, as the bench ran to its end; missed goals are told, not crashed."""
        missed = {name: [figures.get(name), *goal] for name, goal in self.goals.items()
                  if name in figures and not COMPARE[goal[0]](figures[name], goal[1])}
        if not self.args.json:
            for name, value in figures.items():
                goal = self.goals.get(name)
                told = "" if goal is None else f"   goal {goal[0]} {goal[1]}{'   MISSED' if name in missed else ''}"
                print(f"  {name:36s} {value}{told}", file=sys.stderr)
        print(json.dumps({
            "bench": self.name, "ok": not missed, "figures": figures, "goals": {k: list(v) for k, v in self.goals.items()},
            "missed": missed, "machine": {**machine(), "load_before": self.load}, "commit": commit(),
            "seconds": round(time.monotonic() - self.started, 1),
        }), flush=True)
        return 0


def machine() -> dict[str, Any]:
    """What was measured on, without names or addresses."""
    import torch

    return {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
            "load": load(), "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def load() -> float:
    """Processes that want a core, averaged over the last minute: above the number of cores, only ratios mean something."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    made = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return made.stdout.strip() or "unknown"


def interleaved(
    repeats: int, *, middle: Callable[[list[float]], float] = statistics.median, **sides: Callable[[], float],
) -> dict[str, float]:
    """Median, or another middle, of each side's figure; sides take turns, so that a drifting machine hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(side())
    return {name: middle(values) for name, values in found.items()}


def _cpu() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
