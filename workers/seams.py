"""The seams of the engine: what it asks of the bytes below it. Each is filled by one real thing and a ten-line fake in tests.

    Backend   runs steps and moves slots' bytes: one shard (workers/shard.py) or the whole chain of them
    Bank      lends this worker's spans out and reads them back (kvstore/borrowing.py)
    Fetcher   brings spans from host, disk and Redis (workers/fetcher.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbank.errors import Unavailable
from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.span_table import Span
from kvbank.workers.batch import StepPlan, StepResult


def nothing() -> None:
    """Where there is nothing to do meanwhile."""


class BackendLost(Unavailable):
    """Another shard of the chain is gone, and with it what the slots held: every job here ends and no cache counts."""


class Backend(Protocol):
    """All methods are called by the engine thread, between steps except `run`."""

    def run(self, plan: StepPlan, *, keep_logits: bool = False, meanwhile: Callable[[], None] = nothing) -> StepResult:
        """meanwhile: call it once, when this thread is about to be without the interpreter's lock for long, in one large
        product or in waiting: the threads that it wakes then cost the step nothing. It never raises. Raises BackendLost."""

    def copy_tokens(self, source: SlotId, target: SlotId, start: int, stop: int) -> None:
        """Tokens start .. stop-1 of one slot over those of another."""

    def scrub(self, slots: Sequence[SlotId]) -> None: ...

    def spill(self, span: Span) -> None:
        """A copy of a LOCAL span's full blocks goes to the tiers."""

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """What the tiers hold under these keys must not be used again."""

    def park(self, span: Span) -> bool:
        """Copy a full LOCAL span to the host tier, pinned under its uid; False when that has no room for it."""

    def unpark(self, uid: int, slot: SlotId | None) -> None:
        """A parked span comes home into `slot`, or (None) becomes an ordinary frame of the host tier."""

    def parkable(self) -> int:
        """How many more spans `park` would take now."""


def spill_all(backend: Backend, blocks_per_span: int) -> Callable[[Span], None]:
    """What a vault does with a span before it evicts it: its bytes go to the tiers under every key they may be asked for."""
    def spill(span: Span) -> None:
        backend.spill(span)
        if len(span.keys) == blocks_per_span and (tail := span.prompt_tail()) is not None:
            backend.spill(tail)
    return spill


@dataclass(frozen=True, slots=True)
class Move:
    """A full span that should be lent out: its bytes are in `slot` and stay there until it moved."""

    uid: int
    slot: SlotId
    keys: tuple[BlockKey, ...]
    tokens: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class Moved:
    """The lender has sealed the span; flip, and free the local copy."""

    uid: int
    lender: str
    also: tuple[str, ...] = ()               # with several shards: the lenders of the other shards' parts


@dataclass(frozen=True, slots=True)
class Stayed:
    """The span could not be lent; the local copy is and was the one that is read. reason: OLDER when older jobs hold what
    a needy one asked for."""

    uid: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The bytes of a lent span are gone, or the lender is."""

    uid: int
    reason: str


@dataclass(frozen=True, slots=True)
class MustReturn:
    """The lender wants the span's slot back within `within_s`."""

    uid: int
    within_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Returned:
    """`bring_home` ended: the verified bytes are in `slot`."""

    uid: int
    slot: SlotId


@dataclass(frozen=True, slots=True)
class StayedAway:
    """`bring_home` failed; the span is read where it was."""

    uid: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """A peer's cached span is lent to us where it lies."""

    job: str
    key: BlockKey
    uid: int
    lender: str


@dataclass(frozen=True, slots=True)
class AdoptEnded:
    """No more Adopted events will come for this job's request."""

    job: str


@dataclass(frozen=True, slots=True)
class GiveWay:
    """An older job on another worker, with this admission stamp, needs slots that jobs here hold: younger ones yield."""

    age: float


BankEvent = Moved | Stayed | Lost | MustReturn | Returned | StayedAway | Adopted | AdoptEnded | GiveWay


