"""AttendServer: a lender computes partial attention on the slots it lent, for rows of somebody else's batch.

One per member, with or without a model. Every message pins the refs it reads under the short lock of vault and ledger,
computes without it, and unpins. A ref that is no longer good is listed as stale; the other items are answered. With
`verify` the pinned bytes are hashed again first, and what is not what was sealed is reported and stale: it is never used.

One computation at a time: a member has one thread's worth of attention to give, and its own engine runs beside it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np
import torch

from kvbank.kernels.paged_attention import AttentionPlan, Segment, paged_attention, plan_attention
from kvbank.kvstore.layout import Layout, SlotId
from kvbank.kvstore.traces import Traces
from kvbank.kvstore.transport import bulk
from kvbank.kvstore.transport.hot import Attend, HotPlan, Layer, Partial, Want, unpack
from kvbank.kvstore.vault import Arena

KEPT_PLANS = 8                               # plans of one stream; a batch has one or a few alive


class Pins(Protocol):
    """The ledger as the attend server sees it: (loan, slot, gen) of the stream's borrower."""

    def pin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> list[bool]:
        """Which refs are readable now; those stay put until unpinned."""

    def unpin(self, borrower: bytes, refs: list[tuple[int, int, int]]) -> None: ...

    def digest(self, borrower: bytes, ref: tuple[int, int, int]) -> bytes | None:
        """What a pinned slot's bytes hashed to when they were sealed; None when the promise has ended since."""

    def trace_of(self, borrower: bytes, loan: int) -> str:
        """The traceparent of the job that the loan was made for; empty when nobody traces it."""

    def taint(self, borrower: bytes, ref: tuple[int, int, int]) -> None:
        """A pinned slot's bytes are not those that were sealed: the promise is over, and nobody may cache them."""


@dataclass(slots=True)
class AttendCounters:
    """Totals since start, the lender's own proof that it attended."""

    calls: int = 0                           # partial attentions answered
    rows: int = 0
    layers: int = 0                          # layers of K and V handed out instead
    stale: int = 0
    tainted: int = 0                         # refs whose bytes had changed; only found with `verify`
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(slots=True)
class _Stream:
    """State of one borrower's stream."""

    borrower: bytes
    layout: Layout
    slots: torch.Tensor                       # the arena seen through the borrower's layout
    plans: OrderedDict[int, HotPlan] = field(default_factory=OrderedDict)
    prepared: dict[tuple[int, int, int | None, bytes], AttentionPlan] = field(default_factory=dict)
    prepared_step: int = -1

    traced: dict[int, tuple[str, ...]] = field(default_factory=dict)      # plan -> traceparents of its loans

    def forget(self, plan: int) -> None:
        """What was prepared for a plan goes with it."""
        for key in [key for key in self.prepared if key[0] == plan]:
            del self.prepared[key]
        self.traced.pop(plan, None)


