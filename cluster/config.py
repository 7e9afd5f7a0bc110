"""Settings of a whole cluster: one frozen tree from defaults, a file, the environment and flags.

Later sources win: default < config file or mapping < `KVBANK__SECTION__KEY` < keyword or flag. Every value remembers
where it came from. An unknown key, a value out of range or two values that disagree are a ConfigError that names the
key and, for a typo, what was probably meant. This is the only file of kvbank that reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from kvbank.cluster.values import MASK, parse, shown
from kvbank.errors import ConfigError

ENV_PREFIX = "KVBANK__"
_ENVIRONMENT = threading.Lock()      # of the process: changed by one at a time
MARKER = "KVBANK_CLUSTER"            # in the environment of every process a cluster starts; the guardian looks for it
NODE = "node"                        # as a host: the address that a member's machine has in Ray, filled in there
MIN_SPANS = 3                        # one being written, one being read, one on its way
MAX_FILE_BYTES = 1 << 20


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
    keep_jobs_s: float = _set("float", 600.0, "a finished job can be asked for this long", low=0, high=7 * 86_400)


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
            made[section][key] = shown(_FIELDS[key][1].metadata, plain)
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


_FIELDS: Mapping[str, tuple[str, Field[Any]]] = MappingProxyType(
    {spec.name: (section, spec) for section, cls in SECTIONS.items() for spec in fields(cls)}
)


def load(
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    override_source: str = "argument",
) -> Settings:
    """The effective settings, or a ConfigError.

    config:     a mapping or the path of one .yaml, .yml or .toml file; keys by section, or alone (names are unique)
    overrides:  leaf name -> value from keywords or flags: the strongest source
    environ:    read instead of the process's own environment (tests)
    """
    settings = Settings()
    if config is not None:
        source = "config" if isinstance(config, Mapping) else f"file {config}"
        values = config if isinstance(config, Mapping) else _read_file(Path(config))
        settings = _apply(settings, _leaves(values, source), source)
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(ENV_PREFIX):
            settings = _apply(settings, {_env_key(name): text}, f"env {name}")
    if overrides:
        settings = _apply(settings, _leaves(overrides, override_source), override_source)
    return _check(settings)


def _leaves(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`section.key -> raw value`, whichever way the keys were written. Unknown keys and doubles are ConfigErrors."""
    found: dict[str, Any] = {}

    def put(dotted: str, value: Any) -> None:
        if dotted in found:
            raise ConfigError(f"{dotted} is set twice in {source}")
        found[dotted] = value

    for name, value in values.items():
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} in {source} is a section: give it a mapping, not {value!r}")
            for key, inner in value.items():
                put(_known(key, source, section=name), inner)
        else:
            put(_known(name, source), value)
    return found


def _known(name: Any, source: str, section: str | None = None) -> str:
    """`section.key` of a key as the user wrote it: alone, dotted, or inside its section."""
    written = str(name) if section is None else f"{section}.{name}"
    head, _, tail = written.rpartition(".")
    if tail in _FIELDS and head in ("", _FIELDS[tail][0]):
        return f"{_FIELDS[tail][0]}.{tail}"
    near = difflib.get_close_matches(tail, [*_FIELDS, *SECTIONS], n=3, cutoff=0.6)
    meant = " or ".join(f"{_FIELDS[key][0]}.{key}" if key in _FIELDS else key for key in near)
    raise ConfigError(f"unknown setting {written!r} in {source}" + (f"; did you mean {meant}?" if meant else ""))


def _env_key(name: str) -> str:
    section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
    if not key or section not in SECTIONS:
        near = ", ".join(difflib.get_close_matches(section, list(SECTIONS), n=2) or SECTIONS)
        raise ConfigError(f"unknown setting {name} in the environment: expected {ENV_PREFIX}SECTION__KEY, e.g. {near}")
    return _known(key, f"the environment ({name})", section=section)


def _apply(settings: Settings, leaves: Mapping[str, Any], source: str) -> Settings:
    by_section: dict[str, dict[str, Any]] = {}
    for dotted, raw in leaves.items():
        section, _, key = dotted.partition(".")
        by_section.setdefault(section, {})[key] = _parse(dotted, raw, source)
    parts = {section: replace(getattr(settings, section), **values) for section, values in by_section.items()}
    sources = MappingProxyType({**settings.sources, **dict.fromkeys(leaves, source)})
    return replace(settings, **parts, sources=sources)


