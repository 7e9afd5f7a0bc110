"""Retained: jobs that are over and can still be read, bounded in time and in number. Who keeps most gives way first.

Names only; the gateway has the jobs. Time comes in from outside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

Name = tuple[str, str]               # (tenant, job id)


class Retained:
    """When each job ended, the oldest first."""

    def __init__(self, *, limit: int, keep_s: float) -> None:
        self._limit, self._keep_s = limit, keep_s
        self._ended: OrderedDict[Name, float] = OrderedDict()
        self._of: dict[str, OrderedDict[Name, None]] = {}        # by tenant; none is empty

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, name: Name, ended_at: float) -> None:
        """One that just ended."""
        self._ended[name] = ended_at
        self._of.setdefault(name[0], OrderedDict())[name] = None

    def discard(self, name: Name) -> None:
        """Forget it, if it is here."""
        if self._ended.pop(name, None) is None:
            return
        mine = self._of[name[0]]
        del mine[name]
        if not mine:
            del self._of[name[0]]

    def newest(self, count: int) -> list[Name]:
        """The last ones that ended."""
        return list(self._ended)[-count:]

    def give_way(self, now: float) -> Iterator[Name]:
        """Take out those that are too old, then the oldest of whoever keeps most until the rest are few enough."""
        while self._ended:
            name, ended_at = next(iter(self._ended.items()))
            if ended_at >= now - self._keep_s:
                if len(self._ended) <= self._limit:
                    return
                name = next(iter(self._of[max(self._of, key=lambda tenant: len(self._of[tenant]))]))
            self.discard(name)
            yield name
