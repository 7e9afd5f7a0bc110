"""Settings health: what `kvbank doctor` asks of the settings of one cluster, on this machine: can they be had?

    doors      http.port and cluster.bind_host can be bound, cluster.ray_address answers
    secrets    files that hold one are private; Ray asks for a token; certificates are there, private, and valid for a while
    Redis      answers, lets us in, makes room when full, keeps nothing on disk, has the size we were told
    model      config, tokenizer and weights can be read          memory     all that is asked for fits in what is free
"""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvbank.cluster.certs import LOOPBACK, expires, names_in
from kvbank.cluster.config import ray_auth, read_keys
from kvbank.cluster.finding import Finding, bad, good, warn
from kvbank.cluster.machine_health import Machine, listens
from kvbank.cluster.plan import planned
from kvbank.cluster.screen import size
from kvbank.cluster.settings import NODE, Settings
from kvbank.cluster.settings_check import is_loopback
from kvbank.errors import ConfigError, KVBankError, ModelError
from kvbank.kvstore.tiers import redis_address
from kvbank.kvstore.transport.badge import ROLES

REDIS_S = 2.0                        # for a Redis to connect and to answer
SECRET = ("http.api_keys", "tiers.cache_secret", "tiers.redis")
RENEW_DAYS = 14                      # a certificate that ends sooner should be renewed now
OLD_REDIS = (6, 2)                   # older ones get no more repairs


# -- doors -------------------------------------------------------------------------------------------------------------

def doors(settings: Settings) -> Iterator[Finding]:
    """Addresses that are to be bound or reached."""
    cluster, http = settings.cluster, settings.http
    if http.port and http.host != NODE:
        yield _bindable("http.port", http.host, http.port, "choose another http.port, 0 for any, or end that program "
                        "(`ss -ltnp` names it)")
    if cluster.bind_host != NODE:
        yield _bindable("cluster.bind_host", cluster.bind_host, 0, "set cluster.bind_host to an address of this machine "
                        "(`hostname -I`), or to node on a Ray of several")
    if cluster.ray_address not in (None, "auto"):
        host, _, port = str(cluster.ray_address).rpartition(":")
        there = port.isdigit() and _answers(host, int(port))
        yield good("ray", f"something listens at {cluster.ray_address}") if there else bad(
            "ray", f"nobody listens at cluster.ray_address {cluster.ray_address}",
            "start Ray there (`ray start --head --port=6380`), or correct the address")


def _answers(host: str, port: int) -> bool:
    try:
        return listens(host.strip("[]"), port)
    except OSError:
        return False


def _bindable(what: str, host: str, port: int, remedy: str) -> Finding:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
            made.listen()
    except OSError as error:
        return bad(what, f"{host}:{port} cannot be had: {error.strerror or error}", remedy)
    return good(what, f"{host}:{port or 'any port'} can be bound")


# -- secrets -----------------------------------------------------------------------------------------------------------

def secrets(settings: Settings, state_folder: Path, config: Path | None = None) -> Iterator[Finding]:
    """Files that hold a secret, and Ray's token when a Ray is joined."""
    mode = stat.S_IMODE(state_folder.stat().st_mode)
    yield good("state folder", f"mode {mode:04o}") if not mode & 0o077 else warn(
        "state folder", f"mode {mode:04o}: others can look in", f"chmod 700 {state_folder}")
    if (own := state_folder / "cache_secret").exists():
        yield _private("cache secret", own)
    secret = [key for key in SECRET if key != "tiers.redis" or "@" in str(settings.tiers.redis)]
    if config is not None and f"file {config}" in {settings.sources.get(key) for key in secret}:
        yield _private("config file", config)
    auth, joins = ray_auth(), settings.cluster.ray_address is not None
    if auth.path is not None and auth.path.exists():
        found = _private("ray token", auth.path) if auth.path.read_text().strip() else bad(
            "ray token", f"{auth.path} is empty", f"rm {auth.path} && ray get-auth-token --generate")
        used = joins or auth.mode == "token"                     # Ray itself writes one that others can read, for its tests
        yield found if used or found.state == "good" else warn(found.what, found.detail, found.remedy)
    elif auth.mode == "token" and not auth.given:
        yield bad("ray token", "RAY_AUTH_MODE is token, but there is no token",
                  "ray get-auth-token --generate, and copy ~/.ray/auth_token to every machine")
    if joins and auth.mode != "token":
        yield warn("ray auth", "a Ray is joined without RAY_AUTH_MODE=token: whoever reaches its ports can run code there",
                   "ray get-auth-token --generate; then RAY_AUTH_MODE=token for `ray start` and for kvbank")