class Bank(Protocol):
    """Engine thread only; nothing here waits for the network."""

    def lendable(self) -> int:
        """Slots that neighbours would probably lend now, by the latest advice."""

    def callable_back(self) -> bool:
        """Somebody could be asked now to call back what younger jobs elsewhere hold."""

    def lend_out(self, moves: Sequence[Move], *, tenant: str, age: float, needy: bool = False) -> None:
        """Start lending; each uid ends in exactly one Moved or Stayed event. needy: the job cannot go on otherwise, so those
        are asked who have nothing to lend, and call back what younger jobs hold."""

    def adopt(self, job: str, keys: Sequence[BlockKey], *, tenant: str, age: float) -> bool:
        """Ask peers for spans cached under these span keys; False: nobody to ask, no event follows."""

    def left(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Those of these span keys that lenders probably cache because we left them there, and nobody asked for since."""

    def distrust(self, keys: Sequence[BlockKey]) -> None:
        """Peers are not asked again for what they cache under these keys: it may have been made from wrong bytes."""

    def bring_home(self, uid: int, slot: SlotId) -> None:
        """Fetch a lent span into a slot of ours; ends in Returned, StayedAway or Lost."""

    def settle(self, uids: Sequence[int], *, keep: bool) -> None:
        """Nobody here reads these spans any more; with keep the lenders may cache them."""

    def recall(self, slots: int, *, age: float) -> None:
        """A job of this age needs slots of ours that are lent: call back that many from younger jobs. Safe to repeat."""

    def poll(self) -> list[BankEvent]:
        """What happened since the last call. Called at step boundaries: entries flip only there. Raises BackendLost."""


class NoBank:
    """A worker without neighbours."""

    def lendable(self) -> int:
        return 0

    def callable_back(self) -> bool:
        return False

    def lend_out(self, moves: Sequence[Move], *, tenant: str, age: float, needy: bool = False) -> None:
        assert not moves, "nobody lends here"

    def adopt(self, job: str, keys: Sequence[BlockKey], *, tenant: str, age: float) -> bool:
        return False

    def left(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        return []

    def distrust(self, keys: Sequence[BlockKey]) -> None:
        """Nobody is ever asked."""

    def bring_home(self, uid: int, slot: SlotId) -> None:
        raise AssertionError("nothing is lent")

    def settle(self, uids: Sequence[int], *, keep: bool) -> None:
        assert not uids, "nothing is lent"

    def recall(self, slots: int, *, age: float) -> None:
        """Nobody borrowed anything."""

    def poll(self) -> list[BankEvent]:
        return []


class Fetcher(Protocol):
    """Looks below the device ahead of need. `want`, `drop` and `forget` never wait."""

    def want(self, job: str, keys: Sequence[BlockKey], tokens: Sequence[bytes], *, now: float) -> None:
        """The job will need the spans (or tail blocks) that end with these keys, in this order."""

    def state(self, job: str, key: BlockKey, *, now: float) -> str:
        """'here', 'coming', or why not: never_seen | evicted | integrity | timeout | tier_down | over_limit."""

    def load(self, job: str, key: BlockKey, slot: SlotId, start: int) -> str | None:
        """Write the bytes into `slot` from token `start` of the span on; returns the source, None if they are gone."""

    def drop(self, job: str, key: BlockKey) -> None:
        """The job will not load this one: it came from elsewhere, or was computed. Safe to repeat."""

    def forget(self, job: str) -> None: ...


class NoFetcher:
    """A worker without tiers."""

    def want(self, job: str, keys: Sequence[BlockKey], tokens: Sequence[bytes], *, now: float) -> None: ...

    def state(self, job: str, key: BlockKey, *, now: float) -> str:
        return "never_seen"

    def load(self, job: str, key: BlockKey, slot: SlotId, start: int) -> str | None:
        return None

    def drop(self, job: str, key: BlockKey) -> None: ...

    def forget(self, job: str) -> None: ...