def _parse(dotted: str, raw: Any, source: str) -> Any:
    rules = _FIELDS[dotted.partition(".")[2]][1].metadata
    try:
        return parse(rules, raw)
    except ValueError as error:
        given = MASK if rules.get("secret") or rules.get("secret_url") else repr(raw)
        raise ConfigError(f"{dotted} = {given} (from {source}) {error}") from None


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"config file {path} is larger than {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config file {path}: {error}") from error
    try:
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = _StrictLoader(text).get_single_data()
        else:
            raise ConfigError(f"config file {path} must end in .yaml, .yml or .toml")
    except yaml.MarkedYAMLError as error:                # its own text quotes the file, in which secrets stand
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        said = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", error.problem or "it cannot be read")
        raise ConfigError(f"config file {path} is not valid: {line}{said}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid: {error}") from None
    except (ValueError, yaml.YAMLError):                 # YAML's own dates and numbers may be ones that Python cannot hold
        raise ConfigError(f"config file {path} is not valid: it has a character or a value that cannot be read") from None
    except RecursionError:
        raise ConfigError(f"config file {path} is nested too deeply") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"config file {path} must hold a mapping, not {type(values).__name__}")
    return values


def read_keys(path: Path) -> Mapping[str, str]:
    """The mapping of an http.api_keys_file. Raises ConfigError, which names no key."""
    try:
        found: Mapping[str, str] = parse({"kind": "keys"}, dict(_read_file(path)))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"http.api_keys_file {path}: {error}") from None
    return found


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key written twice is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if doubled := [name for at, name in enumerate(names) if name in names[:at]]:
            known = doubled[0] if doubled[0] in _FIELDS or doubled[0] in SECTIONS else "a key"        # or it may be a secret
            raise yaml.MarkedYAMLError(problem=f"{known} is set twice in one mapping", problem_mark=node.start_mark)
        return dict(super().construct_mapping(node, deep))


# -- values that must agree --------------------------------------------------------------------------------------------

def _check(settings: Settings) -> Settings:
    """Settings whose values agree with each other; block counts rounded down to whole spans."""
    settings = _derived(settings)
    loans, cluster, http, redis = settings.loans, settings.cluster, settings.http, settings.tiers.redis
    if loans.renew_s * 2 > loans.term_s:
        raise ConfigError(f"loans.renew_s {loans.renew_s} must be at most half of loans.term_s {loans.term_s}, "
                          "or one lost renewal ends a loan")
    if loans.attend_hedge_s >= loans.attend_lost_s:
        raise ConfigError(f"loans.attend_hedge_s {loans.attend_hedge_s} must be below attend_lost_s "
                          f"{loans.attend_lost_s}")
    if not cluster.heartbeat_s < cluster.suspect_s < cluster.gone_s:
        raise ConfigError(f"cluster.heartbeat_s {cluster.heartbeat_s} < suspect_s {cluster.suspect_s} < gone_s "
                          f"{cluster.gone_s} must hold")
    for key, host in (("cluster.bind_host", cluster.bind_host), ("http.host", http.host)):
        if not is_loopback(host) and not cluster.allow_public:
            raise ConfigError(f"{key} {host} is not loopback: set cluster.allow_public to true if that is meant")
    if not is_loopback(cluster.bind_host) and not cluster.tls_dir and not cluster.allow_plaintext:
        raise ConfigError(f"cluster.bind_host {cluster.bind_host} is not loopback, and KV would travel in clear: make "
                          "certificates with `kvbank certs FOLDER` and set cluster.tls_dir, or set cluster.allow_plaintext "
                          "to true in a network where everybody is trusted")
    if (http.tls_cert is None) != (http.tls_key is None):
        raise ConfigError("http.tls_cert and http.tls_key must be given together")
    if http.api_keys and http.api_keys_file:
        raise ConfigError("http.api_keys and http.api_keys_file are two sources for one thing: give one of them")
    if not is_loopback(http.host):
        if not http.api_keys and not http.api_keys_file:
            raise ConfigError(f"http.host {http.host} is not loopback and http.api_keys is empty: anyone could use it")
        if not http.tls_cert and not cluster.allow_plaintext:
            raise ConfigError(f"http.host {http.host} is not loopback, and API keys and prompts would travel in clear: set "
                              "http.tls_cert and http.tls_key, or cluster.allow_plaintext to true behind a proxy that does")
    if NODE in (cluster.bind_host, http.host) and (cluster.launcher != "ray" or cluster.ray_address is None):
        raise ConfigError("'node' as cluster.bind_host or http.host is a machine's address in Ray: it needs launcher 'ray' "
                          "and cluster.ray_address (auto or host:port); without, write the address")
    if redis not in (None, "embedded") and not re.match(r"(rediss?|unix)://", str(redis)):
        raise ConfigError("tiers.redis must be 'embedded', none, or a URL beginning with redis://, rediss:// or unix://")
    if settings.tracing.exporter == "file" and settings.tracing.trace_dir is None:
        raise ConfigError("tracing.exporter is file and tracing.trace_dir is not set: say which folder")
    return replace(settings, vault=_whole_spans(settings.vault))


