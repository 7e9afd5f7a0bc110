"""Sequence: one job on one worker: its tokens, where its KV is, what is missing, and its receipt so far.

    WAITING --scheduled--> RUNNING --finished, cancelled, failed--> DONE
       ^                      |
       +-----preempted--------+        tokens are kept; its KV becomes idle cache, found again by key

Knows tokens and spans; knows nothing of slots' bytes, batches or the network.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from kvbank.kvstore.hashing import key_space
from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.span_table import REMOTE, Holes, Span, SpanTable
from kvbank.workers.sampler import SamplingParams

WAITING, RUNNING, DONE = "waiting", "running", "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a client wants. `emitted` are tokens that an earlier attempt already streamed; they count as output."""

    id: str
    prompt: list[int]
    max_tokens: int
    emitted: list[int] = field(default_factory=list)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    tenant: str = "default"
    deadline_s: float | None = None          # seconds from now
    age: float = 0.0                         # admission stamp: smaller is older
    keys: tuple[BlockKey, ...] = ()          # of the prompt's full blocks, when the gateway hashed them
    cache_salt: str = ""                     # jobs of other salts, or of none, share no KV with this one
    logprobs: int | None = None              # tell each token's log-probability and so many likely tokens; None: do not

    @property
    def key_space(self) -> str:
        """What its block keys grow from, and who may use its KV."""
        return key_space(self.tenant, self.cache_salt)


@dataclass(slots=True)
class Tally:
    """The receipt as it grows. Tokens, blocks and seconds."""

    computed_tokens: int = 0
    reused: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    borrowed_blocks_peak: int = 0
    parked_blocks_peak: int = 0
    lenders: dict[str, None] = field(default_factory=dict)      # in order of first use
    remote_attention_calls: int = 0
    recomputed_after_fault: int = 0
    submitted_at: float = 0.0
    first_token_at: float | None = None
    started_at: float | None = None          # it ran for the first time
    replay_began: float | None = None        # from the first to the last step that computed something again
    replay_ended: float = 0.0


class Sequence:
    """Engine thread only."""

    def __init__(self, job: JobSpec, span_tokens: int, block_size: int, *, now: float) -> None:
        self.job = job
        self.token_ids: list[int] = [*job.prompt, *job.emitted]
        self.num_prompt = len(job.prompt)
        self.block_size = block_size
        self.keys: list[BlockKey] = []       # of the full blocks of token_ids, as far as hashed
        self.table = SpanTable(span_tokens)
        self.table.holes.add(0, len(self.token_ids))
        self.state = WAITING
        self.waits_for = ""                  # why it does not run: slots | fetch | prefix | ""
        self.deadline = None if job.deadline_s is None else now + job.deadline_s
        self.progress_at = now               # when it last got a step, or waited for one that does: a stalled job ends
        self.computed_at = now               # when it last got a step, or began to run
        self.tally = Tally(submitted_at=now)
        self.lost = Holes()                  # positions lost to a fault and not there again yet
        self.loss_reason = ""
        self.adopted: dict[BlockKey, Span] = {}    # borrowed in place from a peer's cache, not placed yet

    @property
    def age(self) -> tuple[float, str]:
        """Orders jobs: the smaller is the older, and nobody is equal."""
        return (self.job.age, self.job.id)

    @property
    def owner(self) -> str:
        """Whom its slots count against."""
        return self.job.tenant

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Only the last token's KV is missing."""
        holes = self.table.holes
        return len(holes) == 1 and holes.lowest[1] == self.num_tokens

    @property
    def prompt_computed(self) -> int:
        """Prompt tokens whose KV is there."""
        return self.num_prompt - self.table.holes.overlap(0, self.num_prompt)

    @property
    def num_remote(self) -> int:
        """Spans that are read at lenders now."""
        return sum(span is not None and span.place == REMOTE for span in list(self.table.spans))

    def token_bytes(self, start: int, stop: int) -> bytes:
        """Token ids start .. stop-1 as int32 little-endian."""
        return array("i", self.token_ids[start:stop]).tobytes()

    def append(self, token: int) -> None:
        """A sampled token: its own KV is not computed yet."""
        self.token_ids.append(token)
        self.table.holes.add(self.num_tokens - 1, self.num_tokens)

    def finish_reason(self, eos_ids: tuple[int, ...]) -> str | None:
        """'stop' or 'length' when the last token ended the job, else None."""
        last = self.token_ids[-1]
        if last in self.job.stop_token_ids or (last in eos_ids and not self.job.ignore_eos):
            return "stop"
        return "length" if self.num_output >= self.job.max_tokens else None

    def note_away(self, remote: int, host: int) -> None:
        """So many spans of it were read at a lender's and on the host tier in one step."""
        per_span = self.table.span_tokens // self.block_size
        self.tally.borrowed_blocks_peak = max(self.tally.borrowed_blocks_peak, remote * per_span)
        self.tally.parked_blocks_peak = max(self.tally.parked_blocks_peak, host * per_span)
