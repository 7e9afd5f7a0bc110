"""Our decoder against transformers on random weights wide enough that a mistake shows (initializer_range 0.2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from kvbank.workers.models.config_reader import RopeSpec, read_config
from kvbank.workers.models.decoder import Decoder
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.models.rope import inverse_frequencies
from kvbank.workers.weights import load_weights

PROMPT = 70                                  # tokens: more than any window below, and past llama3's slowed wavelengths
NEAR_TIE = 1e-3                              # a smaller gap of the two largest logits may fall either way
SHARED: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama-mqa-tied": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head_dim-biased": (LlamaConfig, {"head_dim": 40, "attention_bias": True}),
    "llama3-scaled": (LlamaConfig, {"rope_parameters": LLAMA3, "hidden_size": 128}),
    "llama-linear": (LlamaConfig, {"rope_parameters": LINEAR}),
    "mistral-window": (MistralConfig, {"sliding_window": 19}),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3-layer_types": (Qwen3Config, {"use_sliding_window": True, "sliding_window": 7, "layer_types":
                                        ["sliding_attention", "full_attention"] * 2}),
}


class Pair(NamedTuple):
    folder: Path
    oracle: PreTrainedModel


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model made and written by transformers, norms and biases random too."""
    kind, fields = CONFIGS[request.param]
    torch.manual_seed(0)
    config = kind(**(SHARED | fields))
    oracle = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(folder)
    return Pair(folder, oracle)


def our_logits(folder: Path, ids: torch.Tensor, dense_attention: Callable[..., Any], dtype: str = "float32",
               decoder: Decoder | None = None) -> torch.Tensor:
    decoder = decoder or build(folder, dtype)
    positions = torch.arange(len(ids))
    return decoder.logits(decoder.forward(ids, None, positions, dense_attention(decoder.config, positions)))


def build(folder: Path, dtype: str = "float32") -> Decoder:
    config = read_config(folder)
    layers = range(config.num_layers)
    weights = load_weights(folder, config, layers, first=True, last=True, dtype=dtype)
    return Decoder(config, weights, layers, True, True)


def prompt_ids(seed: int, count: int = PROMPT) -> torch.Tensor:
    return torch.randint(SHARED["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_logits_are_those_of_transformers(pair: Pair, dense_attention: Callable[..., Any]) -> None:
    ids = prompt_ids(1)
    expected = pair.oracle(ids[None]).logits[0]
    assert expected.std() > 0.5, "degenerate outputs would prove nothing"
    assert (our_logits(pair.folder, ids, dense_attention) - expected).abs().max() < 1e-4


@torch.inference_mode()
def test_in_bfloat16_we_are_as_near_to_float32_as_transformers_is(
    pair: Pair, dense_attention: Callable[..., Any]
) -> None:
    ids = prompt_ids(2)
    exact = pair.oracle(ids[None]).logits[0]
    narrow = transformers.AutoModelForCausalLM.from_pretrained(
        pair.folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    their_error = (narrow(ids[None]).logits[0].float() - exact).pow(2).mean().sqrt()
    our_error = (our_logits(pair.folder, ids, dense_attention, "bfloat16") - exact).pow(2).mean().sqrt()
    assert our_error < 1.5 * their_error


@torch.inference_mode()
def test_greedy_tokens_are_those_of_generate_up_to_near_ties(
    pair: Pair, dense_attention: Callable[..., Any]
) -> None:
    decoder, near_ties = build(pair.folder), 0
    for seed in (3, 4):
        ids = prompt_ids(seed, 24)
        whole = pair.oracle.generate(ids[None], max_new_tokens=64, do_sample=False)[0]
        assert len(set(whole[24:].tolist())) > 6, "one repeated token would prove nothing"
        logits = our_logits(pair.folder, whole, dense_attention, decoder=decoder)[23:-1]
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        differs = logits.argmax(-1) != whole[24:]
        near_ties += int(differs.sum())
        assert bool((best - second)[differs].lt(NEAR_TIE).all())
    print(f"near ties decided differently: {near_ties} of 128 tokens")
    assert near_ties <= 2


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_the_random_model_is_read_alike_by_transformers(
    model_type: str, tmp_path: Path, dense_attention: Callable[..., Any]
) -> None:
    window = {"sliding_window": 9} if model_type == "mistral" else {}
    folder = write_random_model(tmp_path, model_type=model_type, vocab=SHARED["vocab_size"], **window)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = prompt_ids(5)
    assert (our_logits(folder, ids, dense_attention) - oracle(ids[None]).logits[0]).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Ünïcode, and  spaces\n").input_ids) == "Ünïcode, and  spaces\n"


@pytest.mark.parametrize("spec", [
    RopeSpec(theta=10000.0), RopeSpec(theta=1e6), RopeSpec(rope_type="linear", theta=10000.0, factor=4.0),
    RopeSpec(rope_type="llama3", theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position=8192),
], ids=lambda spec: f"{spec.rope_type}-{spec.theta:g}")
def test_rotary_frequencies_are_those_of_transformers_bit_for_bit(spec: RopeSpec) -> None:
    parameters: dict[str, Any] = {"rope_type": spec.rope_type, "rope_theta": spec.theta}
    if spec.rope_type != "default":
        parameters["factor"] = spec.factor
    if spec.rope_type == "llama3":
        parameters |= {"low_freq_factor": spec.low_freq_factor, "high_freq_factor": spec.high_freq_factor,
                       "original_max_position_embeddings": spec.original_max_position}
    config = LlamaConfig(**(SHARED | {"head_dim": 64, "rope_parameters": parameters}))
    oracle = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(spec, 64), oracle.inv_freq)
