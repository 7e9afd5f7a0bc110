"""Ops actions: what a member is asked, what is recorded of it, and the routes: roles, the token, the pages' files."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from kvbank.cluster.job import SpanKeys
from kvbank.cluster.ops import MAX_AUDIT, Ops
from kvbank.errors import InvalidRequest, NotFound, Unavailable
from kvbank.proto import ops_pb2
from kvbank.proto.control_pb2 import Member, MemberView

KEYS = {"key-user": "tenant-a", "key-ops": "tenant-a:ops"}
OPS = {"Authorization": "Bearer key-ops"}


class FakeLinks:
    """Members that answer, refuse, or are away."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ops_pb2.OpsRequest]] = []
        self.reply: ops_pb2.OpsReply | None = ops_pb2.OpsReply(blocks=24, frames=3)
        self.away: set[str] = set()

    async def act(self, address: str, request: ops_pb2.OpsRequest, *, timeout_s: float) -> ops_pb2.OpsReply:
        self.asked.append((address, request))
        if self.reply is None or address in self.away:
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "secret address")
        return ops_pb2.OpsReply.FromString(self.reply.SerializeToString())


@pytest.fixture
def links() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
def ops(links: FakeLinks) -> Ops:
    members = [MemberView(member=Member(id="worker-0", kind="model", address="host:1")),
               MemberView(member=Member(id="gateway", kind="gateway", address="host:2"))]
    return Ops(SimpleNamespace(members=members), links, wall=lambda: 5.0)


def act(ops: Ops, member: str, action: str) -> dict[str, Any]:
    return asyncio.run(ops.act(member, action, who="key-12ab", tenant="t"))


@pytest.mark.parametrize(("action", "kind", "outcome"), [
    ("drain", "draining", "24 lent blocks called back"), ("undrain", "draining", "takes jobs and lends again"),
    ("recall", "recall", "24 lent blocks called back"), ("clear", "clear", "24 idle blocks and 3 host frames dropped")])
def test_an_action_reaches_its_member_and_is_recorded(ops, links, caplog, action, kind, outcome) -> None:
    heard: list[dict[str, Any]] = []
    ops.on_act = heard.append
    with caplog.at_level(logging.INFO):
        entry = act(ops, "worker-0", action)
    (address, request), = links.asked
    assert address == "host:1" and request.WhichOneof("kind") == kind
    assert kind != "draining" or request.draining.on == (action == "drain")
    assert entry == {"at": 5.0, "who": "key-12ab", "tenant": "t", "action": action, "member": "worker-0", "job": "",
                     "ok": True, "outcome": outcome}
    assert list(ops.audit) == heard == [entry]
    assert f"action={action}" in caplog.text and "who=key-12ab" in caplog.text


def test_every_shard_of_a_replica_empties_its_shelf(links) -> None:
    models = [(0, 0), (0, 1), (1, 0), (1, 1)]
    members = [MemberView(member=Member(id=f"worker-{replica}" + (f".{shard}" if shard else ""), kind="model", replica=replica,
                                        shard=shard, address=f"host:{replica}{shard}")) for replica, shard in models]
    members.append(MemberView(member=Member(id="lender-0", kind="lender", address="host:9")))
    ops = Ops(SimpleNamespace(members=members), links)
    assert act(ops, "worker-1", "clear")["outcome"] == "24 idle blocks and 6 host frames dropped"
    assert [(address, request.clear.device, request.clear.host) for address, request in links.asked] == [
        ("host:10", True, True), ("host:11", False, True)]
    links.away = {"host:11"}
    assert act(ops, "worker-1", "clear")["outcome"].endswith("3 host frames dropped; not by worker-1.1: ask again")
    links.asked.clear()
    act(ops, "lender-0", "clear")
    act(ops, "worker-0", "recall")
    assert [address for address, _ in links.asked] == ["host:9", "host:00"]


def test_what_did_not_work_is_told_without_addresses_and_recorded_too(ops, links) -> None:
    with pytest.raises(NotFound):
        act(ops, "gateway", "drain")
    with pytest.raises(InvalidRequest, match="drain, undrain, recall, clear"):
        act(ops, "worker-0", "explode")
    assert links.asked == []
    links.reply = None
    with pytest.raises(Unavailable) as away:
        act(ops, "worker-0", "drain")
    assert "secret" not in str(away.value) and "host" not in str(away.value)
    links.reply = ops_pb2.OpsReply(error="this shard follows")
    with pytest.raises(InvalidRequest, match="this shard follows"):
        act(ops, "worker-0", "drain")
    assert [entry["ok"] for entry in ops.audit] == [False] * 4
    for _ in range(MAX_AUDIT):
        with pytest.raises(NotFound):
            act(ops, "x" * 1000, "drain")
    assert len(ops.audit) == MAX_AUDIT and len(ops.audit[-1]["member"]) == 64


