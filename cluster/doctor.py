"""Doctor: looks at this machine the way a cluster would use it, and says what it found and what to do.

Each check is one function that yields findings; a check that breaks is itself a finding. Nothing is left behind.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc

import kvbank
from kvbank.cluster import statefile
from kvbank.cluster.screen import size
from kvbank.errors import ConfigError

PACKAGES = ("torch", "ray", "grpcio", "protobuf", "fastapi", "uvicorn", "httpx", "redis", "safetensors", "tokenizers",
            "numpy", "msgpack", "prometheus_client")
ENOUGH_FILES = 1024
ENOUGH_MEMORY = 4 << 30
RAY_PORT = 6379                      # a Ray head and a Redis both like it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `state` is good, warn or bad; bad means that a cluster cannot work."""

    what: str
    state: str
    detail: str


def examine(state_folder: Path) -> Iterator[Finding]:
    """Every finding, as it is made."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions, _machine, _memory, _ports, _grpc, lambda: _state(state_folder), _redis, _tiers,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:                   # a doctor must get to the end of the visit
            name = getattr(check, "__name__", "state").strip("_")
            yield Finding(name, "bad", f"the check itself failed: {type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("python", "good" if sys.version_info >= (3, 11) else "bad", python)
    yield Finding("kvbank", "good", kvbank.__version__)
    for package in PACKAGES:
        try:
            yield Finding(package, "good", version(package))
        except PackageNotFoundError:
            spare = package == "ray"
            remedy = "missing; launcher='process' works without it" if spare else "missing: install kvbank again"
            yield Finding(package, "warn" if spare else "bad", remedy)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    yield Finding("cores", "good" if cores > 1 else "warn", f"{cores} for this process")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < ENOUGH_FILES
    yield Finding("open files", "warn" if few else "good",
                  f"{soft} of {hard}" + ("; raise it: ulimit -n 4096" if few else ""))
    card = shutil.which("nvidia-smi")
    yield Finding("gpu", "good", "nvidia-smi is there; device=cuda may work" if card else "none seen; device=cpu works")


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    yield Finding("free memory", "good" if free >= ENOUGH_MEMORY else "warn", size(free))
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("shared memory", "warn", "no /dev/shm: Ray falls back to files, which is slow")
        return
    room = shutil.disk_usage(shared).free
    yield Finding("shared memory", "good" if room >= 1 << 30 else "warn",
                  f"{size(room)} free" + ("" if room >= 1 << 30 else "; Ray wants more: docker run --shm-size=2g"))


def _ports() -> Iterator[Finding]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield Finding("loopback", "good", "a port can be bound")
    with socket.socket() as asked:
        asked.settimeout(0.5)
        taken = asked.connect_ex(("127.0.0.1", RAY_PORT)) == 0
    yield Finding(f"port {RAY_PORT}", "warn" if taken else "good",
                  "something listens there: a Redis would clash with a Ray head (kvbank's own use other ports)"
                  if taken else "free")


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
                  f"bytes came back: {same}, stranger refused: {kept_out}")


def _state(folder: Path) -> Iterator[Finding]:
    mode = stat.S_IMODE(folder.stat().st_mode)
    private = not mode & 0o077
    yield Finding("state folder", "good" if private else "warn",
                  f"mode {mode:04o}" + ("" if private else ": others can look in; chmod 700"))
    clusters = statefile.known(folder)
    names = ", ".join(f"{c.name} at {c.address or '(starting)'}" for c in clusters)
    yield Finding("clusters", "good", names or "none up")


def _redis() -> Iterator[Finding]:
    from kvbank.kvstore.tiers.embedded_redis import find_server

    try:
        yield Finding("redis-server", "good", find_server())
    except ConfigError as error:
        yield Finding("redis-server", "warn", str(error))


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
        yield Finding("tiers", "warn" if whole and len(found) == 8 else "bad", f"host only; no private Redis: {error}")
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
    good = flushed and right == len(frames) == seen and "redis" in sources
    yield Finding("tiers", "good" if good else "bad",
                  f"{right} of {len(frames)} spans came back byte for byte, from {' and '.join(sources) or 'nowhere'}; "
                  f"redis-py counts {seen} in Redis")


def _seen_by_redis_py(url: str) -> int:
    """How many frames an independent client finds: ours could agree with itself and be wrong."""
    import redis

    with redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0) as witness:
        return sum(witness.type(key) == b"string" for key in witness.scan_iter(match=b"kvb:*"))
