"""Token ids in, text out, as early as it is certain. Imports no torch: the gateway uses it.

    ids      ... already shown | context (8) | pending ............ |
    text                         base        | definite      | open |
                                                                ^ half a character, or bytes whose run has not ended
    stops    definite text        | shown now | may begin a stop string: kept back |

The joined deltas are `tokenizer.decode(ids)` up to the stop string that ends first; where two end together, the longer.
Only a small window of ids is decoded again for each push. It relies on one property of decoders: the text of some ids
is the beginning of the text of these ids and more, except for what is called open above.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from kvbank.errors import InvalidRequest

CONTEXT = 8                                  # ids decoded again so that a first-token rule (strip a space) hits them
WINDOW = 8                                   # pending ids at which the window moves on
HALF = "\ufffd"                              # how decoders show a character that is incomplete or invalid


@dataclass(frozen=True, slots=True)
class Rules:
    """What decoding does beyond the text of each token."""

    special: frozenset[int]                  # tokens that it leaves out before all else, as ids of no token
    byte_runs: bool                          # tokens like <0xE2> stand for bytes (sentencepiece models), not for themselves

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Rules:
        special = frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)
        decoder = tokenizer.decoder
        return cls(special, decoder is not None and '"ByteFallback"' in json.dumps(json.loads(decoder.__getstate__())))


class TextStream:
    """The text of one answer while its tokens arrive. Raises InvalidRequest for an empty stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, rules: Rules | None = None) -> None:
        """rules: of the tokenizer, for who opens many."""
        if any(not text for text in stop):
            raise InvalidRequest("a stop string is empty; leave it out")
        self._tokenizer = tokenizer
        self._stops = tuple(stop)
        self._window: list[int] = []         # context and pending ids
        self._shown = 0                      # characters of the window's text that were already taken
        self._held = ""                      # definite text that may begin a stop string
        self._rules = rules or Rules.of(tokenizer)
        self.stopped = False                 # a stop string was found; what follows it is ignored

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids and is safe to show; often shorter or longer than theirs."""
        special, piece = self._rules.special, self._tokenizer.id_to_token
        seen = [token for token in token_ids if token not in special and piece(token) is not None]
        if self.stopped or not seen:
            return ""
        self._window += seen
        if self._rules.byte_runs and self._ends_in_byte_run():
            return ""                        # one invalid byte would turn the whole run into U+FFFD
        text = self._decode(self._window)
        # An incomplete character is shown as exactly one U+FFFD; all before it can no longer change.
        definite = text[self._shown : len(text) - text.endswith(HALF)]
        self._shown += len(definite)
        if len(self._window) > CONTEXT + WINDOW:
            self._move_on(open_characters=len(text) - self._shown)
        return self._show(definite)

    def finish(self) -> str:
        """What was kept back, now that nothing more comes; half a character becomes U+FFFD. Safe to repeat."""
        if self.stopped:
            return ""
        rest = self._decode(self._window)[self._shown :]
        self._shown += len(rest)
        delta = self._show(rest)
        if not self.stopped:
            delta, self._held = delta + self._held, ""
        return delta

    def _decode(self, ids: list[int]) -> str:
        try:
            return str(self._tokenizer.decode(ids))
        except BaseException as error:               # a panic in Rust is no Exception, and must cost no more than this answer
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise RuntimeError("the tokenizer's decoder panicked") from None

    def _show(self, definite: str) -> str:
        """Adds definite text; returns the part in front of a stop string, or of what may become one."""
        if not self._stops:
            return definite
        text = self._held + definite
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = text[: min(found)[1]], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return text

    def _move_on(self, open_characters: int) -> None:
        """Forget all ids but the last few, unless these alone show nothing (they could not take the strip then)."""
        context = self._window[-CONTEXT:]
        base = self._decode(context)
        if len(base) > open_characters:
            self._window, self._shown = context, len(base) - open_characters

    def _ends_in_byte_run(self) -> bool:
        piece = self._tokenizer.id_to_token(self._window[-1]) or ""
        return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
