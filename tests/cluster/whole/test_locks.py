"""A whole cluster behind every lock: certificates between members, https, keys from a file, roles."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

import httpx
import pytest

from kvbank import errors
from kvbank.cluster.certs import make_certificates
from kvbank.cluster.client import Client


@pytest.fixture()
def locked(tmp_path: Path) -> dict[str, object]:
    """Settings of a cluster with all locks; certificates are in tmp_path/certs, keys in tmp_path/keys.yaml."""
    certs, keys = tmp_path / "certs", tmp_path / "keys.yaml"
    make_certificates(certs)
    keys.write_text("key-user: tenant-a\nkey-ops: tenant-a:ops\n")
    return {"tls_dir": str(certs), "api_keys_file": str(keys), "tls_cert": str(certs / "https.pem"),
            "tls_key": str(certs / "https.key")}


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_locked_cluster_borrows_and_answers_as_an_open_one(cluster, locked, big, text, tmp_path, until, shards) -> None:
    one = cluster(workers=1, lenders=2 * shards, shards=shards, **locked)
    assert one.address.startswith("https://")
    ca = str(tmp_path / "certs" / "ca.pem")
    prompt = text(1500)
    expected = big.generate(prompt, max_tokens=16, ignore_eos=True).token_ids
    with Client(one.address, api_key="key-user", ca=ca) as client:
        result = client.generate(prompt, max_tokens=16, ignore_eos=True)
        assert result.token_ids == expected and result.receipt.borrowed_blocks_peak > 0
        assert client.status().workers
    with pytest.raises(errors.Unavailable, match="--ca"), Client(one.address, api_key="key-user") as client:
        client.status()
    with pytest.raises(errors.Unauthorized), Client(one.address, api_key="wrong", ca=ca) as client:
        client.status()

    with httpx.Client(base_url=one.address, verify=ssl.create_default_context(cafile=ca)) as http:
        def metrics(key: str) -> int:
            return http.get("/metrics", headers={"Authorization": f"Bearer {key}"}).status_code

        assert (metrics("key-user"), metrics("key-ops"), metrics("key-new")) == (403, 200, 401)
        replaced = tmp_path / "keys.new"
        replaced.write_text("key-new: tenant-b:ops\n")
        os.replace(replaced, tmp_path / "keys.yaml")
        until(lambda: (metrics("key-ops"), metrics("key-new")) == (401, 200))

        before = _shown(one.address)
        make_certificates(tmp_path / "certs")
        until(lambda: _shown(one.address) != before)
        assert metrics("key-new") == 200
    with Client(one.address, api_key="key-new", ca=ca) as client:
        again = client.generate(prompt, max_tokens=16, ignore_eos=True)
        assert again.token_ids == expected and not sum(again.receipt.reused.values()), "another tenant's cache was used"


def _shown(address: str) -> bytes | None:
    """The certificate that the gateway shows now."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = address.removeprefix("https://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as line:
        return line.getpeercert(binary_form=True)


def test_certificates_that_are_missing_end_the_start_with_the_remedy(cluster, tmp_path) -> None:
    with pytest.raises(errors.ConfigError, match="kvbank certs"):
        cluster(workers=1, lenders=0, tls_dir=str(tmp_path / "nothing"))
    with pytest.raises(errors.ConfigError, match="api_keys_file"):
        cluster(workers=1, lenders=0, api_keys_file=str(tmp_path / "nothing.yaml"))
    with pytest.raises(errors.ConfigError, match="tls_key"):
        cluster(workers=1, lenders=0, tls_cert=str(tmp_path / "a.pem"))
