"""Span and SpanTable: where the KV of a sequence is, piece by piece, and which intervals of it are missing.

A span is `span_tokens` tokens counted from position 0. Sequences with a common prefix share Span objects, so a span that
moves, or is lost, changes in one place for all of them.

    token      0        128       256       384  400
    spans      [ local  ][ remote ][  lost  ][ local ]
    holes                           [256,384)          and always the token not computed yet: [399,400)

Knows intervals and holders; knows nothing of bytes, threads or the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from kvbank.kvstore.layout import BlockKey, SlotId

_uids = count(1)


def new_uid() -> int:
    """A name for a span that will exist; unique in this process."""
    return next(_uids)


LOCAL, REMOTE, HOST, GONE = "local", "remote", "host", "gone"


@dataclass(eq=False, slots=True)
class Span:
    """One piece of KV and its one reader-visible place. Identity matters: sequences share the object."""

    slot: SlotId | None                   # when LOCAL; while a copy is on its way elsewhere it stays LOCAL
    place: str = LOCAL                    # LOCAL | REMOTE | HOST | GONE
    refs: int = 0                         # sequences that read it
    keys: list[BlockKey] = field(default_factory=list)   # of its full blocks, in order
    tokens: bytes = b""                   # token ids of those blocks, int32-LE
    parent: bytes = b""                   # key of the block before the first, or the tenant's root
    digest: bytes = b""                   # of its bytes, when a lender sealed them
    moving: bool = False                  # a copy is under way (lend, return): do not move it again
    lender: str = ""                      # member id, when REMOTE
    owner: str = ""                       # the tenant that it counts against
    tail_blocks: int = 0                  # that many of its blocks end a prompt: whoever asks again knows no later key
    uid: int = field(default_factory=new_uid)

    def prompt_tail(self) -> Span | None:
        """The blocks that end a prompt, as a span over the same slot; None when the prompt ends with the span, or elsewhere.

        A full span is stored and found under the key of its last block. Where that block holds an answer, only the
        single blocks before it can be found by the same prompt again.
        """
        if not 0 < self.tail_blocks < len(self.keys):
            return None
        tokens = self.tokens[: len(self.tokens) // len(self.keys) * self.tail_blocks]
        return Span(slot=self.slot, keys=self.keys[: self.tail_blocks], tokens=tokens, parent=self.parent)


class Holes:
    """A set of half-open intervals of positions whose KV is not there. Kept sorted, disjoint and merged."""

    __slots__ = ("_spans",)

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._spans)

    def __iter__(self) -> object:
        return iter(self._spans)

    def __len__(self) -> int:
        """Positions missing in all."""
        return sum(b - a for a, b in self._spans)

    @property
    def lowest(self) -> tuple[int, int]:
        """The first interval. There must be one."""
        return self._spans[0]

    def intervals(self) -> list[tuple[int, int]]:
        return list(self._spans)

    def add(self, start: int, stop: int) -> None:
        """Positions start .. stop-1 are missing (again)."""
        if start >= stop:
            return
        kept: list[tuple[int, int]] = []
        for a, b in self._spans:
            if b < start or a > stop:
                kept.append((a, b))
            else:
                start, stop = min(a, start), max(b, stop)
        kept.append((start, stop))
        self._spans = sorted(kept)

    def fill(self, start: int, stop: int) -> None:
        """Positions start .. stop-1 are there now."""
        kept: list[tuple[int, int]] = []
        for a, b in self._spans:
            if a < start:
                kept.append((a, min(b, start)))
            if b > stop:
                kept.append((max(a, stop), b))
        self._spans = [(a, b) for a, b in kept if a < b]

    def overlap(self, start: int, stop: int) -> int:
        """How many of the positions start .. stop-1 are missing."""
        return sum(max(0, min(b, stop) - max(a, start)) for a, b in self._spans)


class SpanTable:
    """The spans of one sequence by index, and its holes."""

    __slots__ = ("holes", "released", "span_tokens", "spans")

    def __init__(self, span_tokens: int) -> None:
        self.span_tokens = span_tokens
        self.spans: list[Span | None] = []     # None: nothing there (a hole, or released below every window)
        self.holes = Holes()
        self.released = 0                      # spans below this index are outside every layer's window

    def put(self, index: int, span: Span | None) -> None:
        while len(self.spans) <= index:
            self.spans.append(None)
        self.spans[index] = span

    def at(self, index: int) -> Span | None:
        return self.spans[index] if index < len(self.spans) else None

    def lose(self, index: int, num_tokens: int) -> int:
        """Span `index` is gone: make it a hole and return how many computed tokens that costs.

        num_tokens: length of the sequence; a span past its end is cut there.
        """
        start, stop = index * self.span_tokens, min((index + 1) * self.span_tokens, num_tokens)
        self.put(index, None)
        lost = (stop - start) - self.holes.overlap(start, stop)
        self.holes.add(start, stop)
        return lost

    def live(self, up_to: int | None = None) -> list[tuple[int, Span]]:
        """(index, span) of every span that is there, below token `up_to` when given."""
        last = len(self.spans) if up_to is None else -(-up_to // self.span_tokens)
        return [(i, s) for i, s in enumerate(self.spans[:last]) if s is not None]
