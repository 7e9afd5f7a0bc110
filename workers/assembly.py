"""Assembly: builds one worker's parts from a model folder and a WorkerConfig, in order, and ties them together.

The only place that knows how the parts fit. Knows nothing of gRPC, Ray or who else is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvbank.errors import ConfigError
from kvbank.kernels.digest import DIGEST
from kvbank.kvstore.config import StoreConfig
from kvbank.kvstore.hashing import root_key
from kvbank.kvstore.layout import BlockKey, Layout
from kvbank.kvstore.store import build_store
from kvbank.kvstore.tiers.host_tier import HostTier
from kvbank.kvstore.vault import Arena, Vault
from kvbank.workers.attend import AttentionShape, JoinedAttention
from kvbank.workers.canary import Canary
from kvbank.workers.config import WorkerConfig
from kvbank.workers.engine import Engine
from kvbank.workers.fetcher import TierFetcher
from kvbank.workers.models.config_reader import CANARY, ModelConfig, read_config
from kvbank.workers.models.decoder import Decoder
from kvbank.workers.models.linear import arithmetic
from kvbank.workers.seams import Bank, spill_all
from kvbank.workers.shard import LocalShard, Model, Shelf
from kvbank.workers.weights import load_weights

ROOTS = 1024                                 # root keys kept: callers choose salts, and a root takes microseconds to make


def layer_range(num_layers: int, shard: int, shards: int) -> range:
    """The contiguous layers of one shard; the first ones get one more when they do not divide evenly."""
    if not 1 <= shards <= num_layers:
        raise ConfigError(f"shards {shards} must be between 1 and the model's {num_layers} layers")
    each, more = divmod(num_layers, shards)
    first = shard * each + min(shard, more)
    return range(first, first + each + (shard < more))


def layout_of(model: ModelConfig, config: WorkerConfig, shard: int | None = None) -> Layout:
    """What the bytes of this shard's slots mean."""
    layers = layer_range(model.num_layers, config.shard if shard is None else shard, config.shards)
    return Layout(num_layers=model.num_layers, layer_first=layers.start, layer_last=layers.stop, kv_heads=model.num_kv_heads,
                  head_dim=model.head_dim, span_tokens=config.span_tokens, block_size=config.block_size, dtype=config.dtype)


def widest_window(model: ModelConfig) -> int | None:
    """The widest sliding window when every layer has one: what lies behind it is never read again."""
    windows = [w for w in model.windows if w is not None]
    return max(windows) if len(windows) == model.num_layers else None


def numerics_id(config: WorkerConfig) -> str:
    """Names the arithmetic: members with equal ids give equal bits, others may only hold and fetch."""
    if config.device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        products = arithmetic(getattr(torch, config.dtype), "cpu")
        return f"cpu/{capability}/torch-{torch.__version__.split('+')[0]}/{config.dtype}/{products}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda/sm{major}{minor}/torch-{torch.__version__.split('+')[0]}/{config.dtype}"


@dataclass(slots=True)
class Parts:
    """One shard, built."""

    model: ModelConfig
    layout: Layout
    arena: Arena
    shard: LocalShard
    shape: AttentionShape
    host: HostTier | None


def build_shard(
    config: WorkerConfig, *, host: HostTier | None = None, shelf: Shelf | None = None, model: ModelConfig | None = None
) -> Parts:
    """Read this shard's layers and make its slots. Raises ModelError, ConfigError."""
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"engine.device is {config.device}, and PyTorch finds no CUDA here: use cpu, or install a PyTorch "
                          "with CUDA on a machine with a GPU")
    spec = model or read_config(config.model)
    layout = layout_of(spec, config)
    layers = range(layout.layer_first, layout.layer_last)
    built = build_model(config, spec, layers)
    arena = Arena(config.num_slots, layout.slot_bytes, config.device)
    shape = AttentionShape(
        heads=spec.num_heads, kv_heads=spec.num_kv_heads, span_tokens=config.span_tokens, scale=spec.head_dim ** -0.5,
        windows=tuple(spec.windows[layers.start : layers.stop]),
        exactness=DIGEST if spec.model_type == CANARY else config.exactness,
        dtype=getattr(torch, config.dtype), device=config.device,
    )
    attention = JoinedAttention(shape, arena.view(layout))
    shard = LocalShard(built, arena, layout, attention, exactness=config.exactness, host=host, shelf=shelf)
    return Parts(spec, layout, arena, shard, shape, host)


def build_model(config: WorkerConfig, spec: ModelConfig, layers: range) -> Model:
    """These layers of the decoder, or of the canary where config.json says so. Raises ModelError."""
    if spec.model_type == CANARY:
        if config.device != "cpu":
            raise ConfigError(f"a canary runs on the cpu, not on {config.device}")
        return Canary(config.model, spec, layers, dtype=config.dtype)
    first, last = layers.start == 0, layers.stop == spec.num_layers
    weights = load_weights(config.model, spec, layers, first=first, last=last, dtype=config.dtype)
    return Decoder(spec, weights, layers, first, last, exactness=config.exactness, device=config.device)


def root_keys(
    secret: bytes, digest: str, layout: Layout, config: WorkerConfig
) -> Callable[[str], BlockKey]:
    """JobSpec.key_space -> root of its key chains."""
    numerics = numerics_id(config) if config.exactness == "bitwise" else ""

    @lru_cache(maxsize=ROOTS)
    def root_of(key_space: str) -> BlockKey:
        return BlockKey(root_key(secret, tenant=key_space, model_digest=digest, layout=layout, numerics=numerics))

    return root_of


def build_engine(
    config: WorkerConfig, *, secret: bytes | None = None, digest: str = "unnamed", bank: Bank | None = None,
    store_config: StoreConfig | None = None, lend_cap: int = 0, capacity_tokens: Callable[[], int] | None = None,
) -> Engine:
    """An engine whose chain is this one process: what tests and in-process benches run. `engine.close()` ends its store."""
    secret = secret or os.urandom(32)
    model = read_config(config.model)
    host = HostTier(store_config.host_bytes) if store_config is not None and store_config.host_bytes else None
    store = build_store(store_config, layout_of(model, config), secret, host=host) if store_config is not None else None
    parts = build_shard(config, host=host, shelf=store, model=model)
    vault = Vault(config.num_slots, blocks_per_span=parts.layout.blocks_per_span, lend_cap=lend_cap,
                  on_evict=spill_all(parts.shard, parts.layout.blocks_per_span), on_scrub=parts.shard.scrub)
    woken = [lambda: None]
    fetcher = TierFetcher(
        store, parts.shard.load, staging_bytes=config.staging_spans * parts.layout.slot_bytes, wait_s=config.fetch_wait_s,
        clock=time.monotonic, wake=lambda: woken[0]()) if store is not None else None
    engine = Engine(
        config, vault, parts.shard, clock=time.monotonic, root_of=root_keys(secret, digest, parts.layout, config),
        eos_ids=parts.model.eos_ids, max_position=parts.model.max_position, window=widest_window(parts.model), bank=bank,
        fetcher=fetcher, capacity_tokens=capacity_tokens,
    )
    woken[0] = engine.wake.set
    engine.store = store
    return engine
