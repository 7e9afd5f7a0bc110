"""What happened between two looks, in words: members, breakers, recalls, loans; and nothing when nothing did."""

from __future__ import annotations

from typing import Any

from kvbank.cluster.changes import BAD, BREAKER, LOAN, MEMBER, RECALL, differences


def worker(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "state": "ok", "pid": 1, "blocks_total": 64, "draining": False,
            "tiers": [{"name": "redis", "state": "ok"}], "counters": {"ledger_recalls": 2.0}, **fields}


def told(*workers: dict[str, Any], loans: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"workers": list(workers), "loans": list(loans), "tiers": []}


def said(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    return [(h.kind, h.text) for h in differences(before, now)]


LOANED = {"id": "b>a#1", "lender": "a", "borrower": "b", "blocks": 24, "term_s": 6.0, "age_s": 1.0}


def test_two_equal_looks_say_nothing() -> None:
    assert said(told(worker("a"), loans=(LOANED,)), told(worker("a"), loans=({**LOANED, "age_s": 2.0},))) == []


def test_members_come_go_fall_silent_and_are_started_again() -> None:
    a, b = worker("a"), worker("b")
    assert said(told(a), told(a, b)) == [(MEMBER, "b joined, 64 blocks")]
    assert said(told(a, b), told(a)) == [(MEMBER, "b is gone")]
    silent = differences(told(a), told(worker("a", state="silent")))
    assert [(h.level, h.text) for h in silent] == [(BAD, "a does not answer")]
    assert said(told(worker("a", state="silent")), told(a)) == [(MEMBER, "a answers again")]
    assert said(told(a), told(worker("a", pid=2))) == [(MEMBER, "a is another process now: it was started again")]
    assert said(told(a), told(worker("a", draining=True))) == [(MEMBER, "a drains")]
    assert said(told(worker("a", draining=True)), told(a)) == [(MEMBER, "a drains no more")]


def test_breakers_recalls_and_loans() -> None:
    a, open_one = worker("a"), worker("a", tiers=[{"name": "redis", "state": "open"}])
    half = worker("a", tiers=[{"name": "redis", "state": "half_open"}])
    assert said(told(a), told(open_one)) == [(BREAKER, "a: the breaker of redis is open")]
    assert said(told(open_one), told(half)) == [(BREAKER, "a: the breaker of redis is half_open")]
    assert said(told(open_one), told(a)) == [(BREAKER, "a: the breaker of redis is closed")]
    assert said(told(a), told(worker("a", counters={"ledger_recalls": 5.0}))) == [(RECALL, "a called loans back (3 recalls)")]
    assert said(told(a), told(worker("a", pid=2, counters={"ledger_recalls": 9.0})))[0][0] == MEMBER    # another process
    assert said(told(a), told(a, loans=(LOANED,))) == [(LOAN, "a lends 24 blocks to b")]
    assert said(told(a, loans=(LOANED,)), told(a)) == [(LOAN, "24 blocks of a are back from b")]
