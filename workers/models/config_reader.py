"""A Hugging Face folder's config.json and generation_config.json as one ModelConfig.

Reads both forms: `rope_theta` + `rope_scaling` + `torch_dtype` (transformers 4) and `rope_parameters` + `dtype` (5).
What is absent has transformers' default for that family. What would change the computation and is not supported is
refused with the name of the field: a model that runs is a model that is computed right. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvbank.errors import ModelError

log = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CANARY = "kvbank_canary"                     # workers/canary.py: read like a mistral without a window of its own
DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3")

# Read below, or without effect on the logits of a decoder at inference.
READ = frozenset((
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "dtype", "torch_dtype", "eos_token_id", "bos_token_id",
))
IGNORED = frozenset((
    "architectures", "attention_dropout", "auto_map", "initializer_range", "pad_token_id", "pretraining_tp",
    "transformers_version", "use_cache", "id2label", "label2id", "return_dict", "output_attentions",
    "output_hidden_states", "tokenizer_class", "task_specific_params", "is_decoder",
))
# Harmless at these values (and at null); anything else is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "mlp_bias": (False,), "partial_rotary_factor": (1, 1.0), "quantization_config": (),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "logit_scale": (1, 1.0), "no_rope_layers": (),
    "num_experts": (0,), "num_local_experts": (0,), "residual_multiplier": (1.0,), "attention_multiplier": (),
    "embedding_multiplier": (1.0,), "logits_scaling": (1.0,), "use_mrope": (False,), "is_encoder_decoder": (False,),
    "add_cross_attention": (False,), "rope_interleaved": (False,), "attention_chunk_size": (),
    "use_qk_norm": (False,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Which rotation a head's pairs get. `factor` and below have a meaning only for the scaled types."""

    rope_type: str = "default"               # default | linear | llama3
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0           # positions the unscaled model was trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json proposes; None where it is silent. The request always wins."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """All that the decoder, the vault and the gateway need to know of a model folder."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]          # per layer: a query at p sees keys p-window+1 .. p; None: all before it
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    max_position: int
    dtype: str                               # of the checkpoint; what is computed in is the worker's choice
    eos_ids: tuple[int, ...]                 # generation_config.json's, else config.json's
    bos_id: int | None
    generation: GenerationDefaults

    def identity(self) -> dict[str, Any]:
        """The fields that decide what KV a token gives, as plain values: for the model digest."""
        fields = asdict(self)
        for unrelated in ("dtype", "eos_ids", "bos_id", "generation", "max_position"):
            del fields[unrelated]
        return fields | {"windows": list(self.windows)}


