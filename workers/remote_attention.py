"""RemoteAttention: this worker's queries to all its lenders, written to every one before any answer is read.

Per step the rows that read lent spans are grouped by lender; each group becomes one or more parts, small enough that
no message is too long. The smaller thing travels: queries and partials (decode), or, for many rows over few tokens, the
layer's K and V, asked for one layer ahead. From a lender whose arithmetic is not ours K and V always come, group after group
where staging has no room for all of it. A lender that stays silent costs its spans (they are replayed), never the step.

Knows rows, refs and streams; knows nothing of terms or of what happens to a lost span.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.merge_partials import RUN_SPANS
from kvbank.kvstore.transport.hot import Attend, HotFormatError, HotPlan, Layer, Partial, PlanItem, Want, unpack
from kvbank.workers.attend import AttentionShape, RemoteReply, Staged
from kvbank.workers.batch import StepPlan

PART_BYTES = 3 << 20                         # of queries or partials in one message
KNOWN_PLANS = 7                              # of one stream; the lender remembers one more (workers/attend_server.py)
FETCHED_PARTS = KNOWN_PLANS - 2              # of one lender in a step: each is a plan, and those that attend need theirs

Ref = tuple[int, int, int]                   # loan, slot, gen
_Piece = tuple[int, dict[int, int], list[tuple[int, Ref]]]    # segment number, span index -> uid, (span index, ref)


class StreamBroken(Exception):
    """The lender's stream ended or stayed silent; `reason` goes into the receipt."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HotStream(Protocol):
    """One lender's hot stream."""

    def send(self, message: bytes) -> None:
        """Queue one message. Raises StreamBroken."""

    def receive(self) -> bytes:
        """The next message, with the deadlines of loans.md. Raises StreamBroken."""


class Lendings(Protocol):
    """Where this worker's lent spans are, and the stream to each lender."""

    def where(self, uid: int) -> tuple[str, Ref] | None:
        """(lender, ref) of a REMOTE span; None when it is no longer readable. lender: a name for one life of it."""

    def attends(self, lender: str) -> bool:
        """Its arithmetic is ours. Else it is asked for K and V only."""

    def stream(self, lender: str) -> HotStream:
        """Open or reuse: the same object for as long as the lender remembers what it was told on it. Raises StreamBroken."""

    def stale(self, uids: Sequence[int]) -> None:
        """The lender says that these promises have ended."""

    def silent(self, lender: str, reason: str) -> None:
        """The lender did not answer in time or its stream broke: do not use it for a while."""


@dataclass(slots=True)
class _Part:
    """Rows for one lender in one message."""

    lender: str
    plan: HotPlan
    rows: Tensor                             # int64 indices into the batch
    positions: np.ndarray
    items: list[tuple[int, int, dict[int, int]]]   # (segment number, row offset in it, span index -> uid)
    fetch: bool = False                      # K and V come here, instead of queries going there
    asked: dict[int, int] = field(default_factory=dict)   # layer -> the plan's id when that layer was asked for
    spans: frozenset[tuple[int, int]] = field(init=False) # (item, span index) of all that is asked, for every layer's answer

    def __post_init__(self) -> None:
        self.spans = frozenset((number, index) for number, (_, _, uids) in enumerate(self.items) for index in uids)

    @property
    def uids(self) -> Iterable[int]:
        return (uid for _, _, spans in self.items for uid in spans.values())


