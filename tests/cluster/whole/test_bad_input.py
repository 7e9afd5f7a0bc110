"""Wrong requests, wrong settings and wrong callers against the real thing: each gets a typed error, and nothing is harmed."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from kvbank.cluster.client import Client, Segment
from kvbank.cluster.launcher import LocalCluster
from kvbank.errors import ConfigError, InvalidRequest, ModelError, NotFound, TooLong, Unauthorized, Unavailable
from kvbank.kvstore.transport import rpc
from kvbank.proto import control_pb2, jobs_pb2
from kvbank.workers.models.random_model import write_random_model

MAX_POSITION = 6000
CAPACITY = (48 + 48) * 16                             # tokens: the worker's blocks and the lender's
PROMPT = list(range(3, 60))
SMALL = {"device_blocks": 48, "redis": None, "host_bytes": 0, "torch_threads": 1, "launcher": "process", "workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), seed=7, vocab=512, max_position=MAX_POSITION)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[LocalCluster]:
    with LocalCluster(model=str(folder), **SMALL, lenders=1) as one:
        yield one


@pytest.fixture(scope="module")
def answer(running: LocalCluster) -> list[int]:
    with Client(running.address) as client:
        return client.generate(PROMPT, max_tokens=6, ignore_eos=True).token_ids


@pytest.fixture()
def client(running: LocalCluster, answer: list[int]) -> Iterator[Client]:
    """A client; after the test the same processes still give the same answer and hold nothing."""
    before = running.processes
    with Client(running.address) as one:
        yield one
        assert one.generate(PROMPT, max_tokens=6, ignore_eos=True).token_ids == answer
        assert running.processes == before, "somebody died of it"
        status = one.status()
        assert not status.loans and not any(w.blocks_used or w.blocks_lent for w in status.workers)


@pytest.mark.parametrize("prompt", [
    "", [], [Segment("")], [-1], [512], [2**31], [2**70], "\ud800", "ok \udfff", [Segment("a\udc00")],
], ids=lambda prompt: ascii(prompt)[:20])
def test_a_prompt_that_is_none(client, prompt) -> None:
    with pytest.raises(InvalidRequest):
        client.submit(prompt)


def test_a_prompt_longer_than_the_model_reads(client) -> None:
    with pytest.raises(TooLong, match=rf"{MAX_POSITION - 5} tokens and max_tokens is 16.*the model reads {MAX_POSITION}"):
        client.submit([5] * (MAX_POSITION - 5), max_tokens=16)


def test_a_prompt_longer_than_the_whole_cluster_holds(client) -> None:
    with pytest.raises(TooLong, match=rf"{CAPACITY + 4} together.*holds {CAPACITY}"):
        client.submit([5] * CAPACITY, max_tokens=4)
    assert len(client.generate([5] * (CAPACITY - 400), max_tokens=4, ignore_eos=True).token_ids) == 4


@pytest.mark.parametrize(("max_tokens", "error"), [(0, InvalidRequest), (-1, InvalidRequest), (MAX_POSITION, TooLong),
                                                   (2**31 - 1, TooLong), (2**31, InvalidRequest), (2**80, InvalidRequest)])
def test_max_tokens_of_nothing_or_too_much(client, max_tokens, error) -> None:
    with pytest.raises(error):
        client.submit(PROMPT, max_tokens=max_tokens)


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1])
def test_any_seed_is_a_seed(client, seed) -> None:
    first, second = (client.generate(PROMPT, max_tokens=6, temperature=1.0, seed=seed).token_ids for _ in range(2))
    assert first == second


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/completions"])
@pytest.mark.parametrize("raw", [
    b'{"prompt": "\xff\xfe"}', b"\xc3\x28", b'{"prompt": "\\ud800"}', b"{", b"", b"[1, 2]",
], ids=repr)
def test_a_body_that_is_no_utf8_or_no_json(client, running, path, raw) -> None:
    reply = httpx.post(running.address + path, content=raw)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_request", reply.text


def test_a_job_that_is_not_there(client) -> None:
    with pytest.raises(NotFound):
        client.job("no-such-job")


# -- callers without the cluster token ------------------------------------------------------------------------------------

def control(channel: grpc.Channel, name: str, answer: Any = None) -> Any:
    return channel.unary_unary(f"/kvbank.Control/{name}", response_deserializer=answer)


def submit(channel: grpc.Channel, job: jobs_pb2.Job, **options: Any) -> list[jobs_pb2.SubmitReply]:
    call = channel.stream_stream("/kvbank.Jobs/Submit", response_deserializer=jobs_pb2.SubmitReplies.FromString)
    message = jobs_pb2.SubmitRequests(requests=[jobs_pb2.SubmitRequest(job=job)])
    messages = call(iter([message.SerializeToString()]), timeout=5, **options)
    return [reply for message in messages for reply in message.replies]


@pytest.fixture()
def addresses(running: LocalCluster) -> dict[str, str]:
    channel = rpc.channel(running.control_address, running.token)
    snapshot = control(channel, "Snapshot", control_pb2.SnapshotReply.FromString)(b"", timeout=5)
    channel.close()
    return {view.member.kind: view.member.address for view in snapshot.members}


@pytest.mark.parametrize("token", [None, "", "ab" * 16, "é"])
def test_a_call_without_the_cluster_token(client, running, addresses, token) -> None:
    metadata = None if token is None else [("kvbank-token", token)] if token.isascii() else [("kvbank-token-bin", token.encode())]

    def refused(call: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, caught.value

    for kind in ("model", "lender"):
        with grpc.insecure_channel(addresses[kind]) as channel:
            refused(lambda c=channel: c.unary_unary("/kvbank.Jobs/Status")(b"", timeout=5, metadata=metadata))
            refused(lambda c=channel: submit(c, jobs_pb2.Job(prompt=b"\5\0\0\0", max_tokens=1), metadata=metadata))
            for name in ("Session", "Attend"):
                bank = channel.stream_stream(f"/kvbank.Bank/{name}")
                refused(lambda bank=bank: list(bank(iter([b"x"]), timeout=5, metadata=metadata)))
            refused(lambda c=channel: c.stream_unary("/kvbank.Bank/Put")(iter([b"x"]), timeout=5, metadata=metadata))
            refused(lambda c=channel: list(c.unary_stream("/kvbank.Bank/Fetch")(b"x", timeout=5, metadata=metadata)))
    with grpc.insecure_channel(running.control_address) as channel:
        for name in ("Register", "Heartbeat", "Lenders", "Locate", "Snapshot"):
            refused(lambda name=name: control(channel, name)(b"", timeout=5, metadata=metadata))


def test_with_the_token_garbage_is_refused_and_harms_nobody(client, running, addresses) -> None:
    """A member of another version, or one gone mad: bytes that no version of us sends."""
    boot = [("kvbank-boot", "cd" * 16)]
    for kind in ("model", "lender"):
        channel = rpc.channel(addresses[kind], running.token)
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary("/kvbank.Bank/Put")(iter([b"garbage"]), timeout=5, metadata=boot)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream("/kvbank.Bank/Fetch")(b"garbage", timeout=5, metadata=boot))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream("/kvbank.Bank/Attend")(iter([b"garbage"]), timeout=5, metadata=boot))
        assert caught.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
        for said in (b"garbage", b""):
            with pytest.raises(grpc.RpcError):
                list(channel.stream_stream("/kvbank.Bank/Session")(iter([said]), timeout=0.5, metadata=boot))
            with pytest.raises(grpc.RpcError):
                list(channel.stream_stream("/kvbank.Bank/Session")(iter([said]), timeout=0.5))
        channel.close()
    channel = rpc.channel(addresses["model"], running.token)
    for job in (jobs_pb2.Job(id="x", prompt=b"", max_tokens=1), jobs_pb2.Job(id="x", prompt=b"\5\0\0", max_tokens=1),
                jobs_pb2.Job(id="x", prompt=b"\5\0\0\0", max_tokens=0), jobs_pb2.Job(id="x", prompt=b"\0\0\0\x7f", max_tokens=1),
                jobs_pb2.Job(id="x", prompt=b"\5\0\0\0" * 9, max_tokens=1, keys=b"short"),
                jobs_pb2.Job(id="x", prompt=b"\5\0\0\0", max_tokens=1, sampling=jobs_pb2.Sampling(temperature=-1.0))):
        *_, last = submit(channel, job)
        assert last.failed.code == "invalid_request", last
    channel.close()


# -- a wrong start ----------------------------------------------------------------------------------------------------------

def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.mark.parametrize("damage", [
    "no folder", "a file", "no config", "no weights", "truncated", "a tensor less", "one byte of garbage",
])
def test_a_model_folder_that_cannot_be_served(folder, tmp_path, damage) -> None:
    model = copy_of(folder, tmp_path)
    weights = model / "model.safetensors"
    if damage == "no folder":
        model = tmp_path / "nowhere"
    elif damage == "a file":
        model = model / "config.json"
    elif damage == "no config":
        (model / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a tensor less":
        fields = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 5}))
    else:
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    with pytest.raises(ModelError) as caught, LocalCluster(model=str(model), **SMALL):
        pytest.fail("it started")
    assert str(model) in str(caught.value) or "safetensors" in str(caught.value), caught.value


@pytest.mark.parametrize(("setting", "words"), [
    ({"device_blokcs": 48}, "did you mean vault.device_blocks"), ({"device_blocks": 23}, "at least 3 spans"),
    ({"lender_blocks": 16}, "at least 3 spans"), ({"redis": "redis://127.0.0.1:9"}, "cannot be reached"),
    ({"redis": "unix:///no/such/socket"}, "cannot be reached"), ({"config": {"engine": {"exactnes": "fast"}}}, "exactness"),
])
def test_a_setting_that_cannot_work(folder, setting, words) -> None:
    with pytest.raises(ConfigError, match=words), LocalCluster(model=str(folder), **(SMALL | setting)):
        pytest.fail("it started")


def test_a_port_in_use(folder, client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}"), LocalCluster(model=str(folder), **SMALL, port=port):
            pytest.fail("it started")


def test_the_port_of_a_running_cluster(folder, running, client) -> None:
    port = int(running.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"{port}"), LocalCluster(model=str(folder), **SMALL, port=port):
        pytest.fail("it started")


def test_a_wrong_address_in_the_client(running, client) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for address in (nobody, f"http://{running.control_address}"):       # nobody there; somebody who is not a gateway
        with Client(address) as wrong, pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
            wrong.generate(PROMPT, max_tokens=1)
    for address in ("", "not an address at all", "ftp://127.0.0.1"):
        with pytest.raises(InvalidRequest):
            Client(address)


def test_a_wrong_api_key(folder) -> None:
    with LocalCluster(model=str(folder), **SMALL, api_keys={"right": "tenant"}) as one:
        for key in (None, "wrong", ""):
            with Client(one.address, api_key=key) as wrong, pytest.raises(Unauthorized):
                wrong.generate(PROMPT, max_tokens=1)
        with Client(one.address, api_key="right") as right:
            assert len(right.generate(PROMPT, max_tokens=2, ignore_eos=True).token_ids) == 2
