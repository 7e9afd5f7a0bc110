"""The matrix products of a layer, by what this machine does fastest; chosen once per decoder.

    plain    torch's own `linear`: any device and dtype
    packed   oneDNN inner products on weights in its blocked order, with the activation, product or sum that follows
             done on the way out: CPU, float32 and, with AVX-512, bfloat16
    wide     packed in float32 for a narrower type, its rows widened before and the result rounded once after: CPU
             without instructions for that type, at four bytes a weight

Packed was chosen by measurement (2 cores with AVX-512, torch 2.13, 512 wide, interleaved): float32 takes 0.4 to 0.6 of
plain's time at 8 to 512 rows, where plain runs MKL's narrower kernels, and bfloat16 0.6 at 1 to 8 rows. And from 2 rows
on a row's bits do not depend on how many rows stand beside it, which `exactness="bitwise"` needs and a test demands.
The packed copy replaces the plain matrix. On a CPU without AVX-512 bfloat16 products fall back to loops that take 3 to 9
times as long as wide ones (docs/decisions/0019).
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """x [T, in] -> [T, out], `bias` included where there is one."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        """The product plus addend [T, out]; the addend may be overwritten and returned."""
        ...


class PlainLinear:
    """weight [out, in], any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        return addend.add_(self(x))


class PackedLinear:
    """A blocked copy of weight [out, in]; the caller drops the plain one. `shared`: no copy, others use the matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> None:
        self._weight = weight if shared else torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        self._run, self._run_binary = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self._weight, self._bias, "none", [], "")

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        return self._run_binary(x, addend, self._weight, self._bias, "add")

    def silu(self, x: Tensor) -> Tensor:
        return self._run(x, self._weight, self._bias, "swish", [], "")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return self._run_binary(x, factor, self._weight, self._bias, "mul")


class PlainGate:
    """silu(x @ gate.T) * (x @ up.T) with both matrices in one, gate_up [2 * inner, hidden]."""

    def __init__(self, gate_up: Linear, inner: int) -> None:
        self._gate_up, self._inner = gate_up, inner

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).split(self._inner, dim=-1)
        return F.silu(gate).mul_(up)


class PackedGate:
    """The same as two products, the activation and the factor applied on their way out."""

    def __init__(self, gate_up: Tensor, inner: int) -> None:
        self._gate, self._up = PackedLinear(gate_up[:inner].clone()), PackedLinear(gate_up[inner:].clone())

    def __call__(self, x: Tensor) -> Tensor:
        return self._up.times(x, self._gate.silu(x))


class WideLinear:
    """Packed in float32; rows, addend and result have the type of weight [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._dtype = weight.dtype
        self._wide = PackedLinear(weight.float(), None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        return self._wide(x.float()).to(self._dtype)

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        return self._wide.plus(x.float(), addend.float()).to(self._dtype)


class WideGate:
    """The gate of float32 weights for rows of gate_up's type; what lies between its products is not rounded."""

    def __init__(self, gate_up: Tensor, inner: int) -> None:
        self._dtype, self._wide = gate_up.dtype, PackedGate(gate_up.float(), inner)

    def __call__(self, x: Tensor) -> Tensor:
        return self._wide(x.float()).to(self._dtype)


def packing(dtype: torch.dtype, device: str | torch.device) -> torch.dtype | None:
    """The type in which weights of `dtype` are packed here: the same, a wider one, or None where nothing can be packed."""
    return next((each for each in (dtype, torch.float32) if can_pack(each, device)), None)


@cache
def arithmetic(dtype: torch.dtype, device: str | torch.device) -> str:
    """Names this machine's products of `dtype`: how they are packed, and a digest of one's bits.

    Which instructions oneDNN takes hangs on more than the capability that torch names, and on its own environment.
    """
    kind = packing(dtype, device)
    if kind is None:
        return "plain"
    rows, columns = torch.arange(16 * 640).view(16, 640), torch.arange(48 * 640).view(48, 640)
    x, weight = (rows * 0.7 + 0.1).sin().to(kind), (columns * 1.3 + 0.2).cos().to(kind)
    bits = PackedLinear(weight)(x).contiguous().view(torch.uint8)
    return f"{str(kind).removeprefix('torch.')}-{hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:8]}"


def can_pack(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether this build and CPU have the packed products for `dtype`: oneDNN may be absent, or lack instructions."""
    if torch.device(device).type != "cpu" or dtype == torch.float16 or not torch.backends.mkldnn.is_available():
        return False
    try:
        probe = PackedLinear(torch.ones((16, 16), dtype=dtype))
        return bool((probe.plus(torch.ones((2, 16), dtype=dtype), torch.ones((2, 16), dtype=dtype)) == 17).all())
    except (RuntimeError, AttributeError):
        return False
