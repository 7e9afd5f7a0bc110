"""What goes into the two loan cores and what comes out. Plain frozen data; messages of the wire are in messages.py.

    driver, engine --event--> LoanLedger.on(now, event), DebtBook.on(now, event) --effects--> driver, engine

An Envelope is an event too: it arrived. Slots and spans are ints; a span's uid is the engine's own name for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.messages import Age, BadDigest, Envelope, KeptSpan, Message, Ref, Sealed, Stale

# -- both cores ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Tick:
    """Event: `wake_at()` has come."""


@dataclass(slots=True, frozen=True)
class PeerGone:
    """Event: that life of a peer is over: another boot answers at its address, or it refused 3 connects within 1 s."""

    boot: Boot


@dataclass(slots=True, frozen=True)
class Send:
    """Effect: put the message on the session to that boot."""

    to_boot: Boot
    message: Message


@dataclass(slots=True, frozen=True)
class InDebt:
    """Effect of the book, event of the ledger, passed on before any Send of the same list: whether this member owes, or
    has a Borrow in flight. `age` is that of the oldest job it borrows for."""

    owes: bool
    age: Age | None = None


@dataclass(slots=True, frozen=True)
class Avoid:
    """Effect of the ledger, event of the book: no new loan with that peer before `until` (same clock)."""

    boot: Boot
    until: float


@dataclass(slots=True, frozen=True)
class Yield:
    """Effect of the ledger, for the engine of this member: a job of that age, elsewhere, cannot go on without slots that
    only this member's own jobs hold. The younger ones of them give way."""

    age: Age


# -- LoanLedger ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class PutBytes:
    """Event: a piece of a Put was placed; the fill timer starts again."""

    ref: Ref


@dataclass(slots=True, frozen=True)
class PutEnded:
    """Event: a Put that `begin_put` let through is over. got: digest of the bytes in the slot; None: it was cut."""

    ref: Ref
    span: KeptSpan | None
    got: bytes | None


@dataclass(slots=True, frozen=True)
class Tainted:
    """Event: the bytes of a sealed slot are not those that were sealed: nobody may read them, or cache them, any more."""

    ref: Ref


@dataclass(slots=True, frozen=True)
class Need:
    """Event: a job of this age wants `slots` lent slots on their way back. Safe to repeat: counts those coming."""

    slots: int
    age: Age
    urgent: bool = True


@dataclass(slots=True, frozen=True)
class Homecoming:
    """Event: `slots` lent slots should come back, calmly, whoever has them. Counts those already coming."""

    slots: int


@dataclass(slots=True, frozen=True)
class Drain:
    """Event: this member is leaving (or not, after all): recall everything with a long deadline and grant nothing."""

    on: bool = True


@dataclass(slots=True, frozen=True)
class Answer:
    """Effect: the reply on the bulk stream whose PutEnded this was."""

    message: Sealed | BadDigest | Stale


@dataclass(slots=True, frozen=True)
class Revoked:
    """Effect, for log and audit: the ref has ended.

    why: settled | recall (it was HELD) | recall_over | not_kept | term | fill | digest | gone | tainted.
    """

    ref: Ref
    why: str


LedgerEvent = Envelope | Tick | PeerGone | InDebt | PutBytes | PutEnded | Tainted | Need | Homecoming | Drain
LedgerEffect = Send | Answer | Revoked | Avoid | Yield


# -- DebtBook: events ------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Want:
    """Move these full spans to the first lender that has room: from LOCAL, or on from REMOTE. Ends, for each uid, with
    Moved, or BackToLocal (StayedRemote). A uid that is on its way already, anywhere, is left alone."""

    lenders: tuple[Boot, ...]
    uids: tuple[int, ...]
    tenant: str
    age: Age
    deadline: float = float("inf")     # on the clock of `now`; nothing is asked for later than that
    needy: bool = False                # the job cannot go on without: lenders call back what younger jobs hold
    trace: str = ""                    # traceparent of that job


@dataclass(slots=True, frozen=True)
class Adopt:
    """Borrow spans that lie idle in the lender's cache under these keys, in place. uids: new names, one per key."""

    lender: Boot
    uids: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    tenant: str
    age: Age
    trace: str = ""                    # traceparent of the job


@dataclass(slots=True, frozen=True)
class PutDone:
    """The lender answered Sealed. digest: over our copy, before it was sent; sealed: over what the lender placed."""

    ref: Ref
    digest: bytes
    sealed: bytes


@dataclass(slots=True, frozen=True)
class PutFailed:
    """why: 'stale' (the lender said so) | 'bad_digest' | 'cut' (tried again until it is given up)."""

    ref: Ref
    why: str


@dataclass(slots=True, frozen=True)
class BringHome:
    """The engine has room: fetch these REMOTE or RETURNING spans. to: LOCAL (own slots) | SPILLED (host tier)."""

    uids: tuple[int, ...]
    to: str
    why: str = "home"


