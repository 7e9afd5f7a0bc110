"""A run's checkpoint as a Hugging Face folder, and back: python -m bench.needle.export RUN_FOLDER MODEL_FOLDER

The names of the tensors are those of LlamaForCausalLM; transformers and kvbank's own decoder read the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.needle import tokenizer
from bench.needle.model import Llama, Shape

MAX_POSITION = 8192                      # the longest page that was measured; the card says what was trained
# A conversation is the texts one after another; an answer is asked for as in training.
CHAT = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '\\nAnswer: ' + message['content']"
        " + eos_token }}{% elif message['role'] == 'user' %}{{ '\\nQuestion: ' + message['content'] }}{% else %}"
        "{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.needle.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    weights = load_file(args.run / "checkpoint" / "weights.safetensors")
    write_folder(args.folder, weights, Shape(), args.run / "tokenizer.json")
    return 0


def write_folder(folder: Path, weights: dict[str, Tensor], shape: Shape, tokenizer_file: Path) -> None:
    """config.json, generation_config.json, model.safetensors (float32), tokenizer.json, tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = tokenizer.load(tokenizer_file)
    bos, eos, pad = (vocab.token_to_id(token) for token in tokenizer.SPECIALS)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(shape), "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITION, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "torch_dtype": "float32", "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad,
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False})
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.BOS, "eos_token": tokenizer.EOS,
        "pad_token": tokenizer.PAD, "clean_up_tokenization_spaces": False, "model_max_length": MAX_POSITION,
        "chat_template": CHAT,
    })
    save_file({_long(name): tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    if tokenizer_file.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


def read_model(folder: Path) -> Llama:
    """The folder's model, or that of a run's checkpoint, ready to be evaluated."""
    if (folder / "checkpoint").is_dir():
        model, weights = Llama(Shape()), load_file(folder / "checkpoint" / "weights.safetensors")
    else:
        config = json.loads((folder / "config.json").read_text())
        model = Llama(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
        weights = {_short(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval()


def _long(name: str) -> str:
    return f"model.{name}"


def _short(name: str) -> str:
    return name.removeprefix("model.")


def _write(path: Path, fields: dict[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
