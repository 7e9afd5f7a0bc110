"""The breaker's story, told with a clock in the hand."""

from __future__ import annotations

import random

from kvbank.kvstore.tiers.breaker import CircuitBreaker


def test_five_refusals_in_a_row_open_it_and_one_answered_probe_closes_it() -> None:
    breaker = CircuitBreaker()
    for _ in range(4):
        breaker.failed(now=0.0, silent=False)
    assert breaker.allows and breaker.state == "ok", "a refused connection costs nothing, so requests go on"
    breaker.failed(now=0.0, silent=False)
    assert not breaker.allows and breaker.state == "open" and breaker.wake_at() == 1.0
    assert not breaker.take_probe(now=0.9)
    assert breaker.take_probe(now=1.0) and breaker.state == "half_open" and not breaker.allows
    assert not breaker.take_probe(now=5.0), "one probe at a time"
    breaker.probed(False, now=1.1)
    assert breaker.state == "open" and breaker.wake_at() == 2.1
    assert breaker.take_probe(now=2.1)
    breaker.probed(True, now=2.2)
    assert breaker.allows and breaker.wake_at() == float("inf") and breaker.times_opened == 1
    for _ in range(4):
        breaker.failed(now=3.0, silent=False)
    assert breaker.allows, "it starts with a clean record"


def test_one_silence_stops_requests_until_a_probe_knows_more() -> None:
    breaker = CircuitBreaker()
    breaker.failed(now=7.0, silent=True)
    assert breaker.state == "half_open" and not breaker.allows and breaker.wake_at() == 7.0
    assert breaker.take_probe(now=7.0)
    breaker.probed(True, now=7.01)
    assert breaker.allows and breaker.times_opened == 0, "it was an accident"


def test_silence_that_goes_on_opens_it_after_five_looks_in_quick_succession() -> None:
    breaker = CircuitBreaker()
    breaker.failed(now=0.0, silent=True)
    for look in range(4):
        assert breaker.take_probe(now=0.05 * look)
        breaker.probed(False, now=0.05 * (look + 1))
    assert breaker.state == "open" and breaker.wake_at() == 0.2 + 1.0 and breaker.times_opened == 1


def test_more_than_half_of_the_last_twenty_open_it() -> None:
    breaker = CircuitBreaker()
    for _ in range(10):
        breaker.failed(now=0.0, silent=False)
        breaker.succeeded()
    assert breaker.allows, "half is not more than half"
    for _ in range(3):
        breaker.failed(now=0.0, silent=False)
        breaker.failed(now=0.0, silent=False)
        breaker.succeeded()
    assert not breaker.allows and breaker.state == "open"


def test_a_server_that_answers_probes_and_drips_values_is_given_up_too() -> None:
    """A probe after one silence leaves the record of requests as it is, or five slow values would never be in a row."""
    breaker = CircuitBreaker()
    for _ in range(4):
        breaker.failed(now=0.0, silent=True)
        assert breaker.take_probe(now=0.0)
        breaker.probed(True, now=0.0)
        assert breaker.allows
    breaker.failed(now=0.0, silent=True)
    assert breaker.state == "open"


def test_late_answers_and_late_failures_change_nothing_while_it_is_open() -> None:
    breaker = CircuitBreaker()
    breaker.trip(now=0.0)
    breaker.succeeded()
    breaker.failed(now=0.5, silent=True)
    assert breaker.state == "open" and breaker.wake_at() == 1.0 and breaker.times_opened == 1


def test_in_any_history_an_open_breaker_is_probed_within_a_second_and_closes_on_the_first_answer() -> None:
    rng, breaker, now = random.Random(0), CircuitBreaker(), 0.0
    for _ in range(20_000):
        now += rng.random() * 0.3
        assert breaker.allows == (breaker.state == "ok")
        if breaker.allows:
            assert breaker.wake_at() == float("inf")
            if rng.random() < 0.5:
                breaker.succeeded()
            else:
                breaker.failed(now=now, silent=rng.random() < 0.3)
        else:
            assert breaker.wake_at() <= now + 1.0
            if breaker.take_probe(now=now):
                answered = rng.random() < 0.3
                breaker.probed(answered, now=now)
                assert breaker.allows == answered
