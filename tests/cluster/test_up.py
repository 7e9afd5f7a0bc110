"""`kvbank up -d`, then status, submit and down from other processes, with a real cluster of subprocesses."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbank.cluster import cli
from kvbank.workers.models.random_model import write_random_model

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture
def kvbank(tmp_path: Path) -> Any:
    """Run the command in a process of its own; status, and the last line of its output as JSON."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}

    def run(*words: str) -> tuple[int, dict]:
        command = [sys.executable, "-m", "kvbank", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120, check=False)
        return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"stderr": done.stderr}

    yield run
    run("down")


def test_a_detached_cluster_is_found_used_and_stopped_by_others(kvbank, tmp_path) -> None:
    model = str(write_random_model(tmp_path / "model", hidden_size=32, num_layers=1, heads=2, kv_heads=1))
    config = tmp_path / "cluster.yaml"
    config.write_text("http:\n  api_keys: {planted-key: tenant-a}\n")
    flags = ("--model", model, "--workers", "1", "--device-blocks", "64", "--redis", "none", "--launcher", "process",
             "--config", str(config), "--set", "vault.lender_blocks=32")
    status, up = kvbank("up", "-d", *flags)
    assert status == 0, up
    assert up["address"].startswith("http://127.0.0.1:") and {"control", "gateway", "worker-0"} <= set(up["processes"])
    state = tmp_path / "state" / "kvbank" / "clusters" / "default.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(json.loads(state.read_text())["log"]).stat().st_mode) == 0o600

    taken = kvbank("up", "-d", *flags)[1]["error"]
    assert taken["code"] == "config_error" and "choose another --name, or `kvbank down" in taken["message"]
    status, told = kvbank("status")
    assert [worker["id"] for worker in told["workers"]] == ["worker-0"] and told["workers"][0]["blocks_total"] == 64
    _, settings = kvbank("status", "--config")
    assert settings["vault.lender_blocks"] == {"value": 32, "source": "flag"} and "planted-key" not in str(settings)
    status, answer = kvbank("submit", "hello there", "--max-tokens", "4", "--temperature", "0")
    assert status == 0 and len(answer["token_ids"]) == 4

    pids = [up["pid"], *up["processes"].values()]
    assert kvbank("down") == (0, {"name": "default", "stopped": True, "killed": False})
    assert not [pid for pid in pids if psutil.pid_exists(pid)] and not state.exists()


def test_a_start_that_fails_tells_why_and_leaves_nothing(kvbank, tmp_path) -> None:
    status, told = kvbank("up", "-d", "--model", str(tmp_path / "absent"), "--launcher", "process")
    assert status == 1 and told["error"]["code"] == "model_error"
    assert not (tmp_path / "state" / "kvbank" / "clusters" / "default.json").exists()
    assert kvbank("status")[1]["error"]["code"] == "not_found"


@pytest.mark.parametrize(("setting", "about"), [
    ("http.api_keys_file", "http.api_keys_file"), ("cluster.log_dir", "cluster.log_dir"),
    ("tracing.trace_dir", "tracing.trace_dir"),
])
def test_a_detached_start_tells_what_one_in_the_foreground_tells(kvbank, tmp_path, setting, about) -> None:
    model = str(write_random_model(tmp_path / "model", hidden_size=32, num_layers=1, heads=2, kv_heads=1))
    bad = tmp_path / "file"
    bad.write_text("[]")
    path = bad if setting.startswith("http") else bad / "below"
    status, told = kvbank("up", "-d", "--model", model, "--redis", "none", "--launcher", "process", "--workers", "1",
                          "--device-blocks", "64", "--set", f"{setting}={path}", "--set", "tracing.exporter=file",
                          *(["--set", f"tracing.trace_dir={tmp_path / 'traces'}"] if "trace" not in setting else []))
    assert status == 1 and about in told["error"]["message"] and told["error"]["code"] == "config_error", told


@pytest.mark.parametrize("moment", ["while it starts", "while it serves"])
def test_ctrl_c_ends_a_cluster_in_the_foreground_whenever_it_comes(tmp_path: Path, moment: str) -> None:
    model = str(write_random_model(tmp_path / "model", hidden_size=32, num_layers=1, heads=2, kv_heads=1))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}
    state = tmp_path / "state" / "kvbank" / "clusters" / "mine.json"
    command = [sys.executable, "-m", "kvbank", "up", "--json", "--name", "mine", "--model", model, "--workers", "1",
               "--device-blocks", "64", "--redis", "embedded", "--launcher", "process"]
    log = (tmp_path / "stderr").open("w+")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env) as up:
        ours = psutil.Process(up.pid)
        if moment == "while it serves":
            told = json.loads(up.stdout.readline())
            assert told["name"] == "mine" and json.loads(state.read_text())["address"] == told["address"]
        else:
            while not ours.children(recursive=True):             # its members are on their way
                assert up.poll() is None
        children = ours.children(recursive=True)
        up.send_signal(signal.SIGINT)
        status = up.wait(timeout=60)
        assert status == (0 if moment == "while it serves" else 130), (up.stdout.read(), Path(log.name).read_text())
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and not state.exists()
