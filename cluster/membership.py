"""Membership: who is in the cluster now, as the control plane sees it. Pure: time and chance come in, answers go out.

A member registers, gets a session number, and reports under it. Only the newest session of an id counts; a member that
is told `register_again` does so, which is how a control plane that was restarted, and knows nobody, learns everything.

    absent --Register, versions agree--> ALIVE --silent suspect_s--> SUSPECT --silent gone_s | Leave--> absent
                                           ^----------- Heard -----------'
    ALIVE | SUSPECT --Register with another boot--> the old process is gone, the new one is ALIVE

Silence costs a member new work only; what it already holds and lends is between lender and borrower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

PROTOCOL = 1                         # of every .proto together; raised when an older peer could misread us
RETIRED_BOOTS = 8                    # replaced processes remembered per id, so that a zombie cannot take its name back


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a member says of itself once, when it registers."""

    id: str                          # "worker-0", "worker-0.1" (its shard 1), "lender-2", "gateway"
    boot: bytes                      # 16 random bytes per process start
    kind: str                        # model | lender | gateway
    replica: int = 0
    shard: int = 0
    shards: int = 1
    host: str = ""
    pid: int = 0
    address: str = ""
    numerics: str = ""
    slot_bytes: int = 0
    slots_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What must be equal over the cluster. An empty text is not compared: the member has no such part."""

    kvbank: str
    protocol: int = PROTOCOL
    model_digest: str = ""
    torch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A member's latest counts."""

    slots_free: int = 0              # blank and idle
    slots_lendable: int = 0          # what it would grant now
    slots_lent: int = 0
    slots_borrowed: int = 0
    jobs_running: int = 0
    jobs_waiting: int = 0
    tokens_pending: int = 0          # prompt tokens not computed yet
    suspects: tuple[str, ...] = ()   # member ids it could not reach
    draining: bool = False           # takes no new job and grants no new loan


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One member as of now."""

    facts: Facts
    load: Load
    silent_s: float
    suspect: bool                    # silent for long, or out of reach for most of those who tried


# -- events in, effects out --------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Register:
    facts: Facts
    versions: Versions


@dataclass(frozen=True, slots=True)
class Heard:
    id: str
    session: int
    seq: int
    load: Load


@dataclass(frozen=True, slots=True)
class Leave:
    id: str
    session: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Admitted:
    """Registered under this session."""

    session: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Not registered; `error` names both sides."""

    error: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """The report's session is not the newest of its id: let it register again."""

    id: str


@dataclass(frozen=True, slots=True)
class Missed:
    """At least one report before this one did not arrive: ask for a full one."""

    id: str


@dataclass(frozen=True, slots=True)
class Late:
    """A duplicate, or overtaken by a newer report: it says nothing new."""

    id: str


@dataclass(frozen=True, slots=True)
class Joined:
    facts: Facts


@dataclass(frozen=True, slots=True)
class Gone:
    facts: Facts
    why: str                         # silent | left | replaced


Event = Register | Heard | Leave | Tick
Effect = Admitted | Refused | Unknown | Missed | Late | Joined | Gone


@dataclass(slots=True)
class _Seat:
    facts: Facts
    versions: Versions
    session: int
    heard: float                     # when it was last heard, on the control plane's clock
    seq: int = 0
    load: Load = field(default_factory=Load)


