"""IdleSpans: the spans of a vault that are cached and read by nobody, oldest first, and which of them go last.

    goes first -> [ oldest ... newest without a pin ] [ oldest ... newest with one ]

A pin lasts for a term and orders evictions. It refuses nobody anything: when only pinned spans are left, they go. It is on a
span while that has a slot here, read, idle or lent, and ends with it. The vault's lock is held around every call.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping

from kvbank.kvstore.span_table import Span

MAX_PIN_S = 86_400.0


class IdleSpans(MutableMapping[int, Span]):
    """By uid, oldest first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spans: OrderedDict[int, Span] = OrderedDict()
        self._first: OrderedDict[int, Span] = OrderedDict()     # those without a pin, while there are pins
        self._pins: dict[int, float] = {}                       # uid -> when it ends
        self._next_end = math.inf

    def __getitem__(self, uid: int) -> Span:
        return self._spans[uid]

    def __setitem__(self, uid: int, span: Span) -> None:
        self._spans[uid] = span
        if self._pins and uid not in self._pins:
            self._first[uid] = span

    def __delitem__(self, uid: int) -> None:
        del self._spans[uid]
        self._first.pop(uid, None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def spans(self) -> Collection[Span]:
        return self._spans.values()

    def next_to_go(self) -> Collection[Span]:
        """Of these one goes next: those without a pin, oldest first, else those with one."""
        self._end_terms()
        return (self._first or self._spans).values()

    @property
    def pinned(self) -> Mapping[int, float]:
        """When each pin ends, by the clock."""
        self._end_terms()
        return self._pins

    def pin(self, uids: Iterable[int], term_s: float) -> None:
        """A longer pin stays as it is. Costs a look at every idle span."""
        until = self._clock() + term_s
        for uid in uids:
            self._pins[uid] = max(until, self._pins.get(uid, 0.0))
        self._sort()

    def unpin(self, uids: Iterable[int]) -> None:
        """Costs a look at every idle span."""
        for uid in uids:
            self._pins.pop(uid, None)
        self._sort()

    def forget(self, uid: int) -> None:
        """The span has no slot here any more, and no pin."""
        for book in (self._spans, self._first, self._pins):
            book.pop(uid, None)
        if not self._pins:
            self._first.clear()

    def hand_on(self, old: int, new: int) -> None:
        """The slot of the old span is the new one's, and so is its pin."""
        if (until := self._pins.pop(old, None)) is not None:
            self._pins[new] = until

    def _end_terms(self) -> None:
        if (now := self._clock()) >= self._next_end:
            self._pins = {uid: until for uid, until in self._pins.items() if until > now}
            self._sort()

    def _sort(self) -> None:
        self._next_end = min(self._pins.values(), default=math.inf)
        plain = self._spans.items() if self._pins else ()
        self._first = OrderedDict((uid, span) for uid, span in plain if uid not in self._pins)
