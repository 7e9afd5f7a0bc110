"""Quotas alone, in virtual time; and at a real gateway, where a flood of one tenant leaves another alone."""

from __future__ import annotations

import random

import httpx
import pytest

from kvbank.cluster.quotas import BURST_S, Quotas
from kvbank.errors import InvalidRequest, Overloaded


def test_a_tenant_has_as_many_jobs_as_it_may_and_then_one_for_each_that_ends() -> None:
    quotas = Quotas(jobs=2)
    quotas.admit("a", 1, 0.0)
    quotas.admit("a", 1, 0.0)
    with pytest.raises(Overloaded, match="2 jobs"):
        quotas.admit("a", 1, 0.0)
    quotas.admit("b", 1, 0.0)
    quotas.release("a")
    quotas.admit("a", 1, 0.0)
    for tenant in "aab":
        quotas.release(tenant)
    assert not quotas._accounts


@pytest.mark.parametrize("seed", range(5))
def test_over_any_time_a_tenant_gets_its_rate_and_one_burst_and_a_refusal_says_when(seed: int) -> None:
    rng, quotas, rate = random.Random(seed), Quotas(tokens_per_s=100.0), 100.0
    now, admitted, largest = 0.0, 0, 0
    for _ in range(2000):
        tokens = rng.choice((1, 10, 300, 1000, 5000))
        try:
            quotas.admit("a", tokens, now)
        except Overloaded as refused:
            assert refused.retry_after_s > 0
            with pytest.raises(Overloaded):
                quotas.admit("a", tokens, now + 0.99 * refused.retry_after_s)
            now += refused.retry_after_s + 1e-6
            quotas.admit("a", tokens, now)       # what was said holds
        admitted, largest = admitted + tokens, max(largest, tokens)
        assert admitted <= rate * (now + BURST_S) + largest
        now += rng.random() * 0.1
    assert admitted > rate * now * 0.9, "and it gets it"


def test_at_the_gateway_one_tenants_flood_is_refused_and_another_tenant_is_served(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 1.0                                 # a job goes on until it is cancelled
    keys = {"key-a": "a", "key-b": "b"}
    server = make_server(worker, api_keys=keys, limits={"tenant_jobs": 3})
    a, b = ({"Authorization": f"Bearer {key}"} for key in keys)

    def submit(headers) -> httpx.Response:
        return httpx.post(f"{server.address}/v1/jobs", json={"prompt": [1, 2, 3]}, headers=headers)

    made = [submit(a) for _ in range(10)]
    assert [answer.status_code for answer in made] == [202] * 3 + [429] * 7
    assert int(made[-1].headers["Retry-After"]) >= 1 and made[-1].json()["error"]["code"] == "overloaded"
    assert submit(b).status_code == 202
    httpx.delete(f"{server.address}/v1/jobs/{made[0].json()['id']}", headers=a)
    httpx.get(f"{server.address}/v1/jobs/{made[0].json()['id']}", params={"wait_s": 10}, headers=a)
    assert submit(a).status_code == 202


def test_a_request_with_choices_is_taken_whole_or_costs_nothing(make_worker, make_server) -> None:
    """And what Retry-After says holds, also for all of them together."""
    quotas = Quotas(tokens_per_s=10.0)
    quotas.admit("a", 50, 0.0)
    with pytest.raises(Overloaded) as refused:
        quotas.admit("a", 80, 0.0, jobs=4)
    quotas.admit("a", 80, refused.value.retry_after_s + 1e-6, jobs=4)
    with pytest.raises(InvalidRequest, match="at once"):
        Quotas(jobs=2).admit("a", 1, 0.0, jobs=4)

    worker = make_worker("worker-0")
    worker.token_s = 1.0
    server = make_server(worker, api_keys={"key-a": "a"}, limits={"tenant_jobs": 3})
    with httpx.Client(base_url=server.address, headers={"Authorization": "Bearer key-a"}) as client:
        client.post("/v1/jobs", json={"prompt": [1, 2, 3]})
        body = {"prompt": [1, 2, 3], "n": 3, "stream": True}
        assert client.post("/v1/completions", json=body).status_code == 429
        assert len(client.get("/v1/jobs").json()["data"]) == 1, "nothing of it was admitted"
        answer = client.post("/v1/completions", json={**body, "n": 4})
        assert answer.status_code == 400 and "choices" in answer.json()["error"]["message"]
