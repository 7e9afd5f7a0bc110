"""What /metrics says: the census, the gateway's own counters, the page made from the table, and promtool's opinion."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvbank.cluster.census import Census
from kvbank.cluster.families import ALL, BEGIN, COUNTER, MAX_TENANTS, OTHER, Names, page
from kvbank.cluster.meters import NOTES, Meters
from kvbank.kvstore.logged_errors import OF_THIS_PROCESS

ROOT = Path(__file__).resolve().parent.parent.parent


def worker(name: str = "worker-0", **more: Any) -> dict[str, Any]:
    return {"id": name, "kind": "model", "state": "ok", "blocks_total": 48, "blocks_free": 40, "blocks_used": 5,
            "blocks_lent": 3, "blocks_borrowed": 2, "tiers": [], "counters": {}, **more}


def tier(name: str = "redis", state: str = "ok", **counters: int) -> dict[str, Any]:
    return {"name": name, "bytes_used": 10, "bytes_limit": 100, "frames": 1, "state": state, "counters": counters}


def told(*workers: dict[str, Any], loans: tuple[dict[str, Any], ...] = ()) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of the family) -> value, as a scrape of such members shows it."""
    registry, census = CollectorRegistry(), Census({"model": 1})
    registry.register(census)
    census.told = {"workers": list(workers), "loans": list(loans)}
    return samples(generate_latest(registry).decode())


def samples(text: str) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            order = ALL[sample.name if sample.name in ALL else sample.name.rpartition("_")[0]].labels
            found[(sample.name, *(sample.labels[label] for label in (*order, "le") if label in sample.labels))] = sample.value
    return found


def test_counters_of_members_are_counters_with_their_names_and_reasons() -> None:
    page_of = told(worker(counters={"steps": 7.0, "ledger_revoked_term": 2.0, "book_refused_CAP": 3.0, "book_lost_term": 4.0,
                                    "attend_bytes_sent": 100.0, "jobs_running": 1.0, "forward_s": 0.5}))
    assert page_of["kvbank_member_steps_total", "worker-0"] == 7
    assert page_of["kvbank_member_forward_seconds_total", "worker-0"] == 0.5
    assert page_of["kvbank_loan_spans_ended_total", "worker-0", "term"] == 2
    assert page_of["kvbank_loans_denied_total", "worker-0", "cap"] == 3
    assert page_of["kvbank_borrowed_spans_lost_total", "worker-0", "term"] == 4
    assert page_of["kvbank_attend_bytes_total", "worker-0", "sent"] == 100
    assert page_of["kvbank_member_jobs", "worker-0", "running"] == 1
    assert page_of["kvbank_member_blocks", "worker-0", "lent"] == 3
    assert page_of["kvbank_members_expected", "model"] == 1


def test_a_counter_without_a_family_is_told_all_the_same() -> None:
    page_of = told(worker(counters={"brand_new": 5.0}, tiers=[tier(connects=9)]))
    assert page_of["kvbank_member_events_total", "worker-0", "brand_new"] == 5
    assert page_of["kvbank_tier_events_total", "worker-0", "redis", "connects"] == 9


def test_errors_that_were_survived_are_told_of_members_and_of_the_gateway(monkeypatch) -> None:
    monkeypatch.setattr(OF_THIS_PROCESS, "count", 7)
    page_of = told(worker(counters={"logged_errors": 3.0}))
    assert page_of["kvbank_logged_errors_total", "gateway"] == 7
    assert page_of["kvbank_logged_errors_total", "worker-0"] == 3


def test_what_has_not_happened_yet_is_0_but_a_silent_member_tells_nothing() -> None:
    """Prometheus sees no increase in a series born with its first event, and a new life in a counter that falls to 0."""
    assert told(worker(tiers=[tier()]))["kvbank_borrowed_spans_lost_total", "worker-0", "gone"] == 0
    assert told(worker(tiers=[tier()]))["kvbank_tier_faults_total", "worker-0", "redis", "timeout"] == 0
    assert not [key for key in told(worker(state="silent")) if key[0] == "kvbank_borrowed_spans_lost_total"]
    every = {said for family in ALL.values() for said, _ in family.told}
    stars = tuple(said[:-1] for said in every if said.endswith("*") and said != "*")
    for names in BEGIN.values():
        assert all(said in every or said.startswith(stars) for said in names), "it would end among the rest"


def test_a_tier_tells_its_breaker_its_ratio_and_the_time_it_took() -> None:
    page_of = told(worker(tiers=[tier(state="open", lookups=8, found=6, reads=4, read_us=2_000_000, refused_oom=1, timeouts=2)]))
    place = ("worker-0", "redis")
    assert page_of["kvbank_tier_hits_total", *place] / page_of["kvbank_tier_lookups_total", *place] == 0.75
    assert [page_of["kvbank_tier_breaker", *place, state] for state in ("ok", "half_open", "open", "off")] == [0, 0, 1, 0]
    assert page_of["kvbank_tier_read_seconds_count", *place] == 4
    assert page_of["kvbank_tier_read_seconds_sum", *place] == 2.0
    assert page_of["kvbank_tier_refused_total", *place, "oom"] == 1
    assert page_of["kvbank_tier_faults_total", *place, "timeout"] == 2