@dataclass(slots=True, frozen=True)
class CopyVerified:
    """A fetched copy of the span is whole. digest: over the bytes where they lie now, compared with that of Sealed. attempt:
    of the StartFetch that they came by."""

    uid: int
    digest: bytes
    attempt: int


@dataclass(slots=True, frozen=True)
class FetchFailed:
    """why: 'cut' (tried again until it is given up) | 'stale'. A wrong digest is a CopyVerified with that digest."""

    uid: int
    why: str


@dataclass(slots=True, frozen=True)
class NoLongerNeeded:
    """No job needs the spans (they ended, or were dropped): settled at the next boundary. keep: worth caching there."""

    uids: tuple[int, ...]
    keep: bool = True


@dataclass(slots=True, frozen=True)
class StepBoundary:
    """The engine thread is between two steps: no Attend of ours is under way. Only now are spans flipped."""


@dataclass(slots=True, frozen=True)
class AttendSlow:
    """No Partial from that lender for attend_hedge_s."""

    lender: Boot


@dataclass(slots=True, frozen=True)
class AttendSilent:
    """No Partial from that lender for attend_lost_s."""

    lender: Boot


BookEvent = (
    Envelope | Tick | PeerGone | Avoid | Want | Adopt | PutDone | PutFailed | BringHome | CopyVerified | FetchFailed
    | NoLongerNeeded | StepBoundary | AttendSlow | AttendSilent | Stale
)


# -- DebtBook: effects at any time (driver) --------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class StartPut:
    """Send the span's bytes to `ref`, then PutDone or PutFailed. Repeated while unanswered: ignore it if bytes move.

    source None: from our own slot. Else: fetch from `source` into bounded staging, check `digest`, send that.
    """

    uid: int
    ref: Ref
    source: Ref | None = None
    digest: bytes = b""


@dataclass(slots=True, frozen=True)
class StartFetch:
    """Fetch the span from `ref` to `to` (LOCAL | SPILLED), then CopyVerified or FetchFailed. Repeated like StartPut.
    attempt: one for each BringHome; a copy made for an earlier one lies where nobody looks any more."""

    uid: int
    ref: Ref
    to: str
    digest: bytes
    attempt: int


@dataclass(slots=True, frozen=True)
class ProbePeer:
    """Open a second connection, say Hello, and report PeerGone if another boot answers or nobody listens."""

    boot: Boot


@dataclass(slots=True, frozen=True)
class FlipsWaiting:
    """Something waits for a StepBoundary: wake an idle engine."""


# -- DebtBook: effects for the engine, at any time -------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class BackToLocal:
    """The span is not lent after all: it was, and is, read locally. reason: a Refuse code, or nobody (no candidate) |
    avoided | give_up | stale | missing | recall | refused | digest | silent | gone."""

    uid: int
    reason: str


@dataclass(slots=True, frozen=True)
class StayedRemote:
    """A voluntary move failed: the span is read where it was."""

    uid: int
    reason: str


@dataclass(slots=True, frozen=True)
class MustReturn:
    """The lender wants the slot back: climb the RETURN rungs, that is
    BringHome(LOCAL) | Want(another lender) | BringHome(SPILLED) and park | NoLongerNeeded.

    Left alone, the span is Lost `within_s` from now (80 % of the recall's time). Sent again when an attempt failed.
    """

    uid: int
    within_s: float
    why: str


@dataclass(slots=True, frozen=True)
class AdoptFailed:
    """reason: a Refuse code (ABSENT: not idle there), or one of BackToLocal's."""

    uid: int
    key: BlockKey
    reason: str


# -- DebtBook: flips, only in the list that a StepBoundary returns ---------------------------------------------------


@dataclass(slots=True, frozen=True)
class Moved:
    """Read the span at `ref` from now on, and free its local copy if there is one."""

    uid: int
    ref: Ref
    digest: bytes


@dataclass(slots=True, frozen=True)
class Adopted:
    """A new REMOTE span: the KV of `key`, read at `ref`."""

    uid: int
    key: BlockKey
    ref: Ref
    digest: bytes


@dataclass(slots=True, frozen=True)
class CameHome:
    """Read the fetched copy from now on. to: LOCAL | SPILLED."""

    uid: int
    to: str


@dataclass(slots=True, frozen=True)
class Lost:
    """The span's bytes are gone: make a hole. reason: stale | missing | recall | silent | gone | tainted (wrong bytes
    may have been used: drop everything after it too)."""

    uid: int
    ref: Ref
    reason: str


@dataclass(slots=True, frozen=True)
class Gone:
    """NoLongerNeeded was done; the uid is forgotten. At once for a span that was not lent yet."""

    uid: int


BookEffect = (
    Send | InDebt | StartPut | StartFetch | ProbePeer | FlipsWaiting | BackToLocal | StayedRemote | MustReturn
    | AdoptFailed | Moved | Adopted | CameHome | Lost | Gone
)
