"""What the shards of one replica say to each other: typed messages as msgpack on Lead, hidden states on Activate.

    Lead      shard 0 -> every other    Hello, Step, Copy, Scrub, Spill, Discard, Park, Unpark, Lend, Home, Landed,
                                        Settle, Want, Ask, Load, Drop, Forget, Books, Keys
              every other -> shard 0    Ready, Logits, Result, Parked, Events, Found, Failed
    Activate  shard i -> shard i + 1    hidden states of one step, in pieces of at most PIECE_BYTES

A stream keeps the order in which things were said, and that order is all that keeps the shards in lockstep.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import msgpack
import torch
from torch import Tensor

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.span_table import Span
from kvbank.kvstore.transport.rpc import PIECE_BYTES
from kvbank.workers import seams
from kvbank.workers.batch import PlannedRows, StepPlan
from kvbank.workers.sampler import Logprobs
from kvbank.workers.seams import BankEvent, Move

LEAD, ACTIVATE = "/kvbank.Shard/Lead", "/kvbank.Shard/Activate"
CHAIN_KEY = "kvbank-chain"                   # metadata of Activate: hex of the Hello's chain


class ChainFormatError(Exception):
    """Bytes that no shard of this version sends."""


# -- shard 0 to the others -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """First on every Lead stream: forget what an earlier leader, or an earlier life of this one, had you hold."""

    chain: bytes                             # 16 random bytes, new with every connection of the chain
    shard: int
    likeness: tuple[tuple[str, str], ...]    # what must be equal on all shards, by name
    next_address: str                        # of the shard after this one; empty for the last


@dataclass(frozen=True, slots=True)
class Step:
    """Run this plan; the hidden states come on Activate. Answered by one Result."""

    plan: bytes
    keep_logits: bool


@dataclass(frozen=True, slots=True)
class Copy:
    source: int
    target: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Scrub:
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spill:
    """Copy a LOCAL span's full blocks to this shard's tiers."""

    slot: int
    keys: tuple[bytes, ...]
    tokens: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class Discard:
    """What this shard's tiers hold under these keys must not be used again."""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Park:
    """Answered by one Parked of the same number."""

    number: int
    uid: int
    slot: int
    keys: tuple[bytes, ...]
    tokens: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class Unpark:
    uid: int
    slot: int | None


@dataclass(frozen=True, slots=True)
class Lend:
    """Each uid ends in exactly one Moved or Stayed among the Events. A span that stayed may be lent again under its uid:
    `attempt`, which every event of these moves carries, tells late news of an earlier one apart."""

    attempt: int
    moves: tuple[tuple[int, int, tuple[bytes, ...], bytes, bytes], ...]      # uid, slot, keys, tokens, parent
    tenant: str
    age: float
    needy: bool = False


@dataclass(frozen=True, slots=True)
class Home:
    """Bring this shard's part of a lent span into `slot`."""

    uid: int
    slot: int


@dataclass(frozen=True, slots=True)
class Landed:
    """All shards have these at home: plans name them as local from now on."""

    uids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    uids: tuple[int, ...]
    keep: bool


