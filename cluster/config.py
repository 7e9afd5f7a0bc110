"""Config: the settings of a whole cluster from defaults, a file, the environment and flags.

Later sources win: default < config file or mapping < `KVBANK__SECTION__KEY` < keyword or flag. Every value remembers
where it came from. An unknown key, a value out of range or two values that disagree are a ConfigError that names the
key and, for a typo, what was probably meant. This is the only file of kvbank that reads the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from kvbank.cluster.settings import FIELDS, SECTIONS, Settings
from kvbank.cluster.settings_check import checked
from kvbank.cluster.values import MASK, parse
from kvbank.errors import ConfigError

ENV_PREFIX = "KVBANK__"
_ENVIRONMENT = threading.Lock()      # of the process: changed by one at a time
MARKER = "KVBANK_CLUSTER"            # in the environment of every process a cluster starts; the guardian looks for it
MAX_FILE_BYTES = 1 << 20


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
    return checked(settings)


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
    if tail in FIELDS and head in ("", FIELDS[tail][0]):
        return f"{FIELDS[tail][0]}.{tail}"
    near = difflib.get_close_matches(tail, [*FIELDS, *SECTIONS], n=3, cutoff=0.6)
    meant = " or ".join(f"{FIELDS[key][0]}.{key}" if key in FIELDS else key for key in near)
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
    rules = FIELDS[dotted.partition(".")[2]][1].metadata
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
            known = doubled[0] if doubled[0] in FIELDS or doubled[0] in SECTIONS else "a key"        # or it may be a secret
            raise yaml.MarkedYAMLError(problem=f"{known} is set twice in one mapping", problem_mark=node.start_mark)
        return dict(super().construct_mapping(node, deep))


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