class AttendServer:
    """Serves the hot stream."""

    def __init__(
        self, arena: Arena, pins: Pins, layout_of: Callable[[bytes], Layout | None], *, verify: bool = False,
        traces: Traces | None = None,
    ) -> None:
        """layout_of: the layout a borrower (by boot) said Hello with; None for a stranger. verify: hash before each read."""
        self._arena, self._pins, self._layout_of, self._verify = arena, pins, layout_of, verify
        self._compute = Lock()
        self._traces = traces
        self.counters = AttendCounters()

    def serve(self, borrower: bytes, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Answer a stream until it ends. Raises HotFormatError on bytes that no version of us sends, LookupError
        for a borrower that never said Hello."""
        layout = self._layout_of(borrower)
        if layout is None:
            raise LookupError("attend before hello")
        stream = _Stream(borrower, layout, self._arena.view(layout))
        for data in messages:
            message = unpack(data)
            self.counters.bytes_in += len(data)
            if isinstance(message, HotPlan):
                stream.plans[message.plan] = message
                if self._traces is not None:
                    stream.traced[message.plan] = self._traces_of(borrower, message)
                while len(stream.plans) > KEPT_PLANS:
                    stream.forget(stream.plans.popitem(last=False)[0])
            elif isinstance(message, Attend):
                answer = self._answered(stream, message) if self._traces is None else self._traced(self._traces, stream, message)
                self.counters.calls += 1
                self.counters.rows += len(message.positions)
                self.counters.bytes_out += len(answer)
                yield answer
            elif isinstance(message, Want):
                answer = self._answered(stream, message) if self._traces is None else self._traced(self._traces, stream, message)
                self.counters.layers += 1
                self.counters.bytes_out += len(answer)
                yield answer

    def _answered(self, stream: _Stream, message: Attend | Want) -> bytes:
        if isinstance(message, Want):
            return self._layer(stream, message).pack()
        with self._compute:
            return self._attend(stream, message).pack()

    def _traced(self, traces: Traces, stream: _Stream, message: Attend | Want) -> bytes:
        began = time.monotonic()
        answer = self._answered(stream, message)
        for parent in stream.traced.get(message.plan, ()):
            if isinstance(message, Attend):
                traces.note("lender.attend", parent, began, time.monotonic(), rows=len(message.positions), bytes=len(answer))
            else:
                traces.note("lender.fetch", parent, began, time.monotonic(), bytes=len(answer))
        return answer

    def _traces_of(self, borrower: bytes, plan: HotPlan) -> tuple[str, ...]:
        """Of the jobs that the plan's loans were made for; seldom more than a few."""
        loans = dict.fromkeys(ref[1] for item in plan.items for ref in item.refs)
        return tuple(dict.fromkeys(self._pins.trace_of(borrower, loan) for loan in loans))

    def _layer(self, stream: _Stream, message: Want) -> Layer:
        """One layer of a plan's spans as it lies in the slots, pinned while it is copied out."""
        plan = stream.plans.get(message.plan)
        if plan is None:
            return Layer(message.plan, message.step, message.layer, np.full((1, 2), -1, np.int32), b"")
        refs = [ref[1:] for item in plan.items for ref in item.refs]
        good = self._pin(stream, refs)
        try:
            readable = [ref[1] for ref, ok in zip(refs, good, strict=True) if ok]
            slots = torch.tensor(readable, dtype=torch.int64, device=self._arena.device)    # perhaps none
            data = stream.slots[:, message.layer].index_select(0, slots).cpu().view(torch.uint8).numpy().tobytes()
        finally:
            self._pins.unpin(stream.borrower, [ref for ref, ok in zip(refs, good, strict=True) if ok])
        return Layer(message.plan, message.step, message.layer, self._stale(plan, good), data)

    def _attend(self, stream: _Stream, message: Attend) -> Partial:
        plan = stream.plans.get(message.plan)
        empty = np.zeros((0, 4), dtype=np.int32)
        if plan is None:                       # forgotten: everything asked for is stale to this caller
            return Partial(message.plan, message.step, message.layer, empty, np.full((1, 2), -1, np.int32), b"", b"")
        refs = [ref[1:] for item in plan.items for ref in item.refs]
        good = self._pin(stream, refs)
        try:
            stale = self._stale(plan, good)
            nodes, out, lse = self._compute_partials(stream, plan, message, good)
        finally:
            self._pins.unpin(stream.borrower, [ref for ref, ok in zip(refs, good, strict=True) if ok])
        self.counters.stale += len(stale)
        return Partial(message.plan, message.step, message.layer, nodes, stale, out, lse)

    def _pin(self, stream: _Stream, refs: list[tuple[int, int, int]]) -> list[bool]:
        """Which refs may be read; those are pinned."""
        good = self._pins.pin(stream.borrower, refs)
        if self._verify:
            for number, ref in enumerate(refs):
                if good[number] and not self._is_as_sealed(stream.borrower, ref):
                    good[number] = False
                    self._pins.unpin(stream.borrower, [ref])
        return good

    def _is_as_sealed(self, borrower: bytes, ref: tuple[int, int, int]) -> bool:
        if (sealed := self._pins.digest(borrower, ref)) is None:
            return False
        slot = self._arena.slot(SlotId(ref[1]), bulk.digested_bytes(sealed))
        if bulk.digest(slot.cpu().numpy().data) == sealed:
            return True
        self.counters.tainted += 1
        self._pins.taint(borrower, ref)
        return False

    def _stale(self, plan: HotPlan, good: list[bool]) -> np.ndarray:
        pairs = [(number, ref[0]) for number, item in enumerate(plan.items) for ref in item.refs]
        return np.array([pair for pair, ok in zip(pairs, good, strict=True) if not ok], dtype=np.int32).reshape(-1, 2)

    def _compute_partials(
        self, stream: _Stream, plan: HotPlan, message: Attend, good: list[bool]
    ) -> tuple[np.ndarray, bytes, bytes]:
        dtype = getattr(torch, stream.layout.dtype)
        q = torch.frombuffer(bytearray(message.q), dtype=dtype).view(-1, plan.heads, plan.head_dim)
        attention = self._prepare(stream, plan, message, good, dtype)
        device = self._arena.device
        parts = paged_attention(q.to(device), stream.slots[:, message.layer], attention, plan.scale)
        if plan.exactness != "bitwise":
            out, lse = parts.whole
            return np.zeros((0, 4), dtype=np.int32), _raw(out), _raw(lse)
        rows = [item.num_rows for item in plan.items]
        keys = sorted(parts.nodes)
        table = np.array([(n, level, index, rows[n]) for n, level, index in keys], dtype=np.int32).reshape(-1, 4)
        return table, b"".join(_raw(parts.nodes[key][0]) for key in keys), b"".join(_raw(parts.nodes[key][1]) for key in keys)

    def _prepare(
        self, stream: _Stream, plan: HotPlan, message: Attend, good: list[bool], dtype: torch.dtype
    ) -> AttentionPlan:
        """Masks and index tensors, shared by the layers of one step."""
        if stream.prepared_step != message.step:
            stream.prepared.clear()
            stream.prepared_step = message.step
        key = (plan.plan, message.step, message.window, bytes(good))
        if key not in stream.prepared:
            positions, first, segments, usable = torch.from_numpy(message.positions.copy()), 0, [], iter(good)
            for item in plan.items:
                spans = tuple((ref[0], ref[2]) for ref, ok in zip(item.refs, usable, strict=False) if ok)
                segments.append(Segment(first, positions[first : first + item.num_rows], spans))
                first += item.num_rows
            stream.prepared[key] = plan_attention(
                segments, num_rows=first, span_tokens=stream.layout.span_tokens, heads=plan.heads, kv_heads=plan.kv_heads,
                window=message.window, exactness=plan.exactness, device=self._arena.device, dtype=dtype,
            )
        return stream.prepared[key]


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
