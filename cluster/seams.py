"""The seam between a cluster and what its members run in: processes.py fills it with subprocesses, actors.py with Ray actors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Launcher(Protocol):
    """Starts and ends members, whatever they run in. Every method may be called from any thread."""

    @property
    def processes(self) -> dict[str, int]:
        """Process id by member id, of those that run."""
        ...

    def start(self, config: Mapping[str, Any], *, threads: int = 1, within_s: float = 60.0) -> str:
        """Start one member, wait until it serves, return its address. Raises its own typed error, or Unavailable."""
        ...

    def dead(self) -> list[str]:
        """Ids of members whose process has ended without being asked to."""
        ...

    def stop(self, ids: Sequence[str], *, grace_s: float) -> None:
        """Ask, wait at most `grace_s`, then kill."""
        ...

    def close(self, *, grace_s: float = 0.0) -> bool:
        """Stop everybody and everything of one's own. False when something is left for the end of this process."""
        ...
