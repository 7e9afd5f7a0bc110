"""Real gRPC with certificates: who may call what, and every wrong credential is refused before a body is parsed."""

from __future__ import annotations

import gc
import os
import queue
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.cluster.certs import expires, make_certificates, names_in
from kvbank.errors import ConfigError
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import CALLERS, ROLES, Badge, Certificates
from tests.kvstore.transport.headers_only import Mute

TOKEN = "ab" * 16
THREADS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tls") / "certs"
    make_certificates(made)
    return made


def badge(folder: Path, role: str, token: str = TOKEN) -> Badge:
    return Badge(token, Certificates(folder, role))


class Echo:
    """A member with every service of CALLERS; counts the bodies that were parsed."""

    def __init__(self, shown: Badge | str, *, port: int = 0) -> None:
        self.parsed = 0
        self.server = rpc.server(shown, threads=THREADS)
        methods = [("kvbank.Control", "Register"), ("kvbank.Control", "Snapshot"), ("kvbank.Jobs", "Status"),
                   ("kvbank.Ops", "Drain"), ("kvbank.Bank", "Borrow"), ("kvbank.Shard", "Lead"), ("kvbank.New", "Thing")]
        for service, method in methods:
            self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {
                method: grpc.unary_unary_rpc_method_handler(lambda data, _: data, self._parse),
                f"{method}Answers": grpc.unary_stream_rpc_method_handler(lambda data, _: iter([data, data]), self._parse),
                f"{method}Stream": grpc.stream_stream_rpc_method_handler(lambda data, _: data, self._parse)})])
        self.methods = [f"{service}/{method}" for service, method in methods]
        self.address = f"127.0.0.1:{rpc.bind(self.server, f'127.0.0.1:{port}')}"
        self.server.start()

    def _parse(self, data: bytes) -> bytes:
        self.parsed += 1
        return data


@pytest.fixture(scope="module")
def echo(folder: Path) -> Iterator[Echo]:
    made = Echo(badge(folder, "worker"))
    yield made
    made.server.stop(None)


def ask(address: str, method: str, shown: Badge | str) -> Any:
    """The status code, or the answer."""
    with rpc.channel(address, shown) as channel:
        try:
            return channel.unary_unary(f"/{method}")(b"hello", timeout=10)
        except grpc.RpcError as error:
            return error.code()


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_call_what_is_written_for_it_and_nothing_else(echo: Echo, folder: Path, role: str) -> None:
    for method in echo.methods:
        allowed = role in CALLERS.get(method, CALLERS.get(method.partition("/")[0], ()))
        before = echo.parsed
        answer = ask(echo.address, method, badge(folder, role))
        assert answer == (b"hello" if allowed else grpc.StatusCode.PERMISSION_DENIED), (role, method)
        assert echo.parsed - before == allowed, "a refused body was parsed"
    assert ask(echo.address, "kvbank.New/Thing", badge(folder, role)) == grpc.StatusCode.PERMISSION_DENIED


def test_a_stream_is_refused_before_its_first_message_is_parsed(echo: Echo, folder: Path) -> None:
    before = echo.parsed
    with rpc.channel(echo.address, badge(folder, "gateway")) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.stream_stream("/kvbank.Bank/BorrowStream")(iter([b"a", b"b"]), timeout=10))
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED and echo.parsed == before
        answer = channel.stream_stream("/kvbank.Jobs/StatusStream")(iter([b"a", b"b"]), timeout=10)
        assert list(answer) == [b"a", b"b"] and echo.parsed == before + 2


KINDS = ["", "Answers", "Stream"]              # of a method of Echo: one message for one, one for many, many for many


@pytest.mark.parametrize("secure", [False, True])
def test_a_stranger_who_never_sends_a_body_is_refused_and_holds_nobody_up(folder: Path, secure: bool) -> None:
    server = Echo(badge(folder, "worker") if secure else TOKEN)
    wrong = badge(folder, "worker", "0" * 32) if secure else "0" * 32
    try:
        with Mute(rpc.channel(server.address, wrong)) as stranger:
            calls = [stranger.call(f"kvbank.Bank/Borrow{kind}") for kind in KINDS for _ in range(THREADS)]
            assert ask(server.address, "kvbank.Bank/Borrow", badge(folder, "worker") if secure else TOKEN) == b"hello"
            assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    finally:
        server.server.stop(None)


