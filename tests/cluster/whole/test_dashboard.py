"""The dashboard over a real cluster: live loans, a killed worker, actions that members really carry out."""

from __future__ import annotations

import json
import os
import signal
import time

import httpx
import pytest

from kvbank.cluster.client import Client


def live(page) -> None:
    page.wait_for_selector("#link[data-state=live]")
    page.wait_for_selector("main .page")


def act(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name=name).click()


@pytest.mark.slow
def test_loans_jobs_and_a_killed_worker_are_seen_live(cluster, text, open_page) -> None:
    town = cluster(workers=2, lenders=1, device_blocks=48, lender_blocks=96)
    page = open_page(town.address)
    live(page)
    page.wait_for_function("() => [...kvbank.cluster.workers.values()].filter((w) => w.state === 'ok').length === 3")
    with Client(town.address) as client:
        job = client.submit(text(1200), max_tokens=300, ignore_eos=True, job_id="long-one")
        page.wait_for_function("() => kvbank.cluster.loans.size > 0")
        page.wait_for_selector("svg.flow .ribbon", state="attached")
        page.picture("dashboard-overview")
        page.get_by_role("link", name="long-one").first.click()
        page.wait_for_selector(".timeline .phase-decode", state="attached")
        page.wait_for_selector(".timeline rect.borrowed", state="attached")
        worker = page.evaluate("() => [...kvbank.cluster.jobs.values()].find((j) => j.name === 'long-one').worker")
        killed_at = time.monotonic()
        os.kill(town.processes[worker], signal.SIGKILL)
        page.wait_for_function("""(id) => kvbank.cluster.workers.get(id)?.state !== 'ok'
            || kvbank.cluster.events.some((e) => e.kind === 'member' && e.member === id && e.level !== 'info')""", arg=worker)
        print(f"\nthe page knew of the killed worker after {time.monotonic() - killed_at:.1f} s")
        result = job.result(timeout_s=120)
        assert len(result.token_ids) == 300 and result.receipt.attempts == 2
        page.wait_for_selector("text=attempt 2", state="attached")
        page.wait_for_selector(".timeline .lost", state="attached")
        page.wait_for_selector(".facts >> text=Blocks borrowed, at most")
        page.picture("dashboard-job")
        page.get_by_role("link", name="Events").click()
        page.wait_for_selector("text=lost attempt 1 on")
    assert page.faults == []


@pytest.mark.slow
def test_members_do_what_the_page_asks(cluster, text, until, open_page) -> None:
    town = cluster(workers=1, lenders=2, device_blocks=48, lender_blocks=48, host_bytes="16MiB")
    page = open_page(town.address, at="#/member/lender-0")
    live(page)
    with Client(town.address) as client:
        want = client.generate(text(400, 2), max_tokens=4, ignore_eos=True)
        assert want.receipt.computed_tokens > 390
        again = client.generate(text(400, 2), max_tokens=4, ignore_eos=True)
        assert again.receipt.reused["device"] > 300

        page.goto(f"{town.address}/dashboard#/member/worker-0")
        page.wait_for_function("() => kvbank.cluster.workers.get('worker-0')?.idle > 0")
        act(page, "Clear caches")
        page.wait_for_function("() => kvbank.cluster.workers.get('worker-0').idle === 0")
        cold = client.generate(text(400, 2), max_tokens=4, ignore_eos=True)
        assert cold.token_ids == want.token_ids and "device" not in cold.receipt.reused

        job = client.submit(text(1000, 3), max_tokens=900, ignore_eos=True)
        page.wait_for_function("() => kvbank.cluster.loans.size > 0")
        lender = page.evaluate("() => [...kvbank.cluster.loans.values()][0].lender")
        page.goto(f"{town.address}/dashboard#/member/{lender}")
        act(page, "Recall loans")
        page.wait_for_selector("#polite >> text=lent blocks called back")
        page.wait_for_function("(id) => kvbank.cluster.workers.get(id).recalls > 0", arg=lender)
        act(page, "Drain")
        page.wait_for_selector(".title .chip[data-state=draining]")
        page.wait_for_function("(id) => kvbank.cluster.workers.get(id).lent === 0", arg=lender)
        job.cancel()

        page.goto(f"{town.address}/dashboard#/member/worker-0")
        act(page, "Drain")
        page.wait_for_selector(".title .chip[data-state=draining]")
        waits = client.submit([1, 2, 3], max_tokens=2)
        refused = until(lambda: waits.status().state == "failed", 60)
        assert refused, "the only worker drains: the job is told so"
        assert until(lambda: httpx.get(f"{town.address}/health").status_code == 503, 10), "and a load balancer, too"
        act(page, "End drain")
        page.wait_for_selector(".title .chip[data-state=ok]")
        assert until(lambda: httpx.get(f"{town.address}/health").status_code == 200, 10)
        assert len(client.generate([1, 2, 3], max_tokens=2, ignore_eos=True).token_ids) == 2
    page.goto(f"{town.address}/dashboard#/events")
    page.wait_for_selector("tbody >> text=undrain")
    assert page.locator("tbody tr").count() == 5 and page.faults == []


