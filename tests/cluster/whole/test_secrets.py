"""What must never be written anywhere is planted in a real cluster that is given errors, and looked for everywhere.

Planted: a prompt (as text and as ids), a caller's own job id, API keys (a right and a wrong one), the cluster's token, the
cache secret and Redis' password. Searched: every log at the level debug, traces, /metrics, and what errors answer.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis

KEY, OPS_KEY, WRONG_KEY = "planted-user-key-5561", "planted-ops-key-7713", "planted-wrong-key-9021"
SECRET = "c0ffee" * 10 + "5eed"
TEXT = "plantedprompttext"
IDS = [411, 422, 433, 444, 455, 466, 477, 488]
JOB_ID = "planted-job-id-3307"


def found(text: str, planted: dict[str, str]) -> list[str]:
    return [name for name, pattern in planted.items() if re.search(pattern, text)]


def bad_requests(address: str) -> list[str]:
    """What errors answer to requests that are wrong in many ways and full of what must not come back."""
    mine, ops = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {OPS_KEY}"}
    asked = [
        ("POST", "/v1/completions", {"prompt": TEXT, "max_tokens": -1}, mine),
        ("POST", "/v1/completions", {"prompt": [*IDS, 99_999], "max_tokens": 4}, mine),
        ("POST", "/v1/completions", {"prompt": {"text": TEXT}, "max_tokens": 4}, mine),
        ("POST", "/v1/completions", {"prompt": [[TEXT], 1], "max_tokens": 4}, mine),
        ("POST", "/v1/completions", {"prompt": IDS * 100_000, "max_tokens": 4}, mine),
        ("POST", "/v1/jobs", {"prompt": TEXT, "max_tokens": 4, "stop": [[TEXT]]}, mine),
        ("POST", "/v1/jobs", {"prompt": TEXT}, {"Authorization": f"Bearer {WRONG_KEY}"}),
        ("POST", "/v1/jobs", {"prompt": TEXT}, {"Authorization": WRONG_KEY}),
        ("GET", f"/v1/jobs/{JOB_ID}-not-there", None, mine),
        ("GET", "/metrics", None, mine),
        ("PUT", f"/v1/{TEXT}", {"prompt": TEXT}, ops),
    ]
    told = []
    for method, path, body, headers in asked:
        answer = httpx.request(method, f"{address}{path}", json=body, headers=headers, timeout=60)
        assert answer.status_code >= 400, (method, path)
        told.append(answer.text)
    broken = httpx.post(f"{address}/v1/jobs", content=f'{{"prompt": "{TEXT}", '.encode(), headers=mine)
    assert broken.status_code == 400
    return [*told, broken.text]


@pytest.mark.slow
def test_nothing_secret_is_in_logs_metrics_traces_and_errors_of_a_cluster_in_trouble(cluster, until, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra trace")
    logs, spans = tmp_path / "logs", tmp_path / "spans"
    with EmbeddedRedis(64 << 20) as redis:
        password = urlsplit(redis.url).password or ""
        assert len(password) > 8, "the embedded Redis has a password of its own"
        one = cluster(
            workers=1, lenders=2, lender_blocks=160, prefill_chunk_tokens=32, redis=redis.url, host_bytes=1 << 20,
            api_keys={KEY: "tenant-a", OPS_KEY: "operator:ops"}, cache_secret=SECRET, level="debug", format="json",
            log_dir=str(logs), exporter="file", trace_dir=str(spans))
        planted = {
            "prompt": TEXT, "ids": r"411\W{1,2}422\W{1,2}433", "ids as bytes": re.escape(r"\x9b\x01\x00\x00\xa6\x01"),
            "job id": JOB_ID, "key": KEY, "ops key": OPS_KEY, "wrong key": WRONG_KEY, "token": one.token, "secret": SECRET,
            "password": re.escape(password)}
        mine = {"Authorization": f"Bearer {KEY}"}
        errors = bad_requests(one.address)

        def job(name: str, tokens: int) -> None:
            asked = {"prompt": IDS * 200, "max_tokens": tokens, "ignore_eos": True, "job_id": name}
            httpx.post(f"{one.address}/v1/jobs", json=asked, headers=mine, timeout=60).raise_for_status()

        def state(name: str) -> str:
            body = httpx.get(f"{one.address}/v1/jobs/{name}", headers=mine, timeout=60).json()
            over = body["state"] in ("finished", "failed", "cancelled")
            return "done" if over else "decode" if body["output_tokens"] > 2 else "prefill"

        def redis_is_missed() -> bool:
            asked = {"prompt": TEXT * 20, "max_tokens": 4}
            httpx.post(f"{one.address}/v1/completions", json=asked, headers=mine, timeout=60).raise_for_status()
            return '"event": "redis_not_answering"' in (logs / "worker-0.log").read_text(errors="replace")

        assert not redis_is_missed()
        os.kill(redis.pid, signal.SIGKILL)
        until(redis_is_missed, 60)
        job(JOB_ID, 600)                                       # loses a lender and its worker, one after the other
        until(lambda: httpx.get(f"{one.address}/v1/status", headers=mine, timeout=60).json()["loans"], 60)
        os.kill(one.processes["lender-0"], signal.SIGKILL)
        until(lambda: state(JOB_ID) == "decode", 120)
        os.kill(one.processes["worker-0"], signal.SIGKILL)
        until(lambda: state(JOB_ID) == "done", 200)
        errors += bad_requests(one.address)
        scrape = httpx.get(f"{one.address}/metrics", headers={"Authorization": f"Bearer {OPS_KEY}"}, timeout=60)
        assert scrape.status_code == 200 and "tenant-a" in scrape.text
        until(lambda: list(spans.glob("worker-0.jsonl")), 20)
        one.stop()

    read = {path.name: path.read_text(errors="replace") for path in [*logs.iterdir(), *spans.iterdir()]}
    assert {"gateway.log", "worker-0.log", "lender-0.log", "control.log", "gateway.jsonl", "worker-0.jsonl"} <= set(read)
    assert '"event": "job_attempt_lost"' in read["gateway.log"] and '"event": "redis_not_answering"' in read["worker-0.log"]
    leaks = {name: found(text, planted) for name, text in {**read, "/metrics": scrape.text}.items()}
    assert {name: what for name, what in leaks.items() if what} == {}
    assert [said for said in errors if found(said, planted)] == []
    assert found(f"{TEXT} {KEY} [411, 422, 433] {SECRET} {JOB_ID}", planted) == ["prompt", "ids", "job id", "key", "secret"]
