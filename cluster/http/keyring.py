"""Keyring: the API keys that are valid now, and the https certificate, read again when their files change.

A change is seen within WATCH_S, without a restart. A file that cannot be read or parsed any more changes nothing: what was
valid stays valid, and the log says so. Knows no routes.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kvbank.cluster.config import read_keys
from kvbank.errors import ConfigError
from kvbank.kvstore.transport.badge import file_stamp

log = logging.getLogger(__name__)

WATCH_S = 1.0                                # between two looks at a file

Stamp = tuple[int, ...]


class Keyring:
    """Call it for the keys of a file: `{key: tenant or tenant:role}`, the same object until they change. Thread-safe."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError."""
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._told: Stamp | None = None              # of a file that could not be read
        self._keys = _some(read_keys(path), path)
        self._looked_at = clock()

    def __call__(self) -> Mapping[str, str]:
        with self._lock:
            if self._clock() >= self._looked_at + WATCH_S:
                self._looked_at = self._clock()
                self._look()
            return self._keys

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp is None or stamp == self._stamp:
            return
        try:
            self._keys = _some(read_keys(self._path), self._path)
            log.info("api_keys_renewed keys=%d", len(self._keys))
        except ConfigError:                          # its text may hold what stands in the file
            if stamp != self._told:
                log.warning("api_keys_unreadable")
            self._told = stamp                       # once each; it is looked at again, it may have been out of reach
        else:
            self._stamp = stamp


class HttpsCertificate:
    """A TLS context for the server. `renew` reads the files again when they changed; new connections get the new one."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises ConfigError."""
        self._files = (certificate, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._stamp = self._told = self._stamps()
        try:
            self.context.load_cert_chain(*self._files, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"http.tls_cert {certificate} and http.tls_key cannot be used: they must be a PEM certificate "
                              "and its key, readable by this user and not encrypted") from error

    def renew(self) -> None:
        """Cheap; call it now and then."""
        stamp = self._stamps()
        if stamp == self._stamp or None in stamp:
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files, password="")   # half written: nothing changes
            self.context.load_cert_chain(*self._files, password="")
            log.info("https_certificate_renewed")
        except (OSError, ssl.SSLError):
            if stamp != self._told:
                log.warning("https_certificate_unreadable")
            self._told = stamp                       # as of keys
            return
        self._stamp = stamp

    def _stamps(self) -> tuple[Stamp | None, ...]:
        return tuple(_stamp(path) for path in self._files)


def _stamp(path: Path) -> Stamp | None:
    try:
        return file_stamp(path)
    except OSError:
        return None


def _some(keys: Mapping[str, str], path: Path) -> Mapping[str, str]:
    """An empty file would open the door to everybody."""
    if not keys:
        raise ConfigError(f"http.api_keys_file {path} holds no key")
    return keys
