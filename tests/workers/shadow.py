"""A ledger's shadow: hears what the ledger heard, and must end where it ended (L5).

A ledger is a pure core, so the log of what it was told and what its pool answered makes its state. The shadow replays the
log as it comes, piece by piece, and drops it. A difference means that something wrote into the books past their door, or
that the core looked at something beside its arguments.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

from kvbank.kvstore.ledger import LoanLedger

DOORS = ("on", "pin", "unpin", "begin_put")
STATE = ("_gen", "_lent", "_loans", "_peers", "draining", "in_debt")


class Shadow:
    """Of one ledger, from now on."""

    def __init__(self, ledger: LoanLedger, note: Callable[[str, tuple[Any, ...], Any], None]) -> None:
        """note: told of every call through a door, after it, with what it gave. The lock of vault and ledger must be held."""
        self._ledger, self._note = ledger, note
        self._log: list[tuple[str, tuple[Any, ...]]] = []
        self._script: deque[Any] = deque()
        self._inside: list[int] = []
        self._shadow = LoanLedger(ledger.boot, ledger.compat, self._pool(), lend_cap=ledger.lend_cap,
                                  timings=ledger.timings, tenant_quota=ledger.tenant_quota)
        for name in STATE:
            setattr(self._shadow, name, copy.deepcopy(getattr(ledger, name)))
        for name in DOORS:
            setattr(ledger, name, self._tap(name, getattr(ledger, name)))
        pool: Any = ledger._pool
        ledger._pool = _Recorder(pool, self._script, self._inside)

    def differs(self) -> str:
        """'' or what is not as the log says. The lock must be held."""
        log, self._log = self._log, []
        for name, arguments in log:
            getattr(self._shadow, name)(*arguments)
        for name in STATE:
            real, replayed = getattr(self._ledger, name), getattr(self._shadow, name)
            if real != replayed:
                return f"{name} is {real!r}, the log makes it {replayed!r}"
        return "" if not self._script else f"{len(self._script)} answers of the pool were never asked for"

    def _tap(self, name: str, door: Callable[..., Any]) -> Callable[..., Any]:
        def through(*arguments: Any) -> Any:
            self._log.append((name, arguments))
            self._inside.append(get_ident())
            try:
                result = door(*arguments)
            finally:
                self._inside.pop()
            self._note(name, arguments, result)
            return result
        return through

    def _pool(self) -> Any:
        return _Player(self._script)


class _Recorder:
    """The real pool, whose answers to calls from inside a door are written down."""

    def __init__(self, pool: Any, script: deque[Any], inside: list[int]) -> None:
        self._pool, self._script, self._inside = pool, script, inside

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._pool, name)

        def call(*arguments: Any) -> Any:
            result = real(*arguments)
            if get_ident() in self._inside:
                self._script.append((name, copy.copy(result)))
            return result
        return call


class _Player:
    """A pool that answers as the real one did."""

    def __init__(self, script: deque[Any]) -> None:
        self._script = script

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            asked, result = self._script.popleft()
            assert asked == name, f"the ledger asked its pool for {asked}, the shadow asks for {name}"
            return result
        return call
