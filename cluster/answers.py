"""Answers: what the client hands out, as plain frozen values. Mirrors the gateway's JSON; knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from kvbank.errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt: text or token ids. `reusable` marks a chunk worth caching free of its position."""

    text_or_tokens: str | list[int]
    reusable: bool = True

    def body(self) -> dict[str, Any]:
        """As the gateway reads it."""
        content = self.text_or_tokens
        kind = {"text": content} if isinstance(content, str) else {"token_ids": _items(content)}
        return {**kind, "reusable": self.reusable}


Prompt = str | list[int] | list[Segment]


def prompt_body(prompt: Prompt) -> Any:
    """A prompt as JSON. Raises InvalidRequest for anything but a string, ids or segments."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Segment):
        return [prompt.body()]
    parts = _items(prompt)
    if any(isinstance(part, Segment) for part in parts):
        return [_segment(part).body() for part in parts]
    return [part if isinstance(part, int) else _integer(part) for part in parts]


def _items(prompt: Any) -> list[Any]:
    """Bytes and mappings are sequences of integers, too, but nobody means that."""
    if not isinstance(prompt, (bytes, bytearray, memoryview, Mapping, Set)):
        with suppress(TypeError):
            return list(prompt)
    raise InvalidRequest(f"a prompt is a string, token ids or Segments, not {type(prompt).__name__}", param="prompt")


def _segment(part: Any) -> Segment:
    if isinstance(part, str):
        return Segment(part, reusable=False)
    if not isinstance(part, Segment):
        raise InvalidRequest("a prompt of Segments may hold Segments and strings only", param="prompt")
    return part


def _integer(value: Any) -> int:
    """numpy's integers and their like are fine; floats and strings are not."""
    try:
        return int(value.__index__())
    except (AttributeError, TypeError):
        raise InvalidRequest(f"token ids are integers, not {type(value).__name__}", param="prompt") from None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a stream brought next. Joined texts and ids equal the result's."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a job reused, borrowed, computed and missed."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0         # whose KV was computed, replays included
    reused: dict[str, int] = field(default_factory=dict)             # tokens by source: device, host, disk, redis, peer
    missed: dict[str, int] = field(default_factory=dict)  # tokens by reason: never_seen, evicted, last_block, ...
    borrowed_blocks_peak: int = 0    # at most so many were read at lenders in one step
    parked_blocks_peak: int = 0      # and so many from the host tier
    lenders: list[str] = field(default_factory=list)  # ids of members that held some
    remote_attention_calls: int = 0  # one for each layer of a step that read such blocks
    recomputed_after_fault: int = 0  # tokens replayed because their KV was lost
    attempts: int = 1                # workers that had it; more than one after a fault
    ttft_s: float = 0.0              # from its arrival at the gateway to its first token
    total_s: float = 0.0             # to its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A job that ran to its end."""

    text: str
    token_ids: list[int]
    finish_reason: str               # stop | length
    receipt: Receipt

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Result:
        return cls(text=body["text"], token_ids=list(body["token_ids"]), finish_reason=body["finish_reason"],
                   receipt=take(Receipt, body["receipt"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job now."""

    id: str = ""
    state: str = ""                  # queued | running | finished | failed | cancelled
    prompt_tokens: int = 0
    output_tokens: int = 0
    attempt: int = 0                 # counted up when it moves to another worker
    worker: str = ""
    phase: str = ""                  # queued | fetching | prefill | decode | waiting | parked; empty once it is over
    computed: int = 0                # prompt tokens whose KV is there
    waits_for: str = ""              # slots | fetch | prefix | worker, while it waits
    created: float = 0.0             # Unix time
    seed: int = 0                    # as given, or the one that was drawn

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> JobStatus:
        progress = body.get("progress", {})
        return take(cls, {**body, "phase": progress.get("state", ""), "computed": progress.get("computed", 0),
                          "waits_for": progress.get("waits_for", "")})


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """One shelf below the device."""

    name: str = ""                   # host | disk | redis
    bytes_used: int = 0
    bytes_limit: int = 0
    frames: int = 0
    state: str = ""                  # ok | open | half_open | off
    counters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One member. `blocks_free` counts blank and idle blocks, `blocks_used` those of running jobs."""

    id: str = ""
    kind: str = ""                   # model | lender
    replica: int = 0                 # of a model worker, counted from 0
    shard: int = 0                   # which layer range of the replica
    host: str = ""
    pid: int = 0
    state: str = ""                  # ok | silent
    blocks_total: int = 0            # of its device
    blocks_free: int = 0
    blocks_used: int = 0
    blocks_lent: int = 0             # its own, held for others
    blocks_borrowed: int = 0         # others', held for it
    blocks_idle: int = 0             # of the free ones: cached, evictable
    draining: bool = False           # takes no new job and grants no new loan
    tiers: list[TierStatus] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)  # since it started


@dataclass(frozen=True, slots=True, kw_only=True)
class LoanStatus:
    """Blocks of one member held for another."""

    id: str = ""
    lender: str = ""
    borrower: str = ""
    blocks: int = 0
    term_s: float = 0.0              # ends after so long if it is not renewed
    age_s: float = 0.0
    blocks_recalled: int = 0         # of them, called back and not home yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The whole cluster now. Top-level `tiers` are sums over members (Redis: one for all)."""

    workers: list[WorkerStatus] = field(default_factory=list)
    loans: list[LoanStatus] = field(default_factory=list)
    jobs: list[JobStatus] = field(default_factory=list)
    tiers: list[TierStatus] = field(default_factory=list)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Status:
        workers = [
            take(WorkerStatus, {**worker, "tiers": [take(TierStatus, tier) for tier in worker["tiers"]]})
            for worker in body["workers"]
        ]
        return cls(
            workers=workers,
            loans=[take(LoanStatus, loan) for loan in body["loans"]],
            jobs=[JobStatus.read(job) for job in body["jobs"]],
            tiers=[take(TierStatus, tier) for tier in body["tiers"]],
        )


def take(cls: type[T], body: Mapping[str, Any]) -> T:
    """The fields of `body` that this version of `cls` knows: a newer gateway may say more."""
    known = {spec.name for spec in fields(cls)}      # type: ignore[arg-type]
    return cls(**{name: value for name, value in body.items() if name in known})
