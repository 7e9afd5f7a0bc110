"""LocalCluster: what is refused before anything starts, what a running one offers, and Rays that are not ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbank.cluster.config import MARKER
from kvbank.cluster.guardian import MARKER as GUARDIANS_MARKER
from kvbank.cluster.launcher import LocalCluster
from kvbank.errors import ConfigError, ModelError, Unavailable
from kvbank.workers.models.random_model import write_random_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class ToyCluster(LocalCluster):
    """A real launch of members that compute nothing."""

    member_program = ("-P", str(HERE / "toy_member.py"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_random_model(folder, hidden_size=32, num_layers=2, heads=2, kv_heads=1, vocab=300)


@pytest.fixture
def model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder for this test alone, and a temp folder and state that must be empty or its own afterwards."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("KVBANK__")]:
        monkeypatch.delenv(name)
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when a process of ours, or anything in the temp folder, outlives it."""
    temp = tempfile.mkdtemp(prefix="kvt-", dir="/tmp")           # short: it will hold unix sockets
    monkeypatch.setattr(tempfile, "tempdir", temp)
    children = set(children_of_ours())
    yield
    assert set(children_of_ours()) <= children
    os.rmdir(temp)                                               # fails when it is not empty


def children_of_ours() -> list[str]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return path.read_text().split() if path.exists() else []


def test_the_guardian_and_the_settings_mean_the_same_marker() -> None:
    assert GUARDIANS_MARKER == MARKER


@pytest.mark.parametrize(("keywords", "error", "words"), [
    ({"device_blocks": 23}, ConfigError, "at least 3 spans"),
    ({"block_size": 17}, ConfigError, "multiple of block_size 17"),
    ({"workers": 0}, ConfigError, "cluster.workers"),
    ({"shards": 3}, ConfigError, "more than the model's 2 layers"),
    ({"lenders": -1}, ConfigError, "cluster.lenders"),
    ({"host_bytes": "lots"}, ConfigError, "not a size"),
    ({"redis": "127.0.0.1"}, ConfigError, "tiers.redis must be"),
    ({"dtype": "float8"}, ConfigError, "bfloat16"),
    ({"launcher": "slurm"}, ConfigError, "ray, process"),
    ({"config": {"wrokers": 2}}, ConfigError, "did you mean cluster.workers"),
    ({"config": "/nowhere.yaml"}, ConfigError, "cannot read config file"),
    ({"exactnes": "fast"}, ConfigError, "did you mean engine.exactness"),
    ({"model": None}, ConfigError, "engine.model is not set"),
    ({"model": "/no/such/model"}, ModelError, "/no/such/model"),
])
def test_a_wrong_keyword_is_refused_at_construction(model: Path, keywords: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        LocalCluster(**{"model": str(model), **keywords})


@pytest.mark.parametrize("damage", ["no config", "no weights", "config is no JSON", "unknown family"])
def test_a_damaged_model_folder_is_refused_at_construction(model: Path, damage: str) -> None:
    if damage == "no config":
        (model / "config.json").unlink()
    elif damage == "no weights":
        (model / "model.safetensors").unlink()
    elif damage == "config is no JSON":
        (model / "config.json").write_text("{")
    else:
        fields = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(fields | {"model_type": "rwkv"}))
    with pytest.raises(ModelError):
        LocalCluster(model)


def test_a_keyword_beats_the_environment_and_the_environment_the_config(model: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVBANK__VAULT__DEVICE_BLOCKS", "64")
    monkeypatch.setenv("KVBANK__CLUSTER__WORKERS", "3")
    settings = LocalCluster(model, workers=1, redis=None, config={"device_blocks": 32, "lenders": 4}).settings
    assert (settings.vault.device_blocks, settings.cluster.workers, settings.cluster.lenders) == (64, 1, 4)
    assert settings.tiers.redis is None and settings.engine.model == str(model)


def test_a_port_in_use_is_refused_before_anything_starts(model: Path, nothing_left) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said: list[str] = []
        with pytest.raises(ConfigError, match=f"http.port {port} on 127.0.0.1 cannot be had"):
            ToyCluster(model, launcher="process", config={"port": port}, progress=said.append).start()
        assert said == []


@pytest.mark.parametrize("url", ["redis://127.0.0.1:9/0", "unix:///no/such.sock"])
def test_a_redis_out_of_reach_is_refused_before_anything_starts(model: Path, nothing_left, url: str) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="cannot be reached"):
        ToyCluster(model, launcher="process", redis=url, progress=said.append).start()
    assert said == []