@pytest.mark.slow
def test_caches_of_a_sharded_replica_are_cleared_by_its_leader(cluster, text, until) -> None:
    town = cluster(workers=1, lenders=0, shards=2, device_blocks=96)
    session = httpx.get(f"{town.address}/v1/ops/session").json()

    def clear(member: str) -> httpx.Response:
        return httpx.post(f"{town.address}/v1/ops/members/{member}/clear", headers={"x-kvbank-csrf": session["csrf"]})

    with Client(town.address) as client:
        want = client.generate(text(500, 4), max_tokens=8, ignore_eos=True)
        assert client.generate(text(500, 4), max_tokens=8, ignore_eos=True).receipt.reused["device"] > 300
        until(lambda: not any(w.blocks_used for w in client.status().workers))
        refused = clear("worker-0.1")
        assert refused.status_code == 400 and "leading shard" in refused.json()["error"]["message"]
        done = clear("worker-0")
        assert done.status_code == 200 and not done.json()["outcome"].startswith("0 idle")
        cold = client.generate(text(500, 4), max_tokens=8, ignore_eos=True)
        assert cold.token_ids == want.token_ids and "device" not in cold.receipt.reused
        warm = client.generate(text(500, 4), max_tokens=8, ignore_eos=True)
        assert warm.token_ids == want.token_ids and warm.receipt.reused["device"] > 300


def test_a_pinned_prompt_outlasts_what_drives_out_another(cluster, text, until) -> None:
    """Twelve slots: two prompts of three, and others that need nine at once."""
    town = cluster(workers=1, lenders=0, device_blocks=96)
    session = httpx.get(f"{town.address}/v1/ops/session").json()

    def wire_of(job: str) -> str:
        with httpx.stream("GET", f"{town.address}/v1/ops/feed") as answer:
            data = next(line for line in answer.iter_lines() if line.startswith("data: "))
        return next(row["id"] for row in json.loads(data.removeprefix("data: "))["jobs"] if row["name"] == job)

    def pin(job: str, term_s: int) -> str:
        done = httpx.post(f"{town.address}/v1/ops/jobs/{wire_of(job)}/pin", params={"term_s": term_s},
                          headers={"x-kvbank-csrf": session["csrf"]})
        assert done.status_code == 200, done.text
        return done.json()["outcome"]

    def reused(client: Client, prompt: list[int]) -> int:
        return client.generate(prompt, max_tokens=4, ignore_eos=True).receipt.reused.get("device", 0)

    pinned, other = text(380, 5), text(380, 6)
    with Client(town.address) as client:
        want = client.generate(pinned, max_tokens=4, ignore_eos=True, job_id="pinned").token_ids
        client.generate(other, max_tokens=4, ignore_eos=True)
        assert pin("pinned", 3600) == "23 blocks pinned for 3600 s"
        until(lambda: [worker.counters["blocks_pinned"] for worker in client.status().workers] == [24])
        client.generate(text(1100, 7), max_tokens=4, ignore_eos=True)
        again = client.generate(pinned, max_tokens=4, ignore_eos=True)
        assert again.token_ids == want and again.receipt.reused["device"] == 368
        assert reused(client, other) == 0, "younger, and gone"
        assert len(client.generate(text(1500, 8), max_tokens=4, ignore_eos=True).token_ids) == 4, "a job that needs all gets all"
        assert reused(client, pinned) == 0
        assert pin("pinned", 0) == "0 blocks unpinned"
