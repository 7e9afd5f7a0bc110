"""Job: one job as the gateway knows it, from admission to the end of its retention.

Holds the prompt while it may have to be sent again, every token and its text for streams that come late or twice, and
the outcome. Changed only on the gateway's event loop; readers follow it with a cursor of their own (follow.py).
"""

from __future__ import annotations

import asyncio
import logging
import struct
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvbank.cluster.intake import JobSpec
from kvbank.cluster.timeline import REPLAYED, Timeline
from kvbank.errors import KVBankError
from kvbank.kvstore.hashing import KEY_BYTES

log = logging.getLogger(__name__)


class TextStream(Protocol):
    """Token ids in, text out; holds back what may still change. workers/detokenizer.py is the real one."""

    stopped: bool                    # a stop string was seen: its text is not returned, nothing may follow

    def push(self, ids: list[int]) -> str: ...
    def finish(self) -> str: ...


class Running(Protocol):
    """The attempt that runs a job now: attempt.py."""

    def cancel(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token of the output: the model's log-probability of it, and of the likeliest tokens, packed as on the wire."""

    drawn: float
    top_ids: bytes = b""             # int32 little-endian, the likeliest first
    top: bytes = b""                 # float32 little-endian, beside them

    def likely(self) -> list[tuple[int, float]]:
        """(token id, log-probability), the likeliest first."""
        count = len(self.top_ids) // 4
        return list(zip(struct.unpack(f"<{count}i", self.top_ids), struct.unpack(f"<{count}f", self.top), strict=True))


@dataclass(frozen=True, slots=True)
class SpanKeys:
    """What finds the spans of a prompt on a worker. Few enough of its block keys to be kept when the job is over."""

    ends: bytes = b""                # of the last block of each whole span, 32 bytes each
    tail: bytes = b""                # of the blocks after them

    @classmethod
    def of(cls, keys: bytes, blocks_per_span: int) -> SpanKeys:
        """keys: of all whole blocks of the prompt."""
        span = KEY_BYTES * blocks_per_span
        whole = len(keys) - len(keys) % span
        return cls(b"".join(keys[end - KEY_BYTES : end] for end in range(span, whole + 1, span)), keys[whole:])


@dataclass(slots=True)
class Progress:
    """How far the current attempt says it is."""

    state: str = "queued"
    computed: int = 0                # prompt tokens whose KV is there
    total: int = 0
    waits_for: str = "worker"

    def restart(self, waits_for: str) -> None:
        """It waits again, and nothing of it is there."""
        self.state, self.computed, self.waits_for = "queued", 0, waits_for


@dataclass(eq=False)
class Job:
    """`ids` and `texts` run in parallel: texts[i] is what became certain with token i; `tail` is flushed at the end."""

    id: str                          # what the caller knows it by
    wire_id: str                     # what workers know it by: drawn here, never the caller's
    spec: JobSpec
    text: TextStream
    seed: int
    age: float                       # admission stamp, smaller is older
    created: float                   # unix time
    started_at: float                # monotonic
    homeless_since: float = 0.0      # when it was admitted, or lost the last worker that had it
    keys: bytes = b""                # block keys of the prompt, 32 bytes each
    span_keys: SpanKeys = SpanKeys()
    prompt_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)     # beside ids when they were asked for, else empty
    tail: str = ""
    attempt: int = 0                 # number of the current or last attempt
    accepted: int = 0                # attempts that a worker took up
    worker: str = ""
    progress: Progress = field(default_factory=Progress)
    ending: str = ""                 # why it was asked to end: client | stop | deadline | stopping
    finish_reason: str = ""
    receipt: dict[str, Any] = field(default_factory=dict)
    error: KVBankError | None = None
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    ended_at: float = 0.0
    timeline: Timeline = field(default_factory=Timeline)
    attempt_running: Running | None = None
    deadline: asyncio.TimerHandle | None = None
    readers: int = 0                 # completions that wait for it, and who handed it in to /v1/jobs, who never leaves
    left: bool = False               # it was to end because its last reader left: sent again, it is begun anew
    wake: asyncio.Event = field(default_factory=asyncio.Event)       # set when `ending` is
    watchers: set[asyncio.Event] = field(default_factory=set)        # set whenever something changes: follow.py

    @property
    def over(self) -> bool:
        return self.ended_at > 0.0

    @property
    def state(self) -> str:
        if not self.over:
            return "running" if self.ids or self.progress.state not in ("", "queued", "waiting") else "queued"
        if self.error is None:
            return "finished"
        return "cancelled" if self.error.code == "cancelled" else "failed"

    def take(self, token: int, now: float, logprob: Logprob | None = None) -> None:
        """Accept the next token of the output, or nothing of it."""
        text = self.text.push([token])
        if not self.ids:
            self.first_token_at = now
        self.last_token_at = now
        self.ids.append(token)
        if self.spec.logprobs is not None:
            self.logprobs.append(logprob)
        self.texts.append(text)

    def enter(self, phase: str, now: float, note: str = "") -> None:
        """Note in the timeline what it does now; work that was done before is replay."""
        if phase in REPLAYED and (self.ids or self.accepted > 1):
            phase = "replay"
        self.timeline.enter(now - self.started_at, phase, self.attempt, self.worker, note)

    def end(self, now: float, *, error: KVBankError | None = None) -> None:
        """Close the job: the prompt is let go, the output stays for late readers, and the span keys for a pin. The caller
        announces it."""
        try:
            self.tail = self.text.finish()
        except Exception:                    # ids that are no tokens, of a broken worker: the job must end all the same
            log.exception("text_not_finished job=%s", self.wire_id)
            self.tail = ""
        self.error, self.ended_at = error, now
        if error is not None:
            error.__traceback__ = None       # it holds the frames of the attempt, and they the prompt
        self.spec, self.keys = self.spec.without_prompt(), b""
        if self.deadline is not None:
            self.deadline.cancel()

    def announce(self) -> None:
        """Wake all who follow this job."""
        for watcher in self.watchers:
            watcher.set()

    async def settled(self) -> None:
        """Return once the job is over."""
        news = asyncio.Event()
        self.watchers.add(news)
        try:
            while not self.over:
                news.clear()
                await news.wait()
        finally:
            self.watchers.discard(news)

    @property
    def output_text(self) -> str:
        return "".join(self.texts) + self.tail
