"""What a canary answers by itself: one sequence, one process, plain arrays. The oracle of every canary test.

Shares the canary's functions of a row and the kernel's hash of a token, and no code that keeps, moves or finds KV: no slot,
no span, no key, no batch. A row's sum is the running sum up to it, less the running sum at the window's edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvbank.kernels.digest import from_limbs, raw_words, token_hashes
from kvbank.workers.canary import CanaryRows, read_key
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.sampler import SamplingParams, sample


class CanaryAlone:
    """One canary folder, ready to answer."""

    def __init__(self, folder: str | Path, *, dtype: str = "float32") -> None:
        """dtype: of the workers' KV, because its bytes are what is hashed. Raises ModelError."""
        self._spec = read_config(folder)
        self._rows = CanaryRows(read_key(folder), self._spec, dtype)

    def answer(
        self, prompt: Sequence[int], max_tokens: int, *, tenant: str = "default", sampling: SamplingParams | None = None
    ) -> list[int]:
        """The next `max_tokens` tokens after the prompt. No token ends it. Cost: some ms per 1,000 tokens of prompt."""
        sampling = sampling or SamplingParams()
        run = _Run(self._rows, self._spec.num_layers, self._spec.windows, self._spec.num_heads // self._spec.num_kv_heads)
        state = run.feed(tenant, prompt)
        tokens: list[int] = []
        while True:
            position = len(prompt) + len(tokens)
            tokens += sample(self._rows.logits(state[-1:]), [sampling], [position])
            if len(tokens) == max_tokens:
                return tokens
            state = run.feed(tenant, tokens[-1:])


class _Run:
    """One sequence: per layer the running sums of its tokens' hashes, [n + 1, kv_heads, 2]."""

    def __init__(self, rows: CanaryRows, layers: int, windows: Sequence[int | None], group: int) -> None:
        self._rows, self._windows, self._group = rows, windows, group
        self._sums: list[np.ndarray | None] = [None] * layers
        self._length = 0

    def feed(self, tenant: str, token_ids: Sequence[int]) -> np.ndarray:
        """The states of these next tokens after the last layer, [n, 2]."""
        positions = np.arange(self._length, self._length + len(token_ids))
        self._length += len(token_ids)
        state = self._rows.begin([tenant] * len(token_ids), positions, np.asarray(token_ids))
        for layer, window in enumerate(self._windows):
            k, v = self._rows.kv(state, layer)
            hashes = token_hashes(raw_words(k), raw_words(v), positions[:, None])
            sums = self._append(layer, hashes)
            first = 0 * positions if window is None else np.maximum(positions + 1 - window, 0)
            seen = (sums[positions + 1] - sums[first]).repeat(self._group, axis=1)
            state = self._rows.absorb(state, seen * (from_limbs(self._rows.query(state, layer)) | np.uint64(1)))
        return state

    def _append(self, layer: int, hashes: np.ndarray) -> np.ndarray:
        before = self._sums[layer]
        if before is None:
            before = np.zeros((1, *hashes.shape[1:]), dtype=np.uint64)
        grown = np.concatenate([before, before[-1] + np.cumsum(hashes, axis=0, dtype=np.uint64)])
        self._sums[layer] = grown
        return grown
