"""WorkerConfig: all that one worker needs to know. Built by cluster.config; nothing below reads the environment."""

from __future__ import annotations

from dataclasses import dataclass

from kvbank.errors import ConfigError

MIN_SPANS = 3                                # one being written, one being read, one on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker of one replica. Sizes are of this worker alone."""

    model: str                               # path of a Hugging Face folder
    dtype: str = "float32"
    exactness: str = "fast"                  # fast | bitwise
    device: str = "cpu"
    device_blocks: int = 512                 # rounded down to whole spans
    block_size: int = 16                     # tokens per block
    span_tokens: int = 128                   # tokens per span
    prefill_chunk_tokens: int = 512          # prompt rows a step computes at most, over all jobs
    max_batch: int = 64                      # jobs that run at once
    max_queue: int = 1024                    # jobs that wait at once; one more is Overloaded
    stall_s: float = 30.0                    # a job without a deadline that cannot progress this long is Unavailable
    fetch_wait_s: float = 1.0                # longest wait for promised bytes before they are computed instead
    staging_spans: int = 16                  # spans of fetched or parked bytes in flight beside the vault
    shards: int = 1
    shard: int = 0

    def __post_init__(self) -> None:
        if self.exactness not in ("fast", "bitwise"):
            raise ConfigError(f"exactness {self.exactness!r} is not 'fast' or 'bitwise'")
        if self.num_slots < MIN_SPANS:
            raise ConfigError(
                f"device_blocks {self.device_blocks} is {self.num_slots} spans of {self.span_tokens} tokens; "
                f"at least {MIN_SPANS} spans ({MIN_SPANS * self.span_tokens // self.block_size} blocks) are needed"
            )
        if self.prefill_chunk_tokens < 1 or self.max_batch < 1:
            raise ConfigError("prefill_chunk_tokens and max_batch must be at least 1")

    @property
    def num_slots(self) -> int:
        return self.device_blocks * self.block_size // self.span_tokens