def test_members_that_are_silent_are_shown_and_those_that_left_are_not() -> None:
    loan = {"lender": "worker-1"}
    page_of = told(worker(), worker("worker-1", state="silent"), loans=(loan, loan))
    assert page_of["kvbank_member_up", "worker-0", "model"] == 1 and page_of["kvbank_member_up", "worker-1", "model"] == 0
    assert page_of["kvbank_members", "model", "silent"] == 1
    assert page_of["kvbank_member_loans", "worker-1"] == 2 and page_of["kvbank_member_loans", "worker-0"] == 0
    assert ("kvbank_member_up", "worker-1", "model") not in told(worker())


def test_the_first_tenants_keep_their_name_and_later_ones_share_one() -> None:
    name = Names()
    first = [name(f"tenant-{n}") for n in range(MAX_TENANTS)]
    assert first == [f"tenant-{n}" for n in range(MAX_TENANTS)]
    assert name("one too many") == OTHER and name("tenant-0") == "tenant-0"


def test_a_scrape_costs_no_more_however_many_tenants_there_are() -> None:
    meters = Meters(model="m")
    for n in range(10 * MAX_TENANTS):
        meters.admitted(f"tenant-{n}")
    found = samples(meters.page().decode())
    series = {key: value for key, value in found.items() if key[0] == "kvbank_jobs_admitted_total"}
    assert len(series) == MAX_TENANTS + 1 and series["kvbank_jobs_admitted_total", "m", OTHER] == 9 * MAX_TENANTS


def test_refusals_and_times_between_tokens_are_counted_at_the_gateway(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address
    httpx.post(f"{address}/v1/completions", json={"prompt": "abc", "max_tokens": 5})
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "abc", "max_tokens": -1}).status_code == 400
    assert httpx.get(f"{address}/nowhere").status_code == 404
    found = samples(httpx.get(f"{address}/metrics").text)
    assert found["kvbank_requests_refused_total", "invalid_request"] == 1
    assert found["kvbank_requests_refused_total", "not_found"] == 1
    # Tokens may arrive together; all but those of the first arrival have a time since the one before.
    assert 0 <= found["kvbank_inter_token_seconds_count", ""] <= 4
    assert found["kvbank_output_tokens_total", "", "default"] == 5


def test_tokens_that_are_only_noted_are_never_many_and_all_on_the_page() -> None:
    meters, job = Meters(model="m"), SimpleNamespace(spec=SimpleNamespace(tenant="t"), started_at=1.0, first_token_at=2.0)
    for n in range(10 * NOTES):
        job.last_token_at = 2.0 + n
        meters.tokens(job, 3, before=job.last_token_at - 0.3 if n else 0.0)
        assert len(meters._notes) <= NOTES / 3
    found = samples(meters.page().decode())
    assert found["kvbank_output_tokens_total", "m", "t"] == 30 * NOTES and found["kvbank_ttft_seconds_sum", "m"] == 1.0
    assert found["kvbank_inter_token_seconds_count", "m"] == 30 * NOTES - 3
    assert found["kvbank_inter_token_seconds_sum", "m"] == pytest.approx(0.3 * (10 * NOTES - 1))


def test_tokens_of_a_running_job_are_on_the_page_and_those_of_a_resumed_one_counted_once(make_worker, make_server, until) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.hang_at = 3
    server = make_server(first, limits={"silence_s": 60.0})
    httpx.post(f"{server.address}/v1/jobs", json={"prompt": "abc", "max_tokens": 8})

    def found() -> dict[tuple[str, ...], float]:
        return samples(httpx.get(f"{server.address}/metrics").text)

    until(lambda: found().get(("kvbank_output_tokens_total", "", "default")) == 3)
    assert set(server.gateway._dispatch._pending.values()) == {0}, "its prompt is no work that waits there any more"
    server.roster.alive = [second.view()]
    first.kill()
    until(lambda: found().get(("kvbank_jobs_ended_total", "", "default", "length")) == 1)
    assert found()["kvbank_output_tokens_total", "", "default"] == 8 and found()["kvbank_ttft_seconds_count", ""] == 1
    assert found()["kvbank_inter_token_seconds_count", ""] >= 1
    assert found()["kvbank_inter_token_seconds_sum", ""] > 0


def test_names_follow_the_conventions_and_are_listed_once() -> None:
    for name, family in ALL.items():
        assert name.startswith("kvbank_") and family.about and not family.about.endswith(".")
        assert name.endswith("_total") == (family.kind == COUNTER), name
    assert len(ALL) == page().count("| `kvbank_")


def test_the_page_of_metrics_is_what_the_table_says() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == page(), "run: python -m kvbank.cluster.families > docs/metrics.md"


def test_promtool_has_nothing_to_say_against_a_page_with_every_kind_of_metric() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")
    meters = Meters(model="m", jobs_limit=9, expected={"model": 1})
    meters.refused("overloaded")
    meters.observe(live=1, waiting=0, status={"loans": [], "workers": [
        worker(counters={said: 1.0 for f in ALL.values() for said, _ in f.told if "*" not in said},
               tiers=[tier(**{said: 1 for f in ALL.values() for said, _ in f.told if "*" not in said})])]})
    checked = subprocess.run([promtool, "check", "metrics"], input=meters.page(), capture_output=True,
                             timeout=30)
    assert checked.returncode == 0 and not checked.stdout + checked.stderr, (checked.stdout + checked.stderr).decode()
