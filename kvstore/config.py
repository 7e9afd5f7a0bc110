"""StoreConfig: how much each shelf below the device may hold and how long anybody waits for it.

Built once by cluster/config.py; nothing here or below reads the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbank.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Bytes are bytes, times are seconds. Raises ConfigError for a value that cannot work."""

    host_bytes: int = 256 << 20                # 0: no host tier
    redis_url: str | None = field(default=None, repr=False)      # None: no shared tier. May hold a password
    redis_bytes: int = 1 << 30                 # cap on our bytes in that Redis, over all workers
    redis_ttl_s: float = 86_400.0              # a frame not read for this long is forgotten
    redis_connect_s: float = 0.1
    redis_read_s: float = 0.05                 # longest silence; what a stopped Redis costs one request, once
    redis_floor_bytes_per_s: float = 50e6      # a slower link is a down one: bounds a batch of values beside read_s
    redis_write_s: float = 0.5                 # the same for writes, which nobody waits for
    write_behind_bytes: int = 64 << 20         # what may wait for Redis at once, beside host_bytes

    def __post_init__(self) -> None:
        for name in ("host_bytes", "write_behind_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be 0 or more")
        for name in ("redis_bytes", "redis_ttl_s", "redis_connect_s", "redis_read_s", "redis_write_s",
                     "redis_floor_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be more than 0")
