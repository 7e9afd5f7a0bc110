from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Ref(_message.Message):
    __slots__ = ("lender_boot", "borrower_boot", "loan", "slot", "gen")
    LENDER_BOOT_FIELD_NUMBER: _ClassVar[int]
    BORROWER_BOOT_FIELD_NUMBER: _ClassVar[int]
    LOAN_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GEN_FIELD_NUMBER: _ClassVar[int]
    lender_boot: bytes
    borrower_boot: bytes
    loan: int
    slot: int
    gen: int
    def __init__(self, lender_boot: _Optional[bytes] = ..., borrower_boot: _Optional[bytes] = ..., loan: _Optional[int] = ..., slot: _Optional[int] = ..., gen: _Optional[int] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("from_boot", "to_boot", "hello", "hello_ack", "borrow", "grant", "refuse", "renew", "renewed", "settle", "settled", "recall", "stale", "other_boot")
    FROM_BOOT_FIELD_NUMBER: _ClassVar[int]
    TO_BOOT_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HELLO_ACK_FIELD_NUMBER: _ClassVar[int]
    BORROW_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RENEWED_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    OTHER_BOOT_FIELD_NUMBER: _ClassVar[int]
    from_boot: bytes
    to_boot: bytes
    hello: Hello
    hello_ack: HelloAck
    borrow: Borrow
    grant: Grant
    refuse: Refuse
    renew: Renew
    renewed: Renewed
    settle: Settle
    settled: Settled
    recall: Recall
    stale: Stale
    other_boot: OtherBoot
    def __init__(self, from_boot: _Optional[bytes] = ..., to_boot: _Optional[bytes] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., hello_ack: _Optional[_Union[HelloAck, _Mapping]] = ..., borrow: _Optional[_Union[Borrow, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., renewed: _Optional[_Union[Renewed, _Mapping]] = ..., settle: _Optional[_Union[Settle, _Mapping]] = ..., settled: _Optional[_Union[Settled, _Mapping]] = ..., recall: _Optional[_Union[Recall, _Mapping]] = ..., stale: _Optional[_Union[Stale, _Mapping]] = ..., other_boot: _Optional[_Union[OtherBoot, _Mapping]] = ...) -> None: ...

class Compat(_message.Message):
    __slots__ = ("model_digest", "layer_first", "layer_last", "kv_heads", "head_dim", "dtype", "block_size", "span_tokens", "numerics", "slot_bytes")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIRST_FIELD_NUMBER: _ClassVar[int]
    LAYER_LAST_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPAN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    layer_first: int
    layer_last: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    span_tokens: int
    numerics: str
    slot_bytes: int
    def __init__(self, model_digest: _Optional[str] = ..., layer_first: _Optional[int] = ..., layer_last: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., span_tokens: _Optional[int] = ..., numerics: _Optional[str] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "node", "boot", "nonce", "compat")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    COMPAT_FIELD_NUMBER: _ClassVar[int]
    version: int
    node: str
    boot: bytes
    nonce: bytes
    compat: Compat
    def __init__(self, version: _Optional[int] = ..., node: _Optional[str] = ..., boot: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., compat: _Optional[_Union[Compat, _Mapping]] = ...) -> None: ...

class HelloAck(_message.Message):
    __slots__ = ("boot", "nonce", "fit", "reason", "lendable")
    BOOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LENDABLE_FIELD_NUMBER: _ClassVar[int]
    boot: bytes
    nonce: bytes
    fit: str
    reason: str
    lendable: int
    def __init__(self, boot: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., fit: _Optional[str] = ..., reason: _Optional[str] = ..., lendable: _Optional[int] = ...) -> None: ...

class Borrow(_message.Message):
    __slots__ = ("loan", "tenant", "age", "spans", "keys", "job", "needy", "trace")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    NEEDY_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    loan: int
    tenant: str
    age: float
    spans: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    job: str
    needy: bool
    trace: str
    def __init__(self, loan: _Optional[int] = ..., tenant: _Optional[str] = ..., age: _Optional[float] = ..., spans: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ..., job: _Optional[str] = ..., needy: _Optional[bool] = ..., trace: _Optional[str] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("loan", "refs", "term_ms", "sealed_digests", "keys")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    REFS_FIELD_NUMBER: _ClassVar[int]
    TERM_MS_FIELD_NUMBER: _ClassVar[int]
    SEALED_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    loan: int
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    term_ms: int
    sealed_digests: _containers.RepeatedScalarFieldContainer[bytes]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, loan: _Optional[int] = ..., refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ..., term_ms: _Optional[int] = ..., sealed_digests: _Optional[_Iterable[bytes]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("loan", "code", "retry_ms")
    LOAN_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    loan: int
    code: str
    retry_ms: int
    def __init__(self, loan: _Optional[int] = ..., code: _Optional[str] = ..., retry_ms: _Optional[int] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("no", "upto", "keep")
    NO_FIELD_NUMBER: _ClassVar[int]
    UPTO_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    no: int
    upto: int
    keep: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, no: _Optional[int] = ..., upto: _Optional[int] = ..., keep: _Optional[_Iterable[int]] = ...) -> None: ...

class Renewed(_message.Message):
    __slots__ = ("no", "term_ms", "refs")
    NO_FIELD_NUMBER: _ClassVar[int]
    TERM_MS_FIELD_NUMBER: _ClassVar[int]
    REFS_FIELD_NUMBER: _ClassVar[int]
    no: int
    term_ms: int
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    def __init__(self, no: _Optional[int] = ..., term_ms: _Optional[int] = ..., refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ...) -> None: ...

class Settle(_message.Message):
    __slots__ = ("refs", "keep")
    REFS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    keep: bool
    def __init__(self, refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ..., keep: _Optional[bool] = ...) -> None: ...

class Settled(_message.Message):
    __slots__ = ("refs",)
    REFS_FIELD_NUMBER: _ClassVar[int]
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    def __init__(self, refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ...) -> None: ...

class Recall(_message.Message):
    __slots__ = ("refs", "within_ms", "why")
    REFS_FIELD_NUMBER: _ClassVar[int]
    WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    within_ms: int
    why: str
    def __init__(self, refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ..., within_ms: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Stale(_message.Message):
    __slots__ = ("refs",)
    REFS_FIELD_NUMBER: _ClassVar[int]
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    def __init__(self, refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ...) -> None: ...

class OtherBoot(_message.Message):
    __slots__ = ("boot", "asked")
    BOOT_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    boot: bytes
    asked: bytes
    def __init__(self, boot: _Optional[bytes] = ..., asked: _Optional[bytes] = ...) -> None: ...
