"""What must be so before a cluster is started: a model that can be loaded, a free port, certificates, a Redis, a Ray to join.

Raises ConfigError or ModelError that says what to do; starts nothing and keeps nothing open.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbank.cluster.certs import check_certificates
from kvbank.cluster.settings import NODE, Settings
from kvbank.cluster.settings_check import is_loopback
from kvbank.errors import ConfigError, ModelError
from kvbank.kvstore.tiers.redis_tier import probe
from kvbank.workers.models.config_reader import read_config

REACH_S = 2.0                        # for a Ray that we are to join to accept a connection


class Model:
    """The model folder, read and found good."""

    def __init__(self, folder: str, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = identity


def check_model(settings: Settings) -> Model:
    """Raises ConfigError or ModelError when no worker could load it."""
    folder = settings.engine.model
    if folder is None:
        raise ConfigError("engine.model is not set: give the path of a model folder in Hugging Face format")
    config = read_config(folder)
    if settings.cluster.shards > config.num_layers:
        raise ConfigError(f"cluster.shards {settings.cluster.shards} is more than the model's {config.num_layers} "
                          "layers")
    if not any(Path(folder).glob("*.safetensors")):
        raise ModelError(f"{folder} holds no *.safetensors file: there are no weights to load")
    return Model(folder, config.identity())


def check_world(settings: Settings) -> None:
    """Raises ConfigError when a port, a file or a server that the settings name is not as they need it."""
    cluster, tiers, http = settings.cluster, settings.tiers, settings.http
    if http.port and http.host != NODE:
        _check_port(http.host, http.port)
    if tiers.redis == "embedded" and not is_loopback(cluster.bind_host):
        raise ConfigError("tiers.redis embedded is a Redis for this machine alone: for members on several machines give "
                          "the URL of one that all reach (redis://:password@host:port/0), or none")
    if cluster.tls_dir:
        check_certificates(Path(cluster.tls_dir))
    if tiers.redis not in (None, "embedded"):
        probe(str(tiers.redis))
    if cluster.launcher == "ray" and cluster.ray_address not in (None, "auto"):
        _check_ray(str(cluster.ray_address))


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError as error:
            raise ConfigError(f"http.port {port} on {host} cannot be had ({error.strerror}): is another program "
                              "listening there? Choose another port, or 0 for any") from error


def _check_ray(address: str) -> None:
    """Ray itself would try for three minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"cluster.ray_address {address}: no Ray to join there ({error}); give host:port of its head, "
                          "or auto") from error
