"""Timeline: what one job did when, as the gateway saw it. Bounded: a job that changes for ever keeps its first moments.

    queued ──> prefill ──> decode ──> (attempt lost) queued ──> replay ──> decode ──> end
    borrowed blocks       0 ──────── 24 ──── 48 ───────────── 0            seen once per second while somebody watches

Knows phases and seconds; knows no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_MOMENTS = 128                    # of each of the two lists
REPLAYED = ("prefill", "fetching")   # computing again what was there already


@dataclass(frozen=True, slots=True)
class Moment:
    """From `at_s` on the job was in `phase`: queued | accepted | waiting | fetching | prefill | replay | decode.

    queued: also at a worker that said nothing yet. accepted: it said its first word; what it does with the job follows at once.
    """

    at_s: float                      # since admission
    phase: str
    attempt: int
    worker: str
    note: str = ""                   # why: "lost: silent", or what it waits for


@dataclass(slots=True)
class Timeline:
    """Grows while the job lives."""

    moments: list[Moment] = field(default_factory=list)
    borrowed: list[tuple[float, int]] = field(default_factory=list)      # (at_s, blocks read at lenders from then on)
    left_out: int = 0                # moments beyond the bound

    def enter(self, at_s: float, phase: str, attempt: int, worker: str, note: str = "") -> None:
        """Note a phase; the same one again is no news."""
        if self.moments:
            last = self.moments[-1]
            if (last.phase, last.attempt, last.worker, last.note) == (phase, attempt, worker, note):
                return
        if len(self.moments) >= MAX_MOMENTS:
            self.left_out += 1
            return
        self.moments.append(Moment(at_s, phase, attempt, worker, note))

    def borrow(self, at_s: float, blocks: int) -> None:
        """Note how many blocks it reads at lenders."""
        if blocks != (self.borrowed[-1][1] if self.borrowed else 0) and len(self.borrowed) < MAX_MOMENTS:
            self.borrowed.append((at_s, blocks))

    def told(self) -> dict[str, Any]:
        """As plain values."""
        moments = [{"at_s": m.at_s, "phase": m.phase, "attempt": m.attempt, "worker": m.worker, "note": m.note}
                   for m in self.moments]
        return {"moments": moments, "borrowed": [list(pair) for pair in self.borrowed], "left_out": self.left_out}
