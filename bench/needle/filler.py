"""The corpus as token ids, cut into lines: what facts are hidden in, and what ordinary text is learned from."""

from __future__ import annotations

from random import Random

import numpy as np
from tokenizers import Tokenizer

from bench.needle.corpus import Piece

PROSE_IN = 0.75                          # of the pages: the rest is code


class Filler:
    """The pieces of one side of the split, encoded once. Cheap to draw from: no text is touched after the start."""

    def __init__(self, pieces: list[Piece], tokenizer: Tokenizer, *, held_out: bool) -> None:
        self._lines: dict[str, list[list[np.ndarray]]] = {"prose": [], "code": []}
        self._sizes: dict[str, list[int]] = {"prose": [], "code": []}
        for piece in pieces:
            if piece.held_out != held_out:
                continue
            encoded = tokenizer.encode_batch(piece.text.splitlines(keepends=True), add_special_tokens=False)
            lines = [np.asarray(line.ids, dtype=np.int32) for line in encoded]
            self._lines[piece.kind].append(lines)
            self._sizes[piece.kind].append(sum(map(len, lines)))

    def draw(self, rng: Random, tokens: int) -> list[np.ndarray]:
        """Consecutive lines of one piece or several, about `tokens` in all: the last line is cut to fit exactly."""
        kind = "prose" if rng.random() < PROSE_IN else "code"
        drawn: list[np.ndarray] = []
        while tokens > 0:
            piece = rng.choices(self._lines[kind], self._sizes[kind])[0]
            at = rng.randrange(len(piece))
            while tokens > 0 and at < len(piece):
                line = piece[at][:tokens]
                drawn.append(line)
                tokens, at = tokens - len(line), at + 1
        return drawn
