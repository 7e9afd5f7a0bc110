"""kvbank on a Ray of several nodes (of this machine): who sits where, what is said without room, and nodes that go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvbank.workers.models.random_model import write_random_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

DRIVER = """
import json, os, sys, time
import psutil, ray
from ray.cluster_utils import Cluster
sys.path.insert(0, sys.argv[2])
from toy_driver import ToyCluster, use_toy_actors
from kvbank.errors import ConfigError

use_toy_actors()
model, temp = sys.argv[1], sys.argv[3]
os.makedirs("/tmp/ray", exist_ok=True)                           # Ray's Cluster keeps a note there, whatever temp_dir says
small = {"object_store_memory": 80 << 20, "include_dashboard": False}
rays = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": temp, **small})

def add(**more):
    return rays.add_node(num_cpus=2, resources={"bank": 2}, object_store_memory=80 << 20, **more)

def until(true, within_s=150):
    give_up = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.1)

def raylet_of(node):
    return node.all_processes["raylet"][0].process.pid

def homes(cluster):
    found = {}
    for name, pid in cluster.processes.items():
        try:
            found[name] = names.get(psutil.Process(pid).ppid(), "head")
        except psutil.Error:
            pass
    return found

def toy(**settings):
    return ToyCluster(model, launcher="ray", redis=None, ray_address=rays.address, member_resource="bank", **settings)

nodes = {name: add() for name in ("a", "b")}
names = {raylet_of(node): name for name, node in nodes.items()}
rays.wait_for_nodes()

try:
    toy(workers=2, lenders=3, config={"place_timeout_s": 3}).start()
except ConfigError as error:
    print(json.dumps({"refused": str(error)}), flush=True)

with toy(workers=1, lenders=2, config={"start_timeout_s": 120}) as cluster:
    print(json.dumps({"placed": homes(cluster)}), flush=True)
    crowded = max("ab", key=lambda name: list(homes(cluster).values()).count(name))     # of two, one finds room
    lost = {name for name, home in homes(cluster).items() if home == crowded}
    rays.remove_node(nodes[crowded], allow_graceful=False)
    other = "ab".replace(crowded, "")
    until(lambda: any(homes(cluster).get(name) == other for name in lost))       # one of two is back, on the other node
    print(json.dumps({"after a loss": homes(cluster), "lost": sorted(lost), "node": crowded}), flush=True)
    names[raylet_of(add())] = "c"
    until(lambda: len(cluster.processes) == 5)
    print(json.dumps({"after a return": homes(cluster)}), flush=True)
rays.shutdown()
os.unlink("/tmp/ray/ray_current_cluster") if os.path.exists("/tmp/ray/ray_current_cluster") else None
os.rmdir("/tmp/ray") if not os.listdir("/tmp/ray") else None
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(450)
def test_members_sit_apart_say_who_finds_no_room_and_outlive_their_nodes(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", hidden_size=32, num_layers=1, heads=2, kv_heads=1)
    temp = Path("/tmp") / f"kvt-nodes-{os.getpid()}"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", DRIVER, str(model), str(HERE), str(temp)], capture_output=True, text=True,
            timeout=420, stdin=subprocess.DEVNULL, cwd="/",
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state"),
                 "RAY_USAGE_STATS_ENABLED": "0"},
        )
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    refused, placed, lost, back = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    for part in ("1 of 5 members find no room", "5 CPU, 5 bank are asked for", "CPU 2 free of 2", "cluster.worker_cpus"):
        assert part in refused["refused"]
    homes = placed["placed"]
    assert homes.pop("control") == homes.pop("gateway") == "head"                # beside whoever started the cluster
    assert sorted(homes) == ["lender-0", "lender-1", "worker-0"] and set(homes.values()) == {"a", "b"}
    left = {name: home for name, home in lost["after a loss"].items() if home != "head"}
    assert len(lost["lost"]) == 2 and len(left) == 2 and set(left.values()) == {"a", "b"} - {lost["node"]}
    assert set(back["after a return"]) == {"control", "gateway", *homes}
    assert sorted(home for home in back["after a return"].values() if home != "head").count("c") == 1
