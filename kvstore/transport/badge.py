"""Badge: what a member shows to its peers, and what it asks of them. The cluster token always; certificates by choice.

    folder/ca.pem  worker.pem worker.key  control.pem control.key  gateway.pem gateway.key      (kvbank certs makes them)

With certificates every connection is encrypted and both sides prove that the cluster's own authority signed them, and as
what: a gateway may not lend, a worker may not submit jobs. Files are read again when they change, so certificates are
renewed without a restart: new connections use the new ones.
"""

from __future__ import annotations

import logging
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


@dataclass(frozen=True, slots=True)
class Certificates:
    """One member's certificate, key and the authority that it trusts, as PEM files."""

    folder: Path
    role: str

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(authority, certificate, key). Raises ConfigError, naming the file and the remedy."""
        try:
            ca, pem, key = (path.read_bytes() for path in self._paths())
        except OSError as error:
            raise ConfigError(f"cluster.tls_dir: {error.filename} cannot be read ({error.strerror}): make the certificates "
                              f"with `kvbank certs {self.folder}`, or copy {self.role}'s to this machine") from error
        return ca, pem, key

    def stamp(self) -> tuple[int, ...]:
        """Changes when a file does."""
        return tuple(path.stat().st_mtime_ns for path in self._paths())

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
        try:
            return () if self.certificates is None else self.certificates.stamp()
        except OSError:
            return ()

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
    """gRPC asks before each handshake: the new certificate once the files changed, None while they have not."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self._lock = Lock()
        self._stamp: tuple[int, ...] = ()

    def first(self) -> Any:
        made = self._read()
        self._stamp = self._certificates.stamp()
        return made

    def __call__(self) -> Any:
        with self._lock:
            try:
                stamp = self._certificates.stamp()
                if stamp == self._stamp:
                    return None
                made = self._read()
            except (OSError, ConfigError, ValueError):               # half written: the old one serves until it is whole
                log.warning("certificates_unreadable role=%s", self._certificates.role)
                return None
            self._stamp = stamp
            log.info("certificates_renewed role=%s", self._certificates.role)
            return made

    def _read(self) -> Any:
        ca, pem, key = self._certificates.read()
        return grpc.ssl_server_certificate_configuration([(key, pem)], root_certificates=ca)
