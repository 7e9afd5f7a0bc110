"""Server: the gateway as a member of the cluster. Builds its parts from settings, runs them on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn

from kvbank.cluster.capacity import Capacity
from kvbank.cluster.gateway import Gateway, GatewayLimits
from kvbank.cluster.http.app import Front, HttpLimits, build_app
from kvbank.cluster.http.bounds import HEADER_BYTES, Bounds
from kvbank.cluster.http.connection import Connection
from kvbank.cluster.http.doors import LOOPBACK
from kvbank.cluster.http.keyring import WATCH_S, HttpsCertificate, Keyring
from kvbank.cluster.intake import Intake, ModelFacts
from kvbank.cluster.job import TextStream
from kvbank.cluster.links import Links
from kvbank.cluster.meters import Meters
from kvbank.cluster.ops import Ops
from kvbank.cluster.placement import choose_worker
from kvbank.cluster.roster import Roster
from kvbank.cluster.settings import REACHED
from kvbank.cluster.settings_check import is_loopback
from kvbank.cluster.survey import Survey
from kvbank.cluster.traced import TracedJobs
from kvbank.errors import ConfigError
from kvbank.kvstore.hashing import block_keys, root_key
from kvbank.kvstore.layout import Layout
from kvbank.kvstore.traces import open_traces
from kvbank.kvstore.transport.badge import Badge

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 30                    # a connection may be silent between two requests
MAX_CONNECTIONS = 2048
KEY_SPACES = 1024                    # tenants and salts whose root key is remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """All that one gateway needs to know. `cache_secret` and `model_digest` must be the workers' own."""

    control: str                     # address of the control plane
    badge: Badge                     # what it shows to members
    model: str                       # the model folder: config.json and tokenizer.json are read
    cache_secret: bytes = field(repr=False)
    model_digest: str
    served_name: str = ""            # default: the folder's name
    dtype: str = "float32"
    exactness: str = "fast"
    block_size: int = 16
    span_tokens: int = 128
    host_bytes: int = 0              # of each worker: a job may park spans there
    lend_cap: float | None = None    # share of its slots a member lends; None: lenders all, models half
    host: str = "127.0.0.1"
    port: int = 0
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    api_keys_file: str | None = None
    tls_cert: str | None = None      # with tls_key: serve https
    tls_key: str | None = None
    names: tuple[str, ...] = ()      # host names that are answered to beside loopback ones; empty: any with API keys
    max_job_tokens: int | None = None # prompt and output of one job; None: as many as the model and the cluster hold
    expected: Mapping[str, int] = field(default_factory=dict)        # members by kind, for whoever watches
    tracing: Mapping[str, Any] = field(default_factory=dict)         # the section `tracing`
    http: HttpLimits = field(default_factory=HttpLimits)
    limits: GatewayLimits = field(default_factory=GatewayLimits)

    @classmethod
    def from_flat(
        cls, flat: Mapping[str, Any], *, control: str, badge: Badge, cache_secret: bytes, model_digest: str
    ) -> GatewaySettings:
        """From `cluster.settings.Settings.flat()` and what the launcher made."""
        return cls(
            control=control, badge=badge, model=flat["model"], cache_secret=cache_secret, model_digest=model_digest,
            dtype=flat["dtype"], exactness=flat["exactness"], block_size=flat["block_size"],
            span_tokens=flat["span_tokens"], host_bytes=flat["host_bytes"], lend_cap=flat["lend_cap"],
            host=flat["host"], port=flat["port"], api_keys=dict(flat["api_keys"]),
            expected={"model": flat["workers"] * flat["shards"], "lender": flat["lenders"]},
            tracing={name: flat[name] for name in ("exporter", "otlp_endpoint", "trace_dir", "sampled")},
            api_keys_file=flat["api_keys_file"], tls_cert=flat["tls_cert"], tls_key=flat["tls_key"],
            names=tuple(name.strip().lower() for name in flat["names"].split(",") if name.strip()),
            http=HttpLimits(body_bytes=flat["max_body_bytes"]), max_job_tokens=flat["max_job_tokens"],
            limits=GatewayLimits(max_jobs=flat["max_jobs"], retained_s=flat["keep_jobs_s"], tenant_jobs=flat["tenant_jobs"],
                                 tenant_tokens_per_s=flat["tenant_tokens_per_s"]),
        )


