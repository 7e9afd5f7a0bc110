"""/metrics of a real cluster: what a job did is in it, and promtool finds nothing wrong with it."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvbank.cluster.client import Client
from kvbank.cluster.families import ALL


def values(page: str) -> dict[str, float]:
    """Sums over all labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_a_scrape_tells_what_borrowing_spilling_and_reuse_did(cluster, text, until) -> None:
    one = cluster(workers=1, lenders=1, redis="embedded", host_bytes=32 << 20)
    with Client(one.address) as client:
        for _ in range(2):
            client.generate(text(1000), max_tokens=6)            # a worker holds 768: it borrows
    page = until(lambda: (said := httpx.get(f"{one.address}/metrics").text) and "kvbank_jobs_ended_total" in said and said)
    found = values(page)
    assert found["kvbank_jobs_ended_total"] == 2 and found["kvbank_output_tokens_total"] == 12
    assert found["kvbank_prompt_tokens_total"] == 2000
    assert found["kvbank_computed_tokens_total"] + found["kvbank_reused_tokens_total"] >= 2000
    assert found["kvbank_reused_tokens_total"] > 0
    assert found["kvbank_loans_granted_total"] == found["kvbank_loans_opened_total"] >= 1
    assert found["kvbank_member_steps_total"] > 0 and found["kvbank_member_forward_rows_total"] >= 1000
    assert found["kvbank_attend_calls_total"] > 0 and found["kvbank_attend_served_total"] > 0
    assert found["kvbank_members"] == found["kvbank_members_expected"] == found["kvbank_member_up"] == 2
    assert "kvbank_member_events_total" not in found, "a counter of a member has no family yet"
    unknown = {name for name in found if name not in ALL} - {
        f"{name}{end}" for name in ALL for end in ("_bucket", "_count", "_sum")}
    assert unknown == set()
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")
    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0 and not checked.stdout + checked.stderr, checked.stdout + checked.stderr
