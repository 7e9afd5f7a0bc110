from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubmitRequests(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[SubmitRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[SubmitRequest, _Mapping]]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("job", "cancel", "leave", "lane")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    job: Job
    cancel: Cancel
    leave: Leave
    lane: int
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., lane: _Optional[int] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "attempt", "tenant", "prompt", "emitted", "max_tokens", "sampling", "stop_token_ids", "ignore_eos", "deadline_ms", "keys", "age", "policy", "logprobs", "cache_salt", "trace")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    id: str
    attempt: int
    tenant: str
    prompt: bytes
    emitted: bytes
    max_tokens: int
    sampling: Sampling
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    deadline_ms: int
    keys: bytes
    age: float
    policy: str
    logprobs: int
    cache_salt: str
    trace: str
    def __init__(self, id: _Optional[str] = ..., attempt: _Optional[int] = ..., tenant: _Optional[str] = ..., prompt: _Optional[bytes] = ..., emitted: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., deadline_ms: _Optional[int] = ..., keys: _Optional[bytes] = ..., age: _Optional[float] = ..., policy: _Optional[str] = ..., logprobs: _Optional[int] = ..., cache_salt: _Optional[str] = ..., trace: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubmitReplies(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[SubmitReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[SubmitReply, _Mapping]]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("accepted", "tokens", "progress", "done", "failed", "lost", "lane")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    tokens: Tokens
    progress: Progress
    done: Done
    failed: Failed
    lost: Lost
    lane: int
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., lost: _Optional[_Union[Lost, _Mapping]] = ..., lane: _Optional[int] = ...) -> None: ...

class Lost(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("first_index", "ids", "logprobs", "top_ids", "top_logprobs")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    ids: bytes
    logprobs: bytes
    top_ids: bytes
    top_logprobs: bytes
    def __init__(self, first_index: _Optional[int] = ..., ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("state", "computed", "total", "waits_for")
    STATE_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    state: str
    computed: int
    total: int
    waits_for: str
    def __init__(self, state: _Optional[str] = ..., computed: _Optional[int] = ..., total: _Optional[int] = ..., waits_for: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("finish_reason", "receipt")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    finish_reason: str
    receipt: Receipt
    def __init__(self, finish_reason: _Optional[str] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message", "receipt")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    receipt: Receipt
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("prompt_tokens", "output_tokens", "computed_tokens", "reused", "missed", "borrowed_blocks_peak", "lenders", "remote_attention_calls", "recomputed_after_fault", "ttft_s", "total_s", "parked_blocks_peak")
    class ReusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MissedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    BORROWED_BLOCKS_PEAK_FIELD_NUMBER: _ClassVar[int]
    LENDERS_FIELD_NUMBER: _ClassVar[int]
    REMOTE_ATTENTION_CALLS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_AFTER_FAULT_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    PARKED_BLOCKS_PEAK_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    reused: _containers.ScalarMap[str, int]
    missed: _containers.ScalarMap[str, int]
    borrowed_blocks_peak: int
    lenders: _containers.RepeatedScalarFieldContainer[str]
    remote_attention_calls: int
    recomputed_after_fault: int
    ttft_s: float
    total_s: float
    parked_blocks_peak: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., reused: _Optional[_Mapping[str, int]] = ..., missed: _Optional[_Mapping[str, int]] = ..., borrowed_blocks_peak: _Optional[int] = ..., lenders: _Optional[_Iterable[str]] = ..., remote_attention_calls: _Optional[int] = ..., recomputed_after_fault: _Optional[int] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ..., parked_blocks_peak: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("id", "kind", "replica", "shard", "host", "pid", "blocks_total", "blocks_free", "blocks_used", "blocks_lent", "blocks_borrowed", "tiers", "loans", "jobs", "counters", "blocks_idle", "draining")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LENT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_BORROWED_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LOANS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IDLE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    replica: int
    shard: int
    host: str
    pid: int
    blocks_total: int
    blocks_free: int
    blocks_used: int
    blocks_lent: int
    blocks_borrowed: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    loans: _containers.RepeatedCompositeFieldContainer[LoanStatus]
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    counters: _containers.ScalarMap[str, float]
    blocks_idle: int
    draining: bool
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., replica: _Optional[int] = ..., shard: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_used: _Optional[int] = ..., blocks_lent: _Optional[int] = ..., blocks_borrowed: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., loans: _Optional[_Iterable[_Union[LoanStatus, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ..., counters: _Optional[_Mapping[str, float]] = ..., blocks_idle: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("name", "bytes_used", "bytes_limit", "frames", "state", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes_used: int
    bytes_limit: int
    frames: int
    state: str
    counters: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., bytes_used: _Optional[int] = ..., bytes_limit: _Optional[int] = ..., frames: _Optional[int] = ..., state: _Optional[str] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class LoanStatus(_message.Message):
    __slots__ = ("id", "lender", "borrower", "blocks", "term_s", "age_s", "recalled_blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    LENDER_FIELD_NUMBER: _ClassVar[int]
    BORROWER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TERM_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    RECALLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    lender: str
    borrower: str
    blocks: int
    term_s: float
    age_s: float
    recalled_blocks: int
    def __init__(self, id: _Optional[str] = ..., lender: _Optional[str] = ..., borrower: _Optional[str] = ..., blocks: _Optional[int] = ..., term_s: _Optional[float] = ..., age_s: _Optional[float] = ..., recalled_blocks: _Optional[int] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("id", "state", "prompt_tokens", "output_tokens", "computed", "waits_for", "borrowed_blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    BORROWED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: str
    prompt_tokens: int
    output_tokens: int
    computed: int
    waits_for: str
    borrowed_blocks: int
    def __init__(self, id: _Optional[str] = ..., state: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., computed: _Optional[int] = ..., waits_for: _Optional[str] = ..., borrowed_blocks: _Optional[int] = ...) -> None: ...
