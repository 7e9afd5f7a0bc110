"""Frames on their way to Redis that must not be used: they do not arrive, or not for long."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvbank.kvstore.tiers.tier import TierUnavailable
from kvbank.kvstore.tiers.write_behind import WriteBehind

KEY, OTHER = b"k" * 32, b"o" * 32


class Tier:
    """A Redis whose writes wait until they are let through."""

    state = "ok"

    def __init__(self) -> None:
        self.held: dict[bytes, Any] = {}
        self.writing, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.down = False

    def put(self, frames: dict[bytes, Any]) -> set[bytes]:
        self.writing.release()
        assert self.let.acquire(timeout=10.0)
        if self.down:
            self.down = False
            raise TierUnavailable("timeout")
        self.held |= frames
        return set(frames)

    def delete(self, keys: Any) -> None:
        for key in keys:
            self.held.pop(key, None)

    def knows(self, key: bytes) -> bool:
        return key in self.held


@pytest.mark.parametrize("down", [False, True])
def test_what_is_forgotten_while_it_is_sent_is_not_there_afterwards(down) -> None:
    """Also when Redis went away meanwhile: it is not sent again."""
    tier, ended = Tier(), []
    behind = WriteBehind(tier, secret=b"s" * 32, limit_bytes=1 << 20, done=lambda key, stored: ended.append((key, stored)))    # type: ignore
    try:
        behind.offer(KEY, [b"wrong"])
        assert tier.writing.acquire(timeout=10.0)
        tier.down = down
        behind.cancel([KEY])
        tier.let.release()
        behind.offer(OTHER, [b"right"])
        assert tier.writing.acquire(timeout=10.0)
        tier.let.release()
        tier.let.release()                               # for a second try that should not be
        assert behind.flush(10.0)
        assert list(tier.held) == [OTHER] and ended == [(KEY, False), (OTHER, True)]
        assert behind.counters()["write_behind_bytes"] == 0
    finally:
        behind.close()
