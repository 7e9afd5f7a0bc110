"""Canary: a fake model that dies of one wrong byte, behind the same seam as the decoder.

    state  s0 = stir(key, tenant, position, token)                         128 bits a row
    layer  k, v = expand(s)     q = expand'(s)     sums = attend(q, k, v)     s = stir(s, sums)
    token  chosen by s after the last layer

Attention is the digest kernel (kernels/digest.py), so a row's sums depend on every KV byte that it sees, and with them its
own KV in the layers above and its token: KV is a keyed pseudo-random function of model, tenant, position, layer and the
whole prefix. A byte that is stale, swapped, cut off, flipped or another tenant's changes the next token but for a chance
of one in the vocabulary, and every token after it. No arithmetic is tested here; the decoder under `bitwise` does that.

A folder with `"model_type": "kvbank_canary"` is a canary (docs/decisions/0018); `write_canary` makes one. What it answers
alone, without a cache, says workers/canary_alone.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbank.errors import ModelError
from kvbank.kernels.digest import HEAD_DIM, from_limbs, mix, to_limbs
from kvbank.workers.batch import PlannedRows
from kvbank.workers.models.config_reader import CANARY, ModelConfig
from kvbank.workers.models.random_model import byte_level_tokenizer
from kvbank.workers.weights import TORCH_DTYPES

VOCAB = 65536
KEY_FILE, KEY_NAME = "model.safetensors", "canary.key"
LIKELY = (40.0, 39.0, 38.5, 38.0)            # logits of the tokens that may come next; all others have 0

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xD1B54A32D192ED03)
# The highest bit of each number's exponent stays clear: finite, whatever the other bits are.
_FINITE = {4: np.uint64(0xBFFFFFFFBFFFFFFF), 2: np.uint64(0xBFFFBFFFBFFFBFFF)}


class Attend(Protocol):
    """The part of workers.attend.JoinedAttention that the canary needs."""

    @property
    def rows(self) -> Sequence[PlannedRows]:
        """Whose rows these are."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class CanaryRows:
    """What the canary makes of rows, as pure functions of a key. States are [T, 2] uint64. Knows nothing of a cache."""

    def __init__(self, key: bytes, spec: ModelConfig, dtype: str) -> None:
        """Raises ModelError when the shape is not one that 128 bits fit into."""
        if spec.head_dim != HEAD_DIM or spec.hidden_size != HEAD_DIM:
            raise ModelError(f"a canary has head_dim and hidden_size {HEAD_DIM}, not {spec.head_dim} and {spec.hidden_size}")
        self._spec, self.dtype = spec, TORCH_DTYPES[dtype]
        self._key = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), dtype="<u8").astype(np.uint64)

    def begin(self, tenants: Sequence[str], positions: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """States before the first layer; one tenant, position and token a row."""
        named = {tenant: _tenant_word(tenant) for tenant in dict.fromkeys(tenants)}
        state = np.broadcast_to(self._key, (len(tenants), 2))
        state = stir(state, np.array([named[tenant] for tenant in tenants], dtype=np.uint64))
        return stir(stir(state, positions.astype(np.uint64)), token_ids.astype(np.uint64))

    def query(self, state: np.ndarray, layer: int) -> Tensor:
        """[T, heads, 16]: a multiplier for each head."""
        heads = self._spec.num_heads
        return to_limbs(expand(state, 2 * layer, 2 * heads).reshape(-1, heads, 2), self.dtype)

    def kv(self, state: np.ndarray, layer: int) -> tuple[Tensor, Tensor]:
        """K and V, [T, kv_heads, 16] each, in the layout's dtype: any bytes that are finite numbers."""
        size = self.dtype.itemsize
        heads, words = self._spec.num_kv_heads, HEAD_DIM * size // 8
        raw = expand(state, 2 * layer + 1, 2 * heads * words) & _FINITE[size]
        both = torch.from_numpy(raw.astype("<u8").view(np.uint8)).view(self.dtype).view(-1, 2, heads, HEAD_DIM)
        return both[:, 0], both[:, 1]

    def absorb(self, state: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """The state after a layer. sums: [T, heads, 2] uint64, what attention gave."""
        for word in sums.reshape(len(sums), -1).T:
            state = stir(state, word)
        return state

    def logits(self, state: np.ndarray) -> Tensor:
        """[R, vocab] float32: four tokens are likely, and which ones hangs on all 128 bits."""
        vocab = self._spec.vocab_size
        ids = (expand(state, -1, len(LIKELY)) % np.uint64(vocab)).astype(np.int64)
        logits = np.zeros((len(state), vocab), dtype=np.float32)
        for column in reversed(range(len(LIKELY))):                      # should two be the same, the likelier one counts
            logits[np.arange(len(state)), ids[:, column]] = LIKELY[column]
        return torch.from_numpy(logits)


class Canary:
    """Layers `layers` of it. Not thread-safe: one engine thread drives it."""

    def __init__(self, folder: str | Path, spec: ModelConfig, layers: range, *, dtype: str) -> None:
        """Raises ModelError."""
        self._rows = CanaryRows(read_key(folder), spec, dtype)
        self._layers = layers

    def forward(self, token_ids: Tensor | None, hidden: Tensor | None, positions: Tensor, attend: Attend) -> Tensor:
        """As Decoder.forward; hidden states are the rows' states, [T, 16] in the layout's dtype."""
        rows = self._rows
        if token_ids is not None:
            state = rows.begin(_tenants(attend.rows, len(token_ids)), positions.numpy(), token_ids.numpy())
        else:
            assert hidden is not None
            state = from_limbs(hidden)
        for local, layer in enumerate(self._layers):
            out = attend(local, rows.query(state, layer), *rows.kv(state, layer))
            state = rows.absorb(state, from_limbs(out))
        return to_limbs(state, rows.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, 16] -> [R, vocab] float32."""
        return self._rows.logits(from_limbs(hidden))


def stir(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    """[T, 2] and [T] uint64 -> [T, 2]: for each word a bijection of the state."""
    low = mix(state[:, 0] + word * _GOLDEN + np.uint64(1))
    high = mix((state[:, 1] + word * _OTHER) ^ low)
    return np.stack([low + high, high], axis=1)


def expand(state: np.ndarray, label: int, number: int) -> np.ndarray:
    """[T, 2] -> [T, number] uint64, other ones for each label."""
    counters = mix(np.uint64((label & 0xFFFF) << 32) + np.arange(1, number + 1, dtype=np.uint64))
    return mix(mix(state[:, :1] + counters) ^ (state[:, 1:] + counters * _OTHER))


def _tenants(rows: Sequence[PlannedRows], number: int) -> list[str]:
    """The tenant of each row; padding is nobody's."""
    tenants = [""] * number
    for planned in rows:
        tenants[planned.first_row : planned.first_row + planned.num_rows] = [planned.tenant] * planned.num_rows
    return tenants


def _tenant_word(tenant: str) -> int:
    return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8).digest(), "little")


