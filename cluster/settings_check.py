"""Settings that must agree with each other, and defaults that follow from what the user did choose."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from types import MappingProxyType

from kvbank.cluster.settings import NODE, Settings, VaultSettings
from kvbank.errors import ConfigError

MIN_SPANS = 3                        # one being written, one being read, one on its way
EXAMPLE_KEY = "replace-this-key"     # of deploy/kvbank.yaml


def checked(settings: Settings) -> Settings:
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
        if EXAMPLE_KEY in http.api_keys:
            raise ConfigError(f"http.api_keys still holds {EXAMPLE_KEY}, which everybody knows: put long random texts there")
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