def locks(settings: Settings, now: float) -> Iterator[Finding]:
    """Certificates and the file of API keys, where the settings name them."""
    cluster, http = settings.cluster, settings.http
    if cluster.tls_dir is not None:
        folder = Path(cluster.tls_dir)
        for role in ROLES:
            yield _certificate(f"{role} certificate", folder / f"{role}.pem", folder / f"{role}.key", now)
        if (folder / "ca.key").exists():
            yield warn("certificate authority", f"{folder / 'ca.key'} is here: who reads it can join any cluster of it",
                       "keep ca.key on the machine where certificates are made, and copy the other files")
    elif not is_loopback(cluster.bind_host):
        yield warn("certificates", "what members of several machines say to each other is not encrypted",
                   "kvbank certs FOLDER --name ADDRESS, copy it to every machine, and set cluster.tls_dir")
    if http.tls_cert is not None and http.tls_key is not None:
        yield _certificate("https certificate", Path(http.tls_cert), Path(http.tls_key), now)
        yield from _https_names(http.host, Path(http.tls_cert))
    if http.api_keys_file is not None:
        try:
            read_keys(Path(http.api_keys_file))
        except ConfigError as error:
            yield bad("api keys file", str(error), "write lines of `key: tenant` or `key: tenant:ops` into it")
        else:
            yield _private("api keys file", Path(http.api_keys_file))


def _https_names(host: str, pem: Path) -> Iterator[Finding]:
    """Whether callers can come by a name that the certificate has. Nothing to say of one that cannot be read: that is told."""
    try:
        names = names_in(pem)
    except ConfigError:
        return
    near, far = set(names) & set(LOOPBACK), set(names) - set(LOOPBACK)
    if near if is_loopback(host) else far:
        yield good("https names", ", ".join(names))
    else:
        yield warn("https names", f"the certificate is for {', '.join(names) or 'no name at all'}; who calls http.host {host} "
                   "cannot check it", f"{_again(pem.parent)} --name ADDRESS")


def _again(folder: Path) -> str:
    """The command that renews what is there, https by the same names."""
    names: list[str] = []
    with suppress(ConfigError):
        names = [name for name in names_in(folder / "https.pem") if name not in LOOPBACK]
    return " ".join([f"kvbank certs {folder}", *(f"--name {name}" for name in names)])


def _certificate(what: str, pem: Path, key: Path, now: float) -> Finding:
    renew = _again(pem.parent)
    try:
        left = (expires(pem).timestamp() - now) / 86_400
        private = _private(what, key)
    except (ConfigError, OSError):
        return bad(what, f"{pem} or its key cannot be read", renew)
    if left < 0:
        return bad(what, f"it ended {-left:.0f} days ago", renew)
    if private.state != "good":
        return private
    return good(what, f"valid for {left:.0f} days") if left >= RENEW_DAYS else warn(what, f"it ends in {left:.0f} days", renew)


def _private(what: str, path: Path) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    return good(what, f"mode {mode:04o}") if not mode & 0o077 else bad(
        what, f"{path} may be read by others (mode {mode:04o})", f"chmod 600 {path}")


# -- Redis -------------------------------------------------------------------------------------------------------------

def redis(settings: Settings) -> Iterator[Finding]:
    """The Redis of `tiers.redis`, when it is one of somebody's own."""
    from redis import Redis
    from redis.exceptions import AuthenticationError, RedisError, ResponseError

    url = settings.tiers.redis
    if url in (None, "embedded"):
        yield from _embedded() if url else (good("redis", "none asked for"),)
        return
    address = redis_address.parse(str(url))
    client: Any = Redis.from_url(str(url), socket_timeout=REDIS_S, socket_connect_timeout=REDIS_S)
    with client:
        try:
            client.ping()
        except (AuthenticationError, ResponseError) as error:
            yield bad("redis", f"{address.shown} refuses us ({str(error).split(' ')[0]})",
                      "put the right user and password into tiers.redis: redis://user:password@host:port/0")
            return
        except RedisError:
            yield bad("redis", f"{address.shown} cannot be reached within {REDIS_S:.0f} s",
                      "start it, correct tiers.redis, or set it to embedded or none")
            return
        yield good("redis", f"{address.shown} answers")
        if address.host and not address.password and not is_loopback(address.host):
            yield warn("redis auth", "it asks for no password", "set requirepass, and the password in tiers.redis")
        try:
            told = client.info()
            config = client.config_get("maxmemory*") | client.config_get("save") | client.config_get("appendonly")
        except RedisError:
            yield warn("redis settings", "they cannot be read with this user",
                       "check maxmemory, maxmemory-policy allkeys-lru and save '' on the server")
            return
    yield from _server(settings, told, config)


