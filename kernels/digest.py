"""Attention that forgives nothing: a sum over hashes of the bytes instead of a weighted sum over values. CPU.

    token   h(p, head) = mix(keys . K bytes + keys' . V bytes, p)         128 bits, as two lanes of 64
    partial            = q * (sum of h over the keys that the row sees)   q: the row's own odd multiplier, per head
    merge              = addition, lane by lane, modulo 2^64

It runs where the real ops run, on the same segments, slots, wire and staging, so that a wrong byte anywhere, a key seen
twice, left out, or at another position, gives another sum. Addition is exact and has no order: whoever holds which part,
the merged bits are the same. One flipped bit always changes its token's lanes (the keys are odd); several differences
cancel with a chance of 2^-128.

128 bits travel as 16 numbers from 0 to 255 in the last dimension, exact in float32, bfloat16 and float16 alike: lane 0
first, each little-endian. So a head has 16 elements, as a query and as a result. lse is 0: nothing is normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvbank.kernels.segments import Geometry, Partials, Segment, visible_pairs

DIGEST = "digest"                            # the kernel's id, where others are named "fast" and "bitwise"
HEAD_DIM = 16                                # 128 bits in bytes

_GOLDEN = 0x9E3779B97F4A7C15
_MOST_WORDS = 64                             # of 8 bytes in one head's K or V


def mix(words: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every output bit depends on every input bit (the finalizer of splitmix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


_KEYS = mix(np.arange(1, 4 * _MOST_WORDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)).reshape(2, _MOST_WORDS, 2) | np.uint64(1)
_LANES = mix(np.array([3, 5], dtype=np.uint64) * np.uint64(_GOLDEN))


def token_hashes(k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The two lanes of each token.

    k, v: [..., n] uint64, the raw bytes of one head's key and value; positions: what the leading dimensions broadcast to.
    Returns [..., 2] uint64.
    """
    size = k.shape[-1]
    sums = k @ _KEYS[0, :size] + v @ _KEYS[1, :size]
    place = positions[..., None].astype(np.uint64) * np.uint64(_GOLDEN) + _LANES
    return mix(sums ^ mix(place))


def from_limbs(limbs: Tensor) -> np.ndarray:
    """[..., 16] numbers from 0 to 255 -> [..., 2] uint64."""
    raw = limbs.detach().to("cpu", torch.float32).to(torch.uint8).contiguous().numpy()
    return raw.view("<u8").astype(np.uint64, copy=False)


def to_limbs(lanes: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of from_limbs."""
    raw = np.ascontiguousarray(lanes.astype("<u8", copy=False)).view(np.uint8)
    return torch.from_numpy(raw).to(dtype)


def raw_words(values: Tensor) -> np.ndarray:
    """[..., d] of any dtype -> its bytes as [..., n] uint64, n = d * itemsize / 8."""
    return values.contiguous().view(torch.uint8).numpy().view("<u8").astype(np.uint64, copy=False)


def merge_digest(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Any number of partials (out [T, H, 16], lse [T, H]) over disjoint keys -> the partial over all of them."""
    lanes = from_limbs(parts[0][0])
    for out, _ in parts[1:]:
        lanes = lanes + from_limbs(out)
    return to_limbs(lanes), parts[0][1]


class DigestPlan:
    """Which row sums which tokens. Oracle: reference.digest."""

    def __init__(self, segments: list[Segment], geometry: Geometry, window: int | None) -> None:
        self._geometry = geometry
        self._pairs = pairs = visible_pairs(segments, geometry.span_tokens, window)
        places = np.stack([pairs.slot, pairs.span], axis=1)              # a slot counts anew at each place it is read at
        distinct, self._place_of = np.unique(places, axis=0, return_inverse=True)
        self._slots = torch.from_numpy(distinct[:, 0].copy())
        self._positions = distinct[:, 1:] * geometry.span_tokens + np.arange(geometry.span_tokens)

    def run(self, q: Tensor, kv: Tensor, scale: float) -> Partials:
        """As paged_attention; `scale` has no meaning. Raises ValueError for heads of another size than 16."""
        geometry, pairs = self._geometry, self._pairs
        if q.shape[2] != HEAD_DIM:
            raise ValueError(f"a head has {q.shape[2]} elements, but 128 bits are {HEAD_DIM}")
        sums = np.zeros((geometry.num_rows, geometry.kv_heads, 2), dtype=np.uint64)
        if len(pairs):
            words = raw_words(kv.index_select(0, self._slots))           # [places, 2, Hk, S, n]
            hashes = token_hashes(words[:, 0], words[:, 1], self._positions[:, None])
            before = np.zeros((*hashes.shape[:2], geometry.span_tokens + 1, 2), dtype=np.uint64)
            np.cumsum(hashes, axis=2, out=before[:, :, 1:])              # modulo 2^64, as all sums here
            seen = before[self._place_of, :, pairs.stop] - before[self._place_of, :, pairs.start]
            np.add.at(sums, pairs.row, seen)
        odd = from_limbs(q) | np.uint64(1)
        return Partials(whole=(to_limbs(sums.repeat(geometry.group, axis=1) * odd), torch.zeros(q.shape[:2])))
