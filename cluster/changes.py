"""Changes: what happened between two looks at the cluster, as events in plain words. Pure.

    told (before) + told (now) --differences--> [Happening, ...]         told: Survey.told

What opened and ended between two looks is not seen; counters (recalls) are, by how much they grew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MEMBER, LOAN, RECALL, JOB, BREAKER, OPS = "member", "loan", "recall", "job", "breaker", "ops"
KINDS = (MEMBER, LOAN, RECALL, JOB, BREAKER, OPS)
INFO, WARN, BAD = "info", "warn", "bad"

Told = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Happening:
    """One line of the event log. `member` and `job` name whom it is about, "" for nobody."""

    kind: str
    level: str
    text: str
    member: str = ""
    job: str = ""                    # its name on the wire


def differences(before: Told, now: Told) -> list[Happening]:
    """In the order members, breakers, recalls, loans."""
    old = {worker["id"]: worker for worker in before["workers"]}
    new = {worker["id"]: worker for worker in now["workers"]}
    found = list(_members(old, new))
    for name, worker in new.items():
        if name in old and old[name]["state"] == worker["state"] == "ok" and old[name]["pid"] == worker["pid"]:
            found += _breakers(old[name], worker)
            found += _recalls(old[name], worker)
    return [*found, *_loans(before, now)]


def _members(old: Mapping[str, Told], new: Mapping[str, Told]) -> Iterator[Happening]:
    for name, worker in new.items():
        was = old.get(name)
        if was is None:
            yield Happening(MEMBER, INFO, f"{name} joined, {worker['blocks_total']} blocks", name)
        elif was["pid"] != worker["pid"]:
            yield Happening(MEMBER, WARN, f"{name} is another process now: it was started again", name)
        elif was["state"] != worker["state"]:
            silent = worker["state"] == "silent"
            yield Happening(MEMBER, BAD if silent else INFO, f"{name} {'does not answer' if silent else 'answers again'}", name)
        elif was.get("draining", False) != worker.get("draining", False):
            yield Happening(MEMBER, INFO, f"{name} {'drains' if worker['draining'] else 'drains no more'}", name)
    for name in old:
        if name not in new:
            yield Happening(MEMBER, WARN, f"{name} is gone", name)


def _breakers(was: Told, worker: Told) -> Iterator[Happening]:
    states = {tier["name"]: tier["state"] for tier in was["tiers"]}
    for tier in worker["tiers"]:
        before, state = states.get(tier["name"], tier["state"]), tier["state"]
        if before != state and "open" in (before, state):
            text = f"{worker['id']}: the breaker of {tier['name']} is {state if state != 'ok' else 'closed'}"
            yield Happening(BREAKER, BAD if state == "open" else INFO, text, worker["id"])


def _recalls(was: Told, worker: Told) -> Iterator[Happening]:
    more = worker["counters"].get("ledger_recalls", 0) - was["counters"].get("ledger_recalls", 0)
    if more > 0:
        yield Happening(RECALL, INFO, f"{worker['id']} called loans back ({more:g} recall{'s' if more > 1 else ''})",
                        worker["id"])


def _loans(before: Told, now: Told) -> Iterator[Happening]:
    old, new = {loan["id"]: loan for loan in before["loans"]}, {loan["id"]: loan for loan in now["loans"]}
    for name, loan in new.items():
        if name not in old:
            yield Happening(LOAN, INFO, f"{loan['lender']} lends {loan['blocks']} blocks to {loan['borrower']}", loan["lender"])
    for name, loan in old.items():
        if name not in new:
            yield Happening(LOAN, INFO, f"{loan['blocks']} blocks of {loan['lender']} are back from {loan['borrower']}",
                            loan["lender"])
