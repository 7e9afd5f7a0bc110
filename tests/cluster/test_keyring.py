"""Keys and their file: whatever keeps it from being read once, it is read when it can be."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kvbank.cluster.certs import make_certificates
from kvbank.cluster.http import keyring
from kvbank.cluster.http.keyring import WATCH_S, HttpsCertificate, Keyring
from kvbank.errors import ConfigError


class Ring:
    """A keyring whose clock the test moves."""

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, 0.0
        self.write("old: alice\n")
        self.keys = Keyring(path, clock=lambda: self.now)

    def write(self, text: str) -> None:
        beside = self.path.with_suffix(".new.yaml")
        beside.write_text(text)
        os.replace(beside, self.path)

    def look(self) -> list[str]:
        self.now += WATCH_S
        return list(self.keys())


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return Ring(tmp_path / "keys.yaml")


def test_a_new_file_is_read_within_a_second(ring: Ring) -> None:
    ring.write("new: alice\n")
    assert list(ring.keys()) == ["old"], "it was looked at just now"
    assert ring.look() == ["new"]


def test_a_file_that_could_not_be_opened_is_read_when_it_can_be(ring: Ring, monkeypatch, caplog) -> None:
    """Too many open files, say: nothing of the file changes when they are closed again."""
    ring.write("new: alice\n")
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(keyring, "read_keys", _refuse)
        assert [ring.look() for _ in range(3)] == [["old"]] * 3
        assert [record.message for record in caplog.records] == ["api_keys_unreadable"], "once, not every second"
    assert ring.look() == ["new"]


def _refuse(_path: Path) -> dict[str, str]:
    raise ConfigError("too many open files")


def test_a_file_with_the_time_and_the_size_of_the_old_one_is_another(ring: Ring) -> None:
    before = ring.path.stat()
    ring.write("new: alice\n")
    os.utime(ring.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ring.path.stat().st_size == before.st_size and ring.look() == ["new"]


@pytest.mark.parametrize("text", ["", "[]", "a: b: c", "k: 'x:root'"])
def test_a_file_of_no_use_changes_nothing_until_it_is_mended(ring: Ring, text: str) -> None:
    ring.write(text)
    assert ring.look() == ["old"]
    ring.path.unlink()
    assert ring.look() == ["old"]
    ring.write("new: alice\n")
    assert ring.look() == ["new"]


def test_a_certificate_of_no_use_is_told_once_and_the_old_one_serves_until_it_is_mended(tmp_path: Path, caplog) -> None:
    make_certificates(tmp_path)
    pem, key = tmp_path / "https.pem", tmp_path / "https.key"
    certificate, sound = HttpsCertificate(pem, key), pem.read_bytes()
    with caplog.at_level(logging.INFO):
        for written in (sound[:100], sound + b"\n"):
            pem.write_bytes(written)
            for _ in range(3):
                certificate.renew()
    assert [record.message for record in caplog.records] == ["https_certificate_unreadable", "https_certificate_renewed"]