def test_a_redis_of_the_users_is_used_and_left_running(model: Path, redis_server, nothing_left) -> None:
    with ToyCluster(model, launcher="process", workers=1, redis=redis_server.url) as cluster:
        assert "redis" not in cluster.processes
    assert redis_server.running


def test_a_cluster_runs_from_start_to_stop(model: Path, nothing_left) -> None:
    said: list[str] = []
    cluster = ToyCluster(model, launcher="process", workers=2, shards=2, lenders=2, progress=said.append)
    with pytest.raises(Unavailable, match="not running"):
        print(cluster.address)
    with cluster as entered:
        assert entered is cluster
        assert sorted(cluster.processes) == [
            "control", "gateway", "lender-0", "lender-1", "redis", "worker-0", "worker-0.1", "worker-1", "worker-1.1"]
        assert {f"{name} is ready" for name in cluster.processes} <= set(said)
        host, port = cluster.address.removeprefix("http://").split(":")
        socket.create_connection((host, int(port)), timeout=5.0).close()
        with pytest.raises(ConfigError, match="started before"):
            cluster.start()
        assert cluster.token not in repr(cluster)
    with pytest.raises(Unavailable):
        print(cluster.address)
    assert cluster.processes == {}
    cluster.stop()


def test_progress_is_told_one_line_at_a_time(model: Path, nothing_left) -> None:
    speaking, overlaps, said = threading.Lock(), list[str](), list[str]()

    def hear(line: str) -> None:
        if not speaking.acquire(blocking=False):
            overlaps.append(line)
            return
        time.sleep(0.2)                                          # members that start side by side are ready within that
        said.append(line)
        speaking.release()

    with ToyCluster(model, launcher="process", workers=2, lenders=3, redis=None, progress=hear) as cluster:
        assert {f"{name} is ready" for name in cluster.processes} <= set(said)
    assert not overlaps


