"""`kvbank doctor`: every planted fault is found, and what is said about it helps. Faults are real ones where they can be."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbank.cluster import cli, machine_health, settings_health
from kvbank.cluster.certs import make_certificates
from kvbank.cluster.config import load, ray_auth
from kvbank.cluster.doctor import examine
from kvbank.cluster.finding import Finding
from kvbank.cluster.machine_health import Machine
from kvbank.cluster.settings import Settings
from kvbank.kvstore.tiers.embedded_redis import find_server
from kvbank.workers.models.random_model import write_random_model

ROOT = Path(cli.__file__).resolve().parent.parent
WELL = Machine(cores=8, open_files=(65536, 65536), free_memory=64 << 30, shared_memory=8 << 30, now=time.time())


def settings(**values: Any) -> Settings:
    return load(values, environ={})


def the(findings: Iterator[Finding], what: str) -> Finding:
    """The one finding of that name. Whatever is not good says what to do."""
    found = list(findings)
    assert all((finding.state == "good") == (finding.remedy == "") for finding in found)
    (one,) = [finding for finding in found if finding.what == what]
    return one


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model", hidden_size=32, num_layers=1, heads=2, kv_heads=1)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen()
        yield made


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """redis_server({"--maxmemory": "1mb", ...}): a real one on a port of its own; its URL."""
    running: list[subprocess.Popen[str]] = []

    def start(flags: dict[str, str]) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [find_server(), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", "right", "--dir", str(tmp_path)]
        words += [word for name, text in flags.items() for word in (name, *(text.split() or [""]))]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        for line in running[-1].stdout:
            if "ready to accept" in line.lower():
                return f"redis://:right@127.0.0.1:{port}/0"
        raise AssertionError("redis-server did not start")

    yield start
    for one in running:
        one.kill()
        one.wait(10)


# -- the machine -------------------------------------------------------------------------------------------------------

def test_too_few_open_files_are_found() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = the(machine_health.limits(Machine.seen()), "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.state == "warn" and "256" in found.detail and "ulimit -n" in found.remedy


@pytest.mark.parametrize(("numbers", "what", "remedy"), [
    ({"shared_memory": 64 << 20}, "shared memory", "--shm-size"), ({"shared_memory": None}, "shared memory", "/dev/shm"),
    ({"free_memory": 1 << 30}, "free memory", "vault.device_blocks"), ({"cores": 1}, "cores", "more"),
])
def test_a_machine_that_is_too_small_is_found(numbers: dict, what: str, remedy: str) -> None:
    assert the(machine_health.limits(WELL), what).state == "good"
    found = the(machine_health.limits(replace(WELL, **numbers)), what)
    assert found.state == "warn" and remedy in found.remedy


def test_a_clock_behind_files_that_exist_already_is_found(tmp_path: Path) -> None:
    assert the(machine_health.clock(Machine.seen()), "clock").state == "good"
    witness = tmp_path / "file"
    witness.touch()
    os.utime(witness, (time.time() + 7200,) * 2)
    found = the(machine_health.clock(Machine.seen(), witness=witness), "clock")
    assert found.state == "bad" and "timedatectl" in found.remedy


def test_a_second_kvbank_on_the_path_is_found(tmp_path: Path) -> None:
    (tmp_path / "kvbank").mkdir()
    (tmp_path / "kvbank" / "__init__.py").touch()
    twice = [str(ROOT), str(tmp_path), str(ROOT)]
    assert the(machine_health.copies([str(ROOT), str(ROOT)]), "kvbank").state == "good"
    found = the(machine_health.copies(twice), "kvbank")
    assert found.state == "bad" and str(tmp_path) in found.detail and "pip uninstall" in found.remedy


def test_a_package_outside_the_range_that_kvbank_asks_for_is_found(tmp_path: Path, monkeypatch) -> None:
    for name, number, needs in (("kvbank", "0.1.0", "Requires-Dist: torch<2.14,>=2.6\n"), ("torch", "2.1.0", "")):
        info = tmp_path / f"{name}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{needs}")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = the(machine_health.packages(), "torch")
    assert found.state == "bad" and "2.1.0" in found.detail and "pip install 'torch" in found.remedy


def test_a_taken_port_of_ray_is_found(listener) -> None:
    port = listener.getsockname()[1]
    found = the(machine_health.ports(ray_port=port), f"port {port}")
    assert found.state == "warn" and "--port=6380" in found.remedy
    listener.close()
    assert the(machine_health.ports(ray_port=port), f"port {port}").state == "good"


def test_a_gpu_that_torch_cannot_use_is_found(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's torch can use a GPU")
    found = the(machine_health.gpu("cuda"), "gpu")
    assert found.state == "bad" and "engine.device=cpu" in found.remedy
    card = tmp_path / "nvidia-smi"
    card.write_text("#!/bin/sh\n")
    card.chmod(0o755)
    found = the(machine_health.gpu("cpu", path=str(tmp_path)), "gpu")
    assert found.state == "warn" and "CUDA build" in found.remedy
    assert the(machine_health.gpu("cpu", path=""), "gpu").state == "good"


# -- locks ---------------------------------------------------------------------------------------------------------------

def test_certificates_that_are_missing_old_or_open_are_found(tmp_path: Path) -> None:
    folder, now = tmp_path / "certs", time.time()
    made = settings(tls_dir=str(folder))
    assert "kvbank certs" in the(settings_health.locks(made, now), "worker certificate").remedy
    make_certificates(folder, days=60)
    assert the(settings_health.locks(made, now), "worker certificate").state == "good"
    assert the(settings_health.locks(made, now), "certificate authority").state == "warn"
    (folder / "ca.key").unlink()
    assert "certificate authority" not in [found.what for found in settings_health.locks(made, now)]
    assert the(settings_health.locks(made, now + 50 * 86_400), "gateway certificate").state == "warn"
    assert the(settings_health.locks(made, now + 61 * 86_400), "gateway certificate").state == "bad"
    (folder / "control.key").chmod(0o644)
    found = the(settings_health.locks(made, now), "control certificate")
    assert found.state == "bad" and "chmod 600" in found.remedy
    https = settings(tls_cert=str(folder / "https.pem"), tls_key=str(folder / "nothing.key"))
    assert the(settings_health.locks(https, now), "https certificate").state == "bad"
    assert the(settings_health.locks(https, now), "https names").state == "good"


@pytest.mark.parametrize(("host", "names", "state"), [
    ("127.0.0.1", (), "good"), ("127.0.0.2", (), "good"), ("0:0:0:0:0:0:0:1", (), "good"), ("192.0.2.2", (), "warn"),
    ("192.0.2.2", ("192.0.2.2",), "good"), ("192.0.2.2", ("kvbank.example.org",), "good"), ("0.0.0.0", (), "warn"),
    ("0.0.0.0", ("*.example.org",), "good"),
])
def test_a_certificate_for_other_names_is_found(tmp_path: Path, host: str, names: tuple[str, ...], state: str) -> None:
    make_certificates(tmp_path, names=names)
    made = settings(host=host, allow_public=True, api_keys={"a-long-key": "t"}, tls_cert=str(tmp_path / "https.pem"),
                    tls_key=str(tmp_path / "https.key"))
    found = the(settings_health.locks(made, time.time()), "https names")
    assert found.state == state and (state == "good" or re.search("kvbank certs .* --name", found.remedy))


def test_a_renewal_keeps_the_names_and_a_certificate_of_others_may_have_none(tmp_path: Path, monkeypatch) -> None:
    make_certificates(tmp_path, names=["kvbank.example.org"], days=10)
    files = {"tls_cert": str(tmp_path / "https.pem"), "tls_key": str(tmp_path / "https.key")}
    found = the(settings_health.locks(settings(**files), time.time()), "https certificate")
    assert found.state == "warn" and found.remedy == f"kvbank certs {tmp_path} --name kvbank.example.org"
    monkeypatch.setattr(settings_health, "names_in", lambda _pem: [])
    assert "no name at all" in the(settings_health.locks(settings(**files), time.time()), "https names").detail


def test_a_network_in_clear_and_a_bad_file_of_keys_are_found(tmp_path: Path) -> None:
    public = settings(bind_host="192.0.2.1", allow_public=True, allow_plaintext=True)
    assert "cluster.tls_dir" in the(settings_health.locks(public, time.time()), "certificates").remedy
    keys = tmp_path / "keys.yaml"
    made = settings(api_keys_file=str(keys))
    assert the(settings_health.locks(made, time.time()), "api keys file").state == "bad"
    keys.write_text("k: t:ops\n")
    keys.chmod(0o644)
    assert "chmod 600" in the(settings_health.locks(made, time.time()), "api keys file").remedy
    keys.chmod(0o600)
    assert the(settings_health.locks(made, time.time()), "api keys file").state == "good"


# -- doors and secrets -------------------------------------------------------------------------------------------------

def test_a_taken_http_port_is_found(listener) -> None:
    port = listener.getsockname()[1]
    found = the(settings_health.doors(settings(port=port)), "http.port")
    assert found.state == "bad" and "another http.port" in found.remedy
    listener.close()
    assert the(settings_health.doors(settings(port=port)), "http.port").state == "good"


def test_an_address_that_is_not_this_machines_is_found() -> None:
    made = settings(bind_host="192.0.2.1", allow_public=True, allow_plaintext=True)
    found = the(settings_health.doors(made), "cluster.bind_host")
    assert found.state == "bad" and "hostname -I" in found.remedy


def test_a_ray_that_is_not_there_is_found(listener) -> None:
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert the(settings_health.doors(settings(ray_address=address)), "ray").state == "good"
    listener.close()
    found = the(settings_health.doors(settings(ray_address=address)), "ray")
    assert found.state == "bad" and "ray start --head" in found.remedy


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private state folder, and an environment without anything of Ray's."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return folder


@pytest.mark.parametrize(("redis", "told"), [("embedded", False), ("redis://127.0.0.1:1/0", False),
                                             ("redis://:secret@127.0.0.1:1/0", True)])
def test_a_file_without_a_secret_may_be_read_by_others(state: Path, tmp_path: Path, redis: str, told: bool) -> None:
    config = tmp_path / "kvbank.yaml"
    config.write_text(f"tiers: {{redis: '{redis}'}}\n")
    found = [f for f in settings_health.secrets(load(config, environ={}), state, config) if f.what == "config file"]
    assert bool(found) is told


def test_files_that_others_may_read_are_found(state: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    config = tmp_path / "kvbank.yaml"
    config.write_text("http: {api_keys: {word: tenant}}\n")
    for path in (config, tmp_path / "token", state / "cache_secret"):
        path.write_text(path.read_text() if path.exists() else "ab" * 32)
        path.chmod(0o600)
    mine = load(config, environ={})
    for name, path in (("config file", config), ("ray token", tmp_path / "token"), ("cache secret", state / "cache_secret")):
        assert the(settings_health.secrets(mine, state, config), name).state == "good"
        path.chmod(0o644)
        found = the(settings_health.secrets(mine, state, config), name)
        assert found.state == "bad" and "0644" in found.detail and found.remedy == f"chmod 600 {path}"
    state.chmod(0o755)
    assert "chmod 700" in the(settings_health.secrets(mine, state, config), "state folder").remedy


def test_a_ray_token_that_is_missing_or_empty_or_not_asked_for_is_found(state: Path, tmp_path: Path, monkeypatch) -> None:
    joined = settings(ray_address="auto")
    found = the(settings_health.secrets(joined, state), "ray auth")
    assert found.state == "warn" and "RAY_AUTH_MODE=token" in found.remedy
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = the(settings_health.secrets(joined, state), "ray token")
    assert found.state == "bad" and "--generate" in found.remedy
    (tmp_path / "token").touch(mode=0o600)
    assert the(settings_health.secrets(joined, state), "ray token").detail.endswith("is empty")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted-word")
    assert "planted-word" not in repr(ray_auth()) + repr(list(settings_health.secrets(joined, state)))
    assert not [f for f in settings_health.secrets(joined, state) if f.what.startswith("ray")]


# -- Redis -------------------------------------------------------------------------------------------------------------

GOOD_REDIS = {"--maxmemory": "2gb", "--maxmemory-policy": "allkeys-lru", "--save": "", "--appendonly": "no"}


@pytest.mark.parametrize(("flags", "what", "state", "remedy"), [
    ({"--maxmemory-policy": "noeviction"}, "redis policy", "bad", "maxmemory-policy allkeys-lru"),
    ({"--save": "60 1"}, "redis persistence", "warn", "CONFIG SET save ''"),
    ({"--appendonly": "yes"}, "redis persistence", "warn", "appendonly no"),
    ({"--maxmemory": "64mb"}, "redis maxmemory", "warn", "tiers.redis_bytes"),
    ({"--maxmemory": "0"}, "redis maxmemory", "warn", "CONFIG SET maxmemory"),
])
def test_a_redis_with_a_bad_setting_is_found(redis_server, flags, what, state, remedy) -> None:
    found = the(settings_health.redis(settings(redis=redis_server({**GOOD_REDIS, **flags}))), what)
    assert found.state == state and remedy in found.remedy


def test_a_good_redis_is_good_and_a_wrong_password_or_none_at_all_is_found(redis_server, listener) -> None:
    url = redis_server(GOOD_REDIS)
    assert {f.state for f in settings_health.redis(settings(redis=url))} <= {"good", "warn"}
    assert [f.what for f in settings_health.redis(settings(redis=url)) if f.state == "warn"] in ([], ["redis version"])
    found = the(settings_health.redis(settings(redis=url.replace("right", "wrong"))), "redis")
    assert found.state == "bad" and "password" in found.remedy and "wrong" not in found.detail
    closed = listener.getsockname()[1]
    listener.close()
    found = the(settings_health.redis(settings(redis=f"redis://127.0.0.1:{closed}/0")), "redis")
    assert found.state == "bad" and "start it" in found.remedy


def test_a_redis_that_says_nothing_is_found_in_time(listener) -> None:
    found = the(settings_health.redis(settings(redis=f"redis://127.0.0.1:{listener.getsockname()[1]}/0")), "redis")
    assert found.state == "bad" and "cannot be reached" in found.detail


# -- model and memory --------------------------------------------------------------------------------------------------

def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


@pytest.mark.parametrize(("name", "harm", "what", "remedy"), [
    ("config.json", Path.unlink, "model config", "config.json"), ("config.json", spoil, "model config", "Llama family"),
    ("tokenizer.json", Path.unlink, "model tokenizer", "AutoTokenizer"), ("tokenizer.json", spoil, "model tokenizer", "save"),
    ("model.safetensors", Path.unlink, "model weights", "download"),
    ("model.safetensors", spoil, "model weights", "cut short"),
])
def test_a_model_folder_with_a_broken_part_is_found(model: Path, name: str, harm, what: str, remedy: str) -> None:
    mine = settings(model=str(model))
    assert {finding.state for finding in settings_health.model(mine)} == {"good"}
    harm(model / name)
    found = the(settings_health.model(mine), what)
    assert found.state == "bad" and remedy in found.remedy


def test_settings_that_ask_for_more_memory_than_there_is_are_found(model: Path) -> None:
    assert the(settings_health.memory(settings(model=str(model), redis=None), WELL), "memory").state == "good"
    found = the(settings_health.memory(settings(model=str(model), host_bytes="40GiB"), Machine.seen()), "memory")
    assert found.state == "bad" and "tiers.host_bytes" in found.remedy
    assert found.detail.startswith("81.")                        # two workers of 40, a Redis of 1, little else


# -- the whole visit ---------------------------------------------------------------------------------------------------

def test_a_check_that_breaks_is_a_finding_and_the_visit_goes_on(tmp_path: Path) -> None:
    findings = list(examine(settings(redis=None), tmp_path / "absent", machine=WELL))
    broken = [finding for finding in findings if "itself failed" in finding.detail]
    assert [finding.what for finding in broken] == ["secrets"] and findings[-1].what in ("memory", "model")


def test_the_command_tells_faults_with_their_remedies_as_text_and_as_json(
    model: Path, listener: socket.socket, capsys, monkeypatch, tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "300")
    (model / "tokenizer.json").unlink()
    flags = ("--model", str(model), "--redis", "none", "--port", str(listener.getsockname()[1]))
    assert cli.main(["doctor", *flags]) == 1
    assert "-> choose another http.port" in capsys.readouterr().out
    assert cli.main(["doctor", *flags, "--json"]) == 1
    body = json.loads(capsys.readouterr().out)
    bad = {finding["what"]: finding["remedy"] for finding in body["findings"] if finding["state"] == "bad"}
    assert body["ok"] is False and {"http.port", "model tokenizer"} <= set(bad) and "AutoTokenizer" in bad["model tokenizer"]
