"""The only model worker is killed while it streams; its successor goes on and the client does not notice.

Two workers and eight streams, one worker killed: whole/test_main_job.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvbank import Client, LocalCluster
from kvbank.workers.models.random_model import write_random_model

TOKENS = 400                         # long enough that the fault finds the job at work, however slow this process is


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_the_successor_of_a_killed_worker_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model = write_random_model(tmp_path / "model", hidden_size=64, num_layers=4, heads=4, kv_heads=2)
    job = {"prompt": list(range(300)), "max_tokens": TOKENS, "temperature": temperature, "seed": 5}
    with (
        LocalCluster(str(model), workers=1, device_blocks=128, redis=None, launcher="process",
                     exactness="bitwise") as cluster,
        Client(cluster.address) as client,
    ):
        expected = client.generate(**job)
        running = client.submit(**job)
        text, ids = "", []
        for delta in running.stream():
            if not ids:
                os.kill(cluster.processes["worker-0"], signal.SIGKILL)
            text, ids = text + delta.text, ids + delta.token_ids
        result = running.result()
        assert ids == result.token_ids == expected.token_ids and text == result.text == expected.text
        assert result.receipt.attempts > 1, "the fault hit no job"
