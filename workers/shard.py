"""LocalShard: one shard's model layers, slots and host frames. Runs steps and moves slots' bytes; decides nothing.

    hidden in (or token ids) --> its layers --> hidden out (or, on the last shard, one sampled token per draw)

The engine speaks to it directly when it is the whole chain, and through workers/chain.py when it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.block_copy import block_copy
from kvbank.kvstore.frame import FrameHeader, encode
from kvbank.kvstore.layout import BlockKey, Layout, SlotId
from kvbank.kvstore.span_table import Span
from kvbank.kvstore.tiers.host_tier import Held, HostTier
from kvbank.kvstore.vault import Arena
from kvbank.workers.attend import JoinedAttention
from kvbank.workers.batch import PAD_ROWS, StepPlan, StepResult
from kvbank.workers.sampler import BadLogits, logprobs, sample
from kvbank.workers.seams import nothing


class Model(Protocol):
    """The decoder, or the canary behind the same seam."""

    def forward(
        self, token_ids: Tensor | None, hidden: Tensor | None, positions: Tensor, attend: JoinedAttention
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class Shelf(Protocol):
    """Where spilled frames go (kvstore/store.py)."""

    def put(self, frames: Sequence[tuple[FrameHeader, Any]]) -> Any: ...

    def drop(self, keys: Sequence[bytes]) -> None: ...


class LocalShard:
    """Fills workers.seams.Backend for a chain of one."""

    def __init__(
        self, model: Model, arena: Arena, layout: Layout, attention: JoinedAttention, *,
        exactness: str = "fast", shelf: Shelf | None = None, host: HostTier | None = None,
    ) -> None:
        self.model, self.arena, self.layout, self.attention = model, arena, layout, attention
        self._slots = arena.view(layout)
        self._bitwise = exactness == "bitwise"
        self._shelf, self._host = shelf, host
        self._parked: dict[int, Held] = {}
        if host is not None:
            attention.staging = HostStaging(self)

    # -- computing ---------------------------------------------------------------------------------------------------

    def run(self, plan: StepPlan, *, keep_logits: bool = False, meanwhile: Callable[[], None] = nothing) -> StepResult:
        started = perf_counter()
        with torch.inference_mode():
            hidden = self.forward(plan, None)
            result = self.finish(plan, hidden, keep_logits=keep_logits, meanwhile=meanwhile)
        result.lost = dict(self.attention.lost)
        result.forward_s = perf_counter() - started
        return result

    def forward(self, plan: StepPlan, hidden: Callable[[], Tensor] | None) -> Tensor:
        """This shard's layers over the plan's rows. hidden: waits for those of the shard before; None on the first."""
        device = self.arena.device
        self.attention.begin(plan)
        positions = torch.from_numpy(plan.positions).to(device)
        if hidden is None:
            return self.model.forward(torch.from_numpy(plan.token_ids).to(device), None, positions, self.attention)
        return self.model.forward(None, hidden().to(device), positions, self.attention)

    def passed_on(self) -> StepResult:
        """What `forward` gave on a shard that is not the last."""
        calls, self.attention.remote_calls = self.attention.remote_calls, 0
        return StepResult([], dict(self.attention.lost), remote_calls=calls)

    def finish(
        self, plan: StepPlan, hidden: Tensor, *, keep_logits: bool = False, meanwhile: Callable[[], None] = nothing
    ) -> StepResult:
        """Sample the plan's draws from the last shard's hidden states."""
        calls, self.attention.remote_calls = self.attention.remote_calls, 0
        if not plan.draws:
            return StepResult([], {}, remote_calls=calls)
        rows = torch.tensor([draw.row for draw in plan.draws], device=hidden.device)
        chosen = hidden.index_select(0, rows)
        if self._bitwise and (fill := -len(rows) % PAD_ROWS):
            chosen = torch.cat([chosen, chosen.new_zeros(fill, chosen.shape[1])])
        meanwhile()                                  # next is the largest product; on a GPU also the wait for all before it
        logits = self.model.logits(chosen)[: len(rows)]
        try:
            tokens = sample(logits, [draw.params for draw in plan.draws], [draw.position for draw in plan.draws])
        except BadLogits as bad:
            tokens = [-1 if token is None else token for token in bad.tokens]     # the scheduler fails those jobs alone
        wanted = [draw.logprobs for draw in plan.draws]
        told = logprobs(logits, tokens, wanted) if any(count is not None for count in wanted) else ()
        return StepResult(tokens, {}, logits=logits if keep_logits else None, remote_calls=calls, logprobs=told)

    # -- moving bytes ------------------------------------------------------------------------------------------------

    def copy_tokens(self, source: SlotId, target: SlotId, start: int, stop: int) -> None:
        block_copy(self._slots, source, target, start, stop)

    def scrub(self, slots: Sequence[SlotId]) -> None:
        self.arena.scrub(slots)

    def spill(self, span: Span) -> None:
        if self._shelf is None or not span.keys or not span.parent:
            return                                   # a kept loan's parent is unknown: its borrower spills it, if anybody
        if len(span.keys) == self.layout.blocks_per_span:
            self._shelf.put([(self._header(span), self._payload(span.slot))])
        else:
            self._shelf.put([self._block_frame(span, number) for number in range(len(span.keys))])

    def forget(self, keys: Sequence[BlockKey]) -> None:
        if self._shelf is not None:
            self._shelf.drop(keys)

    def parkable(self) -> int:
        if self._host is None:
            return 0
        status = self._host.status()
        pinned = status.counters.get("bytes_pinned", 0)
        return max(0, (status.bytes_limit - pinned) // (self.layout.slot_bytes + 8192))

    def park(self, span: Span) -> bool:
        if self._host is None:
            return False
        header = self._header(span)
        if not self._host.put({header.key: encode(header, self._payload(span.slot))}, pin=True):
            return False
        held = self._host.hold(header.key)
        assert held is not None, "a pinned frame is gone"
        self._parked[span.uid] = held
        return True

    def unpark(self, uid: int, slot: SlotId | None) -> None:
        assert self._host is not None
        held = self._parked.pop(uid)
        if slot is not None:
            self.arena.slot(slot, self.layout.slot_bytes).copy_(torch.frombuffer(self._body(held), dtype=torch.uint8))
        self._host.release(held)
        self._host.unpin([held.key])

    def load(self, payload: memoryview, slot: SlotId, start: int) -> None:
        """Write a verified payload of whole blocks (or a whole span) into a slot, from token `start` on."""
        tokens = payload.nbytes // self.layout.token_bytes
        if tokens == self.layout.span_tokens and self.arena.device == "cpu":
            np.copyto(self.arena.slot(slot, self.layout.slot_bytes).numpy(), np.frombuffer(payload, dtype=np.uint8))
            return
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if tokens == self.layout.span_tokens:
            self.arena.slot(slot, self.layout.slot_bytes).copy_(data)
            return
        layers, two, heads, _, dim = self.layout.slot_shape
        block = data.view(self._slots.dtype).view(layers, two, heads, tokens, dim)
        self._slots[slot, :, :, :, start : start + tokens].copy_(block)

    def parked_layer(self, uid: int, layer: int) -> Tensor:
        """`[2, kv_heads, span_tokens, head_dim]` of a parked span, a view of host memory."""
        body = self._body(self._parked[uid])
        return torch.frombuffer(body, dtype=torch.uint8).view(self._slots.dtype).view(self.layout.slot_shape)[layer]

    def _body(self, held: Held) -> memoryview:
        # A frame ends with 4 bytes of checksum; the payload before them is exactly one slot.
        return held.view[-4 - self.layout.slot_bytes : -4]

    def _payload(self, slot: SlotId | None) -> memoryview:
        assert slot is not None
        return self.arena.slot(slot, self.layout.slot_bytes).cpu().numpy().data

    def _header(self, span: Span) -> FrameHeader:
        return FrameHeader(key=span.keys[-1], keys=tuple(span.keys), parent=span.parent, layout=self.layout, tokens=span.tokens)

    def _block_frame(self, span: Span, number: int) -> tuple[FrameHeader, Any]:
        size = self.layout.block_size
        block = self._slots[span.slot, :, :, :, number * size : (number + 1) * size].contiguous().cpu()
        header = FrameHeader(
            key=span.keys[number], keys=(span.keys[number],), parent=span.keys[number - 1] if number else span.parent,
            layout=self.layout, tokens=span.tokens[number * size * 4 : (number + 1) * size * 4],
        )
        return header, block.view(torch.uint8).numpy().data


class HostStaging:
    """Parked spans, one layer at a time, through a bounded buffer beside the vault."""

    def __init__(self, shard: LocalShard, spans: int = 16) -> None:
        layout = shard.layout
        _, two, heads, tokens, dim = layout.slot_shape
        self._shard, self._limit = shard, spans
        self._buffer = torch.zeros((spans, two, heads, tokens, dim), dtype=getattr(torch, layout.dtype),
                                   device=shard.arena.device)
        self._uses: list[tuple[int, int, int]] = []          # (uid, segment number, span index)

    @property
    def bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    def begin(self, plan: StepPlan) -> None:
        self._uses = [(uid, number, index) for number, rows in enumerate(plan.rows) for index, uid in rows.host]

    def groups(self, layer: int) -> Any:
        uids = list(dict.fromkeys(uid for uid, _, _ in self._uses))
        for first in range(0, len(uids), self._limit):
            rows = {uid: row for row, uid in enumerate(uids[first : first + self._limit])}
            for uid, row in rows.items():
                self._buffer[row].copy_(self._shard.parked_layer(uid, layer))
            spans: dict[int, list[tuple[int, int]]] = {}
            for uid, number, index in self._uses:
                if uid in rows:
                    spans.setdefault(number, []).append((index, rows[uid]))
            yield self._buffer, [(number, sorted(found)) for number, found in spans.items()]
