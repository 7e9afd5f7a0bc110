"""Directory: which member holds which block key. Derived from reports, bounded, wrong at times, never needed.

A hit that is gone costs a miss at the holder; a holder that is missing here costs a computation. Nothing rests on it,
so it is thrown away and rebuilt from full reports whenever there is doubt. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Held:
    """Member `id` holds `added` now and no longer `removed`; `full`: it holds `added` and nothing else."""

    id: str
    added: Sequence[bytes]
    removed: Sequence[bytes] = ()
    full: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """All that member `id` held is out of reach."""

    id: str


@dataclass(frozen=True, slots=True)
class Run:
    """Member `id` holds `count` consecutive keys of a question, from index `first`."""

    id: str
    first: int
    count: int


class Directory:
    """Keys and their holders, at most `limit` (key, holder) pairs; over it, the longest unmentioned pairs go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pairs: dict[tuple[bytes, str], None] = {}          # in the order of their last mention
        self._holders: dict[bytes, dict[str, None]] = {}
        self._keys_of: dict[str, dict[bytes, None]] = {}
        self.forgotten = 0                                       # pairs dropped for the limit, ever

    def on(self, event: Held | Left) -> None:
        """Take one report in."""
        if isinstance(event, Left) or event.full:
            for key in list(self._keys_of.get(event.id, ())):
                self._drop(key, event.id)
        if isinstance(event, Left):
            return
        for key in event.removed:
            self._drop(key, event.id)
        for key in event.added:
            self._add(key, event.id)
        while len(self._pairs) > self._limit:
            self._drop(*next(iter(self._pairs)))
            self.forgotten += 1

    def __len__(self) -> int:
        """Pairs known."""
        return len(self._pairs)

    def holders(self, key: bytes) -> list[str]:
        """Who is said to hold `key`, by id."""
        return sorted(self._holders.get(key, ()))

    def runs(self, keys: Sequence[bytes], *, without: str = "") -> list[Run]:
        """The unbroken runs of `keys` that each member holds: longest leading run first, then by place and id."""
        open_runs: dict[str, int] = {}                           # member -> where its growing run began
        found: list[Run] = []
        for at, key in enumerate(keys):
            here = self._holders.get(key, {})
            for name in [name for name in open_runs if name not in here]:
                found.append(Run(name, open_runs[name], at - open_runs.pop(name)))
            for name in here:
                if name != without:
                    open_runs.setdefault(name, at)
        found += [Run(name, first, len(keys) - first) for name, first in open_runs.items()]
        return sorted(found, key=lambda run: (run.first, -run.count, run.id))

    def _add(self, key: bytes, name: str) -> None:
        if len(key) != KEY_BYTES:
            return                                               # not a key: a hint we cannot use
        self._pairs.pop((key, name), None)
        self._pairs[key, name] = None
        self._holders.setdefault(key, {})[name] = None
        self._keys_of.setdefault(name, {})[key] = None

    def _drop(self, key: bytes, name: str) -> None:
        if (key, name) not in self._pairs:
            return
        del self._pairs[key, name]
        for table, outer, inner in ((self._holders, key, name), (self._keys_of, name, key)):
            row = table[outer]                                   # type: ignore[index]
            del row[inner]                                       # type: ignore[arg-type]
            if not row:
                del table[outer]                                 # type: ignore[arg-type]