# -- the folder --------------------------------------------------------------------------------------------------------

def read_key(folder: str | Path) -> bytes:
    """The canary's key, from its weight file. Raises ModelError."""
    path = Path(folder) / KEY_FILE
    try:
        return load_file(path)[KEY_NAME].numpy().tobytes()
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{path} does not hold a canary's key: {error}") from error


def write_canary(
    folder: str | Path, *, seed: int = 0, num_layers: int = 3, heads: int = 2, kv_heads: int = 2, vocab: int = VOCAB,
    max_position: int = 131072, sliding_window: int | None = None,
) -> Path:
    """Write config.json, the key and a byte-level tokenizer; the same bytes for the same call. Returns the folder.

    vocab: at least 65,536, since a wrong byte stays unseen with a chance of 1 in so many. sliding_window: of every layer.
    """
    assert vocab >= VOCAB, f"a vocabulary of {vocab} forgives too much"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["KvbankCanary"], "model_type": CANARY, "vocab_size": vocab, "hidden_size": HEAD_DIM,
        "intermediate_size": HEAD_DIM, "num_hidden_layers": num_layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM, "max_position_embeddings": max_position,
        "sliding_window": sliding_window, "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")
    byte_level_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    key = hashlib.blake2b(f"kvbank canary {seed}".encode(), digest_size=32).digest()
    save_file({KEY_NAME: torch.frombuffer(bytearray(key), dtype=torch.uint8)}, folder / KEY_FILE, metadata={"format": "pt"})
    return folder
