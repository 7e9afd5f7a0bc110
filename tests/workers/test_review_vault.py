"""What is under the one lock of vault and ledger is short: bytes are spilled and scrubbed outside it."""

from __future__ import annotations

import threading

import pytest

from kvbank.kvstore.vault import OutOfSlots, Vault


def full_of_idle(slots: int, **settings) -> Vault:
    vault = Vault(slots, blocks_per_span=1, lend_cap=slots, **settings)
    for number, span in enumerate(vault.new_spans(slots)):
        vault.index.publish(span, bytes([number]) * 32, b"", b"root")
        vault.release(span)
    return vault


def is_free(lock) -> bool:
    """Whether another thread could take the lock now."""
    got: list[bool] = []

    def take() -> None:
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got[0]


def test_evicting_copies_outside_the_lock() -> None:
    free: list[bool] = []
    vault = full_of_idle(3, on_evict=lambda span: free.append(is_free(vault.lock)),
                         on_scrub=lambda slots: free.append(is_free(vault.lock)) if free else None)
    vault.new_spans(2)
    vault.take_slots(1)
    assert len(free) == 5 and all(free)
    assert vault.counts().held == 3 and not vault.check()


def test_a_span_on_its_way_out_is_nobody_elses() -> None:
    """While it is spilled a lender's thread asks for all there is."""
    taken: list[int] = []
    vault = full_of_idle(4, on_evict=lambda span: taken.extend(vault.take_for_loan(4)))
    (span,) = vault.new_spans(1)
    assert span.slot not in taken and len(taken) == 3
    assert vault.counts().lent == 3 and not vault.check()


def test_a_spill_that_fails_loses_no_slot() -> None:
    def fail(span) -> None:
        raise RuntimeError("no shelf")
    vault = full_of_idle(2, on_evict=fail)
    with pytest.raises(RuntimeError):
        vault.new_spans(1)
    assert vault.counts().free == 2 and not vault.check()
    with pytest.raises(OutOfSlots):
        vault.new_spans(3)


def test_what_is_dropped_at_the_end_is_offered_to_the_tiers_outside_the_lock() -> None:
    free: list[bool] = []
    vault = full_of_idle(3, on_evict=lambda span: free.append(is_free(vault.lock)))
    assert vault.drop_idle_spilled() == 3
    assert free == [True] * 3 and vault.counts().blank == 3 and not vault.check()
