"""PrefixIndex: which span on this worker holds the KV of a block key.

A key names a block together with everything before it (kvstore/hashing.py), so whoever holds a block of a span under its
key also holds the blocks before it in that span. Each group of blocks that falls into one span is therefore looked up from
its last key backwards: the first key found names one span that serves the whole run up to there.

    keys    k0 k1 k2 k3 | k4 k5 k6 k7 | k8 ...        (4 blocks a span)
    spans   ----A------ | --B--                       match: A whole, then blocks 0..1 of B, then stop

Knows spans and keys; knows nothing of slots, tensors or tiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.span_table import Span


@dataclass(frozen=True, slots=True)
class Hit:
    """`blocks` blocks from the start of `span` serve the same place of the asker's sequence."""

    span: Span
    blocks: int


class PrefixIndex:
    """Block key -> span. The first span to publish a key keeps it."""

    def __init__(self, blocks_per_span: int) -> None:
        self._bps = blocks_per_span
        self._by_key: dict[BlockKey, Span] = {}
        self.added: list[BlockKey] = []      # since the last report, for the directory
        self.removed: list[BlockKey] = []

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._by_key

    def publish(self, span: Span, key: BlockKey, tokens: bytes, parent: bytes) -> None:
        """The next full block of `span` is there: its bytes are final. parent: key of the block before it, or the root."""
        if not span.keys:
            span.parent = parent
        span.keys.append(key)
        span.tokens += tokens
        if self._by_key.setdefault(key, span) is span:
            self.added.append(key)

    def adopt(self, span: Span) -> None:
        """List a span that came with its keys (from a tier or a peer)."""
        for key in span.keys:
            if self._by_key.setdefault(key, span) is span:
                self.added.append(key)

    def withdraw(self, span: Span) -> None:
        """The span's bytes are gone, or about to be: no new match may find it. Safe to repeat."""
        for key in span.keys:
            if self._by_key.get(key) is span:
                del self._by_key[key]
                self.removed.append(key)

    def find(self, key: BlockKey) -> Span | None:
        return self._by_key.get(key)

    def match(self, keys: Sequence[BlockKey], first_span: int = 0, tokens: bytes | None = None) -> list[Hit]:
        """Hits for consecutive spans of `keys` from span `first_span` on; stops at the first span not held whole.

        tokens: the token ids (int32-LE) that `keys` were made from; compared on every hit, so that not even a hash
        collision can serve another text's KV.
        """
        hits: list[Hit] = []
        for start in range(first_span * self._bps, len(keys), self._bps):
            group = keys[start : start + self._bps]
            hit = self._match_span(group, start, tokens, len(keys))
            if hit is None:
                break
            hits.append(hit)
            if hit.blocks < self._bps:
                break
        return hits

    def _match_span(
        self, group: Sequence[BlockKey], start: int, tokens: bytes | None, num_keys: int
    ) -> Hit | None:
        for count in range(len(group), 0, -1):
            span = self._by_key.get(group[count - 1])
            if span is None:
                continue
            if tokens is not None:
                block = len(tokens) // num_keys if num_keys else 0
                if span.tokens[: count * block] != tokens[start * block : (start + count) * block]:
                    continue
            return Hit(span, count)
        return None

    def beneath(self, keys: Iterable[bytes], also: Iterable[Span] = ()) -> list[Span]:
        """Every listed span (and of `also`) whose key chain passes through one of these blocks: it holds it, or was computed
        from it. Looks at every span once."""
        beside: dict[bytes, list[Span]] = {}               # key -> spans that hold its block, or go on where it ends
        for span in {span.uid: span for span in (*self._by_key.values(), *also)}.values():
            for key in (span.parent, *span.keys):
                beside.setdefault(key, []).append(span)
        found: dict[int, Span] = {}
        due = list(keys)
        while due:
            for span in beside.pop(due.pop(), ()):
                if span.uid not in found:
                    found[span.uid] = span
                    due += span.keys
        return list(found.values())

    def take_changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        """Keys added and removed since the last call, for the report to the control plane."""
        added, self.added = self.added, []
        removed, self.removed = self.removed, []
        return added, removed

    def keys(self) -> list[BlockKey]:
        return list(self._by_key)
