"""Fields: a request's JSON, read field by field; what is wrong is an InvalidRequest that names the field and shows the value.

Knows JSON and text, and no field by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from kvbank.errors import InvalidRequest

MAX_DEPTH = 32                       # of a JSON body; ours need six
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")


class Fields:
    """A JSON object read field by field. An absent or null field is its default; a wrong one raises InvalidRequest."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        """where: path of the object within the request; empty for the request itself."""
        self._body, self._prefix = body, where + "." if where else ""

    def refuse_unknown(self, known: frozenset[str]) -> None:
        if unknown := sorted(set(self._body) - known):
            raise InvalidRequest(f"unknown field {shown(unknown[0])}; known ones are {', '.join(sorted(known))}",
                                 param=self._prefix + unknown[0] if _NAME.fullmatch(unknown[0]) else None)

    def raw(self, name: str) -> Any:
        """As it was sent; None where it was not."""
        return self._body.get(name)

    def integer(self, name: str, default: Any, *, low: int, high: int) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, default: Any, *, low: float, high: float, open_low: bool = False) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        fits = type(value) in (int, float) and low <= value <= high and not (open_low and value == low)
        if not fits or not math.isfinite(value):
            border = "above" if open_low else "from"
            raise self._wrong(name, f"a number {border} {low:g} to {high:g}", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def _wrong(self, name: str, wanted: str, value: Any) -> InvalidRequest:
        path = self._prefix + name
        return InvalidRequest(f"{path} must be {wanted}, not {shown(value)}", param=path)


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises InvalidRequest for anything else, however it is malformed."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        at = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the body is not valid JSON{at}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _deeper_than(body, MAX_DEPTH):
        raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} deep")
    return body


def _deeper_than(body: Any, depth: int) -> bool:
    level = [body]
    for _ in range(depth):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
    return bool(level)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_text(text: str, where: str) -> None:
    """Raises InvalidRequest for text that no encoding has. where: the field, or a path into it such as stop[1]."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: character {error.start} is a lone surrogate, which no text can contain", param=where
        ) from None


def shown(value: Any) -> str:
    """A value for an error message: short, printable, and never a prompt."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        return text
    if isinstance(value, str) and len(value) <= 40:
        return ascii(value)
    return f"a {type(value).__name__}"