@dataclass(frozen=True, slots=True)
class Want:
    """A job will need these from the tiers, in this order. Each key is answered by one Found, unless dropped before."""

    name: str                                # of the job and this want of it
    keys: tuple[bytes, ...]
    tokens: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """It needs this one as well, at once. Answered by one Found."""

    name: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Load:
    """Every shard has it staged: into the slot with it, from token `start` of the span on."""

    name: str
    key: bytes
    slot: int
    start: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Some shard lacks it: it will be computed."""

    name: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Forget:
    """The job needs nothing more of what it wanted."""

    name: str


@dataclass(frozen=True, slots=True)
class Books:
    """Slots by state as the leader keeps them, for status and reports."""

    free: int
    held: int


@dataclass(frozen=True, slots=True)
class Keys:
    """Block keys, 32 bytes each, that all shards hold from now on, or no longer. whole: and none but these are held."""

    added: bytes
    removed: bytes
    whole: bool


# -- the others to shard 0 -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """Answer to Hello: connected onwards, and nothing of the past is left. parkable: spans that Park would take now."""

    parkable: int


@dataclass(frozen=True, slots=True)
class Logits:
    """Of one draw, before its step's Result; only when asked for."""

    step: int
    row: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """tokens: one per draw on the last shard, empty on the others. lost: (uid, why). logprobs: one per draw that asked, as
    (index of the draw, its log-probability, ids of likely tokens, theirs)."""

    step: int
    tokens: tuple[int, ...]
    lost: tuple[tuple[int, str], ...]
    remote_calls: int
    forward_s: float
    parkable: int
    logprobs: tuple[tuple[int, float, tuple[int, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Parked:
    number: int
    ok: bool
    parkable: int


@dataclass(frozen=True, slots=True)
class Events:
    """What this shard's bank tells: (attempt, name of the event's class in workers.seams, its fields)."""

    events: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """state: 'here' (staged), or why not, in the words of workers.seams.Fetcher."""

    name: str
    key: bytes
    state: str


@dataclass(frozen=True, slots=True)
class Failed:
    """This shard cannot go on; the stream ends after it."""

    reason: str


Message = (Hello | Step | Copy | Scrub | Spill | Discard | Park | Unpark | Lend | Home | Landed | Settle
           | Want | Ask | Load | Drop | Forget | Books | Keys
           | Ready | Logits | Result | Parked | Events | Found | Failed)

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Message.__args__}
_EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (seams.Moved, seams.Stayed, seams.Lost, seams.MustReturn, seams.Returned, seams.StayedAway)
}


def pack(message: Message) -> bytes:
    """`unpack(pack(m)) == m`."""
    values = [getattr(message, field.name) for field in fields(message)]
    return bytes(msgpack.packb((type(message).__name__, *values)))


def unpack(data: bytes) -> Any:
    """The message. Raises ChainFormatError."""
    try:
        name, *values = msgpack.unpackb(data, use_list=False)
        return _KINDS[name](*values)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ChainFormatError(f"not a message between shards: {type(error).__name__}") from None


def pack_event(attempt: int, event: Any) -> tuple[Any, ...]:
    """event: one of _EVENTS."""
    return (attempt, type(event).__name__, *astuple(event))


def unpack_event(values: tuple[Any, ...]) -> tuple[int, BankEvent]:
    """(attempt, event). Raises ChainFormatError."""
    try:
        return int(values[0]), _EVENTS[values[1]](*values[2:])
    except (KeyError, TypeError, IndexError, ValueError):
        raise ChainFormatError("not a bank event") from None


def pack_logprobs(told: Sequence[Logprobs | None]) -> tuple[tuple[int, float, tuple[int, ...], tuple[float, ...]], ...]:
    """Of a step, for its Result."""
    return tuple((at, each.drawn, each.top_ids, each.top) for at, each in enumerate(told) if each is not None)


def unpack_logprobs(packed: Sequence[Any], draws: int) -> tuple[Logprobs | None, ...]:
    """One per draw; empty when none asked. Raises ChainFormatError."""
    if not packed:
        return ()
    told: list[Logprobs | None] = [None] * draws
    try:
        for at, drawn, ids, values in packed:
            told[at] = Logprobs(drawn, ids, values)
    except (TypeError, ValueError, IndexError):
        raise ChainFormatError("not log-probabilities") from None
    return tuple(told)


def pack_moves(moves: Sequence[Move]) -> tuple[tuple[int, int, tuple[bytes, ...], bytes, bytes], ...]:
    return tuple((move.uid, move.slot, tuple(move.keys), move.tokens, move.parent) for move in moves)


def unpack_span(uid: int, slot: int, keys: tuple[bytes, ...], tokens: bytes, parent: bytes) -> Span:
    """A span as this shard needs it to copy its own layers of it."""
    return Span(slot=SlotId(slot), keys=[BlockKey(key) for key in keys], tokens=tokens, parent=parent, uid=uid)


# -- plans: where a span is on THIS shard ----------------------------------------------------------------------


def placed(plan: StepPlan, homes: dict[int, SlotId], names: dict[int, int] | None = None) -> StepPlan:
    """The leader's plan as this shard must read it.

    homes: lent spans that are home here and not on every other shard yet: read in their slot. names: the leader's uid
    of a lent span -> the one this shard's own books know it by; one that is not among them was lost here, which the leader
    had not heard when it planned, and gets a name that nobody has: -uid.
    """
    if not homes and names is None:
        return plan
    return replace(plan, rows=tuple(_placed(rows, homes, names) if rows.remote else rows for rows in plan.rows))


def _placed(rows: PlannedRows, homes: dict[int, SlotId], names: dict[int, int] | None) -> PlannedRows:
    home = [(index, homes[uid]) for index, uid in rows.remote if uid in homes]
    away = [(index, uid if names is None else names.get(uid, -uid)) for index, uid in rows.remote if uid not in homes]
    local = sorted([*rows.local, *home]) if home else rows.local
    return replace(rows, local=tuple(local), remote=tuple(away))


# -- hidden states ---------------------------------------------------------------------------------------------

_ROWS = struct.Struct("<qIII")               # step, first row, rows here, rows in all


def pack_hidden(step: int, hidden: Tensor) -> Iterator[bytes]:
    """hidden [T, D] as pieces, each at most about PIECE_BYTES."""
    raw = hidden.detach().to("cpu").contiguous().view(torch.uint8).view(len(hidden), -1).numpy()
    per_piece = max(1, PIECE_BYTES // raw.shape[1])
    for first in range(0, len(raw), per_piece):
        rows = raw[first : first + per_piece]
        yield _ROWS.pack(step, first, len(rows), len(raw)) + rows.tobytes()


class HiddenRows:
    """Collects the pieces of one step."""

    def __init__(self, step: int, num_rows: int, size: int, dtype: torch.dtype) -> None:
        """The whole will be [num_rows, size] of dtype."""
        self.hidden = torch.empty((num_rows, size), dtype=dtype)
        self._raw = self.hidden.view(torch.uint8)
        self._step, self._missing = step, num_rows

    def add(self, data: bytes) -> bool:
        """Take a piece; True when all rows are here. A piece of another step is left out. Raises ChainFormatError."""
        if len(data) < _ROWS.size:
            raise ChainFormatError("hidden states are cut short")
        step, first, rows, total = _ROWS.unpack_from(data)
        if step != self._step:
            return False
        body = memoryview(data)[_ROWS.size :]
        if total != len(self._raw) or first + rows > total or len(body) != rows * self._raw.shape[1]:
            raise ChainFormatError(f"{rows} rows of {len(body)} bytes at {first} do not fit {tuple(self._raw.shape)}")
        self._raw[first : first + rows] = torch.frombuffer(bytearray(body), dtype=torch.uint8).view(rows, -1)
        self._missing -= rows
        return self._missing <= 0
