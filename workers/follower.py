"""Follower: a shard that does not lead. Runs the leader's plans on its own layers, and its share of every loan.

    Lead: Step, Copy, Scrub, Lend, ...   --> its slots, its lenders
    Activate: hidden states in           --> its layers --> hidden states out, or, on the last shard, tokens

One thread owns model, slots and loans (workers/follower_loans.py), and obeys one leader at a time, in the order in which
things were said. Keeps no books of its slots: the leader does.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvbank.kvstore.layout import BlockKey, SlotId
from kvbank.kvstore.transport.badge import Badge
from kvbank.workers.batch import StepPlan, StepResult
from kvbank.workers.batch import unpack as unpack_plan
from kvbank.workers.chain_frames import (
    Ask,
    Books,
    Copy,
    Discard,
    Drop,
    Events,
    Forget,
    Found,
    Hello,
    HiddenRows,
    Home,
    Keys,
    Landed,
    Lend,
    Load,
    Logits,
    Park,
    Parked,
    Ready,
    Result,
    Scrub,
    Settle,
    Spill,
    Step,
    Unpark,
    Want,
    pack_logprobs,
    unpack_span,
)
from kvbank.workers.chain_link import LinkBroken, Onward
from kvbank.workers.follower_loans import FollowerLoans, ShardBank
from kvbank.workers.held_keys import HeldKeys
from kvbank.workers.seams import Fetcher
from kvbank.workers.shard import LocalShard
from kvbank.workers.shard_service import Session, SessionOver, ShardService

log = logging.getLogger(__name__)

HIDDEN_S = 30.0                              # longest wait for a step's hidden states; the leader gives up as soon


@dataclass(slots=True)
class FollowerCounters:
    """Totals since start."""

    steps: int = 0
    rows: int = 0
    forward_s: float = 0.0
    sessions: int = 0


class Follower:
    """One per member with shard > 0. `run` is its thread."""

    def __init__(
        self, shard: LocalShard, number: int, shards: int, *, hidden_size: int, badge: Badge | str,
        likeness: tuple[tuple[str, str], ...], bank: ShardBank, fetcher: Fetcher | None = None,
    ) -> None:
        """likeness: what the leader must have alike. bank: this shard's own; its events are polled between commands.
        fetcher: of this shard's tiers, where it has some."""
        self.shard, self.number, self.last = shard, number, number == shards - 1
        self._size, self._dtype = hidden_size, getattr(torch, shard.layout.dtype)
        self._badge, self._likeness = badge, likeness
        self.service = ShardService()
        self.counters = FollowerCounters()
        self.books = Books(shard.arena.num_slots, 0)
        self.keys = HeldKeys()
        self._onward: Onward | None = None
        self.loans = loans = FollowerLoans(bank)
        self._parked: set[int] = set()                   # the leader's uids
        self._fetcher = fetcher
        self._wanted: dict[str, dict[BlockKey, None]] = {}     # of a want: what the leader has not heard of yet
        self._fetched = False                            # something may have been staged since it last did
        self._stopping = False
        self._obey: dict[type[Any], Callable[[Session, Any], None]] = {
            Step: self._step, Copy: self._copy, Scrub: self._scrub, Spill: self._spill,
            Discard: self._discard, Park: self._park, Unpark: self._unpark,
            Want: self._want, Ask: self._ask, Load: self._load, Drop: self._drop, Forget: self._forget_want,
            Lend: lambda _, message: loans.lend(message), Home: lambda _, message: loans.home(message),
            Landed: lambda _, message: loans.landed(message), Settle: lambda _, message: loans.settle(message),
            Books: self._note_books, Keys: self._note_keys,
        }

    def run(self) -> None:
        """Obey until `stop`."""
        service = self.service
        while not self._stopping:
            session, message = service.arrivals.get()
            if isinstance(message, Hello):
                assert session is not None
                self._guarded(session, self._hello, message)
            elif session is not None and session is service.current:
                if message is None:
                    self._reset()
                else:
                    self._guarded(session, self._command, message)
            if service.arrivals.empty():
                self._guarded(service.current, self._tell_events, None)
                if self._fetched and service.current is not None:
                    self._fetched = False
                    self._guarded(service.current, self._tell_found, None)
        self._reset()

    def wake(self) -> None:
        """Any thread: the bank has something to poll."""
        self.service.arrivals.put((None, None))

    def fetched(self) -> None:
        """Any thread: the fetcher has news."""
        self._fetched = True
        self.wake()

    def stop(self) -> None:
        """Any thread."""
        self._stopping = True
        session = self.service.current
        if session is not None:
            session.end()
        self.wake()

    # -- a leader comes and goes -------------------------------------------------------------------------------------

    def _guarded(self, session: Session | None, work: Callable[[Any, Any], None], message: Any) -> None:
        """A leader whose command cannot be carried out is told, and starts anew."""
        try:
            work(session, message)
            return
        except (SessionOver, LinkBroken) as error:
            log.info("chain_session_over shard=%d why=%s", self.number, error)
            why = str(error)
        except Exception as error:                       # a bug must cost the replica's jobs, never the worker
            log.exception("chain_command_failed shard=%d command=%s", self.number, type(message).__name__)
            why = f"{type(message).__name__} failed: {type(error).__name__}"
        if session is not None:
            session.end(why)
            self._reset()

    def _hello(self, session: Session, hello: Hello) -> None:
        if self.service.current is not None:
            self.service.current.end()
        self._reset()
        mine, theirs = dict(self._likeness), dict(hello.likeness)
        wrong = [name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)]
        if hello.shard != self.number or wrong or self.last != (not hello.next_address):
            name = wrong[0] if wrong else "shard"
            raise SessionOver(f"shard {self.number} has {name} {mine.get(name)}, the leader {theirs.get(name)} "
                              f"for its shard {hello.shard}")
        if not self.last:
            self._onward = Onward(hello.next_address, self._badge, hello.chain,
                                  on_end=lambda: self.service.arrivals.put((session, None)))
        session.chain = hello.chain
        self.service.current = session
        self.counters.sessions += 1
        session.send(Ready(self.shard.parkable()))

    def _command(self, session: Session, message: Any) -> None:
        self._obey[type(message)](session, message)

    def _reset(self) -> None:
        """Nobody leads: nothing that was held for a leader is wanted any more."""
        if self.service.current is not None:
            self.service.current.end()
        self.service.current = None
        if self._onward is not None:
            self._onward.close()
        self._onward = None
        for uid in self._parked:
            self.shard.unpark(uid, None)
        self._parked.clear()
        self.loans.reset()
        for name in list(self._wanted):
            self._forget_want(None, Forget(name))
        self.keys.clear()
        self.books = Books(self.shard.arena.num_slots, 0)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _step(self, session: Session, message: Step) -> None:
        plan = unpack_plan(message.plan)
        began = [0.0]

        def hidden() -> Tensor:
            rows = self._wait_for_hidden(session, plan)
            began[0] = perf_counter()
            return rows

        with torch.inference_mode():
            out = self.shard.forward(self.loans.placed(plan), hidden)
            if self.last:
                result = self.shard.finish(plan, out, keep_logits=message.keep_logits)
                result.lost = dict(self.shard.attention.lost)
            else:
                result = self.shard.passed_on()
        result.forward_s = perf_counter() - began[0]
        if self._onward is not None:
            self._onward.send(plan.step, out)
        self._answer(session, plan, result)

    def _answer(self, session: Session, plan: StepPlan, result: StepResult) -> None:
        if result.logits is not None:
            for row in result.logits.cpu():
                session.send(Logits(plan.step, row.numpy().tobytes()))
        lost = tuple((self.loans.theirs(uid), why) for uid, why in result.lost.items())
        session.send(Result(plan.step, tuple(result.tokens), lost, result.remote_calls, result.forward_s,
                            self.shard.parkable(), pack_logprobs(result.logprobs)))
        self.counters.steps += 1
        self.counters.rows += plan.num_rows
        self.counters.forward_s += result.forward_s

    def _wait_for_hidden(self, session: Session, plan: StepPlan) -> Tensor:
        """[rows, hidden] of the shard before. Raises SessionOver."""
        rows = HiddenRows(plan.step, plan.num_rows, self._size, self._dtype)
        deadline = time.monotonic() + HIDDEN_S
        while True:
            try:
                data = session.hidden.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise SessionOver(f"no hidden states for {HIDDEN_S:.0f} s") from None
            if data is None:
                raise SessionOver("the shard before is gone")
            if rows.add(data):
                return rows.hidden

    # -- slots -------------------------------------------------------------------------------------------------------

    def _copy(self, session: Session, message: Copy) -> None:
        self.shard.copy_tokens(SlotId(message.source), SlotId(message.target), message.start, message.stop)

    def _scrub(self, session: Session, message: Scrub) -> None:
        self.shard.scrub([SlotId(slot) for slot in message.slots])

    def _spill(self, session: Session, message: Spill) -> None:
        self.shard.spill(unpack_span(0, message.slot, message.keys, message.tokens, message.parent))

    def _discard(self, session: Session, message: Discard) -> None:
        self.shard.forget([BlockKey(key) for key in message.keys])

    def _park(self, session: Session, message: Park) -> None:
        ok = self.shard.park(unpack_span(message.uid, message.slot, message.keys, message.tokens, message.parent))
        if ok:
            self._parked.add(message.uid)
        session.send(Parked(message.number, ok, self.shard.parkable()))

    def _unpark(self, session: Session, message: Unpark) -> None:
        if message.uid in self._parked:
            self._parked.discard(message.uid)
            self.shard.unpark(message.uid, None if message.slot is None else SlotId(message.slot))

    def _note_books(self, session: Session, message: Books) -> None:
        self.books = message

    def _note_keys(self, session: Session, message: Keys) -> None:
        self.keys.change(message.added, message.removed, whole=message.whole)

    def _tell_events(self, session: Session | None, _: None) -> None:
        """Between two commands: a step boundary for this shard's loans."""
        told = self.loans.take_events()
        if told and session is not None:
            session.send(Events(tuple(told)))

    # -- tiers -------------------------------------------------------------------------------------------------------

    def _want(self, session: Session, message: Want) -> None:
        self._wanted[message.name] = {BlockKey(key): None for key in message.keys}
        if self._fetcher is not None:
            self._fetcher.want(message.name, [BlockKey(key) for key in message.keys], message.tokens, now=time.monotonic())
        self._fetched = True

    def _ask(self, session: Session, message: Ask) -> None:
        self._wanted.setdefault(message.name, {})[BlockKey(message.key)] = None
        self._fetched = True

    def _load(self, session: Session, message: Load) -> None:
        fetcher = self._fetcher
        if fetcher is None or not fetcher.load(message.name, BlockKey(message.key), SlotId(message.slot), message.start):
            raise SessionOver("what was found in a tier is gone")

    def _drop(self, session: Session, message: Drop) -> None:
        self._wanted.get(message.name, {}).pop(BlockKey(message.key), None)
        if self._fetcher is not None:
            self._fetcher.drop(message.name, BlockKey(message.key))

    def _forget_want(self, session: Session | None, message: Forget) -> None:
        self._wanted.pop(message.name, None)
        if self._fetcher is not None:
            self._fetcher.forget(message.name)

    def _tell_found(self, session: Session, _: None) -> None:
        """What is known now of what was wanted."""
        now = time.monotonic()
        for name, keys in self._wanted.items():
            for key in list(keys):
                state = self._fetcher.state(name, key, now=now) if self._fetcher is not None else "never_seen"
                if state != "coming":
                    del keys[key]
                    session.send(Found(name, key, state))
