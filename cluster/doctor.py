"""Doctor: looks at this machine the way a cluster would use it, and says what it found and what to do.

    machine_health    packages, limits, clock, GPU, ports: whatever is to run here
    settings_health   doors, secrets, Redis, model, memory: with the settings of one cluster
    here              the order of the visit, and what is tried out: gRPC with a token, a round trip through the tiers

Each check is one function that yields findings; a check that breaks is itself a finding. Nothing is left behind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from kvbank.cluster import machine_health, settings_health, statefile
from kvbank.cluster.finding import Finding, good
from kvbank.cluster.machine_health import Machine
from kvbank.cluster.settings import Settings
from kvbank.errors import ConfigError


def examine(settings: Settings, state_folder: Path, *, config: Path | None = None,
            machine: Machine | None = None) -> Iterator[Finding]:
    """Every finding, as it is made. `config` is the file that `settings` came from; `machine` is this one if not given."""
    seen = machine or Machine.seen()
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("packages", machine_health.packages), ("kvbank", lambda: machine_health.copies(sys.path)),
        ("limits", lambda: machine_health.limits(seen)), ("clock", lambda: machine_health.clock(seen)),
        ("gpu", lambda: machine_health.gpu(settings.engine.device)), ("ports", machine_health.ports), ("grpc", _grpc),
        ("doors", lambda: settings_health.doors(settings)),
        ("secrets", lambda: settings_health.secrets(settings, state_folder, config)),
        ("locks", lambda: settings_health.locks(settings, seen.now)),
        ("clusters", lambda: _clusters(state_folder)), ("redis", lambda: settings_health.redis(settings)),
        ("tiers", _tiers), ("model", lambda: settings_health.model(settings)),
        ("memory", lambda: settings_health.memory(settings, seen)),
    )
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:                   # a doctor must get to the end of the visit
            yield Finding(name, "bad", f"the check itself failed: {type(error).__name__}: {error}",
                          "tell us, with what `kvbank doctor --json` prints")


def _clusters(folder: Path) -> Iterator[Finding]:
    names = ", ".join(f"{c.name} at {c.address or '(starting)'}" for c in statefile.known(folder))
    yield good("clusters", names or "none up")


def _grpc() -> Iterator[Finding]:
    from kvbank.kvstore.transport import rpc

    token, payload = os.urandom(16).hex(), os.urandom(1 << 16)
    echo: Any = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
    server = rpc.server(token, threads=2)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("kvbank.Doctor", {"Echo": echo})])
    port = rpc.bind(server, "127.0.0.1:0")
    server.start()
    channel, stranger = (rpc.channel(f"127.0.0.1:{port}", each) for each in (token, "0" * 32))
    calls: list[Any] = [each.unary_unary("/kvbank.Doctor/Echo") for each in (channel, stranger)]
    try:
        same = calls[0](payload, timeout=5) == payload
        try:
            calls[1](payload, timeout=5)
            kept_out = False
        except grpc.RpcError as error:
            kept_out = error.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        channel.close()
        stranger.close()
        server.stop(1.0).wait()
    yield Finding("grpc", "good" if same and kept_out else "bad",
                  "bytes come back, and a call without the token is refused" if same and kept_out else
                  f"bytes came back: {same}, stranger refused: {kept_out}",
                  "" if same and kept_out else "pip install --force-reinstall grpcio; unset http_proxy")


def _tiers() -> Iterator[Finding]:
    """Write frames, drive them out of the host tier, read them back from where they went, and compare every byte."""
    from kvbank.kvstore.frame import FrameHeader
    from kvbank.kvstore.layout import Layout
    from kvbank.kvstore.store import BlockStore
    from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis
    from kvbank.kvstore.tiers.host_tier import HostTier
    from kvbank.kvstore.tiers.redis_tier import RedisTier

    layout = Layout(num_layers=2, layer_first=0, layer_last=2, kv_heads=2, head_dim=32)
    frames = [(FrameHeader.of_tokens(os.urandom(32), list(range(layout.span_tokens)), layout),
               os.urandom(layout.slot_bytes)) for _ in range(8)]
    keys = [header.key for header, _ in frames]
    host = HostTier(4 * layout.slot_bytes)           # half of them do not fit
    try:
        server = EmbeddedRedis(64 << 20)
    except ConfigError as error:
        store = BlockStore(layout, host=HostTier(64 << 20), redis=None, secret=os.urandom(32))
        store.put(frames)
        found = store.get(keys)
        store.close()
        whole = all(bytes(found[h.key].payload) == payload for h, payload in frames if h.key in found)
        yield Finding("tiers", "warn" if whole and len(found) == 8 else "bad", f"host only; no private Redis: {error}",
                      "pip install 'kvbank[embedded]', or set tiers.redis to a URL or none")
        return
    with server:
        redis = RedisTier(server.url, limit_bytes=32 << 20, layers="0-2", value_bytes=2 * layout.slot_bytes,
                          read_s=1.0)
        store = BlockStore(layout, host=host, redis=redis, secret=os.urandom(32))
        try:
            store.put(frames)
            flushed = store.flush(10.0, everything=True)
            found = store.get(keys)
            right = sum(h.key in found and bytes(found[h.key].payload) == payload for h, payload in frames)
            sources = sorted({stored.source for stored in found.values()})
            seen = _seen_by_redis_py(server.url)
        finally:
            store.close()
    good_trip = flushed and right == len(frames) == seen and "redis" in sources
    yield Finding("tiers", "good" if good_trip else "bad",
                  f"{right} of {len(frames)} spans came back byte for byte, from {' and '.join(sources) or 'nowhere'}; "
                  f"redis-py counts {seen} in Redis", "" if good_trip else "look for another program on this Redis; tell us")


def _seen_by_redis_py(url: str) -> int:
    """How many frames an independent client finds: ours could agree with itself and be wrong."""
    import redis

    with redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0) as witness:
        return sum(witness.type(key) == b"string" for key in witness.scan_iter(match=b"kvb:*"))
