"""Plan: how many tokens fit where, for one model and one cluster's settings. Arithmetic only; starts nothing.

    a job's tokens:  own device blocks -> blocks it may borrow -> blocks it may park on the host tier -> too long
    cached tokens:   idle device blocks, the host tier, Redis
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType

from kvbank.cluster.screen import size, table
from kvbank.cluster.settings import Settings
from kvbank.errors import ConfigError
from kvbank.kvstore.layout import Layout
from kvbank.workers.models.config_reader import read_config

MODEL_LEND_CAP, LENDER_LEND_CAP = 0.5, 1.0           # where loans.lend_cap is silent
FRAME_BYTES = 8192                                   # what a parked span takes on the host beside its KV: as the gateway counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Tokens and bytes. `verdict` answers for `tokens`, when a length was asked for."""

    model: str
    model_limit_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int          # K and V over all layers
    block_bytes: int
    span_bytes: int
    device_tokens: int               # one replica's own blocks
    device_bytes: int
    borrowable_tokens: int           # of all others, up to their lend caps, while they are idle
    host_tokens: int                 # parked on one replica's host tier
    redis_tokens: int                # cached for later, not for a running job
    longest_job_tokens: int          # prompt and answer
    tokens: int | None
    verdict: str


def planned(settings: Settings, *, tokens: int | None = None) -> Plan:
    """The plan for these settings. Raises ConfigError without a model, ModelError for a bad one."""
    engine, vault, cluster = settings.engine, settings.vault, settings.cluster
    if engine.model is None:
        raise ConfigError("a plan needs a model: give --model FOLDER")
    config = read_config(engine.model)
    layout = Layout(
        num_layers=config.num_layers, layer_first=0, layer_last=config.num_layers, kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, span_tokens=vault.span_tokens, block_size=vault.block_size, dtype=engine.dtype,
    )
    lend_cap = settings.loans.lend_cap
    own_spans = vault.device_blocks // layout.blocks_per_span
    lender_spans = (vault.lender_blocks or vault.device_blocks) // layout.blocks_per_span
    # Each shard of a borrower needs its own slots, so a lender's slots serve `shards` times fewer tokens; and replicas of
    # several shards lend nothing (docs/decisions/0008-shards-in-lockstep.md).
    workers_lend = MODEL_LEND_CAP if lend_cap is None else lend_cap
    borrowable = (
        int(own_spans * (workers_lend if cluster.shards == 1 else 0)) * (cluster.workers - 1)
        + int(lender_spans * (LENDER_LEND_CAP if lend_cap is None else lend_cap)) * cluster.lenders // cluster.shards
    )
    host = settings.tiers.host_bytes // (layout.slot_bytes // cluster.shards + FRAME_BYTES)      # each shard parks its part
    span = layout.span_tokens
    longest = min(config.max_position, (own_spans + borrowable + host) * span)
    return Plan(
        model=Path(engine.model).resolve().name, model_limit_tokens=config.max_position,
        weights_bytes=sum(file.stat().st_size for file in Path(engine.model).glob("*.safetensors")),
        kv_bytes_per_token=layout.token_bytes, block_bytes=layout.block_bytes, span_bytes=layout.slot_bytes,
        device_tokens=own_spans * span, device_bytes=own_spans * layout.slot_bytes, borrowable_tokens=borrowable * span,
        host_tokens=host * span,
        redis_tokens=settings.tiers.redis_bytes // layout.token_bytes if settings.tiers.redis else 0,
        longest_job_tokens=longest, tokens=tokens,
        verdict="" if tokens is None else _verdict(tokens, config.max_position, own_spans * span, borrowable * span,
                                                   host * span, layout.block_size),
    )


def _verdict(tokens: int, limit: int, own: int, borrowable: int, host: int, block: int) -> str:
    if tokens > limit:
        return f"too long: the model reads {limit} tokens"
    if tokens <= own:
        return "fits one worker"
    if tokens <= own + borrowable:
        return f"borrows {-(-(tokens - own) // block)} blocks while others are idle"
    if tokens <= own + borrowable + host:
        parked = -(-(tokens - own - borrowable) // block)
        return (f"borrows {borrowable // block} blocks and parks {parked} on the host tier, which each step streams "
                "back: slow")
    whole = own + borrowable + host
    return f"too long: the cluster holds {whole} tokens for one job; add blocks, lenders or host_bytes"


def plan_view(plan: Plan) -> Group:
    """The plan for people."""
    facts = [
        ("weights, as stored", size(plan.weights_bytes)), ("KV of one token", size(plan.kv_bytes_per_token)),
        ("one block", size(plan.block_bytes)), ("one span", size(plan.span_bytes)),
    ]
    room = [
        ("a worker's own blocks", plan.device_tokens, size(plan.device_bytes)),
        ("borrowable from the others", plan.borrowable_tokens, size(plan.borrowable_tokens * plan.kv_bytes_per_token)),
        ("parked on its host tier", plan.host_tokens, size(plan.host_tokens * plan.kv_bytes_per_token)),
        ("longest job (model's limit " + str(plan.model_limit_tokens) + ")", plan.longest_job_tokens, ""),
        ("kept in Redis for later", plan.redis_tokens, size(plan.redis_tokens * plan.kv_bytes_per_token)),
    ]
    parts: list[RenderableType] = [table(plan.model, ("what", "size"), facts, right=1), "",
             table("room", ("where", "tokens", "bytes"), room, right=1)]
    if plan.tokens is not None:
        parts += ["", f"{plan.tokens} tokens: {plan.verdict}"]
    return Group(*parts)
