"""Redis over real links: TLS, a restricted user, a slow line, a line that is cut, and another client's values."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
from kvbank.kvstore.tiers.redis_address import parse
from kvbank.kvstore.tiers.redis_tier import RedisTier, probe
from kvbank.kvstore.tiers.redis_wire import RedisConnection
from kvbank.kvstore.tiers.tier import TierUnavailable

MIB = 1 << 20
KEY = b"k" * 32


class Relay:
    """A TCP door before a unix socket, which passes the server's bytes on through `pass_on(piece, send)`."""

    def __init__(self, path: Path, tls: ssl.SSLContext | None = None) -> None:
        self._path, self._tls = path, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.pass_on: Callable[[bytes, Callable[[bytes], None]], None] = lambda piece, send: send(piece)
        self._open: list[socket.socket] = []
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
            except OSError:
                continue                       # a handshake that failed, or the end
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._path))
            self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server.sendall, server), daemon=True).start()
            threading.Thread(target=self._pump, daemon=True, args=(
                server, lambda piece, to=client: self.pass_on(piece, to.sendall), client)).start()

    def _pump(self, source: socket.socket, send: Callable[[bytes], None], target: socket.socket) -> None:
        try:
            while piece := source.recv(65536):
                send(piece)
        except OSError:
            pass
        finally:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)      # wakes the thread that accepts
        self._listener.close()
        for end in self._open:
            end.close()


@pytest.fixture
def relay(redis_server: EmbeddedRedis) -> Iterator[Relay]:
    one = Relay(redis_server.socket)
    yield one
    one.close()


def password(server: EmbeddedRedis) -> str:
    return str(parse(server.url).password)


def tier_on(url: str, **settings: float) -> RedisTier:
    return RedisTier(url, **{"limit_bytes": 32 * MIB, "layers": "0-4", "value_bytes": 2 * MIB, "read_s": 5.0,  # type: ignore[arg-type]
                             "write_s": 5.0, **settings})


def test_rediss_speaks_tls_and_checks_who_answers(redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    certificate, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout",
                    secret, "-out", certificate], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)
    relay = Relay(redis_server.socket, context)
    try:
        login = f":{password(redis_server)}@localhost:{relay.port}/0"
        tier = tier_on(f"rediss://{login}?ssl_ca_certs={certificate}", connect_s=5.0)
        value = bytes(range(256)) * 4096
        assert tier.put({KEY: [value]}) == {KEY} and tier.get([KEY]) == {KEY: value}
        for _ in range(20):
            assert tier.has([KEY]) == {KEY}
        assert tier.status().counters["connects"] <= 3, "connections are kept over TLS too"
        tier.delete([KEY])
        tier.close()
        probe(f"rediss://{login}?ssl_cert_reqs=none", within_s=5.0)
        for wrong in (f"rediss://{login}", f"rediss://{login.replace('localhost', '127.0.0.1')}?ssl_ca_certs={certificate}"):
            with pytest.raises(ConfigError, match="cannot be reached") as caught:
                probe(wrong, within_s=5.0)
            assert password(redis_server) not in str(caught.value)
    finally:
        relay.close()


def test_a_user_with_just_the_documented_commands_is_enough(redis_server: EmbeddedRedis) -> None:
    from kvbank.kvstore.tiers import redis_tier
    assert redis_tier.__doc__ is not None
    said = redis_tier.__doc__.split("for an ACL:")[1].split(", on keys")[0]
    admin = RedisConnection(parse(redis_server.url), connect_s=5.0, silence_s=5.0)
    rules = ["ACL", "SETUSER", "kv", "reset", "on", ">kvpw", "~kvb:*", *[f"+{word.lower()}" for word in said.split()]]
    assert admin.exchange([rules, ("DEL", b"kvb:index")], within_s=5.0)[0] == "OK"
    tier = tier_on(f"unix://kv:kvpw@{redis_server.socket}?db=0", limit_bytes=MIB, ttl_s=100)
    for number in range(12):                   # through making room, upkeep and a lost index
        assert tier.put({bytes([number]) * 32: [bytes(200_000)]})
    admin.exchange([("DEL", b"kvb:index")], within_s=5.0)
    assert tier.put({b"x" * 32: [bytes(200_000)]}) and tier.get([b"x" * 32])
    deadline = time.monotonic() + 10
    while tier.status().frames == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    tier.delete([b"x" * 32])
    assert not [name for name in tier.status().counters if name.startswith("refused_")], tier.status().counters
    tier.close()
    admin.close()


def test_another_client_reads_what_we_write_and_we_read_what_it_writes(redis_server: EmbeddedRedis) -> None:
    tier = tier_on(redis_server.url)
    other = redis.Redis(unix_socket_path=str(redis_server.socket), password=password(redis_server))
    tier.put({KEY: [b"head", bytes(MIB), b"tail"]})
    assert other.get(b"kvb:" + KEY + b":0-4") == b"head" + bytes(MIB) + b"tail"
    other.set(b"kvb:" + b"j" * 32 + b":0-4", b"foreign")
    assert tier.get([b"j" * 32]) == {b"j" * 32: b"foreign"}
    assert other.delete(b"kvb:" + KEY + b":0-4", b"kvb:" + b"j" * 32 + b":0-4") == 2
    tier.close()


def test_a_line_that_drips_is_given_up_within_its_bound_and_then_not_asked(
        redis_server: EmbeddedRedis, relay: Relay) -> None:
    """PING is quick on it and values never end: silence alone would not find that out."""
    direct = tier_on(redis_server.url)
    direct.put({KEY: [bytes(2 * MIB - 100)]})

    def drip(piece: bytes, send: Callable[[bytes], None]) -> None:
        for start in range(0, len(piece), 512):
            send(piece[start:start + 512])
            if len(piece) > 4096:
                time.sleep(0.01)
    relay.pass_on = drip
    slow = tier_on(f"redis://:{password(redis_server)}@127.0.0.1:{relay.port}", read_s=0.1, write_s=0.1)
    deadline = time.monotonic() + 60
    timeouts = 0
    while slow.status().counters["breaker_opened"] == 0 and time.monotonic() < deadline:
        try:
            assert slow.has([KEY]) == {KEY}, "small answers come"
            assert slow.get([KEY]) == {}
        except TierUnavailable as error:
            timeouts += error.reason == "timeout"
            time.sleep(0.005)                  # the background probe finds the line alive again
    assert slow.status().counters["breaker_opened"] == 1 and timeouts >= 4
    slow.close()
    direct.delete([KEY])
    direct.close()


@pytest.mark.parametrize("after", [0, 1, 5, 12, 1000, 70_000, 199_999])
def test_a_transfer_that_is_cut_at_any_byte_brings_nothing(
        redis_server: EmbeddedRedis, relay: Relay, after: int) -> None:
    url = f"redis://:{password(redis_server)}@127.0.0.1:{relay.port}"
    tier = tier_on(url, read_s=5.0)
    tier.delete([KEY])
    tier.put({KEY: [b"\x07" * 200_000]})
    passed = [0]

    def cut(piece: bytes, send: Callable[[bytes], None]) -> None:
        room = after - passed[0]
        passed[0] += len(piece)
        if room > 0:
            send(piece[:room])
        if passed[0] > after:
            raise OSError("cut")
    relay.pass_on = cut
    with pytest.raises(TierUnavailable) as caught:
        tier.get([KEY])
    assert caught.value.found == {} and caught.value.reason == "tier_down"
    relay.pass_on = lambda piece, send: send(piece)
    assert tier.get([KEY]) == {KEY: b"\x07" * 200_000}
    tier.delete([KEY])
    tier.close()
