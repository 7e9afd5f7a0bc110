"""Badge: what a member shows to its peers, and what it asks of them. The cluster token always; certificates by choice.

    folder/ca.pem  worker.pem worker.key  control.pem control.key  gateway.pem gateway.key      (kvbank certs makes them)

With certificates every connection is encrypted and both sides prove that the cluster's own authority signed them, and as
what: a gateway may not lend, a worker may not submit jobs. Files are read again when they change, so certificates are
renewed without a restart: new connections use the new ones.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import grpc

from kvbank.errors import ConfigError

log = logging.getLogger(__name__)

WORKER, CONTROL, GATEWAY = "worker", "control", "gateway"
ROLES = (WORKER, CONTROL, GATEWAY)
NAME = "kvbank"                              # members have addresses, not names: this one stands in every certificate
SAN_KEY = "x509_subject_alternative_name"

# Who may call which service; of one method where it differs. What is not here is refused.
CALLERS: Mapping[str, tuple[str, ...]] = {
    "kvbank.Control": (WORKER,), "kvbank.Control/Snapshot": (WORKER, GATEWAY), "kvbank.Control/Locate": (WORKER, GATEWAY),
    "kvbank.Jobs": (GATEWAY,), "kvbank.Ops": (GATEWAY,), "kvbank.Bank": (WORKER,), "kvbank.Shard": (WORKER,),
}


def file_stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file's content, whatever was done to keep the time of writing, and with who may read it. Raises
    OSError."""
    found = path.stat()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class Certificates:
    """One member's certificate, key and the authority that it trusts, from PEM files. Thread-safe.

    Once they have been read whole, nothing about the files is an error any more: what was read last is used until something
    new is there whole, its key fitting its certificate. So files may be copied over the old ones in any order.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self.folder, self.role = folder, role
        self._lock = Lock()
        self._seen: tuple[int, ...] = ()     # of the files that were looked at last
        self._told: tuple[int, ...] | None = None    # of those of which the log says that they are of no use
        self._good: tuple[tuple[int, ...], tuple[bytes, bytes, bytes]] | None = None

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(authority, certificate, key). Raises ConfigError, naming the remedy, as long as they never were there whole."""
        return self._current()[1]

    def stamp(self) -> tuple[int, ...]:
        """Changes when `read` gives something else. Raises ConfigError as it does."""
        return self._current()[0]

    def _current(self) -> tuple[tuple[int, ...], tuple[bytes, bytes, bytes]]:
        with self._lock:
            try:
                stamp = self._stamp()
                if self._good is None or stamp != self._seen:
                    self._seen = stamp
                    made = self._whole()
                    if self._stamp() != stamp:                       # written on meanwhile
                        self._seen = ()
                    elif self._good is None or self._good[1] != made:    # a new mode or name alone renews nothing
                        self._good = (stamp, made)
                        log.info("certificates_read role=%s", self.role)
            except (OSError, ssl.SSLError) as error:
                if not isinstance(error, ssl.SSLError):              # unread: next time they may be readable as they are
                    self._seen = ()
                if self._good is None:
                    raise ConfigError(f"cluster.tls_dir: {self.role}.pem, its key and ca.pem cannot be read and used: make them "
                                      f"with `kvbank certs {self.folder}`, or copy {self.role}'s to this machine") from error
                if self._told != (now := self._there()):
                    log.warning("certificates_unreadable role=%s", self.role)
                self._told = now
            if self._good is None:
                raise ConfigError(f"cluster.tls_dir: the certificates in {self.folder} are being written: try again")
            return self._good

    def _whole(self) -> tuple[bytes, bytes, bytes]:
        ca, pem, key = self._paths()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(ca)
        context.load_cert_chain(pem, key, password="")                            # raises when the key is another one's
        return ca.read_bytes(), pem.read_bytes(), key.read_bytes()

    def _stamp(self) -> tuple[int, ...]:
        return tuple(part for path in self._paths() for part in file_stamp(path))

    def _there(self) -> tuple[int, ...]:
        with contextlib.suppress(OSError):
            return self._stamp()
        return ()

    def _paths(self) -> tuple[Path, Path, Path]:
        return self.folder / "ca.pem", self.folder / f"{self.role}.pem", self.folder / f"{self.role}.key"


@dataclass(frozen=True, slots=True)
class Badge:
    """The cluster token, and certificates where the cluster has them."""

    token: str = field(repr=False)
    certificates: Certificates | None = None

    @classmethod
    def of(cls, shown: Badge | str) -> Badge:
        """A token alone is a badge without certificates."""
        return cls(shown) if isinstance(shown, str) else shown

    @classmethod
    def of_member(cls, config: Mapping[str, Any]) -> Badge:
        """From a member's configuration: its token, its kind and `tls_dir` of its settings."""
        folder = config["settings"].get("tls_dir")
        role = config["kind"] if config["kind"] in ROLES else WORKER
        return cls(config["token"], Certificates(Path(folder), role) if folder else None)

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """None: in clear. Raises ConfigError."""
        if self.certificates is None:
            return None
        watch = _Renewed(self.certificates)
        return grpc.dynamic_ssl_server_credentials(watch.first(), watch, require_client_authentication=True)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """None: in clear. Raises ConfigError."""
        if self.certificates is None:
            return None
        ca, pem, key = self.certificates.read()
        return grpc.ssl_channel_credentials(ca, key, pem)

    def stamp(self) -> tuple[int, ...]:
        """Changes when the certificates were renewed: a channel shows for its whole life those that it was made with."""
        return () if self.certificates is None else self.certificates.stamp()

    def check(self, method: str) -> Callable[[grpc.ServicerContext], None] | None:
        """What aborts a call of `/service/method` by a peer whose certificate does not allow it; None: nothing to check."""
        if self.certificates is None:
            return None
        service, _, _ = method.strip("/").partition("/")
        allowed = CALLERS.get(method.strip("/"), CALLERS.get(service, ()))
        names = {f"{role}.{NAME}".encode() for role in allowed}

        def check(context: grpc.ServicerContext) -> None:
            if names.isdisjoint(context.auth_context().get(SAN_KEY, ())):
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "forbidden: this certificate's role may not make this call")

        return check


class _Renewed:
    """gRPC asks before each handshake: the new certificate once there is one, None while there is not."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self._lock = Lock()
        self._stamp = certificates.stamp()

    def first(self) -> Any:
        return self._made()

    def __call__(self) -> Any:
        with self._lock:
            if (stamp := self._certificates.stamp()) == self._stamp:
                return None
            self._stamp = stamp
            return self._made()

    def _made(self) -> Any:
        ca, pem, key = self._certificates.read()
        return grpc.ssl_server_certificate_configuration([(key, pem)], root_certificates=ca)