def test_a_member_of_another_role_who_never_sends_a_body_is_refused_and_holds_nobody_up(echo: Echo, folder: Path) -> None:
    before = echo.parsed
    with Mute(rpc.channel(echo.address, badge(folder, "gateway"))) as other:
        calls = [other.call(f"kvbank.Bank/Borrow{kind}") for kind in KINDS for _ in range(THREADS)]
        assert ask(echo.address, "kvbank.Bank/Borrow", badge(folder, "worker")) == b"hello"
        assert {call.code() for call in calls} == {grpc.StatusCode.PERMISSION_DENIED}
    assert echo.parsed == before + 1


@pytest.mark.parametrize("secure", [False, True])
def test_a_method_that_takes_one_message_takes_the_first_and_refuses_none(folder: Path, secure: bool) -> None:
    """The same with certificates as without."""
    shown = badge(folder, "worker") if secure else TOKEN
    server = Echo(shown)
    try:
        with rpc.channel(server.address, shown) as channel:
            one, many = channel.stream_unary("/kvbank.Bank/Borrow"), channel.stream_stream("/kvbank.Bank/BorrowAnswers")
            for asked in (lambda: one(iter([]), timeout=10), lambda: list(many(iter([]), timeout=10))):
                with pytest.raises(grpc.RpcError) as refused:
                    asked()
                assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
                assert "requires exactly one request message" in refused.value.details()
            assert server.parsed == 0
            for said in ([b""], [b"a"], [b"a", b"b"]):
                assert one(iter(said), timeout=10) == said[0]
                assert list(many(iter(said), timeout=10)) == [said[0]] * 2
    finally:
        server.server.stop(None)


