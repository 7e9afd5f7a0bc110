"""`kvbank bench quality` from outside: lines, last line, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "kvbank", "bench", "quality", "--json", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=280)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path))
    assert done.returncode == 1
    assert "--model" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.slow
def test_a_quick_run_prints_a_line_for_every_row_and_leaves_its_files(folder: Path, tmp_path: Path) -> None:
    done = run("--quick", "--policy", "streaming", "--model", str(folder), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = (json.loads(line) for line in done.stdout.splitlines())
    assert len(rows) == 8 * 13 and {row["budget"] for row in rows} == {1.0, 0.25, 0.0625}
    assert last["figures"]["identity"] == 0.0 and "identity" not in last["missed"]
    assert last["figures"]["recall_streaming_0.25"] == next(
        round(row["share"], 4) for row in rows if (row["task"], row["policy"], row["budget"]) == ("recall", "streaming", 0.25))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md", "needle.svg", "pareto.svg"}
    assert len(json.loads((tmp_path / "results.json").read_text())["config"]["text"]) == 16
