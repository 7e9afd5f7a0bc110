"""ChainBank: the loans of all shards of a replica as one bank. A span is elsewhere for all shards or for none.

Every shard lends its own layers of a span to a lender of its choice; each has its own loans and its own book. The
engine sees one span and one event:

    MOVING     --Moved from all--> AWAY (Moved)           --one stayed, lost or was recalled--> the rest settle; Stayed
    AWAY       --Lost from one--> the rest settle; Lost     --MustReturn from one--> MustReturn, once
               --bring_home--> RETURNING
    RETURNING  --Returned from all--> Returned              --StayedAway from all--> AWAY; StayedAway
               --Lost from one, or some came and some stayed--> the rest settle; Lost

Plans go by what the engine was told: until Moved the local slots are read (their bytes are still there), until Returned
the lenders (or the slot, on a shard whose part came home early: Chain.homes). Knows uids and shards; knows no bytes.
Engine thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.messages import OLDER
from kvbank.workers.chain_frames import Books, Home, Landed, Lend, Message, Settle, pack_moves
from kvbank.workers.seams import Bank, BankEvent, Lost, Move, Moved, MustReturn, Returned, Stayed, StayedAway

MOVING, AWAY, RETURNING = "moving", "away", "returning"
NO_LIMIT = 1 << 30                           # spans in one needy Lend
PRESS_PAUSE_S = 0.35                         # after one that not all shards could place: who was refused may ask again then


class Followers(Protocol):
    """The other shards (workers/chain.py)."""

    shards: int
    homes: dict[int, SlotId]
    on_lost: Callable[[dict[int, set[int]]], None]
    on_reset: list[Callable[[], None]]

    def check(self) -> None: ...

    def send(self, message: Message) -> None: ...

    def tell(self, shard: int, message: Message) -> None: ...

    def take_events(self) -> list[tuple[int, int, BankEvent]]:
        """(shard, attempt, event) of every shard but the first, in order per shard."""


@dataclass(slots=True)
class _Lent:
    """One span: what each shard has said since the state began. Shard -> its lender, its slot's news or its reason."""

    state: str
    attempt: int                             # of the Lend: what others say about an earlier one is of no interest
    slot: SlotId | None = None               # RETURNING: where it will be
    moved: dict[int, str] = field(default_factory=dict)      # MOVING on: shard -> lender id
    failed: dict[int, str] = field(default_factory=dict)     # MOVING: shard -> why its part stays
    home: set[int] = field(default_factory=set)              # RETURNING: shards whose part came home
    stayed: set[int] = field(default_factory=set)            # RETURNING: shards whose part did not
    recalled: bool = False                   # MustReturn was passed on
    needy: bool = False                      # MOVING, for a job that cannot go on without


