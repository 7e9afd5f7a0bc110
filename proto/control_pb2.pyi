from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Member(_message.Message):
    __slots__ = ("id", "boot", "kind", "replica", "shard", "shards", "host", "pid", "address", "numerics", "slot_bytes", "slots_total")
    ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    boot: bytes
    kind: str
    replica: int
    shard: int
    shards: int
    host: str
    pid: int
    address: str
    numerics: str
    slot_bytes: int
    slots_total: int
    def __init__(self, id: _Optional[str] = ..., boot: _Optional[bytes] = ..., kind: _Optional[str] = ..., replica: _Optional[int] = ..., shard: _Optional[int] = ..., shards: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., numerics: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., slots_total: _Optional[int] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("member", "kvbank_version", "protocol", "model_digest", "torch_version")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    KVBANK_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    member: Member
    kvbank_version: str
    protocol: int
    model_digest: str
    torch_version: str
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., kvbank_version: _Optional[str] = ..., protocol: _Optional[int] = ..., model_digest: _Optional[str] = ..., torch_version: _Optional[str] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("session", "error")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    session: int
    error: str
    def __init__(self, session: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("id", "session", "seq", "full", "slots_free", "slots_lendable", "slots_lent", "slots_borrowed", "jobs_running", "jobs_waiting", "tokens_pending", "keys_added", "keys_removed", "suspects", "leaving", "draining")
    ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_LENDABLE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_LENT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_BORROWED_FIELD_NUMBER: _ClassVar[int]
    JOBS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    JOBS_WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PENDING_FIELD_NUMBER: _ClassVar[int]
    KEYS_ADDED_FIELD_NUMBER: _ClassVar[int]
    KEYS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    id: str
    session: int
    seq: int
    full: bool
    slots_free: int
    slots_lendable: int
    slots_lent: int
    slots_borrowed: int
    jobs_running: int
    jobs_waiting: int
    tokens_pending: int
    keys_added: bytes
    keys_removed: bytes
    suspects: _containers.RepeatedScalarFieldContainer[str]
    leaving: bool
    draining: bool
    def __init__(self, id: _Optional[str] = ..., session: _Optional[int] = ..., seq: _Optional[int] = ..., full: _Optional[bool] = ..., slots_free: _Optional[int] = ..., slots_lendable: _Optional[int] = ..., slots_lent: _Optional[int] = ..., slots_borrowed: _Optional[int] = ..., jobs_running: _Optional[int] = ..., jobs_waiting: _Optional[int] = ..., tokens_pending: _Optional[int] = ..., keys_added: _Optional[bytes] = ..., keys_removed: _Optional[bytes] = ..., suspects: _Optional[_Iterable[str]] = ..., leaving: _Optional[bool] = ..., draining: _Optional[bool] = ...) -> None: ...

class Advice(_message.Message):
    __slots__ = ("register_again", "send_full", "members")
    REGISTER_AGAIN_FIELD_NUMBER: _ClassVar[int]
    SEND_FULL_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    register_again: bool
    send_full: bool
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, register_again: _Optional[bool] = ..., send_full: _Optional[bool] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class LendersRequest(_message.Message):
    __slots__ = ("borrower", "slots", "slot_bytes")
    BORROWER_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    borrower: str
    slots: int
    slot_bytes: int
    def __init__(self, borrower: _Optional[str] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class LendersReply(_message.Message):
    __slots__ = ("candidates",)
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    def __init__(self, candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("id", "boot", "address", "slots_lendable")
    ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_LENDABLE_FIELD_NUMBER: _ClassVar[int]
    id: str
    boot: bytes
    address: str
    slots_lendable: int
    def __init__(self, id: _Optional[str] = ..., boot: _Optional[bytes] = ..., address: _Optional[str] = ..., slots_lendable: _Optional[int] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("keys", "asker")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ASKER_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    asker: str
    def __init__(self, keys: _Optional[bytes] = ..., asker: _Optional[str] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("holdings",)
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    def __init__(self, holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("id", "first", "count")
    ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    id: str
    first: int
    count: int
    def __init__(self, id: _Optional[str] = ..., first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotReply(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[MemberView]
    def __init__(self, members: _Optional[_Iterable[_Union[MemberView, _Mapping]]] = ...) -> None: ...

class MemberView(_message.Message):
    __slots__ = ("member", "report", "silent_s", "suspect")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    member: Member
    report: Report
    silent_s: float
    suspect: bool
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., silent_s: _Optional[float] = ..., suspect: _Optional[bool] = ...) -> None: ...
