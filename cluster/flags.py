"""Flags that several verbs of the command take, and the settings that they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvbank.cluster.config import load, state_dir
from kvbank.cluster.settings import Settings
from kvbank.errors import ConfigError

CLUSTER_FLAGS: dict[str, tuple[type, str]] = {      # settings that have a flag of their own; --set reaches all others
    "model": (str, "model folder in Hugging Face format"),
    "workers": (int, "replicas of the model"),
    "shards": (int, "layer ranges that make up a replica"),
    "lenders": (int, "members that only lend memory"),
    "device_blocks": (int, "KV blocks of each worker"),
    "block_size": (int, "tokens per block"),
    "host_bytes": (str, "host memory for spilled blocks, e.g. 256MiB; 0: none"),
    "redis": (str, "embedded, a URL, or none"),
    "dtype": (str, "float32, bfloat16 or float16"),
    "launcher": (str, "ray or process"),
    "ray_address": (str, "join this Ray (auto, or host:port) instead of starting one; --address says the same"),
    "host": (str, "address the API listens on"),
    "port": (int, "port the API listens on; 0: any"),
}


DEFAULT = "default"                  # the name of a cluster that was given none


def add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=DEFAULT, help="which cluster, when several are up")


def add_target(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("--address", help="a gateway's address, instead of a cluster of this machine")
    parser.add_argument("--ca", help="PEM file with the authority of an https gateway")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the API key; with --name the cluster's own is known")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("--config", type=Path, help="YAML or TOML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any other setting")
    for name, (kind, about) in CLUSTER_FLAGS.items():
        also = ["--address"] if name == "ray_address" else []
        parser.add_argument(f"--{name.replace('_', '-')}", *also, dest=name, type=kind, help=about)


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """What flags say, by setting; `--set` values are texts, which the settings know how to read."""
    given = {name: getattr(args, name) for name in CLUSTER_FLAGS if getattr(args, name) is not None}
    given["name"] = args.name
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: write SECTION.KEY=VALUE")
        given[key.strip()] = value
    return given


def settings_of(args: argparse.Namespace) -> Settings:
    return load(args.config, overrides=overrides_of(args), override_source="flag")


def state_folder() -> Path:
    return state_dir(load())
