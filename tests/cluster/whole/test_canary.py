"""The canary as any user runs a model: a folder for LocalCluster, jobs through the client, real processes, a real Redis."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvbank.cluster.client import Client
from kvbank.errors import Cancelled
from kvbank.workers.canary import write_canary
from kvbank.workers.canary_alone import CanaryAlone
from kvbank.workers.sampler import SamplingParams

JOBS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_canary(tmp_path_factory.mktemp("canary"))


@pytest.mark.parametrize(("exactness", "dtype", "shards"), [
    pytest.param("fast", "float32", 1, marks=pytest.mark.slow), ("bitwise", "bfloat16", 2)])
def test_a_cluster_of_canaries_answers_what_each_answers_alone(cluster, folder, quiet, exactness, dtype, shards) -> None:
    town = cluster(model=str(folder), workers=2, lenders=2, shards=shards, device_blocks=48, lender_blocks=48, dtype=dtype,
                   exactness=exactness, host_bytes="2MiB", redis="embedded")
    alone, rng = CanaryAlone(folder, dtype=dtype), random.Random(3)
    wants: list[tuple[Any, list[int] | None]] = []
    with Client(town.address) as client:
        for number in range(JOBS):
            stem = _text(rng.choice((0, 128, 400)), rng.randrange(2))
            prompt = stem + _text(rng.choice((1, 16, 129, 700)), 10 + rng.randrange(6))
            seed = {"temperature": 1.5, "seed": number} if number % 4 == 3 else {}
            job = client.submit(prompt, max_tokens=12, ignore_eos=True, **seed)
            if number % 8 == 5:
                job.cancel()
                wants.append((job, None))
            else:
                wants.append((job, alone.answer(prompt, 12, sampling=SamplingParams(**seed))))
        borrowed = 0
        for job, want in wants:
            if want is None:
                try:
                    job.result(timeout_s=60)
                except Cancelled:
                    continue
            else:
                result = job.result(timeout_s=60)
                assert result.token_ids == want
                borrowed += result.receipt.borrowed_blocks_peak > 0
        assert borrowed, "nobody borrowed anything"
        quiet(client)


def _text(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 60000) for _ in range(length)]