def _server(settings: Settings, told: dict[str, Any], config: dict[str, str]) -> Iterator[Finding]:
    number = str(told.get("redis_version", "0.0"))
    old = tuple(int(part) for part in number.split(".")[:2]) < OLD_REDIS
    yield warn("redis version", f"{number} gets no more repairs", "install Redis 7 or newer, or Valkey") if old else good(
        "redis version", number)
    policy, most = config.get("maxmemory-policy", ""), int(config.get("maxmemory", 0))
    yield bad("redis policy", "noeviction: a full Redis refuses every write",
              "redis-cli CONFIG SET maxmemory-policy allkeys-lru, and in redis.conf") if policy == "noeviction" else good(
        "redis policy", policy)
    ours = settings.tiers.redis_bytes
    if not most:
        yield warn("redis maxmemory", "no limit: it may take all of its machine",
                   f"redis-cli CONFIG SET maxmemory {ours * 5 // 4}, above tiers.redis_bytes {ours}")
    elif most < ours:
        yield warn("redis maxmemory", f"{size(most)} is less than tiers.redis_bytes {size(ours)}",
                   "raise maxmemory, or lower tiers.redis_bytes below it")
    else:
        yield good("redis maxmemory", size(most))
    kept = (["save"] if config.get("save") else []) + (["appendonly"] if config.get("appendonly") == "yes" else [])
    yield warn("redis persistence", f"{' and '.join(kept)} on: it forks and writes what may be lost anyway",
               "redis-cli CONFIG SET save '' and CONFIG SET appendonly no") if kept else good("redis persistence", "off")


def _embedded() -> Iterator[Finding]:
    from kvbank.kvstore.tiers.embedded_redis import find_server

    try:
        yield good("redis-server", find_server())
    except ConfigError as error:
        yield warn("redis-server", "none was found", str(error).partition(": ")[2] or str(error))


# -- model and memory --------------------------------------------------------------------------------------------------

def model(settings: Settings) -> Iterator[Finding]:
    """The folder's three parts, each read as the members read it; weights by their headers."""
    from safetensors import SafetensorError, safe_open

    from kvbank.workers.models.config_reader import read_config
    from kvbank.workers.models.tokenizer import load_tokenizer
    from kvbank.workers.weights import weight_files

    if settings.engine.model is None:
        yield good("model", "none named: give --model FOLDER to have it examined")
        return
    folder = Path(settings.engine.model)
    try:
        config = read_config(folder)
        yield good("model config", f"{config.num_layers} layers, {config.max_position} tokens at most")
    except ModelError as error:
        yield bad("model config", str(error), "give the path of a Hugging Face folder of the Llama family with its "
                  "config.json")
    try:
        yield good("model tokenizer", f"{load_tokenizer(folder).get_vocab_size()} tokens")
    except ModelError as error:
        yield bad("model tokenizer", str(error),
                  "save it again: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)")
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="np") as opened:
                opened.keys()
        yield good("model weights", f"{len(weight_files(folder))} files, headers agree with their sizes")
    except (KVBankError, SafetensorError, OSError) as error:
        yield bad("model weights", str(error), "a file is missing or cut short: download the folder again")


def memory(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """What the members of this machine will take, beside what is free. On a Ray of several: one member of each kind."""
    if settings.engine.model is None:
        return
    try:
        plan = planned(settings)
    except (ModelError, ConfigError):                            # told above
        return
    cluster, vault, tiers = settings.cluster, settings.vault, settings.tiers
    spread = cluster.ray_address is not None
    workers, lenders = (1, min(1, cluster.lenders)) if spread else (cluster.workers, cluster.lenders)
    lent = plan.block_bytes * (vault.lender_blocks or vault.device_blocks)
    on_gpu = settings.engine.device != "cpu"
    needs = workers * (0 if on_gpu else plan.weights_bytes + plan.device_bytes) + lenders * lent
    needs += (workers * cluster.shards + lenders) * tiers.host_bytes
    needs += tiers.redis_bytes if tiers.redis == "embedded" else 0
    said = f"{size(needs)} for {workers} workers and {lenders} lenders, {size(machine.free_memory)} free"
    yield good("memory", said) if needs <= machine.free_memory else bad(
        "memory", said, "lower vault.device_blocks, vault.lender_blocks, tiers.host_bytes or tiers.redis_bytes, or start "
        "fewer members")
