"""Chain: the shards of one replica as the engine sees them: one Backend. Shard 0 leads; it lives in this process.

    engine --plan--> Chain --Step on Lead--> shard 1 ... shard N-1      every shard runs the same plan on its own layers
                       |                        ^            |
               own layers, then hidden --Activate            +--Result: tokens from the last, lost spans from any

Slot indices are in lockstep: what changes a slot here is said to every other shard, in order, on one stream each. So
the books of the slots are the engine's alone. A stream that breaks ends the replica's step, its jobs and its cache
(BackendLost); the chain is then made anew when it is next needed, with blank slots everywhere.

Knows streams and order; decides nothing about spans. Loans of all shards as one: workers/chain_bank.py.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from threading import Event
from time import perf_counter
from typing import Any

import torch

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.span_table import Span
from kvbank.kvstore.transport.badge import Badge
from kvbank.workers.batch import StepPlan, StepResult
from kvbank.workers.chain_frames import (
    Ask,
    Copy,
    Discard,
    Found,
    Hello,
    Keys,
    Logits,
    Message,
    Park,
    Parked,
    Result,
    Scrub,
    Spill,
    Step,
    Unpark,
    Want,
    placed,
    unpack_logprobs,
)
from kvbank.workers.chain_link import LeadLink, LinkBroken, Onward
from kvbank.workers.seams import BackendLost, BankEvent, nothing
from kvbank.workers.shard import LocalShard

log = logging.getLogger(__name__)

RECONNECT_PAUSE_S = 0.1
KEYS_BYTES = 1 << 20                         # a multiple of a key's 32, well below a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainTimings:
    """How long the engine waits for the other shards before it gives the step up. Seconds."""

    step_s: float = 30.0                     # one step, on all shards
    connect_s: float = 10.0                  # all shards there and ready, at start and after a loss
    park_s: float = 1.0                      # a span parked on every shard


class Chain:
    """Fills workers.seams.Backend. Engine thread only."""

    def __init__(
        self, local: LocalShard, shards: int, *, badge: Badge | str, likeness: tuple[tuple[str, str], ...],
        find: Callable[[int], str | None], wake: Callable[[], None], timings: ChainTimings | None = None,
    ) -> None:
        """find: the address of shard 1 .. shards-1 now, None when it is not there. wake: there is something to poll.
        likeness: what every shard must have alike."""
        self.local, self.shards = local, shards
        self._badge, self._likeness, self._find, self._wake = badge, likeness, find, wake
        self.timings = timings or ChainTimings()
        self.homes: dict[int, SlotId] = {}               # lent spans that are home here but not on every shard yet
        self.on_lost: Callable[[dict[int, set[int]]], None] = lambda lost: None     # in a step: uid -> its losers
        self.on_reset: list[Callable[[], None]] = []
        self._numbers = count(1)
        self._onward: Onward | None = None
        self._asked = False                              # something was said that waits for an answer before any step
        self._keys: deque[tuple[bytes, bytes, bool]] = deque(maxlen=1024)
        self._closed = Event()
        self.links = self._fresh_links()
        self.connects = 0

    @property
    def connected(self) -> bool:
        return self._onward is not None

    # -- seams.Backend -----------------------------------------------------------------------------------------------

    def run(self, plan: StepPlan, *, keep_logits: bool = False, meanwhile: Callable[[], None] = nothing) -> StepResult:
        """One step on all shards. Raises BackendLost when one of them is gone or too slow."""
        if not self.connected:
            self._connect_or_lose()
        try:
            return self._run(plan, keep_logits, time.monotonic() + self.timings.step_s, meanwhile)
        except LinkBroken as error:
            raise self._lost(str(error)) from None
        except Exception as error:                       # the others may be in the middle of a step that never ends
            log.exception("chain_step_failed")
            raise self._lost(f"its leader met {type(error).__name__}") from error

    def copy_tokens(self, source: SlotId, target: SlotId, start: int, stop: int) -> None:
        self.local.copy_tokens(source, target, start, stop)
        self.send(Copy(source, target, start, stop))

    def scrub(self, slots: Sequence[SlotId]) -> None:
        self.local.scrub(slots)
        self.send(Scrub(tuple(slots)))

    def forget(self, keys: Sequence[BlockKey]) -> None:
        self.local.forget(keys)
        self.send(Discard(tuple(keys)))

    def spill(self, span: Span) -> None:
        assert span.slot is not None
        self.local.spill(span)
        self.send(Spill(span.slot, tuple(span.keys), span.tokens, span.parent))

    def parkable(self) -> int:
        if not self.connected:
            return 0
        return min(self.local.parkable(), *(link.parkable for link in self.links))

    def park(self, span: Span) -> bool:
        """On every shard or on none."""
        assert span.slot is not None
        if not self.connected or not self.local.park(span):
            return False
        number = next(self._numbers)
        self.send(Park(number, span.uid, span.slot, tuple(span.keys), span.tokens, span.parent))
        if all(self._parked(link, number) for link in self.links):
            return True
        self.unpark(span.uid, None)
        return False

    def unpark(self, uid: int, slot: SlotId | None) -> None:
        self.local.unpark(uid, slot)
        self.send(Unpark(uid, slot))

    # -- the rest of the engine's and the bank's business ------------------------------------------------------------

    def check(self) -> None:
        """Raises BackendLost, once, when a shard went away since the last step, or cannot be asked what is to be asked."""
        if not self.connected:
            if not self._asked:
                return
            self._connect_or_lose()
        while self._keys:
            added, removed, whole = self._keys.popleft()
            for cut in range(0, max(len(added), len(removed), 1), KEYS_BYTES):
                self.send(Keys(added[cut : cut + KEYS_BYTES], removed[cut : cut + KEYS_BYTES], whole and not cut))
        assert self._onward is not None
        broken = next((link.broken for link in self.links if link.broken), "")
        if broken or self._onward.broken:
            raise self._lost(broken or "the stream of hidden states ended")

    def send(self, message: Message) -> None:
        """To every other shard, in order with everything else."""
        self._asked = self._asked or isinstance(message, Want | Ask)
        for link in self.links:
            link.send(message)

    def tell(self, shard: int, message: Message) -> None:
        """To one other shard."""
        self.links[shard - 1].send(message)

    def note_keys(self, added: bytes, removed: bytes, *, whole: bool) -> None:
        """Any thread: block keys that came and went, or all that are held; told to the others at the next `check`."""
        if added or removed or whole:
            self._keys.append((added, removed, whole))

    def take_events(self) -> list[tuple[int, int, BankEvent]]:
        """(shard, attempt, event) of what the other shards' banks told, in order per shard."""
        return [(link.shard, *told) for link in self.links for told in link.take_events()]

    def take_found(self) -> list[tuple[int, Found]]:
        """What the other shards' tiers had, or had not."""
        return [(link.shard, found) for link in self.links for found in link.take_found()]

    def close(self) -> None:
        """Any thread: end the streams; a connect under way is given up."""
        self._closed.set()
        for link in self.links:
            link.close()
        if (onward := self._onward) is not None:
            onward.close()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan, keep_logits: bool, deadline: float, meanwhile: Callable[[], None]) -> StepResult:
        assert self._onward is not None
        self.send(Step(plan.pack(), keep_logits))
        started = perf_counter()
        with torch.inference_mode():
            hidden = self.local.forward(placed(plan, self.homes), None)
        mine = self.local.passed_on()
        mine.forward_s = perf_counter() - started
        self._onward.send(plan.step, hidden)
        meanwhile()                                        # the others compute now
        logits = None
        lost = {uid: {0} for uid in mine.lost}
        for link in self.links:
            if keep_logits and plan.draws and link is self.links[-1]:
                logits = self._logits(link, plan, deadline)
            result = self._result(link, plan.step, deadline)
            mine.forward_s += result.forward_s
            mine.remote_calls += result.remote_calls
            mine.tokens = list(result.tokens)              # of the last one in the end
            mine.logprobs = unpack_logprobs(result.logprobs, len(plan.draws))
            for uid, why in result.lost:
                mine.lost[uid] = why if why == "tainted" else mine.lost.get(uid, why)     # the worst of all
                lost.setdefault(uid, set()).add(link.shard)
        if lost:
            self.on_lost(lost)
        mine.logits = logits
        return mine

    def _result(self, link: LeadLink, step: int, deadline: float) -> Result:
        while True:
            result: Result = link.answer(Result, timeout_s=deadline - time.monotonic())
            if result.step == step:
                link.parkable = result.parkable
                return result

    def _logits(self, link: LeadLink, plan: StepPlan, deadline: float) -> Any:
        rows = [link.answer(Logits, timeout_s=deadline - time.monotonic()).row for _ in plan.draws]
        return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float32).view(len(rows), -1)

    def _parked(self, link: LeadLink, number: int) -> bool:
        try:
            while True:
                answer: Parked = link.answer(Parked, timeout_s=self.timings.park_s)
                if answer.number == number:
                    link.parkable = answer.parkable
                    return answer.ok
        except LinkBroken:
            return False                                   # if it is more than late, the next step says so

    # -- making and unmaking -----------------------------------------------------------------------------------------

    def _lost(self, why: str) -> BackendLost:
        self._reset()
        return BackendLost(f"the replica lost a shard: {why}; the job can go on elsewhere")

    def _connect_or_lose(self) -> None:
        try:
            self._connect()
        except LinkBroken as error:
            raise self._lost(str(error)) from None

    def _connect(self) -> None:
        """From the last shard to the first, so that who says Ready has somebody ready behind it. Raises LinkBroken."""
        deadline = time.monotonic() + self.timings.connect_s
        while True:
            try:
                self._try_connect(deadline)
                self.connects += 1
                log.info("chain_connected shards=%d", self.shards)
                return
            except LinkBroken:
                if time.monotonic() + RECONNECT_PAUSE_S >= deadline or self._closed.wait(RECONNECT_PAUSE_S):
                    raise

    def _try_connect(self, deadline: float) -> None:
        chain, next_address = os.urandom(16), ""
        made = []
        try:
            for link in reversed(self.links):
                address = self._find(link.shard)
                if address is None:
                    raise LinkBroken(f"shard {link.shard} is not there")
                made.append(link)
                hello = Hello(chain, link.shard, self._likeness, next_address)
                link.open(address, self._badge, hello, timeout_s=deadline - time.monotonic())
                next_address = address
        except LinkBroken:
            for link in made:
                self.links[link.shard - 1] = link.again()
            raise
        for link in self.links:
            link.begin()
        self._onward = Onward(next_address, self._badge, chain, on_end=self._wake)

    def _reset(self) -> None:
        """Streams closed, nothing promised: the next step connects anew."""
        for link in self.links:
            link.close()
        if self._onward is not None:
            self._onward.close()
        self._onward = None
        self.links = self._fresh_links()
        self.homes.clear()
        self._keys.clear()
        self._asked = False
        for forget in self.on_reset:
            forget()

    def _fresh_links(self) -> list[LeadLink]:
        return [LeadLink(shard, wake=self._wake) for shard in range(1, self.shards)]
