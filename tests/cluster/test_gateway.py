"""Jobs over real gRPC and real HTTP, with workers that die, hang, repeat themselves and refuse."""

from __future__ import annotations

import subprocess
import sys
import threading

import httpx
import pytest

PROMPT = [1, 2, 3]


def finished(address: str, job_id: str) -> dict:
    return httpx.get(f"{address}/v1/jobs/{job_id}", params={"wait_s": 20}, timeout=30).json()


def run(address: str, **body: object) -> dict:
    made = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 8, **body})
    assert made.status_code == 202, made.text
    return finished(address, made.json()["id"])


def test_a_job_runs_on_a_worker_and_brings_its_receipt(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    job = run(make_server(worker).address)
    assert job["state"] == "finished"
    assert job["result"]["token_ids"] == answer_of(PROMPT, 8)
    assert job["result"]["text"] == bytes(answer_of(PROMPT, 8)).decode()
    assert job["result"]["finish_reason"] == "length"
    assert job["receipt"]["computed_tokens"] == 2 and job["receipt"]["reused"] == {"device": 1}
    assert 0 < job["receipt"]["ttft_s"] <= job["receipt"]["total_s"]


def test_a_worker_killed_mid_stream_costs_no_token_and_repeats_none(make_worker, make_server, answer_of, until):
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.token_s = 0.05
    server = make_server(first, second, choose=lambda workers, held, tokens: workers[0].id)
    job_id = httpx.post(f"{server.address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 20}).json()["id"]
    seen: list[int] = []
    with httpx.stream("GET", f"{server.address}/v1/jobs/{job_id}/stream", timeout=30) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and '"token_ids":[' in line and '"index"' in line:
                seen += httpx.Response(200, text=line[5:]).json()["token_ids"]
                if len(seen) == 5:
                    server.roster.alive = [second.view()]
                    first.kill()
    assert seen == answer_of(PROMPT, 20)
    job = finished(server.address, job_id)
    assert job["result"]["token_ids"] == seen
    assert job["attempt"] == 2 and job["worker"] == "worker-1"
    assert second.seen[0].attempt == 2 and len(second.seen[0].emitted) >= 20
    assert second.seen[0].sampling.seed == first.seen[0].sampling.seed
    assert job["receipt"]["recomputed_after_fault"] > 0


def test_a_worker_that_falls_silent_loses_the_job_to_another(make_worker, make_server, answer_of) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.hang_at = 3
    server = make_server(first, second, limits={"silence_s": 0.3},
                         choose=lambda workers, held, tokens: workers[0].id)
    job = run(server.address)
    assert job["result"]["token_ids"] == answer_of(PROMPT, 8)
    assert job["attempt"] == 2 and job["worker"] == "worker-1"


def test_a_job_between_two_workers_says_that_it_waits_and_has_nothing(make_worker, make_server, answer_of, until) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.hang_at = 3
    server = make_server(first, limits={"silence_s": 30.0, "no_worker_s": 60.0})
    job_id = httpx.post(f"{server.address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 8}).json()["id"]
    told = until(lambda: (now := finished_now(server.address, job_id))["output_tokens"] == 3 and now)
    assert told["progress"] == {"state": "decode", "computed": len(PROMPT), "total": len(PROMPT), "waits_for": ""}
    server.roster.alive = []
    first.kill()
    told = until(lambda: (now := finished_now(server.address, job_id))["progress"]["state"] != "decode" and now)
    assert told["progress"] == {"state": "queued", "computed": 0, "total": len(PROMPT), "waits_for": "worker"}
    server.roster.alive = [second.view()]
    assert finished(server.address, job_id)["result"]["token_ids"] == answer_of(PROMPT, 8)


def test_the_only_worker_gets_the_job_again_when_its_stream_broke(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    worker.die_at = 4
    job = run(make_server(worker).address)
    assert job["result"]["token_ids"] == answer_of(PROMPT, 8) and job["attempt"] == 2


def test_a_stream_that_repeats_tokens_adds_none(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    worker.repeat = True
    assert run(make_server(worker).address)["result"]["token_ids"] == answer_of(PROMPT, 8)


def test_without_any_worker_a_job_ends_as_unavailable(make_server) -> None:
    job = run(make_server(limits={"no_worker_s": 0.2}).address)
    assert job["state"] == "failed" and job["error"]["code"] == "unavailable"


def test_a_job_waits_for_a_worker_that_comes_late(make_worker, make_server, answer_of) -> None:
    server = make_server(limits={"no_worker_s": 10})
    job_id = httpx.post(f"{server.address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 3}).json()["id"]
    assert finished_now(server.address, job_id)["state"] == "queued"
    server.roster.alive = [make_worker("worker-0").view()]
    assert finished(server.address, job_id)["result"]["token_ids"] == answer_of(PROMPT, 3)


def finished_now(address: str, job_id: str) -> dict:
    return httpx.get(f"{address}/v1/jobs/{job_id}").json()


def test_a_job_that_kills_every_worker_it_meets_is_given_up(make_worker, make_server) -> None:
    workers = [make_worker(f"worker-{n}") for n in range(3)]
    for worker in workers:
        worker.die_at, worker.die_once = 0, False
    job = run(make_server(*workers, limits={"fruitless": 2}).address)
    assert job["error"]["code"] == "unavailable" and job["receipt"]["attempts"] == 2


def test_a_job_that_kills_workers_before_their_first_word_is_given_up_too(make_worker, make_server) -> None:
    """They start again and say that they are there; the job is what they die of."""
    workers = [make_worker(f"worker-{n}") for n in range(2)]
    for worker in workers:
        worker.die_unheard = 1000
    job = run(make_server(*workers, limits={"fruitless": 3, "no_worker_s": 30.0}).address)
    assert job["error"]["code"] == "unavailable" and "in a row" in job["error"]["message"]
    assert job["receipt"]["attempts"] == 3 == sum(len(worker.seen) for worker in workers)


def test_a_worker_that_died_before_its_first_word_counts_as_an_attempt(make_worker, make_server, answer_of) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.die_unheard = 1
    job = run(make_server(first, second).address)
    assert job["result"]["token_ids"] == answer_of(PROMPT, len(job["result"]["token_ids"])) and job["receipt"]["attempts"] == 2


@pytest.mark.parametrize("code", ["unavailable", "overloaded", "internal"])
def test_a_refusal_that_is_about_the_worker_sends_the_job_elsewhere(make_worker, make_server, answer_of, code) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.failure = (code, "secret words of a worker")
    job = run(make_server(first, second).address)
    assert job["result"]["token_ids"] == answer_of(PROMPT, 8)


@pytest.mark.parametrize(("code", "status"), [("too_long", 400), ("deadline_exceeded", 504), ("overloaded", 429)])
def test_a_refusal_by_all_reaches_the_caller_as_it_is(make_worker, make_server, code, status) -> None:
    worker = make_worker("worker-0")
    worker.failure = (code, "5 is more than 4")
    server = make_server(worker)
    assert run(server.address)["error"]["code"] == code
    answer = httpx.post(f"{server.address}/v1/completions", json={"prompt": PROMPT})
    assert answer.status_code == status and answer.json()["error"]["code"] == code


def test_internal_words_of_a_worker_do_not_reach_the_caller(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.failure = ("internal", "/secret/path 10.0.0.7")
    job = run(make_server(worker).address)
    assert job["error"]["code"] == "internal" and "secret" not in str(job) and "10.0.0.7" not in str(job)


def test_a_job_id_makes_submit_idempotent_and_never_names_two_requests(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker).address
    ids = {run(address, job_id="mine")["id"] for _ in range(3)}
    assert ids == {"mine"} and len(worker.seen) == 1
    other = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 9, "job_id": "mine"})
    assert other.status_code == 400 and other.json()["error"]["code"] == "invalid_request"


def test_the_callers_job_id_never_reaches_a_worker(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    run(make_server(worker).address, job_id="mine")
    assert worker.seen[0].id != "mine" and worker.seen[0].id.startswith("j-")


def test_a_deadline_ends_a_job_with_what_it_has(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    job = run(make_server(worker).address, max_tokens=1000, deadline_s=0.3)
    assert job["error"]["code"] == "deadline_exceeded"
    assert worker.seen[0].deadline_ms <= 300
    until(lambda: worker.cancels == ["deadline"])


def test_a_cancelled_job_tells_its_worker_and_keeps_its_receipt(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    address = make_server(worker).address
    job_id = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 1000}).json()["id"]
    until(lambda: finished_now(address, job_id)["output_tokens"] > 2)
    assert httpx.delete(f"{address}/v1/jobs/{job_id}").status_code == 202
    job = finished(address, job_id)
    assert job["state"] == "cancelled" and job["error"]["code"] == "cancelled"
    assert worker.cancels == ["client"] and job["receipt"]["computed_tokens"] == 2
    assert httpx.delete(f"{address}/v1/jobs/{job_id}").status_code == 202    # harmless when it is over


def test_a_cancel_that_its_worker_ignores_still_ends_the_job(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.hang_at = 1
    worker._listen = lambda requests, cancelled: None
    address = make_server(worker, limits={"silence_s": 30, "grace_s": 0.2}).address
    job_id = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 5}).json()["id"]
    until(lambda: finished_now(address, job_id)["output_tokens"] == 1)
    httpx.delete(f"{address}/v1/jobs/{job_id}")
    assert finished(address, job_id)["state"] == "cancelled"
    until(worker.ended.is_set)


def test_a_stop_string_ends_the_job_and_its_text_is_not_returned(make_worker, make_server, answer_of) -> None:
    text = bytes(answer_of(PROMPT, 3000)).decode()
    job = run(make_server(make_worker("worker-0")).address, max_tokens=3000, stop=["never", text[5:8]])
    assert job["result"]["text"] == text[:5]
    assert job["result"]["finish_reason"] == "stop"
    assert job["result"]["token_ids"] == answer_of(PROMPT, 8)
    assert job["receipt"]["output_tokens"] == 8


def test_the_queue_is_bounded_and_says_when_to_come_back(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    address = make_server(worker, limits={"max_jobs": 2}).address
    codes = [httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 500}) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [202, 202, 429]
    assert codes[2].json()["error"]["code"] == "overloaded" and int(codes[2].headers["retry-after"]) >= 1


def test_jobs_wait_for_a_free_lane_and_all_finish(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    address = make_server(worker, limits={"lanes_per_worker": 2}).address
    ids = [httpx.post(f"{address}/v1/jobs", json={"prompt": [n], "max_tokens": 5}).json()["id"] for n in range(1, 9)]
    answers = [finished(address, job_id)["result"]["token_ids"] for job_id in ids]
    assert answers == [answer_of([n], 5) for n in range(1, 9)]


def test_finished_jobs_are_kept_up_to_a_count(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0"), limits={"retained_jobs": 2}).address
    ids = [run(address)["id"] for _ in range(4)]
    found = [httpx.get(f"{address}/v1/jobs/{job_id}").status_code for job_id in ids]
    assert found == [404, 404, 200, 200]


def test_finished_jobs_are_kept_up_to_an_age(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0"), limits={"retained_s": 0.0}).address
    job = httpx.post(f"{address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 2}).json()
    gone = finished(address, job["id"])
    assert gone.get("state") == "finished" or gone["error"]["code"] == "not_found"
    assert httpx.get(f"{address}/v1/jobs/{job['id']}").status_code == 404


def test_two_jobs_with_one_prefix_meet_on_one_worker(make_worker, make_server, until) -> None:
    workers = [make_worker("worker-0"), make_worker("worker-1")]
    address = make_server(*workers, block_keys=lambda tenant, prompt: prompt[:4] * 8).address
    for prompt in ([5, 1], [5, 2], [5, 3]):
        run(address, prompt=prompt)
    assert sorted(len(worker.seen) for worker in workers) == [0, 3]


def test_eight_streams_survive_one_of_two_workers(make_worker, make_server, answer_of) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    first.token_s = second.token_s = 0.01
    server = make_server(first, second)
    results: dict[int, dict] = {}

    def one(n: int) -> None:
        results[n] = run(server.address, prompt=[n], max_tokens=40, temperature=1.0 if n % 2 else 0.0)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    while not first.seen:
        pass
    server.roster.alive = [second.view()]
    first.kill()
    for thread in threads:
        thread.join()
    assert {n: job["result"]["token_ids"] for n, job in results.items()} == {n: answer_of([n], 40) for n in results}


def test_stopping_the_gateway_ends_jobs_with_a_typed_error(make_worker, make_server, until) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    server = make_server(worker)
    got: list[str] = []

    def listen() -> None:
        with httpx.stream("POST", f"{server.address}/v1/completions", timeout=30,
                          json={"prompt": PROMPT, "max_tokens": 1000, "stream": True}) as stream:
            got.extend(stream.iter_lines())

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: len(got) > 1)
    server.stop()
    thread.join()
    assert any('"unavailable"' in line for line in got) and worker.cancels == ["stopping"]


@pytest.mark.parametrize("module", ["gateway", "http.server", "client", "cli", "doctor", "plan"])
def test_the_edge_never_imports_torch_or_ray(module: str) -> None:
    code = (f"import sys, kvbank.cluster.{module}; "
            "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_that_is_gone_but_still_listed_is_tried_until_its_successor_comes(make_worker, make_server, answer_of):
    gone, successor = make_worker("worker-0"), make_worker("worker-0")
    gone.kill()
    server = make_server(gone, limits={"suspect_s": 0.02, "no_worker_s": 20})
    job_id = httpx.post(f"{server.address}/v1/jobs", json={"prompt": PROMPT, "max_tokens": 8}).json()["id"]
    while finished_now(server.address, job_id)["attempt"] < 5:       # more than `fruitless`: nobody had the job yet
        pass
    server.roster.alive = [successor.view()]
    job = finished(server.address, job_id)
    assert job["result"]["token_ids"] == answer_of(PROMPT, 8)


def test_a_worker_that_stays_away_is_not_waited_for_for_ever(make_worker, make_server) -> None:
    gone = make_worker("worker-0")
    gone.kill()
    job = run(make_server(gone, limits={"suspect_s": 0.02, "no_worker_s": 0.3}).address)
    assert job["error"]["code"] == "unavailable" and "kvbank status" in job["error"]["message"]


def test_a_job_that_failed_keeps_neither_its_prompt_nor_the_frames_of_who_read_it(make_worker, make_server) -> None:
    """Its error is kept for an hour; with a traceback it kept the message to the worker and the body of the request."""
    worker = make_worker("worker-0")
    worker.failure = ("too_long", "no room")
    server = make_server(worker)
    for path, body in (("/v1/jobs", {"job_id": "a"}), ("/v1/completions", {"job_id": "b"})):
        httpx.post(f"{server.address}{path}", json={"prompt": PROMPT, "max_tokens": 8, **body})
    assert finished(server.address, "a")["error"]["code"] == finished(server.address, "b")["error"]["code"] == "too_long"
    for job in server.gateway.everyones_jobs():
        assert job.error is not None and job.error.__traceback__ is None and job.spec.prompt == b""
