"""Fields: a request's JSON, read field by field; what is wrong is an InvalidRequest that names the field and shows the value.

Knows JSON and text, and no field by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from kvbank.errors import InvalidRequest

MAX_DEPTH = 32                       # of a JSON body; ours need six


class Fields:
    """A JSON object read field by field. An absent or null field is its default; a wrong one raises InvalidRequest."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def refuse_unknown(self, known: frozenset[str]) -> None:
        if unknown := sorted(set(self._body) - known):
            raise InvalidRequest(f"unknown field {shown(unknown[0])}; known ones are {', '.join(sorted(known))}")

    def raw(self, name: str) -> Any:
        """As it was sent; None where it was not."""
        return self._body.get(name)

    def integer(self, name: str, default: Any, *, low: int, high: int) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise InvalidRequest(f"{name} must be an integer from {low} to {high}, not {shown(value)}")
        return value

    def number(self, name: str, default: Any, *, low: float, high: float, open_low: bool = False) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        fits = type(value) in (int, float) and low <= value <= high and not (open_low and value == low)
        if not fits or not math.isfinite(value):
            border = "above" if open_low else "from"
            raise InvalidRequest(f"{name} must be a number {border} {low:g} to {high:g}, not {shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, not {shown(value)}")
        return value

    def text(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be a string, not {shown(value)}")
        return value


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
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: character {error.start} is a lone surrogate, which no text can contain"
        ) from None


def shown(value: Any) -> str:
    """A value for an error message: short, printable, and never a prompt."""
    if isinstance(value, (bool, int, float)):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        return text
    if isinstance(value, str) and len(value) <= 40:
        return ascii(value)
    return f"a {type(value).__name__}"
