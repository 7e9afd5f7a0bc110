"""At run time: no process of a cluster ever unpickles anything, whatever it is asked to do."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from kvbank.cluster.client import Client

HOOK = '''
import os, sys
def forbid(event, arguments):
    if event == "pickle.find_class":
        with open(os.environ["UNPICKLED"], "a") as seen:
            seen.write(f"{os.getpid()} {arguments} {sys.argv}\\n")
        raise RuntimeError("nothing is unpickled here")
sys.addaudithook(forbid)
with open(os.environ["UNPICKLED"] + ".watched", "a") as watched:
    watched.write(f"{os.getpid()}\\n")
'''


@pytest.fixture()
def hooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every Python that starts from now on writes into the returned file before it unpickles a class, and fails."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("UNPICKLED", str(tmp_path / "seen"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "seen"


def test_the_hook_sees_an_unpickled_class(hooked: Path) -> None:
    code = f"import pickle; pickle.loads({pickle.dumps(Path('/'))!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "nothing is unpickled here" in done.stderr and hooked.read_text()


@pytest.mark.slow
def test_a_cluster_that_borrows_spills_and_is_sent_payloads_unpickles_nothing(hooked: Path, cluster, big, text, until) -> None:
    one = cluster(workers=2, lenders=1, redis="embedded", host_bytes="1MiB")
    watched = set((hooked.parent / "seen.watched").read_text().split())
    payload = pickle.dumps(Path("/")).decode("latin-1")
    with Client(one.address) as client:
        members = {str(worker.pid) for worker in client.status().workers}
        assert len(members) == 3 and members <= watched, "a member runs without the hook"
        for prompt in (text(1200), text(1200, 1), text(1200)):
            assert client.generate(prompt, max_tokens=4).token_ids == big.generate(prompt, max_tokens=4).token_ids
        _plant(one, pickle.dumps(Path("/")))
        client.generate(text(1200, 1), max_tokens=4)
        client.generate(payload, max_tokens=2)
    assert not hooked.exists(), hooked.read_text()


def _plant(one, payload: bytes) -> None:
    """Whatever lies in Redis becomes a pickle."""
    import redis

    with redis.Redis.from_url(one._redis.url) as server:
        names = [name for name in server.scan_iter(match=b"kvb:*", count=1000) if server.type(name) == b"string"]
        for name in names:
            server.set(name, payload)
    assert names, "nothing was spilled"
