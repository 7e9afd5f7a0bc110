"""Loading: what is read, how it is stacked, and every damage that must be told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbank.errors import ModelError
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.weights import load_weights, weight_files

LAYERS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model", hidden_size=32, num_layers=LAYERS, heads=4, kv_heads=2, vocab=260)


def load(folder: Path, layers: range = range(LAYERS), *, first: bool = True, last: bool = True,
         dtype: str = "float32") -> dict[str, torch.Tensor]:
    return load_weights(folder, read_config(folder), layers, first=first, last=last, dtype=dtype)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split(folder: Path) -> None:
    """The single file as three with an index: layer 2 apart, and layer 1's MLP apart from its attention."""
    tensors = load_file(folder / "model.safetensors")
    number = {name: 2 if "layers.2." in name else 3 if "layers.1.mlp" in name else 1 for name in tensors}
    for n in (1, 2, 3):
        save_file({name: tensors[name] for name in tensors if number[name] == n}, folder / file_name(n))
    index = {"metadata": {}, "weight_map": {name: file_name(n) for name, n in number.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def file_name(number: int) -> str:
    return f"model-{number:05}-of-00003.safetensors"


def test_projections_of_one_input_become_one_matrix(folder: Path) -> None:
    raw, weights = load_file(folder / "model.safetensors"), load(folder)
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert torch.equal(weights["1.qkv"], torch.cat([raw[f"{attention}{p}_proj.weight"] for p in "qkv"]))
    assert torch.equal(weights["1.gate_up"], torch.cat([raw[f"{mlp}{p}_proj.weight"] for p in ("gate", "up")]))
    assert torch.equal(weights["head"], raw["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(folder: Path, dtype: str) -> None:
    assert {tensor.dtype for tensor in load(folder, dtype=dtype).values()} == {getattr(torch, dtype)}


def test_several_files_with_an_index_give_the_same_weights_as_one(folder: Path) -> None:
    single = load(folder)
    split(folder)
    several = load(folder)
    assert single.keys() == several.keys()
    assert all(torch.equal(single[name], several[name]) for name in single)
    assert [path.name for path in weight_files(folder)] == [file_name(n) for n in (1, 2, 3)]


def test_a_shard_holds_its_own_layers_counted_from_zero(folder: Path) -> None:
    whole, middle = load(folder), load(folder, range(1, 2), first=False, last=False)
    assert {name.split(".")[0] for name in middle} == {"0"}
    assert all(torch.equal(tensor, whole["1" + name[1:]]) for name, tensor in middle.items())


def test_a_shard_needs_only_the_files_of_its_own_layers(folder: Path) -> None:
    split(folder)
    (folder / file_name(2)).unlink()
    assert "1.down" in load(folder, range(2), first=True, last=False)
    with pytest.raises(ModelError, match=r"00002-of-00003\.safetensors cannot be read"):
        load(folder, range(2, 3), first=False, last=False)


def test_tied_embeddings_give_the_last_shard_the_embedding_and_no_head(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path, hidden_size=32, num_layers=2, vocab=260, tie_word_embeddings=True)
    assert "embed" in load(folder, range(1, 2), first=False, last=True)
    assert "head" not in load(folder, range(2))
    assert "embed" not in load(folder, range(1), first=False, last=False)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.down_proj.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight is missing"):
        load(folder)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[31\], config\.json asks for \[32\]"):
        load(folder)


def test_a_tensor_of_a_dtype_that_is_not_read_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has dtype I8"):
        load(folder)


def test_a_bias_that_the_config_does_not_speak_of_is_not_dropped_in_silence(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(ModelError, match=r"q_proj\.bias is not part of a llama model"):
        load(folder)


def test_precomputed_rotary_frequencies_of_old_files_are_passed_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert "0.qkv" in load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_refused_before_it_is_used(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors .*(truncated|bytes)"):
        load(folder)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff\xff"])
def test_a_file_without_a_valid_header_is_refused(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"no valid safetensors header"):
        load(folder)


def test_a_header_length_beyond_the_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="truncated or no safetensors"):
        load(folder)


def test_bytes_after_the_end_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match="not a plain safetensors file"):
        load(folder)


def test_a_folder_without_weights_says_which_files_it_wants(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(folder)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}',
                                   '{"weight_map": {"a": "../outside.safetensors"}}'])
def test_a_damaged_index_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json is not a valid"):
        load(folder)


def test_an_index_that_points_to_the_wrong_file_is_told_apart_from_a_missing_tensor(folder: Path) -> None:
    split(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file_name(2)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"00003\.safetensors: tensor model\.norm\.weight is missing, although"):
        load(folder)


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="float64"):
        load(folder, dtype="float64")
