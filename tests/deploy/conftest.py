"""A real Prometheus on loopback that scrapes one cluster every second, for tests of what is in deploy/."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from kvbank.cluster.launcher import LocalCluster
from kvbank.workers.models.random_model import write_random_model

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"


class Prometheus:
    """One server; `query` and `firing` ask it."""

    def __init__(self, binary: str, folder: Path, target: str, *, rules: dict[str, Any] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target.removeprefix("http://")]
        (folder / "alerts.yml").write_text(yaml.safe_dump(rules or {"groups": []}))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(
            [binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=1h", "--log.level=warn"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of one query now; raises when Prometheus refuses the expression."""
        answer = httpx.get(f"{self.address}/api/v1/query", params={"query": expression}, timeout=10)
        body = answer.json()
        assert body["status"] == "success", (expression, body)
        return list(body["data"]["result"])

    def firing(self) -> set[str]:
        alerts = httpx.get(f"{self.address}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.address}/-/ready", timeout=2).status_code == 200
        return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)


@pytest.fixture()
def prometheus(tmp_path: Path, until: Callable[..., Any]) -> Iterator[Callable[..., Prometheus]]:
    """prometheus(address, rules=None): a server that scrapes that gateway, ready."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not installed: it comes with Debian's package of that name")
    made: list[Prometheus] = []

    def start(target: str, rules: dict[str, Any] | None = None) -> Prometheus:
        folder = tmp_path / f"prometheus-{len(made)}"
        folder.mkdir()
        made.append(Prometheus(binary, folder, target, rules=rules))
        until(made[-1].ready)
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture()
def cluster(tmp_path: Path) -> Iterator[Callable[..., LocalCluster]]:
    """cluster(**settings): a small random model on plain processes, stopped at the end."""
    write_random_model(tmp_path / "model", seed=7, vocab=512, max_position_embeddings=32_768)
    made: list[LocalCluster] = []

    def start(**settings: Any) -> LocalCluster:
        small = {"device_blocks": 48, "redis": None, "host_bytes": 0, "torch_threads": 1, "launcher": "process"}
        made.append(LocalCluster(**{"model": str(tmp_path / "model"), **small, **settings}))
        return made[-1].start()

    yield start
    for one in made:
        one.stop()
