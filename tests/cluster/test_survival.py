"""A real model worker is killed while it streams; the clients must not notice."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from kvbank import Client, LocalCluster, Result
from kvbank.workers.models.random_model import write_random_model

STREAMS, TOKENS = 8, 160


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model = write_random_model(tmp_path / "model", hidden_size=64, num_layers=4, heads=4, kv_heads=2)
    with LocalCluster(str(model), workers=2, device_blocks=256, redis=None, launcher="process",
                      exactness="bitwise") as made:
        yield made


def test_eight_streams_outlive_one_of_two_workers_greedy_and_seeded(cluster: LocalCluster) -> None:
    jobs = [{"prompt": [(n * 31 + i * 7) % 500 for i in range(200 + 40 * n)], "max_tokens": TOKENS,
             "temperature": float(n % 2), "seed": n} for n in range(STREAMS)]
    with Client(cluster.address) as client:
        expected = [client.generate(**job) for job in jobs]
        streamed: dict[int, tuple[str, list[int]]] = {}
        results: dict[int, Result] = {}
        first_tokens = threading.Barrier(STREAMS + 1)

        def read(number: int) -> None:
            job = client.submit(**jobs[number])
            text, ids = "", []
            for delta in job.stream():
                if not ids:
                    first_tokens.wait(timeout=60)
                text, ids = text + delta.text, ids + delta.token_ids
            streamed[number], results[number] = (text, ids), job.result()

        threads = [threading.Thread(target=read, args=(number,)) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        first_tokens.wait(timeout=60)
        running = [job.worker for job in client.status().jobs]
        assert running, "every job was over before the fault: it would not count"
        os.kill(cluster.processes[running[0]], signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=120)
        moved = [number for number in range(STREAMS) if results[number].receipt.attempts > 1]
        assert moved, "the fault hit no job"
        for number in range(STREAMS):
            assert streamed[number] == (expected[number].text, expected[number].token_ids), number
            assert results[number].token_ids == expected[number].token_ids


def test_the_only_worker_is_killed_and_its_successor_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model = write_random_model(tmp_path / "model", hidden_size=64, num_layers=4, heads=4, kv_heads=2)
    with (
        LocalCluster(str(model), workers=1, device_blocks=128, redis=None, launcher="process") as cluster,
        Client(cluster.address) as client,
    ):
        expected = client.generate(list(range(300)), max_tokens=60)
        job = client.submit(list(range(300)), max_tokens=60)
        seen: list[int] = []
        for delta in job.stream():
            if not seen:
                os.kill(cluster.processes["worker-0"], signal.SIGKILL)
            seen += delta.token_ids
        assert seen == expected.token_ids and job.result().receipt.attempts > 1
