"""Banker: what it may not cost the engine. What it does is in the stories, walks and clusters."""

from threading import RLock
from types import SimpleNamespace

import pytest

from kvbank.kvstore import loan_events as ev
from kvbank.kvstore import messages as m
from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.layout import Boot

ME, LENDER = Boot(b"me".ljust(16)), Boot(b"lo".ljust(16))
COMPAT = m.Compat(slot_bytes=64, numerics="cpu", model_digest="llama")


def test_a_boundary_at_which_nothing_waits_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine comes every step. With the timers woken each time, their thread and the engine's fought for the interpreter."""
    book = DebtBook(ME)
    banker = Banker("me", ME, COMPAT, SimpleNamespace(close=lambda: None), RLock(), lambda: 0.0, book=book)
    woken: list[None] = []
    monkeypatch.setattr(banker._timer, "notify", lambda: woken.append(None))
    assert banker.tell_book(ev.StepBoundary()) == [] and not woken
    book.on(0.0, ev.Want((LENDER,), (1,), "t", (1.0, "job")))
    book.on(0.0, m.Envelope(LENDER, ME, m.Grant(1, (ref := m.Ref(LENDER, ME, 1, 0, 1),), 6000)))
    book.on(0.0, ev.PutDone(ref, b"digest", b"digest"))
    assert banker.tell_book(ev.StepBoundary()) == [ev.Moved(1, ref, b"digest")] and woken
