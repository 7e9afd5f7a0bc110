"""The decoder by itself: shards, row independence, what it owns. Its numbers are checked in tests/parity."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbank.workers.models import decoder as decoder_module
from kvbank.workers.models.config_reader import ModelConfig, RopeSpec, read_config
from kvbank.workers.models.decoder import Decoder, rms_norm
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.models.rope import TABLE_ROWS, RopeTable
from kvbank.workers.weights import load_weights

LAYERS = 4
# Widths that are no multiple of a vector; and a model with every extra a layer can have.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "intermediate_size": 250, "num_layers": LAYERS, "vocab": 330},
    "llama_tied": {"hidden_size": 128, "num_layers": LAYERS, "attention_bias": True, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "hidden_size": 128, "num_layers": LAYERS},
    "qwen3": {"model_type": "qwen3", "hidden_size": 96, "num_layers": LAYERS, "head_dim": 40},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


def build(folder: Path, layers: range = range(LAYERS), *, dtype: str = "float32", exactness: str = "fast") -> Decoder:
    config = read_config(folder)
    first, last = layers.start == 0, layers.stop == config.num_layers
    weights = load_weights(folder, config, layers, first=first, last=last, dtype=dtype)
    return Decoder(config, weights, layers, first, last, exactness=exactness)


def rowwise(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In attention's place: uses all of q, k and v, but no other row, and exact operations only."""
    groups = q.shape[1] // k.shape[1]
    return (q + k.repeat_interleave(groups, 1)).mul_(0.5).add_(v.repeat_interleave(groups, 1))


def tokens(config: ModelConfig, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(config.vocab_size, (count,), generator=generator),
            torch.randint(9000, (count,), generator=generator))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_one_after_the_other_equal_the_whole_bit_for_bit(folder: Path, dtype: str) -> None:
    whole = build(folder, dtype=dtype)
    ids, positions = tokens(whole.config, 13)
    expected = whole.forward(ids, None, positions, rowwise)
    for cut in range(1, LAYERS):
        lower, upper = build(folder, range(cut), dtype=dtype), build(folder, range(cut, LAYERS), dtype=dtype)
        between = lower.forward(ids, None, positions, rowwise)
        kept = between.clone()
        hidden = upper.forward(None, between, positions, rowwise)
        assert torch.equal(hidden, expected)
        assert torch.equal(upper.logits(hidden), whole.logits(expected))
        assert torch.equal(between, kept), "a shard's input belongs to its sender"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_under_bitwise_a_row_has_the_same_bits_in_any_padded_batch(
    folder: Path, dtype: str, threads: int, torch_threads: Callable[[int], None]
) -> None:
    torch_threads(threads)
    decoder = build(folder, dtype=dtype, exactness="bitwise")
    ids, positions = tokens(decoder.config, 512)
    hidden = decoder.forward(ids, None, positions, rowwise)
    logits = decoder.logits(hidden)
    for count in (8, 16, 24, 40, 64, 136, 256, 504):
        some = decoder.forward(ids[:count], None, positions[:count], rowwise)
        assert torch.equal(some, hidden[:count]), f"{count} rows"
        assert torch.equal(decoder.logits(some), logits[:count]), f"{count} rows"
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))[:72]      # other neighbours, other places
    assert torch.equal(decoder.forward(ids[order], None, positions[order], rowwise), hidden[order])


def test_logits_are_float32_whatever_the_weights(folder: Path) -> None:
    decoder = build(folder, dtype="bfloat16")
    hidden = decoder.forward(*tokens_for_forward(decoder), rowwise)
    assert hidden.dtype == torch.bfloat16
    assert decoder.logits(hidden[-1:]).dtype == torch.float32
    assert decoder.logits(hidden[-1:]).shape == (1, decoder.config.vocab_size)


def tokens_for_forward(decoder: Decoder) -> tuple[Tensor, None, Tensor]:
    ids, positions = tokens(decoder.config, 8)
    return ids, None, positions


def test_float16_runs_too(folder: Path) -> None:
    wide, narrow = build(folder), build(folder, dtype="float16")
    ids, positions = tokens(wide.config, 8)
    expected = wide.logits(wide.forward(ids, None, positions, rowwise))
    found = narrow.logits(narrow.forward(ids, None, positions, rowwise))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_bitwise_without_packed_products_is_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "packing", lambda dtype, device: None)
    build(folder, dtype="float16", exactness="bitwise")
    assert "bitwise_not_promised dtype=torch.float16" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_in_a_wider_type_are_those_of_plain_ones_and_no_less_exact(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, positions = tokens(read_config(folder), 24)

    def logits(dtype: str, kind: torch.dtype | None) -> Tensor:
        monkeypatch.setattr(decoder_module, "packing", lambda dtype, device: kind)
        decoder = build(folder, dtype=dtype)
        return decoder.logits(decoder.forward(ids, None, positions, rowwise))

    exact, plain, wide = logits("float32", None), logits(dtype, None), logits(dtype, torch.float32)
    scale = exact.abs().max()
    assert (wide - plain).abs().max() < (0.1 if dtype == "bfloat16" else 0.02) * scale
    assert (wide - exact).square().mean() < 1.2 * (plain - exact).square().mean()


def test_the_decoder_takes_the_matrices_out_of_the_dict_and_keeps_one_copy(folder: Path) -> None:
    config = read_config(folder)
    weights = load_weights(folder, config, range(LAYERS), first=True, last=True, dtype="float32")
    loaded = weakref.ref(weights["2.qkv"])
    decoder = Decoder(config, weights, range(LAYERS), True, True)
    assert weights == {}
    assert decoder.packed == (loaded() is None), "a packed matrix replaces the plain one"


def test_layers_count_from_zero_in_every_shard(folder: Path) -> None:
    seen: list[int] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(layer)
        return q

    upper = build(folder, range(2, LAYERS))
    upper.forward(None, torch.zeros(3, upper.config.hidden_size), torch.arange(3), attend)
    assert seen == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(7, 3, 96) * 30).to(dtype), torch.randn(96).to(dtype)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    rtol = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=rtol, atol=1e-5)


def test_a_positions_angles_do_not_depend_on_how_far_the_table_reaches() -> None:
    spec = RopeSpec(theta=500000.0)
    short, long = (RopeTable(spec, 24, device="cpu") for _ in range(2))
    long.rows(torch.tensor([5 * TABLE_ROWS]))
    positions = torch.tensor([0, 1, 17, TABLE_ROWS - 1])
    assert all(torch.equal(a, b) for a, b in zip(short.rows(positions), long.rows(positions), strict=True))
    far = torch.tensor([3 * TABLE_ROWS + 5])
    assert all(torch.equal(a, b) for a, b in zip(short.rows(far), long.rows(far), strict=True))