def build_gateway(settings: GatewaySettings) -> GatewayServer:
    """A gateway for a cluster whose control plane is up. Raises ModelError or ConfigError before it starts anything."""
    from kvbank.workers.detokenizer import Rules
    from kvbank.workers.detokenizer import TextStream as Detokenizer
    from kvbank.workers.models.chat_template import load_chat_template
    from kvbank.workers.models.config_reader import read_config
    from kvbank.workers.models.tokenizer import encode, load_tokenizer
    from kvbank.workers.token_pieces import TokenPieces

    config = read_config(settings.model)
    tokenizer, template = load_tokenizer(settings.model), load_chat_template(settings.model)
    layout = Layout(
        num_layers=config.num_layers, layer_first=0, layer_last=config.num_layers, kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, span_tokens=settings.span_tokens, block_size=settings.block_size,
        dtype=settings.dtype,
    )
    facts = ModelFacts(
        name=settings.served_name or Path(settings.model).resolve().name, vocab_size=config.vocab_size,
        max_position=config.max_position,
    )

    rules = Rules.of(tokenizer)

    def open_text(stop: tuple[str, ...]) -> TextStream:
        return Detokenizer(tokenizer, stop, rules=rules)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode_batch([ids], skip_special_tokens=False)[0])      # other threads run meanwhile

    def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    keys_now = Keyring(Path(settings.api_keys_file)) if settings.api_keys_file else settings.api_keys
    certificate = None
    if settings.tls_cert is not None:
        assert settings.tls_key is not None, "the settings were checked"
        certificate = HttpsCertificate(Path(settings.tls_cert), Path(settings.tls_key))
    traces = open_traces("gateway", settings.tracing)

    async def assemble() -> Assembly:
        links = Links(settings.badge)
        roster = Roster(links, settings.control)

        @lru_cache(maxsize=KEY_SPACES)
        def root(key_space: str, numerics: str) -> bytes:
            return root_key(settings.cache_secret, tenant=key_space, model_digest=settings.model_digest, layout=layout,
                            numerics=numerics)

        def keys(key_space: str, prompt: bytes) -> bytes:
            numerics = ""
            if settings.exactness == "bitwise":
                named = {worker.numerics for worker in roster.workers()}
                if len(named) != 1:
                    return b""                       # the worker hashes for itself
                numerics = named.pop()
            return b"".join(block_keys(root(key_space, numerics), prompt, settings.block_size))

        capacity = Capacity(
            roster, span_tokens=settings.span_tokens, host_bytes=settings.host_bytes, lend_cap=settings.lend_cap,
            windowed=bool(config.windows) and all(window is not None for window in config.windows),
        )

        gateway = Gateway(
            roster=roster, links=links, open_text=open_text, block_keys=keys,
            blocks_per_span=layout.blocks_per_span, eos_ids=config.eos_ids, limits=settings.limits,
            meters=Meters(model=facts.name, jobs_limit=settings.limits.max_jobs, expected=settings.expected),
            traced=TracedJobs(traces) if traces is not None else None,
            choose=lambda workers, held, tokens: choose_worker(
                held, workers, prompt_tokens=tokens, block_size=settings.block_size
            ),
        )
        survey = Survey(roster, links, blocks_per_slot=layout.blocks_per_span)
        front = Front(
            gateway=gateway, limits=settings.http,
            intake=Intake(facts, lambda text, at_start: encode(tokenizer, text, special_tokens=at_start),
                          capacity_tokens=capacity, decode=decode, render=render, max_job_tokens=settings.max_job_tokens,
                          pieces=TokenPieces(tokenizer)),
            api_keys=keys_now, hosts=(*LOOPBACK, settings.host, *settings.names), named=bool(settings.names),
            created=int(time.time()), status=survey.told, borrowed=lambda: survey.borrowed, ops=Ops(roster, links),
        )
        await roster.start()
        return Assembly(front, roster)

    return GatewayServer(assemble, host=settings.host, port=settings.port, certificate=certificate,
                         open_door=not settings.api_keys and not settings.api_keys_file)


@dataclass(frozen=True, slots=True)
class Assembly:
    """What runs on the server's loop; `roster` is whatever must be stopped after the gateway."""

    front: Front
    roster: Any


class GatewayServer:
    """Owns a thread, its event loop and the listening socket. `start` returns the address, `stop` gives all back."""

    def __init__(self, assemble: Callable[[], Any], *, host: str, port: int, open_door: bool,
                 certificate: HttpsCertificate | None = None) -> None:
        if open_door and not is_loopback(host):
            raise ConfigError(f"http.host {host} is not loopback and http.api_keys is empty: anyone could use it")
        self._assemble = assemble
        self._host, self._port, self._certificate = host, port, certificate
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: _Uvicorn | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self.gateway: Gateway | None = None

    def start(self) -> str:
        """Bind, start serving, and return `http://host:port` as this machine reaches it. Raises ConfigError: it is taken."""
        self._socket = _listen(self._host, self._port)
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self.address

    @property
    def address(self) -> str:
        assert self._socket is not None, "not started"
        host, port = self._socket.getsockname()[:2]
        host = REACHED.get(host, host)
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def stop(self, timeout_s: float = 4.0) -> None:
        """End all jobs, answer who still listens, and close. Safe to call twice."""
        if self._server is not None and self._loop is not None and self._loop.is_running():
            with contextlib.suppress(RuntimeError):  # the loop ended in this moment
                self._loop.call_soon_threadsafe(self._server.leave)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._ready.is_set():
                log.exception("gateway_crashed")
            self._failure = error
        finally:
            self._ready.set()

    def _served(self) -> int:
        assert self._server is not None, "it serves"
        return max(len(self._server.server_state.connections), len(self._server.server_state.tasks))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        assembly: Assembly = await self._assemble()
        self.gateway = assembly.front.gateway
        app = Bounds(build_app(assembly.front), served=self._served, limit=MAX_CONNECTIONS,
                     refused=self.gateway.meters.refused)
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        config.load()
        renewing = None
        if self._certificate is not None:
            config.ssl = self._certificate.context
            renewing = asyncio.ensure_future(_renew(self._certificate))
        self._server = _Uvicorn(config, self._ready)
        assert self._socket is not None
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        leaving = asyncio.ensure_future(self._server.leaving.wait())
        await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
        await assembly.roster.stop()
        await assembly.front.gateway.stop()          # streams end with an error event before their sockets close
        self._server.should_exit = True
        await serving
        leaving.cancel()
        if renewing is not None:
            renewing.cancel()


async def _renew(certificate: HttpsCertificate) -> None:
    while True:
        await asyncio.sleep(WATCH_S)
        certificate.renew()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)   # asyncio sets TCP_NODELAY only then: 40 ms a reply
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(1024)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"http.port {port} on {host} cannot be had ({error.strerror}): is another program listening there? "
            "Choose another port, or 0 for any"
        ) from error
    made.setblocking(False)
    return made


class _Uvicorn(uvicorn.Server):
    """uvicorn without its hands on signals, telling when it is up."""

    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._up = ready
        self.leaving = asyncio.Event()

    def leave(self) -> None:
        self.leaving.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._up.set()
