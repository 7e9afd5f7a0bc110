"""What Client and AsyncClient share: requests and answers as the gateway speaks them, and how long to wait. Sends nothing.

    Wire            address and credential; an answer becomes a value or a typed error
    StreamReader    server-sent events become deltas, and go on where they were after a break
    Waiting         a wait for a result, as a row of long polls
"""

from __future__ import annotations

import json
import math
import re
import ssl
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from kvbank.cluster.answers import Delta, Result, prompt_body
from kvbank.errors import DeadlineExceeded, InvalidRequest, KVBankError, Overloaded, Unavailable, from_code

CONNECT_S = 5.0
_NO_TLS = re.compile("wrong.version.number|record.layer.failure", re.IGNORECASE)     # as OpenSSL says it, old and new
POLL_S = 20.0                        # one long poll for a result
QUIET_S = 30.0                       # the gateway comments on a quiet stream every few seconds
STREAM_RETRIES = 3                   # reconnects in a row without news
LIMITS = httpx.Limits(max_connections=512, max_keepalive_connections=64)


class Broken(Unavailable):
    """The connection failed before an answer: what was asked may or may not have happened."""


class Wire:
    """Address, credential, and how answers become values or typed errors."""

    def __init__(self, address: str, api_key: str | None, timeout_s: float, ca: str | None = None) -> None:
        if not isinstance(address, str) or not address.strip():
            raise InvalidRequest("the address of a gateway looks like http://127.0.0.1:8000")
        if not timeout_s > 0:
            raise InvalidRequest(f"timeout_s must be above 0, not {timeout_s}")
        address = address.strip()
        self.address = (address if "://" in address else f"http://{address}").rstrip("/").removesuffix("/v1")
        try:
            url = httpx.URL(self.address)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{address!r} is not an address: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or len(address.split()) > 1:
            raise InvalidRequest(f"{address!r} is not an address: it looks like http://127.0.0.1:8000")
        self.timeout_s = timeout_s
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise InvalidRequest("an API key is printable ASCII without blanks around it")
        self._verify: ssl.SSLContext | bool = True
        if ca is not None:
            try:
                self._verify = ssl.create_default_context(cafile=ca)
                self._verify.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN       # the gateway's own certificate will do
            except (OSError, ssl.SSLError):
                raise InvalidRequest(f"{ca} is not a PEM file of certificates that can be read") from None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def options(self) -> dict[str, Any]:
        timeout = httpx.Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s))
        return {"base_url": self.address, "headers": self._headers, "timeout": timeout, "trust_env": False,
                "verify": self._verify}

    def broken(self, error: httpx.HTTPError) -> KVBankError:
        """A transport failure as the user should see it."""
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return Unavailable(f"{self.address} shows a certificate that is not trusted here: give its authority's PEM file "
                               "as `ca` (`--ca`), and use a name that stands in the certificate")
        if isinstance(error, httpx.ConnectError) and _NO_TLS.search(str(error)):
            return Unavailable(f"{self.address} does not speak https: write http://, or is it another program's port?")
        if isinstance(error, httpx.ConnectError) and "SSL" in str(error):
            return Unavailable(f"{self.address} speaks TLS, but not with this client ({error}): is it a kvbank gateway?")
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return Unavailable(
                f"nobody answers at {self.address}: is the cluster up (`kvbank status`), and is this the address that "
                "`kvbank up` printed?"
            )
        if isinstance(error, httpx.TimeoutException):
            return DeadlineExceeded(f"{self.address} did not answer within {self.timeout_s:g} s (timeout_s)")
        secret = "; or does it speak https: then write https://" if self.address.startswith("http:") else ""
        return Broken(f"the connection to {self.address} broke ({type(error).__name__}); try again{secret}")

    def read(self, status: int, raw: bytes) -> Any:
        """The JSON of a good answer; raises the typed error of a bad one."""
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise self._stranger(status)
        error = body.get("error")
        if status < 400:
            return body
        if not isinstance(error, dict) or not isinstance(error.get("code"), str):
            raise self._stranger(status)
        raise error_of(error)

    def _stranger(self, status: int) -> Unavailable:
        return Unavailable(f"{self.address} answered {status}, but not as a kvbank gateway does: is the address right?")


def error_of(body: dict[str, Any]) -> KVBankError:
    """The typed error in a gateway's error object."""
    error = from_code(str(body.get("code")), str(body.get("message", "")))
    if isinstance(body.get("param"), str):
        error.param = body["param"]
    if isinstance(error, Overloaded) and isinstance(body.get("retry_after_s"), (int, float)):
        error.retry_after_s = float(body["retry_after_s"])
    return error


