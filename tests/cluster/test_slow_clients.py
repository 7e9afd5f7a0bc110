"""Clients that are slow, or mean to be: each wait for one ends, and honest slowness is served.

What must stay open while time passes is compared with a connection that must not: when that one is closed, the time is over.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from kvbank.cluster.certs import make_certificates
from kvbank.cluster.http import connection, server
from kvbank.cluster.http.keyring import HttpsCertificate
from kvbank.cluster.intake import Intake
from kvbank.cluster.logs import set_up

KEYS = {"key-a": "alice", "key-ops": "operators:ops"}
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
REFUSED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST_REFUSED = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n{"
HALF = b"GET /health HT"
LARGE = 24 << 20                     # more than the system's own buffers hold for both ends


def post(path: str, body: dict, length: int | None = None, **headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length or len(data)}",
             *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@pytest.fixture
def dial() -> Iterator[Callable[..., socket.socket]]:
    """dial(address, sent=b"", buffer=0): a connection over which `sent` went; buffer: what its system takes unread, in bytes."""
    with contextlib.ExitStack() as held:
        def connect(address: str, sent: bytes = b"", *, buffer: int = 0) -> socket.socket:
            made = held.enter_context(socket.socket())
            if buffer:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            made.settimeout(20)
            made.connect(("127.0.0.1", int(address.rpartition(":")[2])))
            made.sendall(sent)
            return made

        yield connect


def heard(sock: socket.socket, *, until: bytes = b"\r\n\r\n") -> bytes:
    got = b""
    while until not in got:
        part = sock.recv(65536)
        assert part, got
        got += part
    return got


def closed(sock: socket.socket, sends: bytes = b"") -> bool:
    """Did the gateway end it? Sends one thing more while it did not."""
    try:
        if sends:
            sock.sendall(sends)
        return bool(select.select([sock], [], [], 0)[0]) and sock.recv(65536) == b""
    except ConnectionError:
        return True


def cut_off(sock: socket.socket) -> bool:
    """Did the gateway end it, though what it sent was not read?"""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


# -- what a client owes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before", [b"", GET, REFUSED], ids=["first", "after an answer", "after a refusal"])
@pytest.mark.parametrize("drip", [b"", b"x"], ids=["silent", "dripping"])
def test_a_head_that_does_not_end_closes_its_connection(make_worker, make_server, dial, until, monkeypatch, before, drip) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    sock = dial(make_server(make_worker("worker-0"), api_keys=KEYS).address, before)
    if before:
        heard(sock)
    sock.sendall(HALF)
    until(lambda: closed(sock, drip), within_s=10)


def test_a_head_that_came_with_the_request_before_it_must_end_too(make_worker, make_server, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    sock = dial(make_server(make_worker("worker-0")).address, GET + HALF)
    heard(sock)
    until(lambda: closed(sock, b"x"), within_s=10)


def test_a_body_that_was_answered_already_must_end_soon(make_worker, make_server, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(connection, "REST_S", 0.3, raising=False)
    sock = dial(make_server(make_worker("worker-0"), api_keys=KEYS).address, POST_REFUSED)
    assert b" 401 " in heard(sock)
    until(lambda: closed(sock, b"x"), within_s=10)


def test_a_refused_body_that_ends_in_time_leaves_a_connection_to_use(make_worker, make_server, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 1.0, raising=False)
    sock = dial(make_server(make_worker("worker-0"), api_keys=KEYS).address, post("/v1/jobs", {"prompt": [1]}, 100))
    assert b" 401 " in heard(sock, until=b"}}")
    sock.sendall(b" " * 85)
    sock.sendall(GET)
    assert b" 200 " in heard(sock, until=b"}")
    sock.sendall(post("/v1/jobs", {"prompt": [1]}, 100))
    assert b" 401 " in heard(sock, until=b"}}")
    sock.sendall(b" " * 85)                          # and then nothing: an idle connection like any other
    until(lambda: closed(sock), within_s=10)


def test_who_says_nothing_between_two_requests_is_not_hurried(make_worker, make_server, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    monkeypatch.setattr(connection, "REST_S", 0.3, raising=False)
    address = make_server(make_worker("worker-0")).address
    idle = dial(address, GET)
    heard(idle, until=b"}")
    body = post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 3})
    uploading = dial(address, GET)
    heard(uploading, until=b"}")
    uploading.sendall(body[:-5])
    pipelining = dial(address, GET + GET + body[:-5])
    for _ in range(2):
        late = dial(address, HALF)
        until(lambda late=late: closed(late), within_s=10)
    for sock, rest in ((idle, GET), (uploading, body[-5:]), (pipelining, body[-5:])):
        sock.sendall(rest)
        assert b" 200 " in heard(sock, until=b"}")
    uploading.sendall(GET + GET)
    assert heard(uploading, until=b"}")


@pytest.mark.parametrize("sent", [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                                  b"\x16\x03\x01\x02" * 20 + b"\r\n\r\n"])
def test_what_is_no_http_is_answered_as_other_mistakes_are(make_worker, make_server, dial, sent) -> None:
    sock = dial(make_server(make_worker("worker-0")).address, sent)
    head, _, body = heard(sock, until=b"}}").partition(b"\r\n\r\n")
    assert b" 400 " in head and b"application/json" in head and sock.recv(1) == b""
    assert json.loads(body)["error"]["code"] == "invalid_request"


def test_a_head_with_a_malformed_body_is_no_error_of_ours(make_worker, make_server, dial, caplog) -> None:
    address, asked = make_server(make_worker("worker-0")).address, GET.replace(b"GET", b"HEAD")
    sock = dial(address, asked[:-2] + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    got = heard(sock)
    assert got.startswith(b"HTTP/1.1 400 Bad Request") and got.endswith(b"\r\n\r\n") and sock.recv(1) == b""
    later = dial(address, asked)
    assert b" 200 " in heard(later)
    later.sendall(b"hello\r\n\r\n")
    assert json.loads(heard(later, until=b"}}").partition(b"\r\n\r\n")[2])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_strangers_do_not_lock_everybody_out(make_worker, make_server, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 23)
    monkeypatch.setattr(connection, "HEADERS_S", 0.5)
    monkeypatch.setattr(connection, "REST_S", 0.5, raising=False)
    address = make_server(make_worker("worker-0"), api_keys=KEYS).address
    held = [dial(address, sent) for _ in range(10) for sent in (REFUSED, POST_REFUSED)]
    for sock in held:
        heard(sock, until=b"}}")
    for sock in held:
        sock.sendall(b"G")
    held += [dial(address, GET) for _ in range(3)]
    for sock in held[-3:]:
        assert b" 200 " in heard(sock)
    full = httpx.get(f"{address}/health")
    assert full.status_code == 503 and full.json()["error"]["code"] == "unavailable"
    assert full.headers["retry-after"] == "1" and full.headers["connection"] == "close"
    until(lambda: httpx.get(f"{address}/health").status_code == 200, within_s=10)


# -- what a client does not read ----------------------------------------------------------------------------------------

@pytest.fixture
def large(make_worker, make_server):
    """A gateway whose /detokenize answers LARGE letters."""
    def intake(*args: object, **named: object) -> Intake:
        return Intake(*args, **{**named, "decode": lambda _ids: "x" * LARGE})

    return lambda **options: make_server(make_worker("worker-0"), intake=intake, **options).address


ASK = post("/detokenize", {"tokens": [1]})


def test_an_answer_that_nobody_takes_is_thrown_away(large, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(connection, "UNREAD_S", 0.5, raising=False)
    address = large()
    last = post("/detokenize", {"tokens": [1]}, Connection="close")
    unread = [dial(address, sent, buffer=4096) for sent in (ASK, ASK + ASK, last)]
    assert unread[0].recv(20).startswith(b"HTTP/1.1 200")
    for sock in unread:
        until(lambda sock=sock: cut_off(sock), within_s=10)


def test_who_takes_a_little_now_and_then_gets_all_of_it(large, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(connection, "UNREAD_S", 1.0, raising=False)
    address = large()
    slow, got = dial(address, ASK, buffer=1 << 16), 0
    for _ in range(3):
        unread, give_up = dial(address, ASK, buffer=4096), time.monotonic() + 20
        while not cut_off(unread):
            assert time.monotonic() < give_up, "held for ever"
            got += len(slow.recv(4096))
            time.sleep(0.02)
    assert 0 < got < LARGE // 4, "it was not slow enough to tell"
    while got < LARGE:
        part = slow.recv(1 << 20)
        assert part
        got += len(part)


def test_over_tls_too_an_unread_answer_is_thrown_away_and_a_slow_reader_served(large, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(connection, "UNREAD_S", 1.0, raising=False)
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 3.0, raising=False)
    make_certificates(tmp_path)
    address = large(certificate=HttpsCertificate(tmp_path / "https.pem", tmp_path / "https.key"))
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))

    def dial(buffer: int, sent: bytes) -> ssl.SSLSocket:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        plain.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        made = trust.wrap_socket(plain, server_hostname="localhost")
        made.settimeout(20)
        made.sendall(sent)
        return made

    with dial(1 << 16, ASK) as slow:
        got = 0
        for sent in (ASK, ASK + ASK):
            with dial(4096, sent) as unread:
                give_up = time.monotonic() + 20
                while not cut_off(unread):
                    assert time.monotonic() < give_up, "held for ever"
                    got += len(slow.recv(4096))
                    time.sleep(0.02)
        until = time.monotonic() + 4.0               # longer than a connection may say nothing between two requests
        while time.monotonic() < until:
            got += len(slow.recv(4096))
            time.sleep(0.02)
        assert 0 < got < LARGE // 4
        while got < LARGE:
            part = slow.recv(1 << 20)
            assert part
            got += len(part)
        while select.select([slow], [], [], 0.2)[0] or slow.pending():
            assert slow.recv(1 << 20)                # what is around the text
        slow.sendall(GET)
        assert b" 200 OK" in heard(slow), "it was read slowly, and nobody closed it behind the answer"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_stream_that_nobody_takes_ends_with_its_job(make_worker, make_server, dial, until, monkeypatch) -> None:
    monkeypatch.setattr(connection, "UNREAD_S", 0.5, raising=False)
    listen = server._listen

    def listen_with_small_buffers(host: str, port: int) -> socket.socket:
        made = listen(host, port)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        return made

    monkeypatch.setattr(server, "_listen", listen_with_small_buffers)
    made = make_server(make_worker("worker-0"), max_position=1 << 20)
    ask = {"prompt": [1], "max_tokens": 20_000, "stream": True, "logprobs": 5}      # for the bytes
    unread = dial(made.address, post("/v1/completions", ask), buffer=4096)
    assert unread.recv(20).startswith(b"HTTP/1.1 200")
    until(lambda: cut_off(unread), within_s=30)
    until(lambda: made.gateway.live == 0, within_s=10)


def test_more_ids_than_the_model_reads_are_not_made_text(make_worker, make_server) -> None:
    address = make_server(make_worker("worker-0"), max_position=8).address
    assert httpx.post(f"{address}/detokenize", json={"tokens": [97] * 8}).json() == {"prompt": "a" * 8}
    answer = httpx.post(f"{address}/detokenize", json={"tokens": [97] * 9})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request"
    assert "9" in answer.json()["error"]["message"] and "8" in answer.json()["error"]["message"]


# -- who may go on listening --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("after", [{"key-a": "alice"}, {"key-a": "alice", "leaked": "operators"},
                                   {"key-a": "alice", "leaked": "others:ops"}], ids=["gone", "no operator", "another tenant"])
def test_a_feed_ends_when_its_key_does(make_worker, make_server, until, after) -> None:
    keys = [{"key-a": "alice", "leaked": "operators:ops", "key-ops": "operators:ops"}]
    address = make_server(make_worker("worker-0"), api_keys=lambda: keys[0]).address
    seen: dict[str, int] = {}

    def watch(key: str) -> None:
        with httpx.stream("GET", f"{address}/v1/ops/feed", headers={"Authorization": f"Bearer {key}"}, timeout=30) as answer:
            for line in answer.iter_lines():
                seen[key] = seen.get(key, 0) + line.startswith("data:")

    watching = {key: threading.Thread(target=watch, args=(key,), daemon=True) for key in ("leaked", "key-ops")}
    for thread in watching.values():
        thread.start()
    until(lambda: min(seen.get("leaked", 0), seen.get("key-ops", 0)) >= 2)
    keys[0] = {**after, "key-ops": "operators:ops"}
    until(lambda: not watching["leaked"].is_alive(), within_s=10)
    went_on = seen["key-ops"]
    until(lambda: seen["key-ops"] > went_on + 1, within_s=10)


# -- what strangers can make the gateway write --------------------------------------------------------------------------

@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a member would write, set up as a member does."""
    root, stream = logging.getLogger(), io.StringIO()
    hooks, handlers, level = (threading.excepthook, sys.excepthook, logging.raiseExceptions), list(root.handlers), root.level
    try:
        set_up("gateway", {"level": "info"}, to=stream)
        yield stream
    finally:
        (threading.excepthook, sys.excepthook, logging.raiseExceptions), root.handlers = hooks, handlers
        root.setLevel(level)


