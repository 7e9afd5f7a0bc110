"""config.json in both forms, and every way of not being supported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvbank.errors import ModelError
from kvbank.workers.models.config_reader import GenerationDefaults, ModelConfig, RopeSpec, read_config

GOLDEN = Path(__file__).parent / "golden"


def model(**fields: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "rope": RopeSpec(), "qkv_bias": False, "o_bias": False, "qk_norm": False, "tie_embeddings": False, "bos_id": 1,
        "eos_ids": (2,), "dtype": "bfloat16", "generation": GenerationDefaults(), "rms_eps": 1e-5,
    }
    return ModelConfig(**{**defaults, **fields})


LLAMA3 = RopeSpec(rope_type="llama3", theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position=8192)
EXPECTED = {
    "llama2": model(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, windows=(None,) * 32, max_position=4096, dtype="float16"),
    "llama3": model(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
        num_kv_heads=8, head_dim=64, rope=LLAMA3, windows=(None,) * 16, tie_embeddings=True, max_position=131072,
        bos_id=128000, eos_ids=(128001, 128008, 128009)),
    "mistral": model(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, windows=(4096,) * 32, max_position=32768),
    "mistral_full": model(
        model_type="mistral", vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_layers=40, num_heads=32,
        num_kv_heads=8, head_dim=128, rope=RopeSpec(theta=1e6), windows=(None,) * 40, max_position=131072),
    "qwen2": model(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
        num_kv_heads=2, head_dim=64, rope=RopeSpec(theta=1e6), windows=(None,) * 24, max_position=32768, rms_eps=1e-6,
        qkv_bias=True, tie_embeddings=True, bos_id=151643, eos_ids=(151645,)),
    "qwen2_window": model(
        model_type="qwen2", vocab_size=151936, hidden_size=1024, intermediate_size=2816, num_layers=6, num_heads=16,
        num_kv_heads=16, head_dim=64, rope=RopeSpec(theta=1e6), windows=(None,) * 3 + (4096,) * 3, max_position=32768,
        rms_eps=1e-6, qkv_bias=True, tie_embeddings=True, bos_id=151643, eos_ids=(151643,)),
    "qwen3": model(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16,
        num_kv_heads=8, head_dim=128, rope=RopeSpec(theta=1e6), windows=(None,) * 28, max_position=40960, rms_eps=1e-6,
        qk_norm=True, tie_embeddings=True, bos_id=151643, eos_ids=(151645,)),
}


def folder_with(tmp_path: Path, golden: str = "qwen2_window-rope_theta", **changes: Any) -> Path:
    """A folder with a golden config.json, fields changed; the value `...` takes a field out."""
    raw = json.loads((GOLDEN / f"{golden}.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return tmp_path


@pytest.mark.parametrize("form", ["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("name", EXPECTED)
def test_both_forms_of_a_config_give_the_same_model(name: str, form: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / f"{name}-{form}.json", tmp_path / "config.json")
    assert read_config(tmp_path) == EXPECTED[name]


def test_every_golden_file_is_expected_and_comes_in_both_forms() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"{name}-{form}.json" for name in EXPECTED for form in ("rope_theta", "rope_parameters")}


REFUSED = [
    ("llama2", "model_type", "gpt2"), ("llama2", "model_type", ...), ("llama2", "hidden_act", "gelu"),
    ("llama2", "mlp_bias", True), ("llama2", "quantization_config", {"bits": 4}), ("llama2", "vocab_size", ...),
    ("llama2", "hidden_size", 0), ("llama2", "num_hidden_layers", "32"), ("llama2", "num_attention_heads", 33),
    ("llama2", "num_key_value_heads", 5), ("llama2", "head_dim", 63), ("llama2", "rms_norm_eps", -1.0),
    ("llama2", "rms_norm_eps", "1e-6"), ("llama2", "max_position_embeddings", None), ("llama2", "sliding_window", 512),
    ("llama2", "tie_word_embeddings", "no"), ("llama2", "torch_dtype", "int8"), ("llama2", "dtype", "float64"),
    ("llama2", "rope_theta", 0), ("llama2", "rope_scaling", [1]), ("llama2", "partial_rotary_factor", 0.5),
    ("llama2", "eos_token_id", "</s>"), ("llama2", "bos_token_id", -7), ("llama2", "attention_bias", 1),
    ("llama2", "logit_scale", 0.5), ("llama2", "residual_multiplier", 2.0),
    ("mistral", "sliding_window", 0), ("mistral", "sliding_window", "4096"), ("mistral", "num_key_value_heads", ...),
    ("mistral", "layer_types", ["full_attention"] * 32),
    ("qwen2_window", "layer_types", ["full_attention"]), ("qwen2_window", "layer_types", ["chunked_attention"] * 6),
    ("qwen2_window", "max_window_layers", -1), ("qwen2_window", "use_sliding_window", None),
]


@pytest.mark.parametrize(("golden", "field", "value"), REFUSED, ids=[f"{f}={v}" for _, f, v in REFUSED])
def test_what_is_not_supported_is_refused_by_the_name_of_its_field(
    golden: str, field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=field):
        read_config(folder_with(tmp_path, f"{golden}-rope_theta", **{field: value}))


@pytest.mark.parametrize(("scaling", "field"), [
    ({"type": "dynamic", "factor": 2.0}, r"rope_scaling\.type = 'dynamic'"),
    ({"rope_type": "yarn", "factor": 4.0}, r"rope_scaling\.rope_type = 'yarn'"),
    ({"rope_type": "longrope"}, r"rope_scaling\.rope_type = 'longrope'"),
    ({"rope_type": "linear"}, r"rope_scaling\.factor"),
    ({"rope_type": "linear", "factor": 0}, r"rope_scaling\.factor = 0"),
    ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, r"rope_scaling\.low_freq_factor"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"rope_scaling\.partial_rotary_factor = 0.5"),
    ({"full_attention": {"rope_type": "default"}}, "rope_scaling"),
])
def test_a_rotation_that_is_not_supported_is_refused_by_the_name_of_its_field(
    scaling: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=field):
        read_config(folder_with(tmp_path, "llama2-rope_theta", rope_scaling=scaling))


def test_linear_scaling_is_read_from_the_old_name_of_the_type(tmp_path: Path) -> None:
    config = read_config(folder_with(tmp_path, "llama2-rope_theta", rope_scaling={"type": "linear", "factor": 4.0}))
    assert config.rope == RopeSpec(rope_type="linear", factor=4.0)


def test_llama3_scaling_without_its_original_length_takes_the_models_own(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = read_config(folder_with(tmp_path, "llama3-rope_theta", rope_scaling=scaling))
    assert config.rope.original_max_position == 131072


def test_layer_types_win_over_max_window_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    config = read_config(folder_with(tmp_path, layer_types=kinds, sliding_window=64))
    assert config.windows == (64, None, 64, None, 64, None)


def test_a_sliding_layer_without_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="layer_types"):
        read_config(folder_with(tmp_path, layer_types=["sliding_attention"] * 6, use_sliding_window=False))


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), (..., ()), (-1, ()), ([], ())])
def test_end_tokens_may_be_one_several_or_none(eos: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    assert read_config(folder_with(tmp_path, eos_token_id=eos)).eos_ids == ids


def test_generation_config_names_the_end_tokens_and_proposes_sampling(tmp_path: Path) -> None:
    folder_with(tmp_path, eos_token_id=1)
    proposal = {"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": "many"}
    (tmp_path / "generation_config.json").write_text(json.dumps(proposal))
    config = read_config(tmp_path)
    assert config.eos_ids == (5, 6)
    assert config.generation == GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=None)


def test_a_generation_config_that_is_silent_about_end_tokens_leaves_those_of_the_model(tmp_path: Path) -> None:
    folder_with(tmp_path, eos_token_id=4)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_config(tmp_path).eos_ids == (4,)


@pytest.mark.parametrize(("content", "words"), [("{", "not valid JSON"), ("[]", "JSON object"), ("\udcff", "JSON")])
def test_a_damaged_config_is_refused_by_the_name_of_the_file(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=f"config.json.*{words}"):
        read_config(tmp_path)


def test_a_folder_without_a_config_or_no_folder_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_config(tmp_path / "nowhere")


def test_fields_nobody_here_knows_are_logged_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_config(folder_with(tmp_path, some_new_field=3, _private=4))
    assert "fields=some_new_field" in caplog.text


def test_identity_ignores_what_does_not_change_the_kv(tmp_path: Path) -> None:
    first = read_config(folder_with(tmp_path)).identity()
    assert first == read_config(folder_with(tmp_path, eos_token_id=3, max_position_embeddings=9)).identity()
    assert first != read_config(folder_with(tmp_path, rope_theta=5.0)).identity()
    assert first != read_config(folder_with(tmp_path, sliding_window=5)).identity()
    assert json.loads(json.dumps(first)) == first, "plain values only"
