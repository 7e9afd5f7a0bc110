"""What several test folders share. Tests that break their Redis start one of their own (`EmbeddedRedis`, 30 ms)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis, find_server

if TYPE_CHECKING:
    from kvbank.workers.models.config_reader import ModelConfig
    from kvbank.workers.models.decoder import Attend

# A busy machine is no counterexample.
settings.register_profile("kvbank", deadline=None)
settings.register_profile("long", max_examples=20_000, deadline=None)     # --hypothesis-profile=long
settings.load_profile("kvbank")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real redis-server for this run, with `.url` and `.pid`. Shared: use keys of your own and leave it running."""
    try:
        find_server()
    except ConfigError as error:
        pytest.skip(str(error))
    with EmbeddedRedis(256 << 20) as server:
        yield server


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """until(check, within_s=60.0): the first true value of check(), or a failure that says what it was instead. For what
    another thread or process is about to do."""

    def wait(check: Callable[[], Any], within_s: float = 60.0) -> Any:
        give_up = time.monotonic() + within_s
        while not (value := check()):
            assert time.monotonic() < give_up, f"still {value!r} after {within_s} s"
            time.sleep(0.02)
        return value

    return wait


@pytest.fixture(scope="session")
def dense_attention() -> Callable[..., Attend]:
    """dense_attention(config, positions, layers=None): the plain oracle, one sequence attending to itself in one go.

    positions [T] int64, of the rows that will come; `layers`: the range of a shard. The KV is nowhere kept.
    """
    import torch

    def build(config: ModelConfig, positions: torch.Tensor, layers: range | None = None) -> Attend:
        windows = [config.windows[layer] for layer in layers or range(config.num_layers)]
        groups, scale = config.num_heads // config.num_kv_heads, config.head_dim**-0.5

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            key, query = positions[None, :], positions[:, None]
            visible = key <= query
            if (window := windows[layer]) is not None:
                visible &= key > query - window
            wide_k, wide_v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.float(), wide_k) * scale
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            return torch.einsum("hqk,khd->qhd", weights, wide_v).to(q.dtype)

        return attend

    return build
