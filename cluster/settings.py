"""Settings: one frozen tree, `settings.section.key`; each setting with its kind, default, meaning and range.

Values come from cluster.config and are parsed by cluster.values; which ones go together, cluster.settings_check knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from kvbank.cluster.values import shown

REACHED = {"0.0.0.0": "127.0.0.1", "::": "::1"}      # hosts that stand for all addresses, and how this machine reaches them
NODE = "node"                        # as a host: the address that a member's machine has in Ray, filled in there


def _set(kind: str, default: Any, about: str, **rules: Any) -> Any:
    """One setting: its kind, default and meaning; `rules` as in cluster.values, plus secret and secret_url."""
    meta = {"kind": kind, "about": about, **rules}
    if isinstance(default, dict):
        return field(default_factory=lambda: MappingProxyType({}), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Who is started, by what, and how long to wait for it."""

    name: str = _set("str", "default", "name of this cluster; one state file per name", pattern=r"[A-Za-z0-9_.-]{1,64}")
    launcher: str = _set("str", "ray", "what starts the members", choices=("ray", "process"))
    workers: int = _set("int", 2, "replicas of the model", low=1, high=256)
    shards: int = _set("int", 1, "layer ranges, one actor each, that make up a replica", low=1, high=256)
    lenders: int = _set("int", 0, "members that host no model and only lend", low=0, high=1024)
    ray_address: str | None = _set("str", None, "join this Ray (auto or host:port) instead of starting one", none=True)
    worker_cpus: float = _set("float", 1.0, "cores of each model worker on a Ray that is joined; 0: any", low=0, high=1024)
    lender_cpus: float = _set("float", 1.0, "cores of each lender on a Ray that is joined; 0: any", low=0, high=1024)
    member_resource: str | None = _set("str", None, "custom Ray resource, of which both take one each", none=True,
                                       pattern=r"[A-Za-z0-9_.-]{1,64}")
    machines: int = _set("int", 1, "a Ray that is joined must have so many before members are placed", low=1, high=10_000)
    place_timeout_s: float = _set("float", 90.0, "longest wait for room on a Ray that is joined", low=1, high=3600)
    bind_host: str = _set("str", "127.0.0.1", "address on which members talk to each other; node: their machine's in Ray")
    allow_public: bool = _set("bool", False, "allow addresses other than loopback: they need certificates and API keys")
    allow_plaintext: bool = _set("bool", False, "allow them without certificates: the network itself is trusted, all of it")
    tls_dir: str | None = _set("path", None, "certificates for all traffic between members; `kvbank certs` makes them", none=True)
    state_dir: str | None = _set("path", None, "where the cache secret and model digests are kept", none=True)
    log_dir: str | None = _set("path", None, "keep the members' logs here; default: a temp folder", none=True)
    restart: bool = _set("bool", True, "start a member again when its process died")
    start_timeout_s: float = _set("float", 180.0, "longest wait for all members to be ready", low=1, high=3600)
    stop_grace_s: float = _set("float", 3.0, "from asking members to stop to killing them", low=0, high=4)
    heartbeat_s: float = _set("float", 0.5, "every member reports to control this often", low=0.02, high=60)
    suspect_s: float = _set("float", 1.5, "silent this long: nothing new is placed there", low=0.05, high=600)
    gone_s: float = _set("float", 5.0, "silent this long: forgotten until it registers again", low=0.1, high=3600)
    directory_keys: int = _set("int", 1_000_000, "block keys the directory remembers at most", low=1, high=1 << 28)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What each model worker computes and how."""

    model: str | None = _set("path", None, "folder in Hugging Face format", none=True)
    dtype: str = _set("str", "float32", "of weights and KV", choices=("float32", "bfloat16", "float16"))
    exactness: str = _set("str", "fast", "bitwise: equal bits whatever the placement", choices=("fast", "bitwise"))
    device: str = _set("str", "cpu", "cpu, cuda or cuda:N", pattern=r"cpu|cuda(:\d+)?")
    torch_threads: int = _set("int", 0, "threads of each worker; 0: the cores over the workers", low=0, high=1024)
    prefill_chunk_tokens: int = _set("int", 512, "prompt rows that one step computes at most", low=1, high=1 << 20)
    max_batch: int = _set("int", 64, "jobs that run at once on a worker", low=1, high=4096)
    max_queue: int = _set("int", 1024, "jobs that wait on a worker; one more is Overloaded", low=1, high=1 << 20)
    stall_s: float = _set("float", 30.0, "a job that cannot progress this long is Unavailable", low=0.1, high=86400)
    fetch_wait_s: float = _set("float", 1.0, "longest wait for promised bytes before computing them", low=0, high=60)
    verify_attend: bool = _set("bool", False, "re-hash a lent span before each attention over it (slow)")


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultSettings:
    """The device's KV memory."""

    device_blocks: int = _set("int", 512, "of each model worker, rounded down to whole spans", low=1, high=1 << 30)
    lender_blocks: int | None = _set("int", None, "of each lender; default: same", low=1, high=1 << 30, none=True)
    block_size: int = _set("int", 16, "tokens per block: unit of keys and prefix hits", low=1, high=4096)
    span_tokens: int = _set("int", 128, "tokens per span: unit of allocation and lending", low=1, high=65536)
    tenant_share: float | None = _set("float", None, "of a worker's KV memory, what a tenant's cache keeps while others press; "
                                      "who has more gives way first; default: the oldest goes", low=0, high=1, none=True)
    staging_spans: int = _set("int", 16, "spans of fetched or parked bytes in flight", low=1, high=65536)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """What may rest below the device, and for how long."""

    host_bytes: int = _set("size", 256 << 20, "host memory for spilled blocks, per member; 0: none", high=1 << 44)
    redis: str | None = _set("str", "embedded", "embedded, a URL, or none", none=True, secret_url=True)
    redis_bytes: int = _set("size", 1 << 30, "what we store in Redis at most", low=1 << 20, high=1 << 50)
    redis_ttl_s: float = _set("float", 86_400.0, "a frame not read this long is forgotten", low=1, high=1e9)
    cache_secret: str | None = _set("str", None, "hex of 32 bytes; default: a private file in state_dir", none=True,
                                    secret=True, pattern=r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoanSettings:
    """Times of the loan protocol, each a duration on the holder's own clock."""

    lend_cap: float | None = _set("float", None, "share of its slots a member lends; default: lenders 1.0, models 0.5",
                                  low=0, high=1, none=True)
    term_s: float = _set("float", 6.0, "a loan not renewed this long ends", low=0.05, high=3600)
    renew_s: float = _set("float", 1.5, "a borrower renews all its loans with a lender this often", low=0.01, high=1800)
    fill_s: float = _set("float", 3.0, "a granted slot not filled this long is taken back", low=0.05, high=600)
    borrow_retry_s: float = _set("float", 0.3, "ask the same lender again after this", low=0.01, high=60)
    borrow_give_up_s: float = _set("float", 1.0, "then try the next candidate", low=0.01, high=60)
    put_retry_s: float = _set("float", 0.5, "send a span again after this", low=0.01, high=60)
    put_give_up_s: float = _set("float", 3.0, "then keep the span at home", low=0.01, high=60)
    attend_hedge_s: float = _set("float", 0.25, "open a second connection after this silence", low=0.01, high=60)
    attend_lost_s: float = _set("float", 1.0, "after this silence the span is lost and replayed", low=0.02, high=60)
    recall_urgent_s: float = _set("float", 2.0, "to bring spans home when the lender is in need", low=0.05, high=600)
    recall_calm_s: float = _set("float", 10.0, "to bring spans home otherwise", low=0.05, high=600)
    recall_drain_s: float = _set("float", 60.0, "to bring spans home when the lender drains", low=0.05, high=3600)
    recall_repeat_s: float = _set("float", 0.5, "a recall is repeated this often", low=0.01, high=60)
    avoid_s: float = _set("float", 10.0, "no new loan of a pair after a recall or a loss by silence", low=0, high=600)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """The gateway's front door."""

    host: str = _set("str", "127.0.0.1", "address the API listens on")
    port: int = _set("int", 0, "port the API listens on; 0: any", low=0, high=65535)
    tls_cert: str | None = _set("path", None, "PEM file: serve https with this certificate chain", none=True)
    tls_key: str | None = _set("path", None, "PEM file: its key", none=True)
    names: str = _set("str", "", "host names that are answered to beside loopback ones, with commas; default: any with API keys",
                      pattern=r"\s*(([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:]+\])\s*(,\s*|$))*")
    api_keys: Mapping[str, str] = _set("keys", {}, "{key: tenant or tenant:ops}; empty: any key is tenant `default`", secret=True)
    api_keys_file: str | None = _set("path", None, "the same as a YAML file, read again whenever it changes", none=True)
    max_body_bytes: int = _set("size", 8 << 20, "largest request body: long prompts are the point", low=1024, high=1 << 30)
    max_job_tokens: int | None = _set("int", None, "prompt and output tokens of one job; none: no bound", low=2, none=True)
    max_jobs: int = _set("int", 1024, "jobs the gateway carries at once; one more is Overloaded", low=1, high=1 << 20)
    tenant_jobs: int | None = _set("int", None, "of them, of one tenant; default: all", low=1, high=1 << 20, none=True)
    tenant_tokens_per_s: float | None = _set("float", None, "prompt and output tokens one tenant may ask for; default: any",
                                             low=0.1, high=1e12, none=True)
    keep_jobs_s: float = _set("float", 600.0, "a finished job (of 4096) can be asked for this long", low=0, high=7 * 86_400)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingSettings:
    """What members write while they run."""

    format: str = _set("str", "keyvalue", "of a line: keyvalue or json", choices=("keyvalue", "json"))
    level: str = _set("str", "info", "the least that is written", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingSettings:
    """Spans of jobs, with OpenTelemetry (the extra `trace`)."""

    exporter: str = _set("str", "none", "where spans go: none (off), otlp, or file", choices=("none", "otlp", "file"))
    otlp_endpoint: str = _set("str", "http://127.0.0.1:4317", "of the collector, OTLP over gRPC", pattern=r"https?://[^\s@]+")
    trace_dir: str | None = _set("path", None, "where exporter=file writes a file of JSON lines per member", none=True)
    sampled: float = _set("float", 1.0, "share of traces kept that no caller decided about", low=0, high=1)


SECTIONS: Mapping[str, type] = MappingProxyType({
    "cluster": ClusterSettings, "engine": EngineSettings, "vault": VaultSettings, "tiers": TierSettings,
    "loans": LoanSettings, "http": HttpSettings, "logging": LoggingSettings,
    "tracing": TracingSettings,
})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole tree. `sources` says for every `section.key` where its value came from."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    vault: VaultSettings = field(default_factory=VaultSettings)
    tiers: TierSettings = field(default_factory=TierSettings)
    loans: LoanSettings = field(default_factory=LoanSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def flat(self) -> dict[str, Any]:
        """Every setting by its own name (names are unique over the sections); JSON-able, secrets included."""
        return {key: plain for _, key, plain in self._walk()}

    def tree(self) -> dict[str, dict[str, Any]]:
        """`{section: {key: value}}`, JSON-able and safe to print: secrets and passwords are masked."""
        made: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for section, key, plain in self._walk():
            made[section][key] = shown(FIELDS[key][1].metadata, plain)
        return made

    def rows(self) -> list[tuple[str, Any, str]]:
        """`(section.key, value, source)` of every setting, masked, in the order of this file."""
        return [
            (f"{section}.{key}", value, self.sources.get(f"{section}.{key}", "default"))
            for section, values in self.tree().items() for key, value in values.items()
        ]

    def _walk(self) -> Iterator[tuple[str, str, Any]]:
        for section in SECTIONS:
            part = getattr(self, section)
            for spec in fields(part):
                value = getattr(part, spec.name)
                yield section, spec.name, dict(value) if isinstance(value, Mapping) else value


FIELDS: Mapping[str, tuple[str, Field[Any]]] = MappingProxyType(
    {spec.name: (section, spec) for section, cls in SECTIONS.items() for spec in fields(cls)}
)
