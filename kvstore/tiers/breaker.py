"""CircuitBreaker: when to stop asking something that does not answer. Pure: time comes in as `now`.

         5 failures in a row, or more than half of the last 20
    ok ────────────────────────────────────────────────────────> open
     │ ^                                                          │ ^
     │ └── probe answered ───────────── half_open <── every 1 s ──┘ │ probe failed
     │                                   │  ^  └────────────────────┘
     └── one silence (a timeout) ────────┼──┘ probed at once, again and again,
                                         └──> open after 5 in a row

A request is let through only in `ok`. Silence costs one request its deadline: a probe, which is nobody's request, then
finds out at once whether it was an accident. A refused connection costs no time and only counts.
"""

from __future__ import annotations

from collections import deque


class CircuitBreaker:
    """Not locked: its owner calls it under a lock of its own."""

    def __init__(self, *, consecutive: int = 5, window: int = 20, probe_every_s: float = 1.0) -> None:
        self._consecutive, self._window, self._probe_every_s = consecutive, window, probe_every_s
        self._last: deque[bool] = deque(maxlen=window)       # True: a failure
        self._in_a_row = 0
        self._state = "ok"
        self._probe_at = float("inf")
        self._probing = False
        self._opened = False                   # since it was last ok
        self.times_opened = 0

    @property
    def state(self) -> str:
        """ok | open | half_open"""
        return self._state

    @property
    def allows(self) -> bool:
        """Whether a request may be tried now."""
        return self._state == "ok"

    def succeeded(self) -> None:
        """A request was answered, whatever the answer was."""
        if self._state == "ok":                # a late answer does not close it: the probe does
            self._in_a_row = 0
            self._last.append(False)

    def failed(self, *, now: float, silent: bool) -> None:
        """A request was not answered: by silence until its deadline, or at once."""
        if self._state != "ok":
            return
        self._count_failure(now)
        if silent and self._state == "ok":
            self._state, self._probe_at = "half_open", now

    def trip(self, *, now: float) -> None:
        """Open it at once, as when it was found down at start."""
        self.times_opened += not self._opened
        self._opened = True
        self._state, self._probe_at = "open", now + self._probe_every_s

    def take_probe(self, *, now: float) -> bool:
        """True when a probe is due: the caller is the probe and must report with `probed`. One at a time."""
        if self._probing or now < self._probe_at:
            return False
        self._probing = True
        self._state = "half_open"
        return True

    def probed(self, answered: bool, *, now: float) -> None:
        """The probe's outcome. After `open` an answer starts a clean record; after one silence the record stays."""
        self._probing = False
        if not answered:
            self._probe_at = now
            self._count_failure(now)
            return
        if self._opened:
            self._opened, self._in_a_row = False, 0
            self._last.clear()
        self._state, self._probe_at = "ok", float("inf")

    def wake_at(self) -> float:
        """When the next probe is due; infinity while none is, or one is under way."""
        return float("inf") if self._probing else self._probe_at

    def _count_failure(self, now: float) -> None:
        self._in_a_row += 1
        self._last.append(True)
        if self._opened or self._in_a_row >= self._consecutive or 2 * sum(self._last) > self._window:
            self.trip(now=now)
