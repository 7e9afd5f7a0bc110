"""A planted bug: which function is replaced by what, and the shortest story in which it does harm.

Replacements are made by the test's own process. Product code has no flag and knows nothing of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Make = Callable[[Any], Any]                  # the real function -> the one that takes its place


@dataclass(frozen=True)
class Mutant:
    """name: what the code does wrong. harm: the minimal history that shows it. patches: "module:Class.function" -> Make."""

    name: str
    harm: str
    patches: dict[str, Make]

    def plant(self) -> None:
        """For the rest of this process."""
        for target, make in self.patches.items():
            replace(target, make)


def replace(target: str, make: Make) -> None:
    """Raises AttributeError when there is nothing to replace: a mutant of what no longer exists proves nothing."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(f"kvbank.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    planted = make(real)
    for event, handler in list(getattr(owner, "table", {}).items()):      # a core's dispatch table holds the functions
        if handler is real:
            owner.table[event] = planted
    setattr(owner, name, planted)


def nothing(real: Any) -> Any:
    """The function does nothing."""
    return lambda *args, **kwargs: None
