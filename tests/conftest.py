"""What several test folders share. Tests that break their Redis start one of their own (`EmbeddedRedis`, 30 ms)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis, find_server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real redis-server for this run, with `.url` and `.pid`. Shared: use keys of your own and leave it running."""
    try:
        find_server()
    except ConfigError as error:
        pytest.skip(str(error))
    with EmbeddedRedis(256 << 20) as server:
        yield server
