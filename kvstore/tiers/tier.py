"""What every shelf of the bank below the device promises. Knows bytes and keys, not what the bytes mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvbank.kvstore.frame import Buffer


class TierUnavailable(Exception):
    """The tier could not answer in time or at all; what it had answered before is in `found`. Never reaches a user.

    `reason`: "timeout" (asked, and it stayed silent) or "tier_down" (refused, lost, or not asked: the breaker is open).
    """

    def __init__(self, reason: str, found: dict[bytes, memoryview] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.found = found or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """One shelf at one moment."""

    name: str                                  # host | disk | redis
    bytes_used: int
    bytes_limit: int
    frames: int
    state: str                                 # ok | open | half_open (of the breaker) | off
    counters: dict[str, int] = field(default_factory=dict)


class Tier(Protocol):
    """Batched on purpose: one call is one round trip, or a bounded few. A frame is a list of buffers to be joined.

    Frames are content-addressed: the first writer of a key keeps it, and putting it again only makes it recent.
    A key is reported present only after all of its bytes have arrived.
    """

    def put(self, frames: dict[bytes, Sequence[Buffer]]) -> set[bytes]:
        """Store frames; the keys that are here afterwards. What does not fit is refused and counted, never an error."""
        ...

    def get(self, keys: Sequence[bytes]) -> dict[bytes, memoryview]:
        """Copies of the frames that are here. A miss is an absent key, never an error; raises TierUnavailable only."""
        ...

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of the keys are here now."""
        ...

    def delete(self, keys: Sequence[bytes]) -> None: ...

    def status(self) -> TierStatus: ...

    def close(self) -> None: ...
