"""Lending threads work beside the engine's: what a lender does between two lines of ours must never cost a token or a job."""

from __future__ import annotations

import pytest

from kvbank.kvstore.vault import Vault
from kvbank.workers.sequence import JobSpec


def after_a_hit(engine, act) -> None:
    """Run `act` once, right after the engine found a span to hold, as another thread would that was waiting."""
    real, done = engine.vault.index.match, []

    def raced(keys, first_span=0, tokens=None):
        hits = real(keys, first_span, tokens)
        if hits and tokens is not None and not done:
            done.append(1)
            act()
        return hits
    engine.vault.index.match = raced


@pytest.fixture()
def asked_twice(alone, run_jobs, prompt):
    """(engine that has answered the prompt once, job to ask again, its tokens)."""
    text = prompt(440)
    engine = alone(device_blocks=64)
    engine.vault.lend_cap = engine.vault.num_slots
    first = run_jobs(engine, JobSpec(id="a", prompt=text, max_tokens=8, ignore_eos=True))
    return engine, JobSpec(id="b", prompt=text, max_tokens=8, ignore_eos=True), first.tokens["a"]


def overwrite(engine, slots) -> None:
    for slot in slots:
        engine.backend.arena.slot(slot).view(engine.backend._slots.dtype).fill_(7.0)


def test_a_span_evicted_for_a_loan_between_match_and_hold_is_computed_again(asked_twice, run_jobs) -> None:
    engine, job, want = asked_twice
    lent = []

    def lend() -> None:
        lent.extend(engine.vault.take_for_loan(engine.vault.num_slots))
        overwrite(engine, lent)
        for slot in lent[4:]:                              # enough comes back to compute with
            engine.vault.give_back(slot)
    after_a_hit(engine, lend)
    got = run_jobs(engine, job)
    assert lent, "nothing was lent in between"
    assert got.tokens["b"] == want
    assert not engine.vault.check()


def test_a_span_handed_to_a_peer_between_match_and_hold_is_not_read(asked_twice, run_jobs) -> None:
    engine, job, want = asked_twice
    handed = []

    def hand_over() -> None:
        for span in list(engine.vault._idle.values()):
            if len(span.keys) == 8 and engine.vault.lend_idle(span.keys[-1]) is not None:
                handed.append(span.slot)
        overwrite(engine, handed)                          # that loan has ended long since, and the next one writes
    after_a_hit(engine, hand_over)
    got = run_jobs(engine, job)
    assert handed, "nothing was handed over"
    assert got.tokens["b"] == want
    assert not engine.vault.check()


def test_blocks_being_copied_stay_put(asked_twice, run_jobs) -> None:
    engine, job, want = asked_twice
    real, copied = engine.backend.copy_tokens, []

    def raced(source, target, start, stop):
        copied.append(source)
        overwrite(engine, engine.vault.take_for_loan(engine.vault.num_slots))
        real(source, target, start, stop)
    engine.backend.copy_tokens = raced
    got = run_jobs(engine, job)
    assert copied, "nothing was copied"
    assert got.tokens["b"] == want


def test_a_slot_lent_while_the_engine_takes_its_own_costs_no_job(alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(300), max_tokens=4, ignore_eos=True)
    want = run_jobs(alone(), job)
    engine = alone(device_blocks=24)
    engine.vault.lend_cap = 1
    real, lent = engine.vault.new_spans, []

    def new_spans(number, owner):
        if not lent:                                       # after the scheduler has counted what is free
            lent.extend(engine.vault.take_for_loan(1))
        return real(number, owner)
    engine.vault.new_spans = new_spans

    def give_back() -> None:
        if engine.counters.steps and engine.vault.counts().lent:
            engine.vault.give_back(lent[0])
    got = run_jobs(engine, job, each_step=give_back)
    assert lent and not got.errors
    assert got.tokens == want.tokens


def test_hold_refuses_what_is_not_the_vaults_any_more() -> None:
    vault = Vault(2, blocks_per_span=2, lend_cap=2)
    (span,) = vault.new_spans(1)
    vault.index.publish(span, b"k" * 32, b"1", b"r")
    vault.release(span)
    assert vault.hold(span)
    vault.release(span)
    vault.take_for_loan(2)
    assert not vault.hold(span)
    assert span.refs == 0 and not vault.check()
