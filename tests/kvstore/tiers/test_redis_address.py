"""Redis URLs: every form that users write, and never a password in what we say."""

from __future__ import annotations

import ssl

import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers.redis_address import parse


@pytest.mark.parametrize(("url", "expected"), [
    ("redis://localhost", {"host": "localhost", "port": 6379, "db": 0, "user": None, "password": None}),
    ("redis://10.0.0.1:7000/3", {"host": "10.0.0.1", "port": 7000, "db": 3}),
    ("redis://:pw@h:1/2", {"user": None, "password": "pw", "db": 2}),
    ("redis://me:p%40ss%2Fw%3A@h", {"user": "me", "password": "p@ss/w:"}),
    ("redis://h/?db=4", {"db": 4}),
    ("redis://[::1]:7001", {"host": "::1", "port": 7001}),
    ("unix:///run/r.sock", {"path": "/run/r.sock", "db": 0}),
    ("unix://me:pw@/run/r.sock?db=2", {"path": "/run/r.sock", "user": "me", "password": "pw", "db": 2}),
], ids=str)
def test_urls_mean_what_they_say(url: str, expected: dict) -> None:
    address = parse(url)
    assert {name: getattr(address, name) for name in expected} == expected and address.tls is None


def test_rediss_verifies_unless_it_is_told_not_to() -> None:
    strict = parse("rediss://h").tls
    assert strict is not None and strict.verify_mode == ssl.CERT_REQUIRED and strict.check_hostname
    loose = parse("rediss://h?ssl_cert_reqs=none").tls
    assert loose is not None and loose.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize("url", [
    "", "http://h", "redis://", "redis://h:port", "redis://u:SECRET@h:99999", "redis://u:SECRET@h/x",
    "redis://u:SECRET@h?nonsense=SECRET", "unix://relative/SECRET", "redis://u:SEC[RET@h", "rediss://h?ssl_ca_certs=/SECRET",
    "rediss://h?ssl_cert_reqs=SECRET", "redis://u:SECRET@h:66x/0"])
def test_a_wrong_url_is_a_config_error_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(url)
    assert "SEC" not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_neither_repr_nor_the_shown_form_tells_the_password() -> None:
    for url in ("redis://me:SECRET@h:7000/1", "unix://me:SECRET@/run/r.sock"):
        address = parse(url)
        assert "SECRET" not in repr(address) + str(address) + address.shown and "me" not in address.shown
