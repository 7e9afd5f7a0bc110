"""A model folder's safetensors as the fused matrices the decoder runs on. Memory-mapped, never unpickled.

    in the file                          here                    rows
    q_proj, k_proj, v_proj .weight       {layer}.qkv             (heads + 2 * kv_heads) * head_dim
    gate_proj, up_proj     .weight       {layer}.gate_up         2 * intermediate_size

A shard reads the bytes of its own layers only: its files are mapped, checked for length, and closed again.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvbank.errors import ModelError
from kvbank.workers.models.config_reader import ModelConfig

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER_BYTES = 100 << 20                 # the format's own limit
READABLE = ("F32", "BF16", "F16")            # safetensors' names


def weight_files(folder: str | Path) -> list[Path]:
    """The folder's safetensors files in a fixed order; for the model digest. Raises ModelError when there are none."""
    return sorted(set(_Checkpoint(Path(folder)).file_of_tensor.values()))


def load_weights(
    folder: str | Path, config: ModelConfig, layers: range, *, first: bool, last: bool, dtype: str
) -> dict[str, Tensor]:
    """The weights of `layers` (of the whole model's numbering), renumbered from 0, contiguous, in host memory.

    first:  also `embed` [vocab, hidden]; with tied embeddings the last shard gets it too
    last:   also `norm` [hidden] and, unless tied, `head` [vocab, hidden]
    dtype:  what the result is converted to, whatever the file holds
    Per layer: input_norm, qkv, [qkv_bias], [q_norm, k_norm], o, [o_bias], post_norm, gate_up, down.
    Raises ModelError naming the file or tensor that is missing, truncated or of the wrong shape.
    """
    if dtype not in TORCH_DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    with _Checkpoint(Path(folder)) as checkpoint:
        reader = _Reader(checkpoint, config, TORCH_DTYPES[dtype])
        weights: dict[str, Tensor] = {}
        for local, layer in enumerate(layers):
            weights |= {f"{local}.{name}": tensor for name, tensor in reader.layer(layer)}
        vocab, hidden = config.vocab_size, config.hidden_size
        if first or (last and config.tie_embeddings):
            weights["embed"] = reader.stacked(["model.embed_tokens.weight"], [(vocab, hidden)])
        if last:
            weights["norm"] = reader.stacked(["model.norm.weight"], [(hidden,)])
            if not config.tie_embeddings:
                weights["head"] = reader.stacked(["lm_head.weight"], [(vocab, hidden)])
        return weights


class _Reader:
    """Names and shapes of the family's tensors, and how they stack."""

    def __init__(self, checkpoint: _Checkpoint, config: ModelConfig, dtype: torch.dtype) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype

    def layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        c, at = self.config, f"model.layers.{layer}."
        hidden, inner = c.hidden_size, c.intermediate_size
        heads = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        attn = at + "self_attn."
        projections = [attn + p for p in ("q_proj", "k_proj", "v_proj")]
        wanted: list[tuple[str, list[str], list[tuple[int, ...]]]] = [
            ("input_norm", [at + "input_layernorm.weight"], [(hidden,)]),
            ("qkv", [p + ".weight" for p in projections], [(rows, hidden) for rows in heads]),
            ("o", [attn + "o_proj.weight"], [(hidden, heads[0])]),
            ("post_norm", [at + "post_attention_layernorm.weight"], [(hidden,)]),
            ("gate_up", [at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"], [(inner, hidden)] * 2),
            ("down", [at + "mlp.down_proj.weight"], [(hidden, inner)]),
        ]
        if c.qkv_bias:
            wanted.append(("qkv_bias", [p + ".bias" for p in projections], [(rows,) for rows in heads]))
        if c.o_bias:
            wanted.append(("o_bias", [attn + "o_proj.bias"], [(hidden,)]))
        if c.qk_norm:
            wanted += [(f"{p}_norm", [f"{attn}{p}_norm.weight"], [(c.head_dim,)]) for p in "qk"]
        self._refuse_unread(at, {name for _, names, _ in wanted for name in names})
        for name, parts, shapes in wanted:
            yield name, self.stacked(parts, shapes)

    def stacked(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """The tensors one below the other, copied out of the mapping once, each checked against its shape."""
        result = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=self.dtype)
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            result[row : row + shape[0]].copy_(self.checkpoint.tensor(name, shape))
            row += shape[0]
        return result

    def _refuse_unread(self, prefix: str, read: set[str]) -> None:
        """A tensor that this family should not have (a bias, a second norm) would silently be left out of the sum."""
        for name in self.checkpoint.file_of_tensor:
            if name.startswith(prefix) and name not in read and not name.endswith("rotary_emb.inv_freq"):
                raise ModelError(f"{self.checkpoint.folder}: tensor {name} is not part of a {self.config.model_type} "
                                 "model with this config.json (is a bias field missing there?)")


class _Checkpoint:
    """The folder's safetensors, single or sharded, every file checked for its full length before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.file_of_tensor = self._index()

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._open.clear()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A view of the mapped file, valid until the checkpoint is closed; copy what you keep."""
        path = self.file_of_tensor.get(name)
        if path is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing from the safetensors files")
        header = self._header(path)
        if name not in header:
            raise ModelError(f"{path}: tensor {name} is missing, although the index puts it there")
        found = header[name]
        if tuple(found["shape"]) != shape:
            raise ModelError(f"{path}: tensor {name} has shape {found['shape']}, config.json asks for {list(shape)}")
        if found["dtype"] not in READABLE:
            raise ModelError(f"{path}: tensor {name} has dtype {found['dtype']}; supported are {', '.join(READABLE)}")
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
        return self._open[path].get_tensor(name)

    def _index(self) -> dict[str, Path]:
        self._headers: dict[Path, dict[str, Any]] = {}
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._header(single), single)
        if not index.is_file():
            raise ModelError(f"{self.folder} holds neither model.safetensors nor model.safetensors.index.json "
                             "(other weight formats are not read)")
        try:
            files = json.loads(index.read_bytes())["weight_map"]
            if any("/" in name or name in (".", "..") for name in files.values()):
                raise ValueError("a weight file must lie in the folder itself")
            return {tensor: self.folder / name for tensor, name in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a valid safetensors index: {error}") from error

    def _header(self, path: Path) -> dict[str, Any]:
        """The file's own table of tensors, once its length has been found to hold all of them."""
        if path not in self._headers:
            self._headers[path] = _read_header(path)
        return self._headers[path]


def _read_header(path: Path) -> dict[str, Any]:
    """Safetensors: 8 bytes little-endian header length, JSON header, then the bytes it describes, without gaps."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8)) if size >= 8 else (size,)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(f"{path} is truncated or no safetensors file: {size} bytes cannot hold its header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        if any(not isinstance(entry["shape"], list) or "dtype" not in entry for entry in header.values()):
            raise ValueError("a tensor has no shape or dtype")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} has no valid safetensors header: {error}") from error
    if size != wanted:
        raise ModelError(f"{path} is {size} bytes long, but its header describes {wanted}: "
                         f"{'truncated, fetch it again' if size < wanted else 'not a plain safetensors file'}")
    return header
