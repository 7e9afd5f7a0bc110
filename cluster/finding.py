"""Finding: one thing that `kvbank doctor` looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """`state` is good, warn (it works, worse than it could) or bad (a cluster cannot work). Only then is there a remedy."""

    what: str
    state: str
    detail: str
    remedy: str = ""


def good(what: str, detail: str) -> Finding:
    return Finding(what, "good", detail)


def warn(what: str, detail: str, remedy: str) -> Finding:
    return Finding(what, "warn", detail, remedy)


def bad(what: str, detail: str, remedy: str) -> Finding:
    return Finding(what, "bad", detail, remedy)