def block_key(number: int) -> bytes:
    return bytes([number]) * 32


def test_one_key_of_each_span_is_kept_and_those_of_the_rest() -> None:
    keys = b"".join(block_key(number) for number in range(19))
    assert SpanKeys.of(keys, 8) == SpanKeys(block_key(7) + block_key(15), block_key(16) + block_key(17) + block_key(18))
    assert SpanKeys.of(keys[: 8 * 32], 8) == SpanKeys(block_key(7))
    assert SpanKeys.of(keys[:32], 8) == SpanKeys(b"", block_key(0))
    assert SpanKeys.of(b"", 8) == SpanKeys()


def test_a_pin_names_the_prompt_to_the_worker_that_ran_it_and_is_recorded(ops, links) -> None:
    job = SimpleNamespace(worker="worker-0", span_keys=SpanKeys(block_key(1), block_key(2)))

    def pin(job: Any, term_s: float) -> dict[str, Any]:
        return asyncio.run(ops.pin("j-1", job, term_s, who="key-12ab", tenant="t"))

    links.reply = ops_pb2.OpsReply(blocks=24, left_out=8)
    entry = pin(job, 59.5)
    assert links.asked == [("host:1", ops_pb2.OpsRequest(pin=ops_pb2.Pin(ends=block_key(1), tail=block_key(2), term_s=60)))]
    assert entry == {"at": 5.0, "who": "key-12ab", "tenant": "t", "action": "pin", "member": "worker-0", "job": "j-1",
                     "ok": True, "outcome": "24 blocks pinned for 60 s; 8 more would be over half of the vault"}
    links.reply = ops_pb2.OpsReply(blocks=24)
    entry = pin(job, 0)
    assert (entry["action"], entry["outcome"]) == ("unpin", "24 blocks unpinned") and links.asked[-1][1].pin.term_s == 0
    links.reply = ops_pb2.OpsReply(error="nothing of this prompt lies there")
    with pytest.raises(InvalidRequest, match="nothing of this prompt"):
        pin(job, 60)
    for bad, says in ((SimpleNamespace(worker="", span_keys=job.span_keys), "no worker has had this job"),
                      (SimpleNamespace(worker="worker-0", span_keys=SpanKeys()), "no block keys")):
        with pytest.raises(InvalidRequest, match=says):
            pin(bad, 60)
    for gone in (None, SimpleNamespace(worker="worker-9", span_keys=job.span_keys)):
        with pytest.raises(NotFound):
            pin(gone, 60)
    assert len(links.asked) == 3 and [entry["ok"] for entry in ops.audit] == [True, True, *[False] * 5]
    assert {entry["job"] for entry in ops.audit} == {"j-1"} and "\\x01" not in str(ops.audit)


def test_a_job_is_pinned_by_ops_alone_while_it_is_kept_and_no_key_leaves(make_worker, make_server, ops, links) -> None:
    keys = [block_key(number) for number in range(10)]
    server = make_server(make_worker("worker-0"), api_keys=KEYS, ops=ops, block_keys=lambda _space, _prompt: b"".join(keys))
    with httpx.Client(base_url=server.address) as client:
        csrf = client.get("/v1/ops/session", headers=OPS).json()["csrf"]
        trusted = {**OPS, "x-kvbank-csrf": csrf}
        client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2}, headers=OPS)
        (job,) = server.gateway.everyones_jobs()
        assert job.over and not job.keys and job.span_keys == SpanKeys(keys[7], keys[8] + keys[9])
        url = f"/v1/ops/jobs/{job.wire_id}/pin"
        for headers in ({}, {"Authorization": "Bearer key-user", "x-kvbank-csrf": csrf}, OPS, {**OPS, "x-kvbank-csrf": "no"}):
            assert client.post(url, headers=headers).status_code in (401, 403)
        for term in ("-1", "86401", "soon", "nan", "inf", ""):
            assert client.post(url, params={"term_s": term}, headers=trusted).status_code == 400, term
        assert links.asked == [] and not ops.audit
        assert client.post(url.replace(job.wire_id, "nobody"), headers=trusted).status_code == 404
        assert client.post(url.replace(job.wire_id, job.id), headers=trusted).status_code == 404, "its tenant's name for it"
        done = client.post(url, headers=trusted)
        assert done.status_code == 200 and done.json()["outcome"] == "24 blocks pinned for 600 s"
        assert client.post(url, params={"term_s": 0}, headers=trusted).json()["action"] == "unpin"
        assert [request.pin.term_s for _, request in links.asked] == [600, 0]
        assert [(entry["job"], entry["ok"]) for entry in ops.audit] == [
            ("nobody", False), (job.id, False), (job.wire_id, True), (job.wire_id, True)]
        told = client.get(f"/v1/ops/jobs/{job.wire_id}", headers=OPS).json()
        assert not [name for name in (*told, *done.json()) if "key" in name]
        assert keys[7].hex() not in json.dumps(told) + done.text


