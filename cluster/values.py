"""One value of a setting: from what a user wrote to its own type and range, and how it may be shown.

Texts are accepted for every kind, because the environment has nothing else. What is wrong with a value is said in words
that follow the value itself ("loans.term_s = -1 ... is out of range").
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

MASK = "********"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse(rules: Mapping[str, Any], raw: Any) -> Any:
    """`raw` as the kind that `rules` name. Raises ValueError with the reason.

    rules: kind (int float bool str size path keys), and any of low, high, choices, pattern, none (None is allowed)
    """
    if raw is None or (rules.get("none") and isinstance(raw, str) and raw.strip().lower() in ("", "none", "null")):
        if not rules.get("none"):
            raise ValueError("may not be empty")
        return None
    value = _PARSERS[rules["kind"]](raw)
    low, high = rules.get("low"), rules.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"is out of range: {low if low is not None else 0} to {high}")
    if (choices := rules.get("choices")) and value not in choices:
        raise ValueError(f"is not one of {', '.join(choices)}")
    if (pattern := rules.get("pattern")) and not re.fullmatch(str(pattern), value):
        raise ValueError(f"does not have the form {pattern}")
    return value


def shown(rules: Mapping[str, Any], value: Any) -> Any:
    """The value as it may be printed: secrets, and passwords inside URLs, are masked."""
    if rules.get("secret_url") and isinstance(value, str):
        return re.sub(r"(?<=://)([^/@:]*:)?[^/@]*(?=@)", lambda found: (found[1] or "") + MASK, value)
    if not rules.get("secret") or not value:
        return value
    return {f"{MASK} ({at})": v for at, v in enumerate(value.values(), 1)} if isinstance(value, Mapping) else MASK


def size(raw: Any) -> int:
    """Bytes: a whole number, or a text like `256MiB`, `1.5 GB`, `0`."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        if raw < 0:
            raise ValueError("is negative")
        return raw
    match = re.fullmatch(r"\s*(\d{1,24}(?:\.\d{1,9})?)\s*([a-z]*)\s*", raw.lower()) if isinstance(raw, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError("is not a size like 1048576, 256MiB or 1.5GB")
    return int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]


def _int(raw: Any) -> int:
    try:
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise ValueError
        return int(raw)
    except ValueError:
        raise ValueError("is not a whole number") from None


def _float(raw: Any) -> float:
    try:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str) or not math.isfinite(value := float(raw)):
            raise ValueError
        return value
    except (ValueError, OverflowError):
        raise ValueError("is not a finite number") from None


def _bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.strip().lower() in _WORDS:
        return _WORDS[raw.strip().lower()]
    raise ValueError("is not true or false")


def _str(raw: Any) -> str:
    if not isinstance(raw, str) or "\0" in raw:
        raise ValueError("is not a text")
    return raw


def _path(raw: Any) -> str:
    """Absolute, so that a child process with another working directory means the same place."""
    if not isinstance(raw, str | os.PathLike) or not str(raw) or "\0" in str(raw):
        raise ValueError("is not a path")
    try:
        return str(Path(raw).expanduser().absolute())
    except (RuntimeError, UnicodeError):
        raise ValueError("begins with the home of somebody who is not known here") from None


def _keys(raw: Any) -> Mapping[str, str]:
    """{api key: tenant or tenant:role}; as text: JSON, or `key=tenant,key=tenant:ops`."""
    if isinstance(raw, str):
        raw = _keys_from_text(raw)
    if not isinstance(raw, Mapping):
        raise ValueError("is not a mapping of API key to tenant")
    for key, tenant in raw.items():
        if not isinstance(key, str) or not re.fullmatch(r"[\x21-\x7e]{1,512}", key):
            raise ValueError("has an API key that is empty, too long or not printable ASCII without spaces")
        if not isinstance(tenant, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}(:(user|ops))?", tenant):
            raise ValueError("has a tenant that is not 1 to 64 letters, digits, '.', '_' or '-', perhaps with `:ops` behind it")
    return MappingProxyType(dict(raw))


def _keys_from_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        return json.loads(text)
    pairs = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
    return {key: tenant for key, _, tenant in pairs}


_PARSERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType({
    "int": _int, "float": _float, "bool": _bool, "str": _str, "path": _path, "size": size, "keys": _keys,
})