class Membership:
    """The table of members. One caller at a time; the caller holds the lock."""

    def __init__(self, versions: Versions, *, first_session: int, suspect_s: float, gone_s: float) -> None:
        """`versions` are control's own; `first_session` is random, so that no session of an older control fits."""
        self._own = versions
        self._next_session = first_session
        self._suspect_s = suspect_s
        self._gone_s = gone_s
        self._seats: dict[str, _Seat] = {}
        self._retired: dict[str, list[bytes]] = {}
        self._table = {Register: self._register, Heard: self._hear, Leave: self._leave, Tick: self._tick}

    def on(self, now: float, event: Event) -> list[Effect]:
        """Take one event; the effects are in the order in which they are to be told."""
        return self._table[type(event)](now, event)      # type: ignore[operator, no-any-return]

    def wake_at(self) -> float:
        """When silence next makes a difference; infinity with nobody in."""
        return min((seat.heard + self._gone_s for seat in self._seats.values()), default=math.inf)

    def views(self, now: float) -> list[View]:
        """Everyone in, by id. An effect of silence shows here at once; `Gone` follows at the next Tick."""
        doubted = self._doubted()
        return [
            View(facts=seat.facts, load=seat.load, silent_s=max(0.0, now - seat.heard),
                 suspect=now - seat.heard >= self._suspect_s or doubted.get(name, 0) > 0)
            for name, seat in sorted(self._seats.items())
        ]

    def _register(self, now: float, event: Register) -> list[Effect]:
        facts = event.facts
        if error := self._disagreement(event):
            return [Refused(error)]
        seat = self._seats.get(facts.id)
        self._next_session += 1
        admitted = Admitted(self._next_session)
        if seat is not None and seat.facts.boot == facts.boot:   # the same process again: its reply was lost
            self._seats[facts.id] = _Seat(facts, event.versions, admitted.session, now, load=seat.load)
            return [admitted]
        self._seats[facts.id] = _Seat(facts, event.versions, admitted.session, now)
        if seat is None:
            return [admitted, Joined(facts)]
        retired = self._retired.setdefault(facts.id, [])
        retired.append(seat.facts.boot)
        del retired[:-RETIRED_BOOTS]
        return [Gone(seat.facts, "replaced"), admitted, Joined(facts)]

    def _disagreement(self, event: Register) -> str:
        """Why this member may not be in one cluster with us and the others; empty when it may."""
        facts, told = event.facts, event.versions
        if told.protocol != self._own.protocol:
            return (f"protocol mismatch: {facts.id} speaks version {told.protocol}, control speaks version "
                    f"{self._own.protocol}; run one kvbank version everywhere")
        if told.kvbank != self._own.kvbank:
            return (f"kvbank version mismatch: {facts.id} runs {told.kvbank}, control runs {self._own.kvbank}; "
                    "install one version everywhere")
        if facts.boot in self._retired.get(facts.id, ()):
            return (f"the name {facts.id} now belongs to another process: {facts.host} pid {facts.pid} was replaced; "
                    "stop one of them")
        for name, seat in sorted(self._seats.items()):
            if name == facts.id:
                continue                                 # it replaces that one
            for what, mine, theirs in (("model digest", told.model_digest, seat.versions.model_digest),
                                       ("torch version", told.torch, seat.versions.torch)):
                if mine and theirs and mine != theirs:
                    return (f"{what} mismatch: {facts.id} has {mine}, {name} has {theirs}; "
                            "all members of a cluster need the same")
        return ""

    def _hear(self, now: float, event: Heard) -> list[Effect]:
        seat = self._seats.get(event.id)
        if seat is None or seat.session != event.session:
            return [Unknown(event.id)]
        if event.seq <= seat.seq:
            return [Late(event.id)]
        missed = event.seq != seat.seq + 1
        seat.heard, seat.seq, seat.load = now, event.seq, event.load
        return [Missed(event.id)] if missed else []

    def _leave(self, now: float, event: Leave) -> list[Effect]:
        seat = self._seats.get(event.id)
        if seat is None or seat.session != event.session:
            return []
        del self._seats[event.id]
        return [Gone(seat.facts, "left")]

    def _tick(self, now: float, event: Tick) -> list[Effect]:
        silent = sorted(name for name, seat in self._seats.items() if now - seat.heard >= self._gone_s)
        return [Gone(self._seats.pop(name).facts, "silent") for name in silent]

    def _doubted(self) -> Mapping[str, int]:
        """Ids that more members fail to reach than stand by, counting only those who said so; one voice is enough
        while only two are in, as it is all there is."""
        counts: dict[str, int] = {}
        for name, seat in self._seats.items():
            for suspect in dict.fromkeys(seat.load.suspects):
                if suspect != name and suspect in self._seats:
                    counts[suspect] = counts.get(suspect, 0) + 1
        talkers = sum(1 for seat in self._seats.values() if seat.facts.kind == "model")
        return {name: count for name, count in counts.items() if count * 2 >= max(1, talkers - 1)}