CHUNKED = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("sent", [
    [UPGRADE], [b"nonsense\r\n\r\n"], [CHUNKED + b"nonsense\r\n"], [CHUNKED, b"nonsense\r\n"], [CHUNKED + b"1\r\n", b"nonsense"],
    [POST_REFUSED], [GET + b"\x00nonsense"], [GET, b"\x00nonsense"],
], ids=["upgrade", "no request", "no chunk", "no chunk, answered", "no chunk's end", "left", "pipelined", "second"])
def test_a_stranger_cannot_make_the_log_grow(make_worker, make_server, dial, until, log, sent) -> None:
    address = make_server(make_worker("worker-0"), api_keys=KEYS).address
    httpx.get(f"{address}/health")
    before = log.getvalue()
    for _ in range(3):
        sock = dial(address)
        for at, part in enumerate(sent):
            sock.sendall(part)
            assert at == len(sent) - 1 or heard(sock, until=b"}")
        sock.shutdown(socket.SHUT_WR)
        until(lambda sock=sock: closed(sock), within_s=10)
    assert httpx.get(f"{address}/health").status_code == 200
    assert log.getvalue() == before


def test_what_breaks_inside_is_still_written(make_worker, make_server, until, log) -> None:
    def broken(*args: object, **named: object) -> Intake:
        return Intake(*args, **{**named, "decode": lambda _ids: 1 // 0})

    address = make_server(make_worker("worker-0"), intake=broken).address
    assert httpx.post(f"{address}/detokenize", json={"tokens": [1]}).status_code == 500
    until(lambda: "ZeroDivisionError" in log.getvalue(), within_s=10)
