"""Keys: golden, the same in every process, and different as soon as anything that shaped the KV differs."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbank.errors import ConfigError, InvalidRequest, ModelError
from kvbank.kvstore.hashing import block_keys, load_secret, model_digest, root_key, token_bytes
from kvbank.kvstore.layout import Layout

LAYOUT = Layout(num_layers=4, layer_first=0, layer_last=4, kv_heads=2, head_dim=16)
SECRET = bytes(range(32))
REPOSITORY = Path(__file__).parents[2]
NAMED = {"tenant": "default", "model_digest": "ab" * 32, "layout": LAYOUT}

# Derived once from the docstring's formula with hashlib, hmac and struct alone.
GOLDEN_ROOT = "07e33f4ffe3477b4f5d33526b2eb01457dd958b093cde5d4d5ffda392292a9d0"
GOLDEN_KEYS = ["8086bfb5fc5fb6ac2cede892181800e6a40fb059fa3bf44d1d1ab96dfa408a4f",
               "bd0d88ae45971cb5c2dd63860b0061c125b3a9f3279a25f522f7015566480f5a",
               "fd533c1bdfb0986ec03503b2848706aaa149957065b49c7cc6f4c2dc2bb5a982"]


def test_root_and_keys_equal_their_golden_values() -> None:
    root = root_key(SECRET, **NAMED)
    assert root.hex() == GOLDEN_ROOT
    assert [key.hex() for key in block_keys(root, list(range(50)), 16)] == GOLDEN_KEYS


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_keys_do_not_depend_on_the_process(seed: str) -> None:
    code = ("from kvbank.kvstore.hashing import *; from kvbank.kvstore.layout import Layout;"
            "layout = Layout(num_layers=4, layer_first=0, layer_last=4, kv_heads=2, head_dim=16);"
            "root = root_key(bytes(range(32)), tenant='default', model_digest='ab' * 32, layout=layout);"
            "print(*[key.hex() for key in block_keys(root, list(range(50)), 16)])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
                           env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}).stdout
    assert found.split() == GOLDEN_KEYS


@pytest.mark.parametrize("changed", [
    {"tenant": "other"}, {"model_digest": "cd" * 32}, {"adapter_digest": "x"}, {"fidelity": "codec:int8"},
    {"numerics": "cpu-avx512"}, {"layout": replace(LAYOUT, dtype="bfloat16")}, {"layout": replace(LAYOUT, kv_heads=4)},
    {"layout": replace(LAYOUT, block_size=32)}, {"layout": replace(LAYOUT, span_tokens=256)},
    {"layout": replace(LAYOUT, rope="none")}, {"layout": replace(LAYOUT, num_layers=5)}], ids=str)
def test_every_named_field_changes_the_root(changed: dict) -> None:
    assert root_key(SECRET, **{**NAMED, **changed}) != root_key(SECRET, **NAMED)
    assert root_key(bytes(32), **NAMED) != root_key(SECRET, **NAMED)


def test_shards_of_one_model_agree_on_keys() -> None:
    half = replace(LAYOUT, layer_first=2)
    assert root_key(SECRET, **{**NAMED, "layout": half}) == root_key(SECRET, **NAMED)


def test_fields_cannot_run_into_each_other() -> None:
    one = root_key(SECRET, tenant="ab", model_digest="c", layout=LAYOUT)
    assert one != root_key(SECRET, tenant="a", model_digest="bc", layout=LAYOUT)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=200), st.sampled_from([1, 4, 16]))
def test_keys_are_the_chain_of_the_docstring(ids: list[int], block_size: int) -> None:
    expected, key = [], b"r" * 32
    for start in range(0, len(ids) - block_size + 1, block_size):
        key = hashlib.sha256(key + struct.pack(f"<{block_size}i", *ids[start:start + block_size])).digest()
        expected.append(key)
    assert block_keys(b"r" * 32, ids, block_size) == expected
    for dtype in (np.int32, np.int64, np.uint32):
        assert block_keys(b"r" * 32, np.array(ids, dtype=dtype), block_size) == expected
    assert block_keys(b"r" * 32, token_bytes(ids), block_size) == expected


@given(st.lists(st.integers(0, 2**31 - 1), min_size=64, max_size=96), st.integers(0, 63))
def test_one_early_token_changes_every_later_key_and_none_before(ids: list[int], at: int) -> None:
    other = [*ids[:at], ids[at] ^ 1, *ids[at + 1:]]
    for index, (a, b) in enumerate(zip(block_keys(bytes(32), ids, 16), block_keys(bytes(32), other, 16), strict=True)):
        assert (a == b) == (index < at // 16)


def test_going_on_from_a_parent_equals_hashing_from_the_start() -> None:
    keys = block_keys(bytes(32), list(range(160)), 16)
    assert block_keys(bytes(32), list(range(64, 160)), 16, parent=keys[3]) == keys[4:]


@pytest.mark.parametrize("ids", [[2**31], [-2**31 - 1], [1.5], ["a"], [None], np.array([2**40]), np.array([1.0]),
                                 np.array([2**32 - 1], dtype=np.uint32), b"123"], ids=repr)
def test_ids_that_are_no_int32_are_refused_and_never_wrapped(ids: object) -> None:
    with pytest.raises(InvalidRequest):
        block_keys(bytes(32), ids, 1)           # type: ignore[arg-type]


def test_a_strided_array_hashes_like_its_copy() -> None:
    ids = np.arange(128, dtype=np.int32)[::2]
    assert block_keys(bytes(32), ids, 16) == block_keys(bytes(32), ids.copy(), 16)


# -- model digest -----------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (path / name).write_bytes(name.encode() * 1000)
        os.utime(path / name, (1_000_000, 1_000_000))
    return path


def test_model_digest_changes_with_config_and_with_every_weight_byte(folder: Path, tmp_path: Path) -> None:
    first = model_digest(folder, {"b": 1, "a": [1.5, None]}, state_folder=tmp_path / "state")
    assert first == model_digest(folder, {"a": (1.5, None), "b": 1}) and len(first) == 64
    assert first != model_digest(folder, {"b": 2, "a": [1.5, None]})
    data = bytearray((folder / "model-2.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model-2.safetensors").write_bytes(data)      # same length, another mtime
    assert first != model_digest(folder, {"b": 1, "a": [1.5, None]}, state_folder=tmp_path / "state")


def test_a_second_digest_reads_no_weights(folder: Path, tmp_path: Path) -> None:
    first = model_digest(folder, {}, state_folder=tmp_path)
    cache = tmp_path / "model-digests.json"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    known = json.loads(cache.read_text())
    assert len(known) == 2
    for row in known.values():
        row[2] = "0" * 64                       # proof that the cache is what answers
    cache.write_text(json.dumps(known))
    assert model_digest(folder, {}, state_folder=tmp_path) != first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2, 3]}', "\x00"])
def test_a_damaged_digest_cache_is_only_forgotten(folder: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "model-digests.json").write_text(damage)
    assert model_digest(folder, {}, state_folder=tmp_path) == model_digest(folder, {})


def test_a_file_written_this_moment_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    (folder / "model-1.safetensors").write_bytes(b"fresh")
    model_digest(folder, {}, state_folder=tmp_path)
    assert len(json.loads((tmp_path / "model-digests.json").read_text())) == 1


def test_a_folder_without_weights_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        model_digest(tmp_path, {})


# -- secret -----------------------------------------------------------------------------------------------------------

def test_the_secret_is_made_once_and_private(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: load_secret(tmp_path / "state"), range(32)))
    assert len(secrets) == 1 and len(secrets.pop()) == 32
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["cache_secret"]
    assert stat.S_IMODE((tmp_path / "state" / "cache_secret").stat().st_mode) == 0o600


def test_a_secret_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    load_secret(tmp_path)
    (tmp_path / "cache_secret").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_secret(tmp_path)


@pytest.mark.parametrize("text", ["", "xyz", "00" * 15, "é"])
def test_a_damaged_secret_is_refused_with_the_remedy(tmp_path: Path, text: str) -> None:
    load_secret(tmp_path)
    (tmp_path / "cache_secret").write_text(text)
    with pytest.raises(ConfigError, match="delete it"):
        load_secret(tmp_path)