def read_config(folder: str | Path) -> ModelConfig:
    """The folder's model. Raises ModelError naming the file, or the field and its value."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    raw = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    return _Reader(folder / "config.json", raw).config(generation)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must be a JSON object, not {type(raw).__name__}")
    return raw


class _Reader:
    """One config.json being read; every complaint names the file, the field and its value."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw

    def config(self, generation: dict[str, Any]) -> ModelConfig:
        family = self.raw.get("model_type")
        if family not in FAMILIES and family != CANARY:
            raise self.refuse("model_type", f"supported are {', '.join(FAMILIES)}")
        self._refuse_unsupported()
        heads, hidden = self.count("num_attention_heads"), self.count("hidden_size")
        head_dim = self._head_dim(family, hidden, heads)
        kv_heads = self._kv_heads(family, heads)
        layers = self.count("num_hidden_layers")
        bias = self.flag("attention_bias", False) if family in ("llama", "qwen3") else False
        return ModelConfig(
            model_type=family,
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_eps=self.number(self.raw, "rms_norm_eps", 1e-6),
            rope=self._rope(),
            windows=self._windows(family, layers),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            qk_norm=family == "qwen3",
            tie_embeddings=self.flag("tie_word_embeddings", False),
            max_position=self.count("max_position_embeddings"),
            dtype=self._dtype(),
            eos_ids=self._eos(generation),
            bos_id=self._token_id("bos_token_id", self.raw.get("bos_token_id")),
            generation=_generation_defaults(generation),
        )

    def refuse(self, field: str, why: str) -> ModelError:
        value: Any = self.raw
        for part in field.split("."):
            value = value.get(part, "(absent)") if isinstance(value, dict) else "(absent)"
        return ModelError(f"{self.path}: {field} = {value!r} is not supported: {why}")

    def _refuse_unsupported(self) -> None:
        for field, neutral in NEUTRAL.items():
            value = self.raw.get(field)
            if value is not None and not any(value is n if isinstance(n, bool) else value == n for n in neutral):
                raise self.refuse(field, f"only {' or '.join(map(repr, neutral))} is" if neutral else "leave it out")
        unknown = [key for key in self.raw if not key.startswith("_") and key not in READ | IGNORED | NEUTRAL.keys()]
        if unknown:
            log.warning("model_config_fields_not_known file=%s fields=%s", self.path, ",".join(sorted(unknown)))

    def count(self, field: str) -> int:
        value = self.raw.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(field, "a positive integer is needed")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.raw.get(field, default)
        if not isinstance(value, bool):
            raise self.refuse(field, "true or false is needed")
        return value

    def number(self, table: dict[str, Any], field: str, default: float | None, prefix: str = "") -> float:
        value = table.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refuse(prefix + field, "a positive number is needed")
        return float(value)

    def _head_dim(self, family: str, hidden: int, heads: int) -> int:
        if self.raw.get("head_dim") is not None:
            head_dim = self.count("head_dim")
        elif family == "qwen3" and "head_dim" not in self.raw:
            head_dim = 128                   # this family's default does not follow from the width
        elif hidden % heads:
            raise self.refuse("num_attention_heads", f"hidden_size {hidden} is not a multiple, and head_dim is absent")
        else:
            head_dim = hidden // heads
        if head_dim % 2:
            raise ModelError(f"{self.path}: head_dim = {head_dim} is not supported: rotary pairs need an even number")
        return head_dim

    def _kv_heads(self, family: str, heads: int) -> int:
        if self.raw.get("num_key_value_heads") is None:
            if family != "llama" and "num_key_value_heads" not in self.raw:
                raise self.refuse("num_key_value_heads", f"{family} has no natural default, write it out")
            return heads
        kv_heads = self.count("num_key_value_heads")
        if heads % kv_heads:
            raise self.refuse("num_key_value_heads", f"num_attention_heads {heads} is not a multiple of it")
        return kv_heads

    def _rope(self) -> RopeSpec:
        name = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        table = self.raw.get(name) or {}
        if not isinstance(table, dict):
            raise self.refuse(name, "an object is needed")
        if any(isinstance(value, dict) for value in table.values()):
            raise self.refuse(name, "one rotation for all layers is needed, not one per layer type")
        rope_type = table.get("rope_type", table.get("type", "default"))
        field = f"{name}.{'rope_type' if 'rope_type' in table else 'type'}"
        if rope_type not in ROPE_TYPES:
            raise self.refuse(field, f"supported are {', '.join(ROPE_TYPES)}")
        if table.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.refuse(f"{name}.partial_rotary_factor", "whole heads are rotated")
        theta = self.number(table, "rope_theta", None, f"{name}.") if table.get("rope_theta") is not None else \
            self.number(self.raw, "rope_theta", 10000.0)
        if rope_type == "default":
            return RopeSpec(theta=theta)
        factor = self.number(table, "factor", None, f"{name}.")
        if rope_type == "linear":
            return RopeSpec(rope_type="linear", theta=theta, factor=factor)
        low, high = (self.number(table, key, None, f"{name}.") for key in ("low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise self.refuse(f"{name}.high_freq_factor", f"it must exceed low_freq_factor {low}")
        key = "original_max_position_embeddings"
        # As transformers does: the field beside wins over the one inside; the model's own length stands in for both.
        original = self.raw.get(key) or table.get(key) or self.raw.get("max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise self.refuse(f"{name}.{key}", "a positive integer is needed")
        return RopeSpec(rope_type="llama3", theta=theta, factor=factor, low_freq_factor=low, high_freq_factor=high,
                        original_max_position=original)

    def _windows(self, family: str, layers: int) -> tuple[int | None, ...]:
        window = self.raw.get("sliding_window", 4096 if family in ("mistral", "qwen2", "qwen3") else None)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise self.refuse("sliding_window", "a positive integer or null is needed")
        kinds = self.raw.get("layer_types")
        if family == "llama" and window is not None:
            raise self.refuse("sliding_window", "this family attends to everything before it")
        if family in ("llama", "mistral", CANARY):
            wanted = "full_attention" if window is None else "sliding_attention"
            if kinds is not None and any(kind != wanted for kind in kinds):
                raise self.refuse("layer_types", f"all layers of this model are {wanted}")
            return (window,) * layers
        if not self.flag("use_sliding_window", False):
            window = None
        if kinds is None:
            first = self.raw.get("max_window_layers", 28)
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise self.refuse("max_window_layers", "an integer of at least 0 is needed")
            return tuple(window if layer >= first else None for layer in range(layers))
        if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise self.refuse("layer_types", f"{layers} entries of full_attention or sliding_attention are needed")
        if window is None and "sliding_attention" in kinds:
            raise self.refuse("layer_types", "a sliding layer needs use_sliding_window and sliding_window")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def _dtype(self) -> str:
        field = "dtype" if self.raw.get("dtype") is not None else "torch_dtype"
        name = self.raw.get(field)
        if name is None:
            return "float32"
        short = name.removeprefix("torch.") if isinstance(name, str) else name
        if short not in DTYPES:
            raise self.refuse(field, f"supported are {', '.join(DTYPES)}")
        return str(short)

    def _eos(self, generation: dict[str, Any]) -> tuple[int, ...]:
        value = generation.get("eos_token_id")
        if value is None:
            value = self.raw.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(found for token in ids if (found := self._token_id("eos_token_id", token)) is not None)

    def _token_id(self, field: str, value: Any) -> int | None:
        if value is None or value == -1:     # -1: some writers' "none"
            return None
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{self.path}: {field} = {value!r} is not supported: "
                             "a token id, a list of them or null is needed")
        return value


def _generation_defaults(raw: dict[str, Any]) -> GenerationDefaults:
    """Proposals only, so a value of the wrong kind is as good as none."""
    def proposal(field: str, *kinds: type) -> Any:
        value = raw.get(field)
        return value if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)) else None

    return GenerationDefaults(
        do_sample=proposal("do_sample", bool), temperature=proposal("temperature", int, float),
        top_p=proposal("top_p", int, float), top_k=proposal("top_k", int),
    )