def test_a_cluster_stops_from_another_thread_and_without_a_with_statement(model: Path, nothing_left) -> None:
    cluster = ToyCluster(model, launcher="process", workers=1, redis=None).start()
    threads = [threading.Thread(target=cluster.stop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert cluster.processes == {}


def test_stop_ends_a_start_that_is_under_way(model: Path, nothing_left, until) -> None:
    (model / "worker-0:slow.toy").write_text("600")
    cluster = ToyCluster(model, launcher="process", workers=1, redis=None)
    errors: list[type] = []

    def start() -> None:
        try:
            cluster.start()
        except Exception as error:
            errors.append(type(error))

    starter = threading.Thread(target=start)
    starter.start()
    until(lambda: "worker-0" in cluster.processes)
    cluster.stop()
    starter.join(20.0)
    assert errors == [Unavailable] and cluster.processes == {}


def test_a_fork_of_the_owner_does_not_stop_its_cluster(model: Path, nothing_left) -> None:
    with ToyCluster(model, launcher="process", workers=1, redis=None) as cluster:
        if (child := os.fork()) == 0:
            cluster.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert sorted(cluster.processes) == ["control", "gateway", "worker-0"]


def test_two_clusters_live_side_by_side(model: Path, nothing_left) -> None:
    with ToyCluster(model, launcher="process", workers=1) as one:
        with ToyCluster(model, launcher="process", workers=1) as two:
            assert one.address != two.address and not set(one.processes.values()) & set(two.processes.values())
        assert len(one.processes) == 4
        assert one.processes["worker-0"]


def test_members_know_what_the_cluster_knows(model: Path, tmp_path: Path, nothing_left) -> None:
    kept = {"log_dir": str(tmp_path / "logs")}
    with ToyCluster(model, launcher="process", workers=1, shards=2, lenders=1, config=kept) as cluster:
        configs = cluster._configs
        assert configs["worker-0.1"]["shard"] == 1 and configs["worker-0.1"]["shards"] == 2
        assert configs["lender-0"]["shards"] == 1
        assert configs["worker-0"]["settings"]["redis"].startswith("unix://:")
        assert configs["gateway"]["model_digest"] == configs["worker-0"]["model_digest"] != ""
        assert len(bytes.fromhex(configs["worker-0"]["cache_secret"])) == 32
        json.dumps(configs)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert {"control.log", "worker-0.log", "gateway.log"} <= set(logs), "a chosen log folder stays"
    told = "".join(logs.values())
    assert cluster.token not in told and configs["worker-0"]["cache_secret"] not in told


def test_the_cache_secret_outlives_the_cluster(model: Path, nothing_left) -> None:
    secrets = []
    for _ in range(2):
        with ToyCluster(model, launcher="process", workers=1, redis=None) as cluster:
            secrets.append((cluster._configs["worker-0"]["cache_secret"], cluster.token))
    assert secrets[0][0] == secrets[1][0] and secrets[0][1] != secrets[1][1]


def test_a_member_that_keeps_dying_is_given_up(model: Path, nothing_left, until, caplog) -> None:
    with ToyCluster(model, launcher="process", workers=1, redis=None, config={"start_timeout_s": 20}) as cluster:
        (model / "worker-0:crash.toy").write_text("")
        os.kill(cluster.processes["worker-0"], signal.SIGKILL)
        until(lambda: "member_given_up id=worker-0" in caplog.text, within_s=40.0)
        assert "gateway" in cluster.processes


def test_nothing_is_restarted_when_that_is_switched_off(model: Path, nothing_left, until) -> None:
    with ToyCluster(model, launcher="process", workers=2, redis=None, config={"restart": False}) as cluster:
        os.kill(cluster.processes["worker-1"], signal.SIGKILL)
        until(lambda: "worker-1" not in cluster.processes)
        assert sorted(cluster.processes) == ["control", "gateway", "worker-0"]


def test_a_redis_of_this_machine_is_no_redis_for_several(model: Path, nothing_left) -> None:
    cluster = ToyCluster(model, launcher="process", config={"bind_host": "192.0.2.1", "allow_public": True,
                                                              "allow_plaintext": True})
    with pytest.raises(ConfigError, match="embedded is a Redis for this machine alone"):
        cluster.start()


# -- Rays that are not ours --------------------------------------------------------------------------------------------

JOIN = """
import json, sys, time
import ray
sys.path.insert(0, sys.argv[2])
from toy_driver import ToyCluster, use_toy_actors
from kvbank.errors import ConfigError

use_toy_actors()
try:
    ToyCluster(sys.argv[1], launcher="ray", redis=None, ray_address="127.0.0.1:9").start()
except ConfigError as error:
    print(json.dumps({"refused": str(error)}), flush=True)

@ray.remote(num_cpus=0)
class Neighbour:
    def ping(self):
        return "here"

mine = ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False, namespace="mine",
                _temp_dir=sys.argv[3], object_store_memory=80 << 20)
neighbour = Neighbour.options(name="neighbour").remote()
with ToyCluster(sys.argv[1], launcher="ray", workers=1, redis=None) as cluster:
    inside = sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    processes = sorted(cluster.processes)
give_up = time.monotonic() + 10
while (after := [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]) != ["neighbour"]:
    assert time.monotonic() < give_up, after
    time.sleep(0.05)
print(json.dumps({"inside": inside, "processes": processes, "after": after, "ping": ray.get(neighbour.ping.remote()),
                  "connected": ray.is_initialized()}), flush=True)
ray.shutdown()
"""


TWO = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[2])
from toy_driver import ToyCluster, use_toy_actors

def toy():
    return ToyCluster(sys.argv[1], launcher="ray", workers=1, redis=None).start()

use_toy_actors()
one, two = toy(), toy()
one.stop()
socket.create_connection(("127.0.0.1", int(two.address.rpartition(":")[2]))).close()
after = [sorted(one.processes), sorted(two.processes)]
two.stop()
three = toy()                                                    # left to the end of the process
print(json.dumps({"after": after, "three": sorted(three.processes)}), flush=True)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_two_clusters_share_stays_for_the_second_and_ends_with_the_process(model: Path, until) -> None:
    temp = tempfile.mkdtemp(prefix="kvt-", dir="/tmp")
    done = subprocess.run(
        [sys.executable, "-P", "-c", TWO, str(model), str(HERE)], capture_output=True, text=True, timeout=180, cwd="/",
        stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temp},
    )
    assert done.returncode == 0, done.stderr
    members = ["control", "gateway", "worker-0"]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]      # Ray tells of actors that ended
    assert said == [{"after": [[], members], "three": members}]
    until(lambda: os.listdir(temp) == [])
    os.rmdir(temp)


@pytest.mark.ray
def test_a_ray_that_was_only_joined_stays_untouched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    temp = Path("/tmp") / f"kvt-ray-{os.getpid()}"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", JOIN, str(model), str(HERE), str(temp)], capture_output=True, text=True,
            timeout=180, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, cwd="/",
        )
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert "no Ray to join" in said[0]["refused"]
    assert said[1] == {
        "inside": ["control", "gateway", "neighbour", "worker-0"], "processes": ["control", "gateway", "worker-0"],
        "after": ["neighbour"], "ping": "here", "connected": True,
    }
