"""Certificates for a cluster: an authority of its own, and one certificate for each role of its members.

    folder/ca.key  ca.pem  worker.key worker.pem  control.key control.pem  gateway.key gateway.pem  https.key https.pem

ca.key signs; it belongs on the operator's machine and nowhere else. A second run renews what the authority signed and keeps
the authority. Keys are made with mode 0600 in a folder of mode 0700, each file whole or not at all.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvbank.errors import ConfigError
from kvbank.kvstore.transport.badge import NAME, ROLES

HTTPS = "https"
CA_DAYS = 3650
BEHIND = timedelta(minutes=5)                # other machines' clocks may be a little late

Key = ec.EllipticCurvePrivateKey
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")


def make_certificates(folder: Path, *, names: Sequence[str] = (), days: int = 90, now: datetime | None = None) -> list[Path]:
    """Make or renew; the files written. names: what callers know the https gateway by, beside this machine's names for itself.
    Raises ConfigError."""
    now = now or datetime.now(UTC)
    called = [_general_name(name) for name in dict.fromkeys([*names, *LOOPBACK])]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority, key, written = _authority(folder, now)
        for role in ROLES:
            made = _sign(authority, key, role, [x509.DNSName(NAME), x509.DNSName(f"{role}.{NAME}")], now, days)
            written += _write(folder, role, *made)
        made = _sign(authority, key, HTTPS, called, now, days)
        return written + _write(folder, HTTPS, *made)
    except OSError as error:
        raise ConfigError(f"certificates cannot be written to {folder}: {error.strerror}") from error


def names_in(pem: Path) -> list[str]:
    """Host names and addresses that a certificate is for; clients look at its subjectAltName only. Raises ConfigError."""
    try:
        told = x509.load_pem_x509_certificate(pem.read_bytes()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    except (OSError, ValueError, x509.UnsupportedGeneralNameType) as error:
        raise ConfigError(f"{pem} is not a certificate whose names can be read") from error
    return [str(name.value) for name in told.value if isinstance(name, (x509.DNSName, x509.IPAddress))]


def expires(pem: Path) -> datetime:
    """When a certificate ends. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(pem.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pem} is not a certificate that can be read") from error


def check_certificates(folder: Path, *, now: datetime | None = None) -> None:
    """Of the roles whose certificates are here: signed by this ca.pem, and valid now. Else members would not hear each other,
    and nobody could say why. Raises ConfigError."""
    now = now or datetime.now(UTC)
    for role in ROLES:
        pem = folder / f"{role}.pem"
        if not pem.exists():
            continue                             # another machine's, or told by the member that needs it
        try:
            authorities = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
            certificate = x509.load_pem_x509_certificate(pem.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cluster.tls_dir: {pem} or its ca.pem cannot be read as a certificate: make new ones with "
                              f"`kvbank certs {folder}`") from error
        if not any(_signed(certificate, authority) for authority in authorities):
            raise ConfigError(f"cluster.tls_dir: {pem} was not signed by the authority in ca.pem beside it: copy both from "
                              "one `kvbank certs` folder")
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise ConfigError(f"cluster.tls_dir: {pem} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                              f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, which is not now: renew it with "
                              f"`kvbank certs {folder}`")


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _authority(folder: Path, now: datetime) -> tuple[x509.Certificate, Key, list[Path]]:
    if (folder / "ca.key").exists():
        try:
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            found = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
        except (ValueError, TypeError, FileNotFoundError) as error:      # damaged, encrypted, or half of a pair
            raise ConfigError(f"{folder / 'ca.key'} and ca.pem cannot be read as a pair: make certificates in a new "
                              "folder") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or found[0].public_key() != key.public_key():
            raise ConfigError(f"{folder / 'ca.key'} is not the key of ca.pem, or not one that kvbank made: make certificates "
                              "in a new folder")
        return found[0], key, []
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvbank cluster authority")])
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BEHIND).not_valid_after(now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_usage(sign=True), critical=True)
            .sign(key, hashes.SHA256()))
    return made, key, _write(folder, "ca", key, made)


def _sign(authority: x509.Certificate, key: Key, role: str, names: Sequence[x509.GeneralName], now: datetime,
          days: int) -> tuple[Key, x509.Certificate]:
    own = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kvbank {role}")])
    end = min(now + timedelta(days=days), authority.not_valid_after_utc)
    return own, (x509.CertificateBuilder().subject_name(subject).issuer_name(authority.subject).public_key(own.public_key())
                 .serial_number(x509.random_serial_number()).not_valid_before(now - BEHIND).not_valid_after(end)
                 .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                 .add_extension(x509.SubjectAlternativeName(names), critical=False)
                 .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                                critical=False)
                 .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
                 .add_extension(_usage(sign=False), critical=True)
                 .sign(key, hashes.SHA256()))


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not sign, key_cert_sign=sign, crl_sign=sign, content_commitment=False,
                         key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                         decipher_only=False)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _HOST.fullmatch(name) or len(name) > 253 or name.rpartition(".")[2].isdigit():      # the last: a mistyped address
        raise ConfigError(f"{name!r} cannot stand in a certificate: write a host name in ASCII (xn--...) or an address, without "
                          "scheme and port, one --name for each")
    return x509.DNSName(name)


def _write(folder: Path, name: str, key: Key, certificate: x509.Certificate) -> list[Path]:
    """The key first: who sees a new certificate finds its key."""
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = certificate.public_bytes(serialization.Encoding.PEM)
    paths = [folder / f"{name}.key", folder / f"{name}.pem"]
    for path, data, mode in zip(paths, (secret, public), (0o600, 0o644), strict=True):
        temporary = path.with_suffix(path.suffix + ".new")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        temporary.replace(path)
    return paths