class ChainBank:
    """Fills workers.seams.Bank for a chain. `local` is shard 0's own bank."""

    def __init__(self, local: Bank, chain: Followers, *, books: Callable[[], tuple[int, int]] | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """books: (free, held) slots of the engine's vault, passed on to the other shards' status."""
        self._local, self._chain = local, chain
        self._lent: dict[int, _Lent] = {}
        self._out: list[BankEvent] = []
        self._attempts = 0
        self._needy_spans, self._portion = 0, NO_LIMIT           # of the last needy Lend; of the next one, at most
        self._clock, self._press_at = clock, float("-inf")
        self._books, self._told = books, (-1, -1)
        chain.on_lost = self._lost_in_step
        chain.on_reset.append(self._reset)

    # -- seams.Bank --------------------------------------------------------------------------------------------------

    def lendable(self) -> int:
        """Every span takes one slot per shard, from lenders that all shards share."""
        return self._local.lendable() // self._chain.shards

    def callable_back(self) -> bool:
        return self._clock() >= self._press_at and self._local.callable_back()

    def lend_out(self, moves: Sequence[Move], *, tenant: str, age: float, needy: bool = False) -> None:
        self._attempts += 1
        if needy:
            self._out += [Stayed(move.uid, "portion") for move in moves[self._portion :]]
            moves = moves[: self._portion]
            self._needy_spans = len(moves)
        for move in moves:
            self._lent[move.uid] = _Lent(MOVING, self._attempts, needy=needy)
        self._chain.send(Lend(self._attempts, pack_moves(moves), tenant, age, needy))
        self._local.lend_out(moves, tenant=tenant, age=age, needy=needy)

    def adopt(self, job: str, keys: Sequence[BlockKey], *, tenant: str, age: float) -> bool:
        """Nothing: a cached span of a peer has one shard's layers, and its key does not say whose."""
        return False

    def left(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        return []

    def distrust(self, keys: Sequence[BlockKey]) -> None:
        """Nobody is ever asked."""

    def bring_home(self, uid: int, slot: SlotId) -> None:
        if (lent := self._lent.get(uid)) is None:
            return                                         # lost since it was recalled: the engine hears of it next
        lent.state, lent.slot, lent.recalled = RETURNING, slot, False
        lent.home.clear()
        lent.stayed.clear()
        self._chain.send(Home(uid, slot))
        self._local.bring_home(uid, slot)

    def recall(self, slots: int, *, age: float) -> None:
        """A sharded replica lends nothing."""

    def settle(self, uids: Sequence[int], *, keep: bool) -> None:
        """keep is not passed on: what lenders cached for one shard could be mistaken for another's."""
        for uid in uids:
            if (lent := self._lent.pop(uid, None)) is not None:
                self._settle_at(uid, set(range(self._chain.shards)) - lent.home)
                self._forget_home(uid, lent)

    def poll(self) -> list[BankEvent]:
        """Raises BackendLost when a shard went away."""
        self._chain.check()
        while True:
            # Again until all is quiet: what one shard says can settle spans at another, ours included, and a uid must
            # be free there before the engine hears that it may be lent again.
            mine, theirs = self._local.poll(), self._chain.take_events()
            if not mine and not theirs:
                break
            for event in mine:
                self._heard(0, event)
            for shard, attempt, event in theirs:
                lent = self._lent.get(getattr(event, "uid", 0))
                if lent is not None and lent.attempt == attempt:
                    self._heard(shard, event)
        self._pass_on_books()
        events, self._out = self._out, []
        return events

    # -- what the shards say -----------------------------------------------------------------------------------------

    def _heard(self, shard: int, event: BankEvent) -> None:
        lent = self._lent.get(getattr(event, "uid", -1))
        match event:
            case Moved(uid=uid) if lent is None or lent.state != MOVING:
                self._settle_at(uid, {shard})              # given up meanwhile
            case _ if lent is None:
                pass                                       # it has ended for the engine already
            case Moved(uid=uid, lender=lender):
                lent.moved[shard] = lender
                self._end_move(uid, lent)
            case Stayed(uid=uid, reason=reason):
                lent.failed[shard] = reason
                self._end_move(uid, lent)
            case Lost(uid=uid, reason=reason):
                self._lost(uid, lent, {shard}, reason)
            case MustReturn(uid=uid):
                self._must_return(lent, shard, event)
            case Returned(uid=uid):
                self._returned(uid, lent, shard)
            case StayedAway(uid=uid):
                lent.stayed.add(shard)
                self._end_return(uid, lent)

    def _end_move(self, uid: int, lent: _Lent) -> None:
        """All shards must have answered: until then some still read the bytes to send them."""
        shards = range(self._chain.shards)
        if any(shard not in lent.moved and shard not in lent.failed for shard in shards):
            return
        if not lent.failed:
            lent.state, self._portion = AWAY, NO_LIMIT
            lenders = tuple(dict.fromkeys(lent.moved[shard] for shard in shards))
            self._out.append(Moved(uid, lenders[0], lenders[1:]))
            return
        del self._lent[uid]
        self._settle_at(uid, set(lent.moved) - set(lent.failed))
        if lent.needy and lent.moved:                      # what one shard took the others lack: ask for less
            self._portion, self._press_at = max(1, self._needy_spans // 2), self._clock() + PRESS_PAUSE_S
        reasons = list(lent.failed.values())
        self._out.append(Stayed(uid, OLDER if OLDER in reasons else reasons[0]))

    def _must_return(self, lent: _Lent, shard: int, event: MustReturn) -> None:
        if lent.state == MOVING:                           # our copy is still here: no need to fetch this part
            self._settle_at(event.uid, {shard})
            lent.failed[shard] = f"recalled_{event.why.lower()}"
            self._end_move(event.uid, lent)
        elif lent.state == AWAY and not lent.recalled:
            lent.recalled = True
            self._out.append(event)

    def _returned(self, uid: int, lent: _Lent, shard: int) -> None:
        assert lent.slot is not None
        lent.home.add(shard)
        if shard == 0:
            self._chain.homes[uid] = lent.slot
        self._end_return(uid, lent)

    def _end_return(self, uid: int, lent: _Lent) -> None:
        shards = self._chain.shards
        if len(lent.home) + len(lent.stayed) < shards:
            return
        if not lent.home:
            lent.state = AWAY
            self._out.append(StayedAway(uid))
        elif not lent.stayed:
            assert lent.slot is not None
            del self._lent[uid]
            self._chain.homes.pop(uid, None)
            self._chain.send(Landed((uid,)))
            self._out.append(Returned(uid, lent.slot))
        else:
            self._lost(uid, lent, set(), "recall")

    def _lost(self, uid: int, lent: _Lent, losers: set[int], reason: str) -> None:
        if lent.state == MOVING:                           # read locally still: only this part of the move failed
            for shard in losers:
                lent.failed[shard] = reason
            self._end_move(uid, lent)
            return
        del self._lent[uid]
        self._settle_at(uid, set(range(self._chain.shards)) - losers - lent.home)
        self._forget_home(uid, lent)
        self._out.append(Lost(uid, reason))

    def _lost_in_step(self, lost: dict[int, set[int]]) -> None:
        """The engine hears of these in the step's result: the other shards let go of theirs."""
        for uid, losers in lost.items():
            if (lent := self._lent.pop(uid, None)) is not None:
                self._settle_at(uid, set(range(self._chain.shards)) - losers - lent.home)
                self._forget_home(uid, lent)

    def _reset(self) -> None:
        """The other shards are gone, and with them their parts of everything."""
        for uid, lent in self._lent.items():
            if lent.state == MOVING:
                if 0 in lent.moved:
                    self._local.settle([uid], keep=False)
                self._out.append(Stayed(uid, "shard_lost"))
            else:
                if 0 not in lent.home:
                    self._local.settle([uid], keep=False)
                self._out.append(Lost(uid, "shard_lost"))
        self._lent.clear()
        self._told = (-1, -1)

    # -- telling them ------------------------------------------------------------------------------------------------

    def _settle_at(self, uid: int, shards: set[int]) -> None:
        for shard in sorted(shards):
            if shard:
                self._chain.tell(shard, Settle((uid,), False))
            else:
                self._local.settle([uid], keep=False)

    def _forget_home(self, uid: int, lent: _Lent) -> None:
        """Shards that have it at home no longer need to know; nothing reads it there."""
        self._chain.homes.pop(uid, None)
        if lent.home:
            self._chain.send(Landed((uid,)))

    def _pass_on_books(self) -> None:
        if self._books is not None and (now := self._books()) != self._told:
            self._told = now
            self._chain.send(Books(*now))