def _derived(settings: Settings) -> Settings:
    """Defaults that follow from another setting which the user did choose."""
    loans, cluster, chosen = settings.loans, settings.cluster, settings.sources
    sources = dict(chosen)
    if "loans.term_s" in chosen and "loans.renew_s" not in chosen and loans.renew_s * 4 > loans.term_s:
        loans = replace(loans, renew_s=loans.term_s / 4)
        sources["loans.renew_s"] = "derived from loans.term_s"
    if "cluster.heartbeat_s" in chosen and not {"cluster.suspect_s", "cluster.gone_s"} & set(chosen):
        cluster = replace(cluster, suspect_s=3 * cluster.heartbeat_s, gone_s=10 * cluster.heartbeat_s)
        sources |= dict.fromkeys(("cluster.suspect_s", "cluster.gone_s"), "derived from cluster.heartbeat_s")
    return replace(settings, loans=loans, cluster=cluster, sources=MappingProxyType(sources))


def _whole_spans(vault: VaultSettings) -> VaultSettings:
    if vault.span_tokens % vault.block_size:
        raise ConfigError(f"vault.span_tokens {vault.span_tokens} must be a multiple of block_size {vault.block_size}")
    per_span = vault.span_tokens // vault.block_size

    def whole(key: str, blocks: int) -> int:
        if blocks // per_span < MIN_SPANS:
            raise ConfigError(f"vault.{key} {blocks} is {blocks // per_span} spans of {vault.span_tokens} tokens; "
                              f"at least {MIN_SPANS} spans ({MIN_SPANS * per_span} blocks) are needed")
        return blocks // per_span * per_span

    lenders = vault.lender_blocks
    return replace(vault, device_blocks=whole("device_blocks", vault.device_blocks),
                   lender_blocks=None if lenders is None else whole("lender_blocks", lenders))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# -- the environment ---------------------------------------------------------------------------------------------------

def state_dir(settings: Settings, environ: Mapping[str, str] | None = None) -> Path:
    """The folder of things that outlive a cluster (cache secret, model digests, state files); made 0700 when absent."""
    env = os.environ if environ is None else environ
    default = Path(env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvbank"
    folder = Path(settings.cluster.state_dir) if settings.cluster.state_dir else default
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cluster.state_dir {folder} cannot be made: {error}") from error
    return folder


def child_variables(marker: str, threads: int) -> dict[str, str]:
    """What every process of a cluster has in its environment on top of its parent's."""
    made = {
        MARKER: marker,
        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",    # workers share cores: idle threads sleep
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "GRPC_VERBOSITY": "ERROR", "PYTHONUNBUFFERED": "1",
    }
    root = Path(__file__).resolve().parent.parent            # of the checkout: `cluster/` is reached through a link
    if not (root / "kvbank").is_dir():
        root = root.parent                                   # installed: `kvbank/cluster/` is a real folder
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    if root not in installed:                                # an uninstalled checkout must be found from anywhere
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        made["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, inherited)])
    return made


def child_env(marker: str, threads: int) -> dict[str, str]:
    """The whole environment of a child process. Settings of ours do not travel in it: they are resolved already."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return {**inherited, **child_variables(marker, threads)}


@contextmanager
def marked_environment(marker: str | None) -> Iterator[None]:
    """For the time that a library starts processes of its own (Ray, a private Redis): they inherit the marker.

    Also what Ray reads from the environment of whoever starts or joins it. One at a time: there is one environment.
    """
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if marker is not None:
        wanted[MARKER] = marker
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, text in before.items():
                if text is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = text


@dataclass(frozen=True, slots=True)
class RayAuth:
    """How this process would show itself to a Ray: `mode` as set, whether the token is `given` itself, else its file."""

    mode: str
    given: bool
    path: Path | None


def ray_auth(environ: Mapping[str, str] | None = None) -> RayAuth:
    """Ray's own variables, as Ray reads them. The token is not among what is returned."""
    env = os.environ if environ is None else environ
    given = bool(env.get("RAY_AUTH_TOKEN"))
    path = None if given else Path(env.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return RayAuth(env.get("RAY_AUTH_MODE", "").lower(), given, path)


def threads_per_worker(settings: Settings) -> int:
    """Torch threads of each member that computes: as configured, else its cores on a Ray that is joined, else this
    machine's cores over them all; at least 1."""
    if settings.engine.torch_threads:
        return settings.engine.torch_threads
    if settings.cluster.ray_address is not None and settings.cluster.worker_cpus:
        return max(1, int(settings.cluster.worker_cpus))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // (settings.cluster.workers * settings.cluster.shards))
