"""FollowerLoans: one follower's share of the loans that its leader makes for all shards.

    leader: Lend, Home, Landed, Settle      --> this shard's own bank, under names of its own
    leader <-- Moved, Stayed, Lost, ...     <-- what that bank tells, under the leader's names

Knows a lent span by a name of its own, because the leader's names start anew with every leader while lenders remember the
old ones. Knows no bytes. The follower's thread only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.span_table import new_uid
from kvbank.workers.batch import StepPlan
from kvbank.workers.chain_frames import Home, Landed, Lend, Settle, pack_event, placed
from kvbank.workers.seams import BankEvent, Lost, Move, Moved, Returned, Stayed


class ShardBank(Protocol):
    """What a follower needs of workers.seams.Bank."""

    def lend_out(self, moves: list[Move], *, tenant: str, age: float, needy: bool = False) -> None: ...

    def bring_home(self, uid: int, slot: SlotId) -> None: ...

    def settle(self, uids: list[int], *, keep: bool) -> None: ...

    def poll(self) -> list[BankEvent]: ...


class FollowerLoans:
    """One per follower. `uid`s are the leader's names, `mine` this shard's."""

    def __init__(self, bank: ShardBank) -> None:
        self._bank = bank
        self._names: dict[int, int] = {}                 # uid -> mine, of spans that are or will be lent
        self._theirs: dict[int, tuple[int, int]] = {}    # mine -> uid, and the attempt of its Lend
        self._away: set[int] = set()                     # mine: lent, and not settled yet
        self._homes: dict[int, SlotId] = {}              # uid -> slot: home here, perhaps not elsewhere

    @property
    def idle(self) -> bool:
        """Nothing is lent, on its way, or remembered."""
        return not (self._names or self._theirs or self._away or self._homes)

    def lend(self, message: Lend) -> None:
        moves = []
        for uid, slot, keys, tokens, parent in message.moves:
            mine = self._names[uid] = new_uid()
            self._theirs[mine] = (uid, message.attempt)
            moves.append(Move(mine, SlotId(slot), tuple(BlockKey(key) for key in keys), tokens, parent))
        self._bank.lend_out(moves, tenant=message.tenant, age=message.age, needy=message.needy)

    def home(self, message: Home) -> None:
        mine = self._names.get(message.uid)
        if mine in self._away:                           # else it was lost, and the leader will hear of it
            self._bank.bring_home(mine, SlotId(message.slot))

    def landed(self, message: Landed) -> None:
        for uid in message.uids:
            self._homes.pop(uid, None)
            self._forget(self._names.get(uid, 0))

    def settle(self, message: Settle) -> None:
        for uid in message.uids:
            mine = self._names.get(uid, 0)
            self._forget(mine)
            self._homes.pop(uid, None)
            if mine in self._away:
                self._away.discard(mine)
                self._bank.settle([mine], keep=message.keep)

    def reset(self) -> None:
        """The leader is gone: what was lent for it is given back. What is on its way is, when it has arrived."""
        if self._away:
            self._bank.settle(sorted(self._away), keep=False)
        for held in (self._away, self._homes, self._names, self._theirs):
            held.clear()

    def take_events(self) -> list[tuple[Any, ...]]:
        """A step boundary: flip what waits for one. Returns what the leader must hear, packed."""
        told = []
        for event in self._bank.poll():
            mine: int = getattr(event, "uid", 0)
            uid, attempt = self._theirs.get(mine, (0, 0))
            if not uid:
                if isinstance(event, Moved):
                    self._bank.settle([mine], keep=False)    # for a leader that is gone
                continue
            match event:
                case Moved():
                    self._away.add(mine)
                case Stayed() | Lost():
                    self._away.discard(mine)
                    self._forget(mine)
                case Returned(slot=slot):
                    self._away.discard(mine)
                    self._homes[uid] = slot
            told.append(pack_event(attempt, replace(event, uid=uid)))    # type: ignore[arg-type]  # those have one
        return told

    def placed(self, plan: StepPlan) -> StepPlan:
        """The leader's plan as this shard must read it."""
        return placed(plan, self._homes, self._names)

    def theirs(self, mine: int) -> int:
        """The leader's name of a span of its plan, as `placed` named it."""
        return -mine if mine < 0 else self._theirs.get(mine, (mine, 0))[0]

    def _forget(self, mine: int) -> None:
        uid, _ = self._theirs.pop(mine, (0, 0))
        if self._names.get(uid) == mine:                 # else the leader has lent the span again since
            del self._names[uid]
