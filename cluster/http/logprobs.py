"""Log-probabilities as OpenAI's two dialects write them: four lists side by side (completions), a list of objects (chat).

They are natural logarithms of the model's own distribution, before temperature, top_k and top_p. A token that the softmax
gives nothing is told as FLOOR, because JSON has no infinity.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from kvbank.cluster.fields import Fields
from kvbank.cluster.intake import MAX_LOGPROBS, Pieces
from kvbank.cluster.job import Logprob
from kvbank.errors import InvalidRequest

FLOOR = -9999.0


def wanted_by_completion(fields: Fields) -> int | None:
    """`logprobs`: likely tokens wanted; None: no log-probabilities. Raises InvalidRequest."""
    value = fields.raw("logprobs")
    return None if value is False else fields.integer("logprobs", None, low=0, high=MAX_LOGPROBS)


def wanted_by_chat(fields: Fields) -> int | None:
    """`logprobs` says whether, `top_logprobs` how many likely tokens. Raises InvalidRequest."""
    likely: int | None = fields.integer("top_logprobs", None, low=0, high=MAX_LOGPROBS)
    if fields.flag("logprobs", False):
        return likely or 0
    if likely:
        raise InvalidRequest("top_logprobs needs logprobs: true beside it", param="top_logprobs")
    return None


class Offsets:
    """Where each token's text begins in the text of its choice, in characters."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._at, self._first = pieces, 0, True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens. One that only goes on with a character begins where that character does."""
        found = []
        for token in ids:
            found.append(self._at)
            self._at += len(self._decoder.decode(self._pieces.shown(token, first=self._first)))
            self._first = False
        return found


def completion_logprobs(
    pieces: Pieces, ids: Sequence[int], told: Sequence[Logprob | None], offsets: Sequence[int]
) -> dict[str, Any]:
    """`told` beside `ids`. The likeliest tokens come by their text, the drawn one always among them."""
    likely: list[dict[str, float] | None] = []
    for token, each in zip(ids, told, strict=True):
        if each is None:
            likely.append(None)
            continue
        by_text: dict[str, float] = {}
        for other, value in each.likely():
            by_text.setdefault(_text(pieces, other), _number(value))     # two tokens of one text: the likelier counts
        by_text.setdefault(_text(pieces, token), _number(each.drawn))
        likely.append(by_text)
    return {"tokens": [_text(pieces, token) for token in ids],
            "token_logprobs": [None if each is None else _number(each.drawn) for each in told],
            "top_logprobs": likely, "text_offset": list(offsets)}


def chat_logprobs(pieces: Pieces, ids: Sequence[int], told: Sequence[Logprob | None]) -> dict[str, Any]:
    """`told` beside `ids`; a token that came without is left out."""
    content = [{**_entry(pieces, token, each.drawn), "top_logprobs": [_entry(pieces, *other) for other in each.likely()]}
               for token, each in zip(ids, told, strict=True) if each is not None]
    return {"content": content, "refusal": None}


def _entry(pieces: Pieces, token: int, value: float) -> dict[str, Any]:
    piece = pieces.piece(token)
    return {"token": piece.decode(errors="replace"), "logprob": _number(value), "bytes": list(piece)}


def _text(pieces: Pieces, token: int) -> str:
    """A token as completions write it: its text, or its bytes where they are not whole characters."""
    piece = pieces.piece(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _number(value: float) -> float:
    return max(value, FLOOR) if math.isfinite(value) else FLOOR