@dataclass(slots=True)
class StreamReader:
    """Reads server-sent events into deltas and knows from where to go on after a break."""

    wire: Wire
    job_id: str
    index: int = 0
    tail_told: bool = False
    ended: bool = False
    breaks: int = 0
    _event: str = ""
    _data: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        self._event, self._data = "", []
        return f"{job_path(self.job_id)}/stream?from={self.index}"

    @property
    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(QUIET_S, connect=CONNECT_S)

    def take(self, line: str) -> Delta | None:
        """One line; a Delta when it completed one. Raises the job's error when it says so."""
        if line.startswith("event:"):
            self._event = line[6:].strip()
        elif line.startswith("data:"):
            self._data.append(line[5:].lstrip(" "))
        elif not line and self._data:
            name, data = self._event, json.loads("\n".join(self._data))
            self._event, self._data = "", []
            return self._dispatch(name, data)
        return None

    def closed(self) -> None:
        """The connection ended in good order; without the job's end that is a break as well."""
        if not self.ended:
            self.broke(httpx.RemoteProtocolError("the stream ended early"))

    def broke(self, error: httpx.HTTPError) -> None:
        """Note a broken connection; raises when it breaks again and again without news."""
        self.breaks += 1
        if self.breaks > STREAM_RETRIES or isinstance(error, httpx.ConnectError):
            raise self.wire.broken(error) from None

    def _dispatch(self, name: str, data: dict[str, Any]) -> Delta | None:
        if name == "done":
            self.ended = True
            if isinstance(data.get("error"), dict):
                raise error_of(data["error"])
        if name != "delta":
            return None
        self.breaks = 0
        ids, text = data["token_ids"], data["text"]
        if not ids:
            if self.tail_told:                       # a reconnect brought the flushed end again
                return None
            self.tail_told = True
        self.index = data["index"] + len(ids)
        return Delta(text=text, token_ids=ids)


@dataclass(slots=True)
class Waiting:
    """A wait for a result, as a row of long polls."""

    job_id: str
    timeout_s: float
    _until: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.timeout_s, (int, float)) or not self.timeout_s >= 0:
            raise InvalidRequest(f"timeout_s must be 0 or more, not {self.timeout_s}")
        self._until = time.monotonic() + self.timeout_s

    def options(self) -> dict[str, Any]:
        left = max(0.0, min(POLL_S, self._until - time.monotonic()))
        return {"params": {"wait_s": f"{left:.3f}"}, "timeout": httpx.Timeout(left + QUIET_S, connect=CONNECT_S)}

    def read(self, body: dict[str, Any]) -> Result | None:
        """The result if there is one; raises the job's error, or DeadlineExceeded when the wait is over."""
        if isinstance(body.get("error"), dict):
            raise error_of(body["error"])
        if "result" in body:
            return Result.read(body["result"])
        if time.monotonic() >= self._until:
            raise DeadlineExceeded(
                f"job {self.job_id} is not finished after {self.timeout_s:g} s; it runs on: call result again, or "
                "cancel it"
            )
        return None


def job_path(job_id: str) -> str:
    """Raises InvalidRequest for what cannot be a part of a path."""
    if not isinstance(job_id, str) or job_id in ("", ".", ".."):
        raise InvalidRequest(f"{job_id!r} is no job_id")
    return f"/v1/jobs/{quote(job_id, safe='')}"


def job_body(given: dict[str, Any]) -> dict[str, Any]:
    """The request of `submit` from its own arguments; without a job_id it gets one, so that a retry is harmless."""
    body = {name: value for name, value in given.items() if name != "self" and value is not None}
    body["prompt"] = prompt_body(given["prompt"])
    body.setdefault("job_id", f"job-{uuid.uuid4().hex}")
    for name in ("temperature", "top_p", "deadline_s"):
        if isinstance(body.get(name), float) and not math.isfinite(body[name]):
            raise InvalidRequest(f"{name} must be a finite number, not {body[name]}", param=name)
    return body


def as_bytes(options: dict[str, Any]) -> dict[str, Any]:
    """JSON is written here and not by httpx: a lone surrogate must reach the gateway's check, not break the encoder."""
    if "json" not in options:
        return options
    options = dict(options)
    body = options.pop("json")
    try:
        content = json.dumps(body, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be written as JSON: {error}") from None
    return {**options, "content": content, "headers": {"Content-Type": "application/json"}}