class RemoteAttention:
    """Fills workers.attend.RemoteAttention. Engine thread only."""

    def __init__(self, shape: AttentionShape, head_dim: int, lendings: Lendings, *, staging_spans: int = 16) -> None:
        """staging_spans: K and V that may lie here at once, this layer's and the next one's, in whole spans."""
        self._shape, self._head_dim, self._lendings = shape, head_dim, lendings
        self.ship = "smaller"                # "query" | "kv": tests force one
        item = shape.dtype.itemsize
        self._query_bytes = shape.heads * (head_dim * (item + 4) + 4)                 # per row, there and back
        self._span_bytes = 2 * shape.kv_heads * shape.span_tokens * head_dim * item   # per layer
        self._staged_layers = staging_spans * len(shape.windows) // 2                 # of single spans
        self._spans_per_part = max(1, PART_BYTES // self._span_bytes)
        # (lender, plan, layer): one answer, in order, for each part that asked. Parts with the same rows and refs are one plan.
        self._early: dict[tuple[str, int, int], deque[Partial | Layer]] = {}
        row_bytes = shape.heads * head_dim * 4 + shape.heads * 4
        self._rows_per_part = max(8, PART_BYTES // row_bytes // 8 * 8)
        self._plan_ids = count(1)
        self._known: dict[tuple[object, ...], int] = {}     # content of a plan -> its id at that lender's stream
        self._parts: list[_Part] = []
        self._crowded: set[str] = set()                     # lenders of this step that cannot remember all its plans
        self._later: list[_Part] = []                       # fetched one after the other, each when its turn has come
        self._broken: dict[str, str] = {}
        self._streams: dict[str, HotStream] = {}            # of this step: one that breaks is not replaced within it
        self._told: dict[str, HotStream] = {}               # the stream that knows our plans
        self._step = 0
        self.calls = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def begin(self, plan: StepPlan) -> None:
        self._step = plan.step
        self._segment_rows = [rows.num_rows for rows in plan.rows]
        self._broken = {}
        self._streams = {}
        self._unplaced: dict[int, str] = {}
        self._early = {}
        self._parts = []
        by_lender = self._by_lender(plan)
        others = [lender for lender in by_lender if not self._lendings.attends(lender)]
        room = self._fetch_all({lender: by_lender.pop(lender) for lender in others})
        for lender, pieces in by_lender.items():
            fetched: list[_Part] = []
            asked: list[_Piece] = []
            for piece in pieces:
                if len(piece[2]) <= room and self._fetches(plan.rows[piece[0]].num_rows, len(piece[2])):
                    cut = list(self._cut_spans(lender, [piece], self._spans_per_part))
                    if len(fetched) + len(cut) <= FETCHED_PARTS:
                        fetched += cut
                        room -= len(piece[2])
                        continue
                asked.append(piece)
            self._parts += fetched
            self._parts += self._cut(lender, asked, plan)
        self._announce_all()

    def send(self, layer: int, window: int | None, q: Tensor) -> None:
        for part in self._parts:
            if part.lender in self._broken:
                continue
            if part.lender in self._crowded:
                self._announce(part)
            if part.fetch:
                for ahead in (layer, layer + 1) if layer == 0 else (layer + 1,):
                    if ahead < len(self._shape.windows):
                        self._want(part, ahead)
                continue
            part.asked[layer] = part.plan.plan
            rows = q if len(part.rows) == len(q) else q.index_select(0, part.rows)
            raw = rows.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
            self._send(part.lender, Attend(part.plan.plan, self._step, layer, window, part.positions, raw).pack())

    def receive(self, layer: int, lost: dict[int, str]) -> RemoteReply:
        reply = RemoteReply()
        pieces: dict[tuple[int, int, int], list[tuple[int, Tensor, Tensor]]] = {}
        for part in self._parts:
            answer = self._receive(part, layer)
            if answer is None:
                lost.update(dict.fromkeys(part.uids, self._broken[part.lender]))
                continue
            self._note_stale(part, answer, lost)
            if isinstance(answer, Layer):
                reply.staged += self._stage(part, answer)
            else:
                self._unfold(part, answer, reply, pieces)
        for key, found in pieces.items():
            if sum(len(out) for _, out, _ in found) < self._segment_rows[key[0]]:
                continue                     # part of this piece is lost, and so are the rows that asked for it
            found.sort(key=lambda piece: piece[0])
            reply.nodes[key] = (torch.cat([out for _, out, _ in found]), torch.cat([lse for _, _, lse in found]))
        lost.update(self._unplaced)
        reply.later = self._fetch_later(layer, lost)
        return reply

    # -- grouping ----------------------------------------------------------------------------------------------------

    def _by_lender(self, plan: StepPlan) -> dict[str, list[_Piece]]:
        """lender -> (segment number, span index -> uid, [(span index, ref)]) of the segments that read its slots."""
        found: dict[str, list[_Piece]] = {}
        for number, rows in enumerate(plan.rows):
            mine: dict[str, tuple[dict[int, int], list[tuple[int, Ref]]]] = {}
            for index, uid in rows.remote:
                place = self._lendings.where(uid)
                if place is None:
                    self._unplaced[uid] = "not_held"
                    continue
                uids, refs = mine.setdefault(place[0], ({}, []))
                uids[index] = uid
                refs.append((index, place[1]))
            for lender, (uids, refs) in mine.items():
                found.setdefault(lender, []).append((number, uids, refs))
        return found

    def _cut(self, lender: str, pieces: list[_Piece], plan: StepPlan) -> Iterable[_Part]:
        """Parts whose answers have at most `rows_per_part` rows; of a long segment at least eight rows are taken."""
        items: list[tuple[int, int, int, dict[int, int], list[tuple[int, Ref]]]] = []
        room = self._rows_per_part
        for number, uids, refs in pieces:
            offset, left, each = 0, plan.rows[number].num_rows, self._answers(refs)
            while left:
                if items and room < min(left, 8) * each:
                    yield self._part(lender, items, plan)
                    items, room = [], self._rows_per_part
                taken = min(left, max(8, room // each))
                items.append((number, offset, taken, uids, refs))
                offset, left, room = offset + taken, left - taken, room - taken * each
        if items:
            yield self._part(lender, items, plan)

    def _answers(self, refs: list[tuple[int, Ref]]) -> int:
        """Partials that a row gets for these spans: one, or under `bitwise` one for each maximal aligned piece of them."""
        if self._shape.exactness != "bitwise":
            return 1
        held = Counter(index // RUN_SPANS for index, _ in refs)
        whole = {run for run, spans in held.items() if spans == RUN_SPANS}
        answers = len(refs) - RUN_SPANS * len(whole)
        while whole:                               # level by level: two neighbours are one piece of the level above
            above = {run // 2 for run in whole if run % 2 == 0 and run + 1 in whole}
            answers += len(whole) - 2 * len(above)
            whole = above
        return answers

    def _fetches(self, rows: int, spans: int) -> bool:
        if self.ship != "smaller":
            return self.ship == "kv"
        return rows * self._query_bytes > spans * self._span_bytes

    def _fetch_all(self, by_lender: dict[str, list[_Piece]]) -> int:
        """Parts for lenders that only hand out what they hold: one layer ahead like others that are fetched, if staging has
        room for all of them, else in groups of which two may lie there. Returns the room that is left, in spans."""
        parts = [list(self._cut_spans(lender, pieces, self._spans_per_part)) for lender, pieces in by_lender.items()]
        room = self._staged_layers - sum(len(refs) for pieces in by_lender.values() for _, _, refs in pieces)
        if room >= 0 and all(len(some) <= KNOWN_PLANS for some in parts):
            self._later = []
            self._parts += [part for some in parts for part in some]
            return room
        group = max(1, min(self._spans_per_part, self._staged_layers // 2))
        self._later = [part for lender, pieces in by_lender.items() for part in self._cut_spans(lender, pieces, group)]
        return self._staged_layers - group

    def _cut_spans(self, lender: str, pieces: list[_Piece], most: int) -> Iterable[_Part]:
        """Parts of at most `most` spans whose K and V are fetched."""
        empty = torch.zeros(0, dtype=torch.int64)
        for number, uids, refs in pieces:
            for first in range(0, len(refs), most):
                some = refs[first : first + most]
                hot = self._hot_plan((PlanItem(0, tuple((index, *ref) for index, ref in some)),))
                yield _Part(lender, hot, empty, np.zeros(0, np.int64), [(number, 0, {i: uids[i] for i, _ in some})], fetch=True)

    def _hot_plan(self, items: tuple[PlanItem, ...]) -> HotPlan:
        shape = self._shape
        return HotPlan(0, shape.heads, shape.kv_heads, self._head_dim, shape.scale, shape.exactness, items)

    def _part(
        self, lender: str, items: list[tuple[int, int, int, dict[int, int], list[tuple[int, Ref]]]], plan: StepPlan
    ) -> _Part:
        rows = np.concatenate([
            np.arange(plan.rows[number].first_row + offset, plan.rows[number].first_row + offset + taken)
            for number, offset, taken, _, _ in items
        ])
        wire = tuple(PlanItem(taken, tuple((index, *ref) for index, ref in refs)) for _, _, taken, _, refs in items)
        return _Part(lender, self._hot_plan(wire), torch.from_numpy(rows), plan.positions[rows],
                     [(number, offset, uids) for number, offset, _, uids, _ in items])

    def _announce_all(self) -> None:
        """Where one plan is new, all of this step are told anew: the lender forgets the oldest, whether in use or not. Where
        they are too many for it, each is told when it is used."""
        plans = Counter(lender for lender, _ in dict.fromkeys((part.lender, part.plan.items) for part in self._parts))
        self._crowded = {lender for lender, number in plans.items() if number > KNOWN_PLANS}
        for lender in dict.fromkeys(part.lender for part in self._parts if (part.lender, part.plan.items) not in self._known):
            self._forget_plans(lender)
        for part in self._parts:
            if part.lender not in self._crowded:
                self._announce(part)

    def _announce(self, part: _Part) -> None:
        """Send the plan unless this stream knows it already: in decode it seldom changes."""
        if self._stream(part.lender) is None:
            return
        key = (part.lender, part.plan.items)
        known = self._known.get(key)
        fresh = next(self._plan_ids) if known is None else known
        part.plan = HotPlan(fresh, part.plan.heads, part.plan.kv_heads, part.plan.head_dim, part.plan.scale,
                            part.plan.exactness, part.plan.items)
        if known is None:
            for old in [k for k in self._known if k[0] == part.lender][: 1 - KNOWN_PLANS]:
                del self._known[old]
            self._known[key] = fresh
            self._send(part.lender, part.plan.pack())

    # -- talking -----------------------------------------------------------------------------------------------------

    def _stream(self, lender: str) -> HotStream | None:
        """This step's stream to a lender; None when it is broken. What a former stream was told, a new one is told again."""
        if lender not in self._streams and lender not in self._broken:
            try:
                stream = self._streams[lender] = self._lendings.stream(lender)
            except StreamBroken as error:
                self._break(lender, error.reason)
                return None
            if self._told.get(lender) is not stream:
                self._told[lender] = stream
                self._forget_plans(lender)
        return None if lender in self._broken else self._streams[lender]

    def _send(self, lender: str, message: bytes) -> None:
        if (stream := self._stream(lender)) is None:
            return
        self.bytes_sent += len(message)
        try:
            stream.send(message)
        except StreamBroken as error:
            self._break(lender, error.reason)

    def _want(self, part: _Part, layer: int) -> None:
        part.asked[layer] = part.plan.plan
        self._send(part.lender, Want(part.plan.plan, self._step, layer).pack())

    def _receive(self, part: _Part, layer: int) -> Partial | Layer | None:
        heads, dim = self._shape.heads, self._head_dim
        wanted = (part.lender, part.asked.get(layer, 0), layer)
        try:
            while not self._early.get(wanted):
                if (stream := self._stream(part.lender)) is None:
                    return None
                data = stream.receive()
                answer = unpack(data, lse_per_row=heads, out_per_row=heads * dim)
                if not isinstance(answer, (Partial, Layer)):
                    raise HotFormatError("a question instead of an answer")
                self.bytes_received += len(data)
                if answer.step == self._step:      # else it answers a question we no longer ask
                    self._early.setdefault((part.lender, answer.plan, answer.layer), deque()).append(answer)
            found = self._early[wanted].popleft()
            self._check(part, found)
        except StreamBroken as error:
            self._break(part.lender, error.reason)
            return None
        except HotFormatError:
            self._break(part.lender, "lender_garbled")
            return None
        self.calls += 1
        return found

    def _check(self, part: _Part, answer: Partial | Layer) -> None:
        """Raises HotFormatError for an answer that does not fit what was asked: a fault there costs a replay, not a step."""
        if isinstance(answer, Layer) != part.fetch:
            raise HotFormatError("the wrong kind of answer")
        asked, stale = part.spans, frozenset((item, index) for item, index in answer.stale.tolist())
        if any(item < 0 for item, _ in stale):       # the plan was forgotten, and nothing of it computed
            stale = asked
        if not stale <= asked:
            raise HotFormatError("stale spans that were not asked for")
        if isinstance(answer, Layer):
            good = len(answer.data) == (len(asked) - len(stale)) * self._span_bytes
        elif self._shape.exactness == "bitwise":
            good = (self._covers(part, answer, asked - stale)
                    and sum(count for _, _, _, count in answer.nodes.tolist()) * 4 * self._shape.heads == len(answer.lse))
        else:
            whole = len(part.rows) * 4 * self._shape.heads
            good = len(answer.lse) == whole or (len(answer.lse) == 0 and stale == asked)
        if not good:
            raise HotFormatError("an answer of the wrong size")

    def _covers(self, part: _Part, answer: Partial, asked: frozenset[tuple[int, int]]) -> bool:
        """Every span that was asked for is in one node with the rows of its item; left out is what no row sees."""
        rows, window = [item.num_rows for item in part.plan.items], self._shape.windows[answer.layer]
        named: list[tuple[int, int]] = []
        for item, level, index, number in answer.nodes.tolist():
            if not (-1 <= level < 32 and 0 <= item < len(rows)) or number != rows[item]:
                return False
            if (width := RUN_SPANS << level if level >= 0 else 1) > len(asked):
                return False
            named += [(item, span) for span in range(index * width, (index + 1) * width)]
        missing = asked.difference(named)
        if len(named) + len(missing) != len(asked):        # said twice, or not asked for
            return False
        firsts = np.cumsum([0, *rows])
        return all(window is not None and (index + 1) * self._shape.span_tokens <= part.positions[firsts[item]] - window + 1
                   for item, index in missing)

    def _break(self, lender: str, reason: str) -> None:
        self._broken[lender] = reason
        self._told.pop(lender, None)
        self._forget_plans(lender)
        self._lendings.silent(lender, reason)

    def _forget_plans(self, lender: str) -> None:
        for key in [key for key in self._known if key[0] == lender]:
            del self._known[key]

    # -- reading -----------------------------------------------------------------------------------------------------

    def _note_stale(self, part: _Part, partial: Partial | Layer, lost: dict[int, str]) -> None:
        stale: list[int] = []
        for item, index in partial.stale.tolist():
            # Item -1: the lender forgot the plan, and nothing of it was computed.
            stale += part.uids if item < 0 else [part.items[item][2][index]]
        if stale:
            lost.update(dict.fromkeys(stale, "stale"))
            self._lendings.stale(stale)

    def _fetch_later(self, layer: int, lost: dict[int, str]) -> Iterator[Staged]:
        """One group at a time: it is asked for when the one before has been attended."""
        for part in self._later:
            self._announce(part)                   # again: with many groups the lender forgets the first ones
            self._want(part, layer)
            answer = self._receive(part, layer)
            if answer is None:
                lost.update(dict.fromkeys(part.uids, self._broken[part.lender]))
                continue
            self._note_stale(part, answer, lost)
            if isinstance(answer, Layer):
                yield from self._stage(part, answer)

    def _stage(self, part: _Part, layer: Layer) -> list[Staged]:
        shape, (number, _, uids) = self._shape, part.items[0]
        stale = {index for _, index in layer.stale.tolist()}
        indices = [index for index in uids if index not in stale]
        if not indices or not layer.data:
            return []
        kv = torch.frombuffer(bytearray(layer.data), dtype=shape.dtype).to(shape.device)
        kv = kv.view(len(indices), 2, shape.kv_heads, shape.span_tokens, self._head_dim)
        return [(kv, [(number, [(index, row) for row, index in enumerate(indices)])])]

    def _unfold(
        self, part: _Part, partial: Partial, reply: RemoteReply,
        pieces: dict[tuple[int, int, int], list[tuple[int, Tensor, Tensor]]],
    ) -> None:
        heads, dim, device = self._shape.heads, self._head_dim, self._shape.device
        lse = torch.frombuffer(bytearray(partial.lse), dtype=torch.float32).view(-1, heads).to(device) if partial.lse else None
        if lse is None:
            return
        out = torch.frombuffer(bytearray(partial.out), dtype=torch.float32).view(-1, heads, dim).to(device)
        if self._shape.exactness != "bitwise":
            reply.whole.append((part.rows.to(device), out, lse))
            return
        first = 0
        for item, level, index, rows in partial.nodes.tolist():
            number, offset, _ = part.items[item]
            pieces.setdefault((number, level, index), []).append(
                (offset, out[first : first + rows], lse[first : first + rows]))
            first += rows

