"""The words two members say to each other about loans. Plain frozen data; kvstore/transport/wire.py puts it on a wire.

    borrower --Borrow, Renew, Settle--> lender          borrower --Put, Fetch--> lender     (bulk stream, raw bytes)
    borrower <--Grant, Refuse, Renewed, Settled, Recall, Stale-- lender      <--Sealed, BadDigest, Stale--

Every message travels in an Envelope that names both boots; one that reaches another boot is answered OtherBoot. Every
request may be said twice: it is named by (boots, loan) or by its refs, and the second time changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbank.kvstore.layout import BlockKey, Boot

PROTOCOL_VERSION = 1

ATTEND, FETCH_ONLY, NO = "ATTEND", "FETCH_ONLY", "NO"                    # Fit.kind
NEED, HOME, DRAIN = "NEED", "HOME", "DRAIN"                              # Recall.why
FULL, CAP, QUOTA, IN_DEBT, DRAINING, COMPAT, ABSENT, OLDER = (           # Refuse.code
    "FULL", "CAP", "QUOTA", "IN_DEBT", "DRAINING", "COMPAT", "ABSENT", "OLDER")

Age = tuple[float, str]                # (admission stamp, job id): the smaller is the older, and nobody is equal


@dataclass(slots=True, frozen=True)
class Ref:
    """Full name of a promise: this slot, of this life of the lender, for this loan. One that does not match exactly is
    stale."""

    lender_boot: Boot
    borrower_boot: Boot
    loan: int
    slot: int
    gen: int

    def __str__(self) -> str:
        return f"{self.lender_boot[:3].hex()}/{self.slot}.{self.gen}<{self.borrower_boot[:3].hex()}#{self.loan}"


@dataclass(slots=True, frozen=True, kw_only=True)
class Compat:
    """What a borrower's spans are, or what a lender is made for."""

    model_digest: str = ""
    layer_first: int = 0
    layer_last: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    dtype: str = ""
    block_size: int = 16
    span_tokens: int = 128
    numerics: str = ""                 # device kind, CPU capability or SM, kernel version, dtype: equal ids, equal bits
    slot_bytes: int = 0


@dataclass(slots=True, frozen=True)
class Fit:
    """ATTEND: may hold and compute. FETCH_ONLY: may hold. NO: neither. `reason` is empty for ATTEND."""

    kind: str
    reason: str = ""


def fit(mine: Compat, theirs: Compat) -> Fit:
    """What a lender made as `mine` can do for a borrower whose spans are `theirs`.

    A lender needs no model: it holds bytes and computes attention over the borrower's shape. So its slots must be large
    enough, the cluster-wide constants equal, and for Attend the numerics.
    """
    if mine.slot_bytes < theirs.slot_bytes:
        return Fit(NO, "slot_size")
    if mine.span_tokens != theirs.span_tokens:
        return Fit(NO, "span_tokens")
    if mine.block_size != theirs.block_size:
        return Fit(NO, "block_size")
    if not theirs.numerics or mine.numerics != theirs.numerics:
        return Fit(FETCH_ONLY, "numerics")
    return Fit(ATTEND)


# -- session stream: protobuf, one stream per pair -------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Hello:
    """First on every session; answered by whoever lives at that address, whatever `to_boot` says."""

    version: int
    node: str                          # display only
    boot: Boot
    nonce: bytes
    compat: Compat


@dataclass(slots=True, frozen=True)
class HelloAck:
    boot: Boot                         # who lives here
    nonce: bytes                       # of the Hello
    fit: str
    reason: str
    lendable: int                      # slots it would grant now


@dataclass(slots=True, frozen=True)
class Borrow:
    loan: int                          # drawn by the borrower, 1, 2, 3.. per pair, never reused
    tenant: str
    age: float                         # of the job it is for: admission stamp, then job
    spans: int                         # slots wanted; fewer may be granted
    job: str = ""
    keys: tuple[BlockKey, ...] = ()    # adopt: lend the idle spans whose last block has these keys, where they lie
    needy: bool = False                # the job cannot go on without: call back what younger jobs hold
    trace: str = ""                    # traceparent of that job, which decides nothing


@dataclass(slots=True, frozen=True)
class Grant:
    loan: int
    refs: tuple[Ref, ...]
    term_ms: int
    sealed_digests: tuple[bytes, ...] = ()   # adopt: one per ref, which is SEALED already; else empty
    keys: tuple[BlockKey, ...] = ()          # adopt: the key of each ref


@dataclass(slots=True, frozen=True)
class Refuse:
    loan: int
    code: str
    retry_ms: int


@dataclass(slots=True, frozen=True)
class Renew:
    no: int                            # 1, 2, 3.. per pair
    upto: int                          # highest loan drawn
    keep: tuple[int, ...]              # loans ASKED or OPEN


@dataclass(slots=True, frozen=True)
class Renewed:
    no: int                            # of the Renew
    term_ms: int
    refs: tuple[Ref, ...]              # live now: HELD, SEALED or RECALLED


@dataclass(slots=True, frozen=True)
class Settle:
    refs: tuple[Ref, ...]
    keep: bool                         # the bytes may become the lender's own idle cache


@dataclass(slots=True, frozen=True)
class Settled:
    refs: tuple[Ref, ...]


@dataclass(slots=True, frozen=True)
class Recall:
    refs: tuple[Ref, ...]
    within_ms: int                     # from receipt
    why: str


@dataclass(slots=True, frozen=True)
class Stale:
    """These refs have ended at the lender. Also the answer to a Put, Fetch or Attend through one of them."""

    refs: tuple[Ref, ...]


@dataclass(slots=True, frozen=True)
class OtherBoot:
    boot: Boot                         # who lives here
    asked: Boot                        # whom the message was for: it does not live here


Message = Hello | HelloAck | Borrow | Grant | Refuse | Renew | Renewed | Settle | Settled | Recall | Stale | OtherBoot


@dataclass(slots=True, frozen=True)
class Envelope:
    """One message on its way; as an event of a core: it arrived."""

    from_boot: Boot
    to_boot: Boot
    message: Message


FOR_LENDER: tuple[type, ...] = (Hello, Borrow, Renew, Settle, OtherBoot)        # which core hears what; OtherBoot both
FOR_BORROWER: tuple[type, ...] = (HelloAck, Grant, Refuse, Renewed, Settled, Recall, Stale, OtherBoot)


# -- bulk stream: raw bytes behind a fixed header --------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class KeptSpan:
    """What a sealed slot holds."""

    keys: tuple[BlockKey, ...]         # of its blocks, in order
    tokens: bytes                      # token ids, int32-LE
    digest: bytes                      # over the bytes of the span

    @property
    def key(self) -> BlockKey:
        """Names the span: the key of its last block."""
        return self.keys[-1]


@dataclass(slots=True, frozen=True)
class Put:
    """Header of a span on its way to a lender; `length` raw bytes follow in pieces of at most 1 MiB."""

    ref: Ref
    span: KeptSpan
    length: int


@dataclass(slots=True, frozen=True)
class Sealed:
    ref: Ref
    digest: bytes                      # as the lender hashed what it placed


@dataclass(slots=True, frozen=True)
class BadDigest:
    ref: Ref


@dataclass(slots=True, frozen=True)
class Fetch:
    ref: Ref
    layer_from: int
    layer_to: int                      # exclusive
