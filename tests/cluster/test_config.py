"""Settings: where each value comes from, what is refused and in which words, and that secrets are not shown."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest

from kvbank.cluster import config
from kvbank.cluster.settings import SECTIONS
from kvbank.cluster.values import size
from kvbank.errors import ConfigError
from kvbank.workers.config import WorkerConfig


def test_later_sources_win_and_every_value_knows_its_source(tmp_path: Path) -> None:
    path = tmp_path / "kvbank.toml"
    path.write_text('[loans]\nterm_s = 12\n[vault]\ndevice_blocks = 64\n[http]\nport = 8001\n')
    settings = config.load(path, environ={"KVBANK__VAULT__DEVICE_BLOCKS": "128", "KVBANK__HTTP__PORT": "8002"},
                           overrides={"port": 8003})
    assert (settings.loans.term_s, settings.vault.device_blocks, settings.http.port) == (12.0, 128, 8003)
    sources = {key: source for key, _, source in settings.rows()}
    assert sources["loans.term_s"] == f"file {path}"
    assert sources["vault.device_blocks"] == "env KVBANK__VAULT__DEVICE_BLOCKS"
    assert sources["http.port"] == "argument"
    assert sources["engine.exactness"] == "default"


@pytest.mark.parametrize("written", [
    {"term_s": 3, "exactness": "bitwise"},
    {"loans": {"term_s": 3}, "engine": {"exactness": "bitwise"}},
    {"loans.term_s": 3, "engine.exactness": "bitwise"},
])
def test_a_key_may_be_written_alone_in_its_section_or_dotted(written: dict) -> None:
    settings = config.load(written, environ={})
    assert (settings.loans.term_s, settings.engine.exactness) == (3.0, "bitwise")


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("tiers: {host_bytes: 1.5GiB, redis: null}\nhttp:\n  api_keys: {secret-1: alice}\n")
    toml = 'tiers = {host_bytes = "1.5GiB", redis = "none"}\n[http.api_keys]\nsecret-1 = "alice"\n'
    (tmp_path / "b.toml").write_text(toml)
    made = [config.load(tmp_path / name, environ={}) for name in ("a.yaml", "b.toml")]
    assert made[0].flat() == made[1].flat()
    assert made[0].tiers.host_bytes == 1_610_612_736 and made[0].tiers.redis is None
    assert made[0].http.api_keys == {"secret-1": "alice"}


def test_setting_names_are_unique_over_the_sections_and_survive_the_journey_to_a_member() -> None:
    names = [spec.name for section in SECTIONS.values() for spec in fields(section)]
    assert len(names) == len(set(names)) and not set(names) & set(SECTIONS)
    settings = config.load({"device_blocks": 99, "api_keys": {"k": "t"}, "redis": None}, environ={})
    assert config.load(settings.flat(), environ={}).flat() == settings.flat()


def test_the_environment_of_a_member_cannot_change_what_its_launcher_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBANK__HTTP__PORT", "9999")
    assert not [name for name in config.child_env("mark", 1) if name.startswith("KVBANK__")]


@pytest.mark.parametrize(("values", "words"), [
    ({"device_block": 64}, ["unknown setting 'device_block'", "did you mean vault.device_blocks"]),
    ({"vault": {"term_s": 1}}, ["unknown setting 'vault.term_s'", "loans.term_s"]),
    ({"loan": {"term_s": 1}}, ["unknown setting 'loan'", "did you mean loans"]),
    ({"vault": 7}, ["vault", "section"]),
    ({"term_s": 1, "loans": {"term_s": 2}}, ["loans.term_s is set twice"]),
    ({"device_blocks": 23}, ["vault.device_blocks 23 is 2 spans", "at least 3 spans (24 blocks)"]),
    ({"lender_blocks": 8}, ["vault.lender_blocks 8 is 1 spans"]),
    ({"device_blocks": 0}, ["vault.device_blocks = 0", "out of range"]),
    ({"device_blocks": -5}, ["out of range"]),
    ({"device_blocks": 2.5}, ["whole number"]),
    ({"device_blocks": True}, ["whole number"]),
    ({"device_blocks": None}, ["may not be empty"]),
    ({"device_blocks": "many"}, ["'many'", "whole number"]),
    ({"tls_dir": "~nobody-by-that-name/x"}, ["tls_dir", "home"]),
    ({"span_tokens": 100}, ["vault.span_tokens 100 must be a multiple of block_size 16"]),
    ({"host_bytes": "256 MegaBytes"}, ["not a size", "256MiB"]),
    ({"host_bytes": -1}, ["negative"]),
    ({"host_bytes": "1e9"}, ["not a size"]),
    ({"term_s": math.nan}, ["finite"]),
    ({"term_s": "inf"}, ["finite"]),
    ({"term_s": 10, "renew_s": 6}, ["loans.renew_s 6.0 must be at most half of loans.term_s 10.0"]),
    ({"attend_hedge_s": 2}, ["attend_hedge_s 2.0 must be below"]),
    ({"gone_s": 1}, ["gone_s 1.0 must hold"]),
    ({"dtype": "int4"}, ["engine.dtype = 'int4'", "float32, bfloat16, float16"]),
    ({"exactness": "exact"}, ["fast, bitwise"]),
    ({"launcher": "slurm"}, ["ray, process"]),
    ({"device": "tpu"}, ["does not have the form"]),
    ({"workers": 0}, ["cluster.workers = 0", "out of range"]),
    ({"port": 70000}, ["http.port = 70000", "out of range: 0 to 65535"]),
    ({"host": "0.0.0.0"}, ["http.host 0.0.0.0 is not loopback", "allow_public"]),
    ({"host": "0.0.0.0", "allow_public": True}, ["api_keys is empty"]),
    ({"bind_host": "10.0.0.1"}, ["cluster.bind_host 10.0.0.1 is not loopback"]),
    ({"bind_host": "10.0.0.1", "allow_public": True}, ["KV would travel in clear", "kvbank certs", "allow_plaintext"]),
    ({"host": "0.0.0.0", "allow_public": True, "api_keys": {"k": "t"}}, ["in clear", "http.tls_cert"]),
    ({"tls_cert": "/a.pem"}, ["http.tls_cert and http.tls_key must be given together"]),
    ({"api_keys": {"k": "t"}, "api_keys_file": "/k.yaml"}, ["two sources"]),
    ({"api_keys": {"k": "t:root"}}, ["tenant that is not"]),
    ({"redis": "localhost:6379"}, ["tiers.redis must be", "redis://"]),
    ({"redis_bytes": 10}, ["tiers.redis_bytes = 10", "out of range"]),
    ({"cache_secret": "abcd"}, ["tiers.cache_secret = ********"]),
    ({"api_keys": ["k"]}, ["not a mapping of API key to tenant"]),
    ({"api_keys": {"": "t"}}, ["empty"]),
    ({"api_keys": {"key": "a tenant"}}, ["tenant that is not"]),
    ({"name": "../etc"}, ["cluster.name"]),
    ({"verify_attend": "perhaps"}, ["not true or false"]),
    ({"model": "a\0b"}, ["not a path"]),
])
def test_a_wrong_value_is_a_config_error_that_names_the_key_and_the_rule(values: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(values, environ={})
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(("name", "words"), [
    ("KVBANK__VAULTS__DEVICE_BLOCKS", ["KVBANK__VAULTS__DEVICE_BLOCKS", "vault"]),
    ("KVBANK__VAULT__DEVICE_BLOKS", ["vault.device_bloks", "did you mean vault.device_blocks"]),
    ("KVBANK__PORT", ["expected KVBANK__SECTION__KEY"]),
])
def test_an_unknown_variable_is_an_error_and_not_a_silent_default(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(environ={name: "1", "KVBANK_UNRELATED": "x"})
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.yaml", b"a: [1", ["not valid"]),
    ("a.yaml", b"- 1\n", ["must hold a mapping"]),
    ("a.yaml", b"port: 1\nport: 2\n", ["set twice"]),
    ("a.yaml", b"http: !!python/object/apply:os.system ['true']\n", ["not valid"]),
    ("a.yaml", b"\xff\xfe\x00", ["cannot read"]),
    ("a.toml", b"port = ", ["not valid"]),
    ("a.json", b"{}", [".yaml, .yml or .toml"]),
    ("a.yaml", b"#" * (config.MAX_FILE_BYTES + 1), ["larger than"]),
])
def test_a_file_that_cannot_be_read_is_a_config_error(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / name, environ={})
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_missing_file_is_a_config_error_and_an_empty_one_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config file"):
        config.load(tmp_path / "absent.yaml", environ={})
    (tmp_path / "empty.yaml").write_text("")
    assert config.load(tmp_path / "empty.yaml", environ={}).flat() == config.load(environ={}).flat()


def test_what_is_printed_holds_no_secret() -> None:
    settings = config.load({
        "api_keys": {"sk-live-1": "alice", "sk-live-2": "bob"}, "cache_secret": "ab" * 32,
        "redis": "rediss://worker:hunter2@cache.internal:6380/1",
    }, environ={})
    shown = repr(settings.rows()) + repr(settings.tree())
    assert not [secret for secret in ("sk-live", "ab" * 32, "hunter2") if secret in shown]
    assert "alice" in shown and "rediss://worker:********@cache.internal:6380/1" in shown


def test_an_error_about_a_secret_does_not_repeat_it() -> None:
    for key in ("api_keys", "cache_secret"):
        with pytest.raises(ConfigError) as caught:
            config.load({key: "hunter2"}, environ={})
        assert "hunter2" not in str(caught.value)


def test_device_blocks_are_rounded_down_to_whole_spans_and_agree_with_the_worker() -> None:
    settings = config.load({"device_blocks": 39, "block_size": 16, "span_tokens": 128}, environ={})
    assert settings.vault.device_blocks == 32
    assert WorkerConfig(model="m", device_blocks=39).num_slots == 32 * 16 // 128


def test_a_short_term_brings_its_renewals_with_it() -> None:
    settings = config.load({"term_s": 2}, environ={})
    assert settings.loans.renew_s == 0.5
    assert ("loans.renew_s", 0.5, "derived from loans.term_s") in settings.rows()
    fast = config.load({"heartbeat_s": 0.1}, environ={}).cluster
    assert (fast.suspect_s, fast.gone_s) == (pytest.approx(0.3), 1.0)


@pytest.mark.parametrize(("written", "wanted"), [
    (0, 0), ("0", 0), ("1024", 1024), ("256MiB", 256 << 20), (" 2 gib ", 2 << 30), ("1.5kb", 1500), ("3MB", 3_000_000),
    ("7b", 7),
])
def test_sizes(written: object, wanted: int) -> None:
    assert size(written) == wanted


def test_api_keys_fit_into_a_variable() -> None:
    for text in ("k1=alice,k2=bob", '{"k1": "alice", "k2": "bob"}'):
        settings = config.load(environ={"KVBANK__HTTP__API_KEYS": text})
        assert settings.http.api_keys == {"k1": "alice", "k2": "bob"}


def test_a_relative_model_path_means_the_same_folder_for_a_child_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load({"model": "models/one"}, environ={}).engine.model == str(tmp_path / "models" / "one")


def test_children_find_an_uninstalled_checkout_and_do_not_spin() -> None:
    variables = config.child_variables("mark", 3)
    assert variables[config.MARKER] == "mark" and variables["OMP_NUM_THREADS"] == "3"
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE" and variables["HF_HUB_OFFLINE"] == "1"
    root = variables["PYTHONPATH"].split(":")[0]
    assert (Path(root) / "kvbank" / "__init__.py").is_file()
    assert not (Path(root) / "__init__.py").exists()


def test_the_environment_is_as_before_after_a_library_started_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), config.marked_environment("mark"):
        assert os.environ[config.MARKER] == "mark" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_the_state_folder_is_private_and_follows_the_setting(tmp_path: Path) -> None:
    chosen = config.load({"state_dir": str(tmp_path / "state")}, environ={})
    assert config.state_dir(chosen) == tmp_path / "state"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    usual = config.state_dir(config.load(environ={}), {"XDG_STATE_HOME": str(tmp_path / "x")})
    assert usual == tmp_path / "x" / "kvbank"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir"):
        config.state_dir(config.load({"state_dir": str(tmp_path / "file" / "below")}, environ={}))


@pytest.mark.parametrize("text", [
    "sk-SECRETSECRET: a\nsk-SECRETSECRET: b\n", "sk-SECRETSECRET a\n\tb: c\n", "*sk-SECRETSECRET: a\n", "!sk-SECRETSECRET: a\n",
    "@sk-SECRETSECRET: a\n", "%sk-SECRETSECRET: a\n", "sk-SECRETSECRET: [a\n", "'sk-SECRETSECRET: a\n",
    "sk-SECRETSECRET: a tenant\n", "sk-SECRETSECRET\n",
])
def test_what_is_wrong_with_a_file_of_keys_is_told_without_a_key(tmp_path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    for read in (lambda: config.read_keys(path), lambda: config.load(path, environ={})):
        with pytest.raises(ConfigError) as caught:
            read()
        if "unknown setting" not in str(caught.value):      # the main file's keys are settings' names, and shown
            assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("names", ["https://api.example.com", "api.example.com:8080", "*.example.com", "::1"])
def test_a_name_that_would_never_match_is_refused(names: str) -> None:
    with pytest.raises(ConfigError, match=r"http\.names"):
        config.load({"names": names}, environ={})
    assert config.load({"names": "api.example.com, b, [::1]"}, environ={})
