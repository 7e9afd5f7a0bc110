"""Logs: how every member writes what happened, one event a line, as key=value or as JSON, without a secret in it.

    log.info("job_attempt_lost job=%s attempt=%d", wire_id, 2)
  time=2026-01-31T12:00:00.250Z level=info member=gateway logger=kvbank.cluster.gateway event=job_attempt_lost job=j-1 attempt=2
  {"time": "...", "level": "info", "member": "gateway", ..., "event": "job_attempt_lost", "job": "j-1", "attempt": 2}

The message's template gives the names and its arguments the values, so a value with a space or a quote stays one value.
Of an exception the type and the way to it are written, its own words only where they are ours or the system's: others may
quote what a caller sent. What the member knows as secret is masked wherever it still turns up. Other libraries' records
keep their first line alone, of an exception only what stands before the first colon.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from kvbank.cluster.values import MASK
from kvbank.errors import ConfigError, ModelError, Unavailable
from kvbank.kvstore.logged_errors import OF_THIS_PROCESS

_TOKEN = re.compile(r"(?:(\w+)=)?(\S+)")
_CONVERSION = re.compile(r"%[-#0 +]*\d*(?:\.\d+)?[diouxXeEfFgGcrsa]")
_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f]+")
_WORDED_BY_US = (ConfigError, ModelError, Unavailable)
_OF_THE_SYSTEM = ("builtins", "socket", "ssl")       # modules of such OSErrors; others are libraries' own
_SHORTEST_SECRET = 4                 # masking shorter ones would mask everything else
_FRAMES = 12
_CAUSES = 16                         # steps back: a chain may be a ring
_LONGEST = 2000                      # characters of one value

log = logging.getLogger(__name__)


class Line(logging.Formatter):
    """One record as one line of one format."""

    def __init__(self, member: str, *, as_json: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._member, self._as_json = member, as_json
        self._secrets = sorted({s for s in secrets if len(s) >= _SHORTEST_SECRET}, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        made = {
            "time": f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "member": self._member, "logger": record.name,
        }
        for name, value in (*_said(record), *_raised(record)):
            made[f"{name}_" if name in made else name] = self._masked(value)
        if self._as_json:
            return json.dumps(made, ensure_ascii=False)
        return " ".join(f"{name}={_quoted(value)}" for name, value in made.items())

    def _masked(self, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        text = str(value)
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text[:_LONGEST]


def set_up(member: str, settings: Mapping[str, Any], secrets: Iterable[str] = (), *, to: IO[str] | None = None) -> None:
    """All logging of this process goes to `to` (stderr) in the format of the settings; also what threads die of. Errors are
    counted from here on."""
    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(Line(member, as_json=settings.get("format") == "json", secrets=secrets))
    logging.basicConfig(level=str(settings.get("level", "info")).upper(), handlers=[handler, OF_THIS_PROCESS], force=True)
    for foreign in ("httpx", "httpcore", "uvicorn.access"):      # they write addresses of requests
        logging.getLogger(foreign).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)   # below it are lines that any stranger's request can ask for
    logging.raiseExceptions = False                  # or a record that cannot be written is printed with its arguments
    threading.excepthook = _thread_died
    sys.excepthook = _process_died


def secrets_of(config: Mapping[str, Any]) -> list[str]:
    """What a member's config holds that must be in no log: tokens, API keys, Redis' password."""
    settings = config.get("settings", {})
    found = [config.get("token", ""), config.get("cache_secret", ""), settings.get("cache_secret") or "",
             *settings.get("api_keys", {})]
    password = urlsplit(settings.get("redis") or "").password or ""
    return [str(secret) for secret in (*found, password, unquote(password)) if secret]


def _said(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """The event and its fields, by the template where it is one of ours."""
    args = record.args if isinstance(record.args, tuple) else ()
    template = str(record.msg)
    if not record.name.startswith("kvbank") or len(_CONVERSION.findall(template)) != len(args):
        yield "event", "message"
        message = (_message(record).splitlines() or [""])[0]
        yield "message", message.partition(":")[0] if record.exc_info else message      # its own words would follow
        return
    words: list[str] = []
    fields: list[tuple[str, Any]] = []
    left = iter(args)
    for name, shape in _TOKEN.findall(template):
        if not name:
            words.append(shape)
            continue
        given = [next(left) for _ in _CONVERSION.findall(shape)]
        whole = len(given) == 1 and _CONVERSION.fullmatch(shape)
        fields.append((name, given[0] if whole and isinstance(given[0], int | float) and shape.endswith("d") else
                       shape % tuple(given) if given else shape))
    yield "event", "_".join(words)
    yield from fields


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):        # its template and its arguments do not agree
        return str(record.msg)


def _raised(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """The exception, and the one that it began with: its cause, or what was being handled, and so on back."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return
    first = error
    for _ in range(_CAUSES):
        before = first.__cause__ or (None if first.__suppress_context__ else first.__context__)
        if before is None:
            break
        first = before
    yield from _one_of(error, "error_type", "error_text", "at")
    if first is not error:
        yield from _one_of(first, "cause_type", "cause_text", "cause_at")


def _one_of(error: BaseException, kind: str, text: str, at: str) -> Iterator[tuple[str, Any]]:
    yield kind, type(error).__name__
    if isinstance(error, _WORDED_BY_US) or (isinstance(error, OSError) and type(error).__module__ in _OF_THE_SYSTEM):
        yield text, str(error)
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    yield at, " > ".join(f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in frames)


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _thread_died(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread is not None else "?"
        log.critical("thread_died thread=%s", name,
                     exc_info=(args.exc_type, args.exc_value, args.exc_traceback) if args.exc_value is not None else None)


def _process_died(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("process_died", exc_info=(kind, error, trace))