def test_only_ops_with_the_pages_token_acts_and_the_trail_names_no_key(make_server, ops, links) -> None:
    server = make_server(api_keys=KEYS, ops=ops)
    url = f"{server.address}/v1/ops/members/worker-0/drain"
    with httpx.Client() as client:
        csrf = client.get(f"{server.address}/v1/ops/session", headers=OPS).json()["csrf"]
        for headers in ({}, {"Authorization": "Bearer key-user", "x-kvbank-csrf": csrf}, OPS, {**OPS, "x-kvbank-csrf": "no"}):
            assert client.post(url, headers=headers).status_code in (401, 403)
        assert links.asked == []
        done = client.post(url, headers={**OPS, "x-kvbank-csrf": csrf})
        assert done.status_code == 200 and done.json()["who"].startswith("key-") and "key-ops" not in done.text
        assert client.post(url.replace("drain", "explode"), headers={**OPS, "x-kvbank-csrf": csrf}).status_code == 400
        assert client.get(f"{server.address}/v1/ops/feed", headers={"Authorization": "Bearer key-user"}).status_code == 403
        for path in ("workers/nobody", "jobs/nothing"):
            assert client.get(f"{server.address}/v1/ops/{path}", headers=OPS).status_code == 404


def test_the_feed_tells_of_all_tenants_jobs_and_never_what_they_say(make_worker, make_server) -> None:
    async def nobody() -> dict[str, Any]:
        return {"workers": [], "loans": [], "tiers": []}

    server = make_server(make_worker("worker-0"), api_keys={**KEYS, "key-b": "tenant-b"}, status=nobody)
    prompt = "the secret plan of tenant b"
    with httpx.Client(base_url=server.address) as client:
        made = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8, "temperature": 0},
                           headers={"Authorization": "Bearer key-b"}).json()
        with client.stream("GET", "/v1/ops/feed", headers=OPS) as answer:
            lines = answer.iter_lines()
            head, data = next(lines), next(lines)
        assert head == "event: snapshot"
        snapshot = json.loads(data.removeprefix("data: "))
        (job,) = snapshot["jobs"]
        assert (job["tenant"], job["state"], job["outcome"], job["output_tokens"]) == ("tenant-b", "finished", "length", 8)
        assert snapshot["window"]["recent"]["jobs"] == 1 and snapshot["window"]["ttft_s"]["count"] == 1
        page = client.get(f"/v1/ops/jobs/{job['id']}", headers=OPS)
        assert [m["phase"] for m in page.json()["timeline"]["moments"]][-1] == "decode"
        assert page.json()["receipt"]["output_tokens"] == 8
        text = made["choices"][0]["text"]
        for told in (data, page.text):
            assert prompt not in told and text not in told and "token_ids" not in told


def test_a_page_that_was_closed_is_watched_for_no_longer(make_server, until) -> None:
    server = make_server()
    (feed,) = server.gateway.observers
    with httpx.stream("GET", f"{server.address}/v1/ops/feed") as answer:
        lines = answer.iter_lines()                  # held: a dropped iterator closes its response
        next(lines)
        assert feed.watched == 1
    until(lambda: feed.watched == 0)


def test_a_worker_that_refuses_a_job_did_not_take_it_up(make_worker, make_server, until) -> None:
    drained, other = make_worker("worker-0"), make_worker("worker-1")
    drained.refusal = ("unavailable", "this worker is draining and takes no new jobs")
    address = make_server(drained, other, choose=lambda workers, _held, _tokens: min(w.id for w in workers)).address
    whole = httpx.post(f"{address}/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4}).json()
    receipt = whole["kvbank"]["receipt"]
    assert (receipt["output_tokens"], receipt["attempts"], receipt["recomputed_after_fault"]) == (4, 1, 0)


def test_the_files_are_there_for_everybody_and_only_they(make_server) -> None:
    address = make_server(api_keys=KEYS).address
    for path, kind in (("", "text/html"), ("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css"),
                       ("/mark.svg", "image/svg+xml")):
        answer = httpx.get(f"{address}/dashboard{path}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        again = httpx.get(f"{address}/dashboard{path}", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for path in ("nothing.js", "..%2fapp.py", "%2e%2e/app.py", "index.html%00", ".."):
        assert httpx.get(f"{address}/dashboard/{path}").status_code == 404
    assert httpx.get(f"{address}/dashboard/door").json() == {"sign_in": True}
    assert httpx.get(f"{make_server().address}/dashboard/door").json() == {"sign_in": False}
    assert httpx.post(f"{address}/dashboard").status_code == 405
