"""The public client against real HTTP and fake workers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from kvbank import AsyncClient, Client, Delta, Receipt, Result, Segment, errors

PROMPT = [1, 2, 3]


def test_generate_gives_text_tokens_reason_and_receipt(make_worker, make_server, answer_of) -> None:
    with Client(make_server(make_worker("worker-0")).address) as client:
        result = client.generate(PROMPT, max_tokens=8)
    assert isinstance(result, Result) and isinstance(result.receipt, Receipt)
    assert result.token_ids == answer_of(PROMPT, 8) and result.text == bytes(result.token_ids).decode()
    assert result.finish_reason == "length"
    assert (result.receipt.prompt_tokens, result.receipt.output_tokens, result.receipt.computed_tokens) == (3, 8, 2)
    assert result.receipt.reused == {"device": 1} and result.receipt.missed == {"never_seen": 2}


def test_a_stream_replays_late_and_twice_and_equals_the_result(make_worker, make_server) -> None:
    client = Client(make_server(make_worker("worker-0")).address)
    job = client.submit(PROMPT, max_tokens=20, stop=["never seen"])
    live = list(job.stream())
    result = job.result()
    late, again = list(job.stream()), list(client.job(job.id).stream())
    for deltas in (live, late, again):
        assert all(isinstance(delta, Delta) for delta in deltas)
        assert "".join(delta.text for delta in deltas) == result.text
        assert [token for delta in deltas for token in delta.token_ids] == result.token_ids


def test_two_readers_of_one_job_do_not_disturb_each_other(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.01
    client = Client(make_server(worker).address)
    job = client.submit(PROMPT, max_tokens=30)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append("".join(d.text for d in job.stream()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    next(iter(job.stream()))                         # a reader that leaves early
    for thread in threads:
        thread.join()
    assert texts == [job.result().text] * 4 and len(worker.seen) == 1


def test_leaving_a_stream_early_does_not_cancel_the_job(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.01
    job = Client(make_server(worker).address).submit(PROMPT, max_tokens=20)
    for _ in job.stream():
        break
    assert job.result().token_ids == answer_of(PROMPT, 20)


def test_the_async_twin_does_the_same(make_worker, make_server, answer_of) -> None:
    address = make_server(make_worker("worker-0")).address

    async def use() -> None:
        async with AsyncClient(address) as client:
            job = await client.submit(PROMPT, max_tokens=8)
            text = "".join([delta.text async for delta in job.stream()])
            result = await job.result()
            assert text == result.text and result.token_ids == answer_of(PROMPT, 8)
            assert (await job.status()).state == "finished"
            assert (await client.generate("hello", max_tokens=2)).receipt.prompt_tokens == 5
            await job.cancel()
            assert job.id in [seen.id for seen in await client.jobs()]
            with pytest.raises(errors.NotFound):
                await client.job("unknown")
            with pytest.raises(errors.InvalidRequest):
                await client.submit([])

    asyncio.run(use())


def test_segments_are_joined_in_order(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    client = Client(make_server(worker).address)
    client.generate([Segment("ab"), Segment([7, 8], reusable=False), "c"], max_tokens=1)
    assert np.frombuffer(worker.seen[0].prompt, "<i4").tolist() == [97, 98, 7, 8, 99]


def test_numpy_ids_are_token_ids(make_worker, make_server, answer_of) -> None:
    client = Client(make_server(make_worker("worker-0")).address)
    assert client.generate(np.array(PROMPT), max_tokens=2).token_ids == answer_of(PROMPT, 2)


def test_cancel_makes_result_and_stream_raise_cancelled(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    job = Client(make_server(worker).address).submit(PROMPT, max_tokens=1000)
    with pytest.raises(errors.Cancelled):
        for _ in job.stream():
            job.cancel()
    with pytest.raises(errors.Cancelled):
        job.result()
    job.cancel()
    assert job.status().state == "cancelled"


def test_a_result_that_takes_too_long_is_not_lost(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    job = Client(make_server(worker).address).submit(PROMPT, max_tokens=10)
    with pytest.raises(errors.DeadlineExceeded, match="runs on"):
        job.result(timeout_s=0.05)
    assert job.result(timeout_s=30).token_ids == answer_of(PROMPT, 10)


def test_a_jobs_own_deadline_is_deadline_exceeded(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    with pytest.raises(errors.DeadlineExceeded, match=r"deadline of 0\.2"):
        Client(make_server(worker).address).generate(PROMPT, max_tokens=1000, deadline_s=0.2)


def test_the_same_job_id_is_one_job(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    client = Client(make_server(worker).address)
    first, second = (client.submit(PROMPT, max_tokens=4, job_id="mine") for _ in range(2))
    assert first.id == second.id == "mine" and first.result() == second.result() and len(worker.seen) == 1


def test_overloaded_says_when_to_retry(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05
    client = Client(make_server(worker, limits={"max_jobs": 1}).address)
    client.submit(PROMPT, max_tokens=1000)
    with pytest.raises(errors.Overloaded) as caught:
        client.submit(PROMPT, max_tokens=1)
    assert caught.value.retry_after_s >= 1.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_wrong_address_is_unavailable_and_says_what_to_do() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}")
    for call in (lambda: client.submit("x"), client.status, lambda: client.job("x")):
        with pytest.raises(errors.Unavailable, match="kvbank status"):
            call()


def test_an_address_of_something_else_is_unavailable() -> None:
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(errors.Unavailable, match="not as a kvbank gateway"):
            Client(f"127.0.0.1:{server.server_port}").status()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("address", ["", "ftp://x", "http://", "not an address"])
def test_what_is_not_an_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Client(address)


@contextlib.contextmanager
def one_that_says(words: bytes) -> Iterator[str]:
    """Host and port of a server that hears its first caller, says this and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def hang_up() -> None:
            line, _ = server.accept()
            with line:
                line.recv(4096)
                line.sendall(words)
        threading.Thread(target=hang_up, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_who_speaks_http_to_an_https_gateway_is_told_so() -> None:
    alert = b"\x15\x03\x01\x00\x02\x02\x46"                              # as https answers plain http
    with one_that_says(alert) as where, pytest.raises(errors.Unavailable, match="write https://"):
        Client(f"http://{where}", timeout_s=10).status()


def test_who_speaks_https_to_an_http_gateway_is_told_so(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0")).address.replace("http:", "https:")
    with pytest.raises(errors.Unavailable, match="write http://"):
        Client(address, timeout_s=10).status()


def test_a_server_that_refuses_the_handshake_is_not_called_one_without_tls() -> None:
    """Or its callers would send their keys in clear."""
    handshake_failure = b"\x15\x03\x03\x00\x02\x02\x28"
    with one_that_says(handshake_failure) as where, pytest.raises(errors.Unavailable, match="speaks TLS, but"):
        Client(f"https://{where}", timeout_s=10).status()


def test_a_stream_goes_on_after_its_connection_broke(make_worker, make_server, answer_of) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.02
    server = make_server(worker)
    relay = Relay(server.address)
    client = Client(relay.address)
    job = client.submit(PROMPT, max_tokens=30)
    seen: list[int] = []
    for delta in job.stream():
        seen += delta.token_ids
        if len(seen) in (5, 12):
            relay.cut()
    assert seen == answer_of(PROMPT, 30)
    relay.close()


class Relay:
    """A TCP relay whose connections can be cut."""

    def __init__(self, address: str) -> None:
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        while self._open:
            connection = self._open.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def test_status_shows_workers_loans_tiers_and_own_jobs(make_worker, make_server) -> None:
    worker = make_worker("worker-0")
    worker.token_s = 0.05

    async def told() -> dict:
        tier = {"name": "host", "bytes_used": 1, "bytes_limit": 2, "frames": 3, "state": "ok", "counters": {"hits": 4}}
        return {"tiers": [tier], "loans": [
            {"id": "loan-1", "lender": "lender-0", "borrower": "worker-0", "blocks": 8, "term_s": 6.0, "age_s": 0.5}],
            "workers": [{"id": "worker-0", "kind": "model", "replica": 0, "shard": 0, "host": "h", "pid": 1,
                         "state": "ok", "blocks_total": 48, "blocks_free": 40, "blocks_used": 8, "blocks_lent": 0,
                         "blocks_borrowed": 8, "tiers": [tier], "counters": {}, "from_the_future": 1}]}

    client = Client(make_server(worker, status=told).address)
    job = client.submit(PROMPT, max_tokens=1000)
    status = client.status()
    assert status.workers[0].blocks_borrowed == 8 and status.workers[0].tiers[0].counters == {"hits": 4}
    assert status.loans[0].lender == "lender-0" and status.tiers[0].name == "host"
    assert [seen.id for seen in status.jobs] == [job.id] and status.jobs[0].prompt_tokens == 3


def test_a_client_that_never_gets_an_answer_gives_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        before = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            client.status()
        assert time.monotonic() - before < 10


@pytest.mark.parametrize("prompt", ["", [], [Segment("")], [-1], [256], ["1"], [1.5], [True, None], "\ud800", 5, None,
                                    b"x", bytearray(b"x"), memoryview(b"x"), {1: 2}, {1, 2}, [Segment(5)], [Segment(b"x")]])
def test_bad_prompts_are_typed_and_leave_the_server_unharmed(make_worker, make_server, answer_of, prompt) -> None:
    client = Client(make_server(make_worker("worker-0")).address)
    with pytest.raises(errors.InvalidRequest):
        client.submit(prompt)
    assert client.generate(PROMPT, max_tokens=2).token_ids == answer_of(PROMPT, 2)


@pytest.mark.parametrize("options", [
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2**40}, {"max_tokens": 2.5}, {"temperature": -1},
    {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -2}, {"seed": "x"}, {"stop": [""]},
    {"stop": ["x"] * 17}, {"stop": ["\udc00"]}, {"stop_token_ids": [999]}, {"policy": "blend"}, {"job_id": "a/b"},
    {"job_id": "."}, {"job_id": ".."},
    {"job_id": ""}, {"deadline_s": 0}, {"deadline_s": -1}, {"ignore_eos": "yes"},
])
def test_bad_options_are_typed(make_worker, make_server, options) -> None:
    client = Client(make_server(make_worker("worker-0")).address)
    with pytest.raises(errors.InvalidRequest):
        client.submit(PROMPT, **options)


def test_too_long_names_the_numbers(make_worker, make_server) -> None:
    client = Client(make_server(make_worker("worker-0"), max_position=100, capacity_tokens=50).address)
    with pytest.raises(errors.TooLong, match=r"90 tokens and max_tokens is 20: 110 together, the model reads 100"):
        client.submit([1] * 90, max_tokens=20)
    with pytest.raises(errors.TooLong, match=r"60 together, the whole cluster holds 50"):
        client.submit([1] * 40, max_tokens=20)
    client.generate([1] * 40, max_tokens=10)
