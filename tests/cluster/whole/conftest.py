"""Whole clusters of real processes on this machine: control, workers, lenders, gateway, Redis; a small random model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbank.cluster.client import Client
from kvbank.cluster.launcher import LocalCluster
from kvbank.workers.models.random_model import write_random_model

VOCAB = 512
SMALL = {"device_blocks": 48, "redis": None, "host_bytes": 0, "torch_threads": 1, "launcher": "process"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, seed=7, vocab=VOCAB, max_position_embeddings=32_768)
    return folder


@pytest.fixture()
def cluster(model_folder: Path) -> Iterator[Callable[..., LocalCluster]]:
    """cluster(workers=1, lenders=2, **settings): started, and stopped at the end."""
    made: list[LocalCluster] = []

    def start(**settings: Any) -> LocalCluster:
        made.append(LocalCluster(**{"model": str(model_folder), **SMALL, **settings}))
        return made[-1].start()

    yield start
    for one in made:
        one.stop()


@pytest.fixture(scope="session")
def big(model_folder: Path) -> Iterator[Client]:
    """One big worker without neighbours: what every other cluster must equal."""
    settings = {**SMALL, "device_blocks": 2048, "workers": 1, "lenders": 0}
    with LocalCluster(model=str(model_folder), **settings) as one, Client(one.address) as client:
        yield client


@pytest.fixture()
def text() -> Callable[[int, int], list[int]]:
    """text(length, seed): token ids."""
    def make(length: int, seed: int = 0) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(3, VOCAB) for _ in range(length)]
    return make


@pytest.fixture()
def quiet(until: Callable[..., Any]) -> Callable[[Client], None]:
    """quiet(client): wait until nothing is used, lent or borrowed anywhere."""
    def check(client: Client) -> None:
        def busy() -> list[Any]:
            return [(w.id, w.blocks_used, w.blocks_lent, w.blocks_borrowed) for w in client.status().workers
                    if w.blocks_used or w.blocks_lent or w.blocks_borrowed]
        until(lambda: not busy(), 10.0)
    return check