def test_wrong_credentials_do_not_get_as_far_as_a_body(echo: Echo, folder: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other")
    make_certificates(tmp_path / "old", days=1, now=datetime.now(UTC) - timedelta(days=30))
    for name in ("old/worker.pem", "old/worker.key"):       # signed by the right authority, long ago
        (tmp_path / "mixed").mkdir(exist_ok=True)
        (tmp_path / "mixed" / Path(name).name).write_bytes((tmp_path / name).read_bytes())
    _sign_expired(folder, tmp_path / "expired")
    wrong = {
        "no certificate": TOKEN, "another authority": badge(tmp_path / "other", "worker"),
        "expired": badge(tmp_path / "expired", "worker"), "no token": badge(folder, "worker", ""),
        "wrong token": badge(folder, "worker", "0" * 32),
    }
    before = echo.parsed
    for what, shown in wrong.items():
        assert ask(echo.address, "kvbank.Bank/Borrow", shown) in (
            grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED), what
    assert echo.parsed == before
    assert ask(echo.address, "kvbank.Bank/Borrow", badge(folder, "worker")) == b"hello"


def _sign_expired(folder: Path, target: Path) -> None:
    """The cluster's own authority, a month ago, for one day."""
    target.mkdir()
    for name in ("ca.key", "ca.pem"):
        (target / name).write_bytes((folder / name).read_bytes())
    make_certificates(target, days=1, now=datetime.now(UTC) - timedelta(days=30))
    assert expires(target / "worker.pem") < datetime.now(UTC)


def test_who_asks_for_certificates_does_not_talk_to_a_server_without_one(folder: Path) -> None:
    plain = Echo(TOKEN)
    try:
        assert ask(plain.address, "kvbank.Bank/Borrow", badge(folder, "worker")) == grpc.StatusCode.UNAVAILABLE
        assert plain.parsed == 0 and ask(plain.address, "kvbank.New/Thing", TOKEN) == b"hello"
    finally:
        plain.server.stop(None)


def test_certificates_are_renewed_without_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    make_certificates(folder)
    server = Echo(badge(folder, "worker"))
    try:
        with rpc.channel(server.address, badge(folder, "worker")) as old:
            call = old.unary_unary("/kvbank.Bank/Borrow")
            assert call(b"1", timeout=10) == b"1"
            (folder / "ca.key").unlink()                     # another authority: what the old one signed is worth nothing
            before = badge(folder, "worker").certificates.read()
            make_certificates(folder)
            assert badge(folder, "worker").certificates.read()[1] != before[1]
            give_up = time.monotonic() + 20
            while (answer := ask(server.address, "kvbank.Bank/Borrow", badge(folder, "worker"))) != b"hello":
                assert time.monotonic() < give_up, answer
            assert call(b"2", timeout=10) == b"2", "what was connected goes on"
    finally:
        server.server.stop(None)


def test_a_peer_that_comes_back_after_a_renewal_is_met_with_the_new_certificate(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    make_certificates(folder)
    shown = badge(folder, "worker")
    server = Echo(shown)
    channels, held = rpc.Channels(shown), rpc.channel(server.address, shown)
    try:
        assert channels.to(server.address).unary_unary("/kvbank.Bank/Borrow")(b"1", timeout=10) == b"1"
        assert held.unary_unary("/kvbank.Bank/Borrow")(b"1", timeout=10) == b"1"
        before = channels.to(server.address)
        server.server.stop(None).wait(10)
        (folder / "ca.key").unlink()                         # another authority: what the old one signed is worth nothing
        make_certificates(folder)
        server = Echo(shown, port=int(server.address.rpartition(":")[2]))
        assert channels.to(server.address) is not before
        assert channels.to(server.address).unary_unary("/kvbank.Bank/Borrow")(b"2", timeout=10, wait_for_ready=True) == b"2"
        with pytest.raises(grpc.RpcError):
            held.unary_unary("/kvbank.Bank/Borrow")(b"2", timeout=3)
    finally:
        channels.close()
        held.close()
        server.server.stop(None)
    with pytest.raises(ValueError):
        channels.to(server.address)


def test_a_channel_of_before_a_renewal_lasts_as_long_as_what_is_open_on_it(tmp_path: Path, until) -> None:
    folder, now = tmp_path / "certs", [0.0]
    make_certificates(folder)
    shown = badge(folder, "worker")
    server = Echo(shown)
    channels, said = rpc.Channels(shown, clock=lambda: now[0]), queue.SimpleQueue[bytes | None]()

    def works(channel: grpc.Channel) -> bool:
        try:
            return channel.unary_unary("/kvbank.Bank/Borrow")(b"1", timeout=10, wait_for_ready=True) == b"1"
        except ValueError:                                   # it is closed
            return False
    try:
        first = channels.to(server.address)
        stream = first.stream_stream("/kvbank.Bank/BorrowStream")(iter(said.get, None), wait_for_ready=True)
        assert works(first)
        make_certificates(folder)
        second = channels.to(server.address)
        make_certificates(folder)
        third = channels.to(server.address)
        assert first is not second and second is not third and channels.to(server.address) is third
        now[0] = rpc.RETIRED_S - 1
        assert works(channels.to(server.address)) and works(second), "somebody may just be about to call on it"
        now[0] = rpc.RETIRED_S
        assert works(channels.to(server.address)) and not works(second) and works(first)
        said.put(b"hello")
        said.put(None)
        assert list(stream) == [b"hello"]
        until(lambda: works(channels.to(server.address)) and not works(first))
        assert works(third)
    finally:
        channels.close()
        server.server.stop(None)


@pytest.mark.parametrize("how", ["dropped", "read", "refused", "future"])
def test_a_call_is_open_until_it_is_over_and_a_dropped_stream_ends_at_the_server(echo: Echo, folder: Path, until, how) -> None:
    connection = rpc._connect(echo.address, badge(folder, "worker"))
    try:
        stream = connection.channel.stream_stream("/kvbank.Bank/BorrowStream")
        if how == "future":
            assert connection.channel.unary_unary("/kvbank.Bank/Borrow").future(b"1", timeout=10).result() == b"1"
        elif how == "refused":
            with pytest.raises(grpc.RpcError):
                connection.channel.unary_unary("/kvbank.New/Thing")(b"1", timeout=10)
        else:
            said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            answers = stream(iter(said.get, None))
            said.put(b"1")
            assert next(answers) == b"1" and connection.calls.open == 1
            if how == "read":
                said.put(None)
                assert list(answers) == []
            del answers
            gc.collect()
        until(lambda: connection.calls.open == 0)
    finally:
        connection.channel.close()


def test_files_that_are_gone_half_there_or_do_not_fit_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    with pytest.raises(ConfigError, match="kvbank certs"):
        rpc.channel("127.0.0.1:1", badge(folder, "worker"))
    make_certificates(folder)
    shown = badge(folder, "worker")
    server = Echo(shown)
    channels = rpc.Channels(shown)

    def answers() -> bool:
        return (ask(server.address, "kvbank.Bank/Borrow", shown) == b"hello"
                and channels.to(server.address).unary_unary("/kvbank.Bank/Borrow")(b"hello", timeout=10) == b"hello")

    try:
        assert answers()
        kept, first = (folder / "worker.key").read_bytes(), channels.to(server.address)
        for text in (None, b"", kept[:40], (folder / "control.key").read_bytes()):      # another one's key does not fit
            (folder / "worker.key").unlink(missing_ok=True)
            if text is not None:
                (folder / "worker.key").write_bytes(text)
            assert answers() and channels.to(server.address) is first
            with pytest.raises(ConfigError):
                rpc.channel(server.address, badge(folder, "worker"))
        make_certificates(folder)
        assert answers() and channels.to(server.address) is not first, "whole again: the new ones are used"
    finally:
        channels.close()
        server.server.stop(None)
    assert not [path for path in folder.iterdir() if path.name == "ca.key" and path.stat().st_mode & 0o077]
    assert TOKEN not in repr(shown)


def test_an_https_certificate_has_the_names_that_were_given_and_this_machines_own(tmp_path: Path) -> None:
    make_certificates(tmp_path, names=["kvbank.example.org", "192.0.2.10", "*.a.org", "127.0.0.1"])
    assert names_in(tmp_path / "https.pem") == ["kvbank.example.org", "192.0.2.10", "*.a.org", "127.0.0.1", "localhost", "::1"]


@pytest.mark.parametrize("name", ["https://a.org", "a.org:8080", "a.org,b.org", "192.0.2.10/24", "not a name!", "", "ä.org",
                                  "a..b", "-a.org", "a." * 130 + "org", "x" * 64, "192.0.2.300", "127.1"])
def test_what_no_certificate_can_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a certificate"):
        make_certificates(tmp_path, names=[name])
    assert not list(tmp_path.iterdir())


def test_a_renewal_that_could_not_be_read_at_first_is_read_later(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    certificates = Certificates(tmp_path, "worker")
    before = certificates.read()
    make_certificates(tmp_path)
    with no_more_files():
        assert certificates.read() == before
    assert certificates.read()[1] == (tmp_path / "worker.pem").read_bytes() != before[1]


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process cannot open another file or socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_renewal_that_keeps_the_times_of_the_files_is_seen_and_a_new_mode_renews_nothing(tmp_path: Path) -> None:
    """As `cp -p` keeps them; a wrong mode that is put right changes no time of writing either."""
    make_certificates(tmp_path)
    certificates, files = Certificates(tmp_path, "worker"), [tmp_path / "worker.pem", tmp_path / "worker.key"]
    before, stamp, times = certificates.read(), certificates.stamp(), [file.stat().st_mtime_ns for file in files]
    make_certificates(tmp_path)
    for file, at in zip(files, times, strict=True):
        os.utime(file, ns=(at, at))
    renewed = certificates.read()
    assert renewed != before and certificates.stamp() != stamp
    stamp = certificates.stamp()
    files[0].chmod(0o600)
    assert certificates.read() == renewed and certificates.stamp() == stamp, "connections are not made anew for it"


def test_a_channel_that_another_takes_away_is_never_handed_out(folder: Path) -> None:
    """A peer that comes back at its old address while what belonged to its former life is closed."""
    server = Echo(badge(folder, "worker"))
    channels = rpc.Channels(badge(folder, "worker"))
    try:
        old = channels.to(server.address)
        taken = channels.take(server.address)
        new = channels.to(server.address)
        assert taken == [old] and new is not old
        for one in taken:
            one.close()
        assert new.unary_unary("/kvbank.Bank/Borrow")(b"1", timeout=10) == b"1"
    finally:
        channels.close()
        server.server.stop(None)
