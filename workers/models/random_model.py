"""Writes a model folder with seeded random weights and a byte-level tokenizer, as Hugging Face lays it out.

For tests, benches and the demo when no trained model is at hand. Large weights (initializer_range 0.2) keep the outputs
from degenerating into one repeated token, so that equal tokens prove something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from kvbank.workers.models.config_reader import ModelConfig, read_config
from kvbank.workers.token_pieces import byte_alphabet
from kvbank.workers.weights import TORCH_DTYPES

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
END = "<|endoftext|>"
NUM_BYTES = 256
BY_FREQUENCY = " etaoinshrdlucmfwypvbgkqjxz\n.,ETAOINSHRDLUCMFWYPVBGKQJXZ0123456789-'\"()[]{}<>=_/*:;#`|+!?&%$@~^\\\t"


def write_random_model(
    folder: str | Path, *, seed: int = 0, model_type: str = "llama", hidden_size: int = 128, num_layers: int = 4,
    heads: int = 4, kv_heads: int = 2, vocab: int = 512, intermediate_size: int | None = None,
    initializer_range: float = 0.2, dtype: str = "float32", max_position: int = 131072, **overrides: Any,
) -> Path:
    """Write config.json, generation_config.json, model.safetensors and a tokenizer; the same bytes for the same call.

    vocab:  at least 257: the 256 bytes, one end token (not set as eos, so that answers have their full length), merges
    overrides:  further fields of config.json, replacing ours; None writes null
    Returns the folder, created if absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "vocab_size": vocab,
        "hidden_size": hidden_size, "intermediate_size": intermediate_size or _inner_size(hidden_size),
        "num_hidden_layers": num_layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden_size // heads, "hidden_act": "silu", "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": dtype,
        "initializer_range": initializer_range, "bos_token_id": None, "eos_token_id": None,
    }
    if model_type == "mistral":
        config["sliding_window"] = None      # this family's default is not null
    config |= overrides
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    byte_level_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    # Without this line transformers puts the family's own splitting rules in place of the file's.
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")
    tensors = dict(_random_tensors(read_config(folder), seed, initializer_range))
    save_file({name: tensor.to(TORCH_DTYPES[dtype]) for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def byte_level_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab` ids, each of which decodes to some text or is END.

    Ids 0-255 are the bytes, 256 is END, the rest are merges of frequent characters, shortest first.
    """
    assert vocab > NUM_BYTES, f"a byte-level vocabulary needs {NUM_BYTES + 1} ids, not {vocab}"
    alphabet = byte_alphabet()
    pieces = {alphabet[byte]: byte for byte in range(NUM_BYTES)}
    merges: list[tuple[str, str]] = []
    for left, right in islice(_candidates([alphabet[ord(c)] for c in BY_FREQUENCY]), vocab - NUM_BYTES - 1):
        merges.append((left, right))
        pieces[left + right] = NUM_BYTES + len(merges)
    tokenizer = Tokenizer(models.BPE(vocab={**pieces, END: NUM_BYTES}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def _candidates(letters: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of letters, then pairs with a third letter, and so on: every left side is a piece that came earlier."""
    level = letters
    while True:
        longer = []
        for left, right in product(level, letters):
            longer.append(left + right)
            yield left, right
        level = longer


def _inner_size(hidden_size: int) -> int:
    """About 8/3 of the width, a multiple of 32."""
    return max(32, math.ceil(hidden_size * 8 / 3 / 32) * 32)


def _random_tensors(config: ModelConfig, seed: int, scale: float) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(0.0, scale, generator=generator)

    def norm(size: int) -> Tensor:           # around one, but not one: a norm left out must show
        return 1.0 + torch.empty(size).normal_(0.0, 0.1, generator=generator)

    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    yield "model.embed_tokens.weight", matrix(config.vocab_size, hidden)
    for layer in range(config.num_layers):
        at, attn = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        yield at + "input_layernorm.weight", norm(hidden)
        for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            yield f"{attn}{name}_proj.weight", matrix(heads * dim, hidden)
            if config.qkv_bias:
                yield f"{attn}{name}_proj.bias", matrix(heads * dim)
            if config.qk_norm and name in "qk":
                yield f"{attn}{name}_norm.weight", norm(dim)
        yield attn + "o_proj.weight", matrix(hidden, config.num_heads * dim)
        if config.o_bias:
            yield attn + "o_proj.bias", matrix(hidden)
        yield at + "post_attention_layernorm.weight", norm(hidden)
        yield at + "mlp.gate_proj.weight", matrix(inner, hidden)
        yield at + "mlp.up_proj.weight", matrix(inner, hidden)
        yield at + "mlp.down_proj.weight", matrix(hidden, inner)
    yield "model.norm.weight", norm(hidden)
    if not config.tie_embeddings:
        yield "lm_head.weight", matrix(config.vocab_size, hidden)
