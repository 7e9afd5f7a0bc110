"""RedisAddress: which Redis, as its URL says. Shown without its password, always.

    redis://[user[:password]@]host[:port][/db]       rediss://… the same over TLS
    unix://[user[:password]@]/path/to/socket[?db=n]
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from kvbank.errors import ConfigError

_OPTIONS = {"db", "ssl_cert_reqs", "ssl_ca_certs", "ssl_check_hostname"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """Built by `parse`."""

    host: str = ""
    port: int = 6379
    numeric: str = ""                          # of the host, once it was resolved
    path: str = ""                             # of a unix socket; then host and port mean nothing
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: ssl.SSLContext | None = None

    @property
    def shown(self) -> str:
        """For messages and logs: no user, no password."""
        if self.path:
            return f"unix://{self.path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"


def parse(url: str) -> RedisAddress:
    """The address a URL means. Raises ConfigError that says what is wrong and never repeats the URL, or a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:                         # its text quotes what could not be read: maybe a piece of the password
        raise ConfigError("the Redis URL cannot be read: write redis://user:password@host:port/db, "
                          "with special characters of the password as %xx") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ConfigError("the Redis URL must begin with redis://, rediss:// or unix://")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - _OPTIONS):
        raise ConfigError(f"the Redis URL has unknown options {unknown}; known are {sorted(_OPTIONS)}")
    user, password = unquote(parts.username or "") or None, unquote(parts.password or "") or None
    if parts.scheme == "unix":
        if parts.hostname or not parts.path.startswith("/"):
            raise ConfigError("a unix:// Redis URL needs an absolute path: unix:///run/redis.sock")
        return RedisAddress(path=unquote(parts.path), user=user, password=password, db=_db(options.get("db", "0")))
    if not parts.hostname:
        raise ConfigError("the Redis URL names no host: write redis://host:port/db")
    db = options.get("db") or parts.path.strip("/") or "0"
    return RedisAddress(host=parts.hostname, port=port or 6379, user=user, password=password, db=_db(db),
                        tls=_tls(options) if parts.scheme == "rediss" else None)


def _db(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError("the database in the Redis URL must be a number, as in redis://host:6379/0")
    return int(text)


def _tls(options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    except OSError:
        raise ConfigError("ssl_ca_certs of the Redis URL names no readable certificate file") from None
    verify = options.get("ssl_cert_reqs", "required")
    if verify not in ("required", "none"):
        raise ConfigError("ssl_cert_reqs of the Redis URL must be required or none")
    if verify == "none" or options.get("ssl_check_hostname", "true").lower() in ("false", "no", "0"):
        context.check_hostname = False
    if verify == "none":
        context.verify_mode = ssl.CERT_NONE
    return context
