"""The stand-in model: the same bytes for the same seed, and a vocabulary without gaps."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.random_model import byte_level_tokenizer, write_random_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    one, two, other = (write_random_model(tmp_path / name, seed=seed, hidden_size=32, num_layers=1)
                       for name, seed in (("one", 5), ("two", 5), ("other", 6)))
    assert contents(one) == contents(two)
    assert contents(one)["model.safetensors"] != contents(other)["model.safetensors"]
    assert set(contents(one)) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                  "tokenizer_config.json"}


def test_overrides_reach_the_config_and_the_weights_fit_it(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path, hidden_size=48, heads=4, kv_heads=1, head_dim=20, dtype="bfloat16",
                                eos_token_id=[7, 8], rope_theta=5e5)
    config = read_config(folder)
    assert (config.head_dim, config.num_kv_heads, config.dtype, config.eos_ids) == (20, 1, "bfloat16", (7, 8))
    assert config.rope.theta == 5e5


@pytest.mark.parametrize("vocab", [257, 512, 10_000])
def test_every_id_of_the_vocabulary_decodes_to_something(vocab: int) -> None:
    tokenizer = byte_level_tokenizer(vocab)
    assert tokenizer.get_vocab_size() == vocab
    assert all(tokenizer.id_to_token(token) for token in range(vocab))
    assert all(tokenizer.decode([token], skip_special_tokens=False) for token in range(vocab))


def test_a_larger_vocabulary_needs_fewer_tokens() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 4
    small, large = (len(byte_level_tokenizer(vocab).encode(text).ids) for vocab in (257, 10_000))
    assert small == len(text)
    assert large < 0.6 * small
