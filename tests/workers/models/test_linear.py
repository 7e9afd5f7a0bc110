"""Packed products against plain ones, and the property that `bitwise` rests on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from kvbank.workers.models import linear as linear_module
from kvbank.workers.models.linear import (
    PackedGate,
    PackedLinear,
    PlainGate,
    PlainLinear,
    WideGate,
    WideLinear,
    arithmetic,
    can_pack,
    packing,
)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(96, 320), (352, 130), (512, 1024)]                # (in, out); 130: no multiple of any vector width


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def need_packed(dtype: torch.dtype) -> None:
    if not can_pack(dtype, "cpu"):
        pytest.skip(f"oneDNN has no packed products for {dtype} on this CPU")


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_products_equal_plain_ones(
    shape: tuple[int, int], rows: int, biased: bool, dtype: torch.dtype
) -> None:
    need_packed(dtype)
    torch.manual_seed(0)
    weight, bias = torch.randn(shape[::-1]).mul_(0.1).to(dtype), torch.randn(shape[1]).to(dtype) if biased else None
    x, other = torch.randn(rows, shape[0]).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    packed, plain = PackedLinear(weight, bias), PlainLinear(weight, bias)
    expected = plain(x)
    torch.testing.assert_close(packed(x), expected, **tolerance(dtype))
    torch.testing.assert_close(PackedLinear(weight, bias, shared=True)(x), expected, **tolerance(dtype))
    torch.testing.assert_close(packed.plus(x, other), expected + other, **tolerance(dtype))
    torch.testing.assert_close(packed.times(x, other), expected * other, **tolerance(dtype))
    torch.testing.assert_close(packed.silu(x), F.silu(expected), **tolerance(dtype))
    torch.testing.assert_close(plain.plus(x, other.clone()), expected + other, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packed_gate_equals_the_plain_one(dtype: torch.dtype) -> None:
    need_packed(dtype)
    torch.manual_seed(0)
    gate_up, x = torch.randn(2 * 130, 96).mul_(0.1).to(dtype), torch.randn(5, 96).to(dtype)
    torch.testing.assert_close(PackedGate(gate_up, 130)(x), PlainGate(PlainLinear(gate_up), 130)(x), **tolerance(dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (11008, 64)])     # 11008: a sum too long for one pass
def test_a_row_of_a_packed_product_does_not_depend_on_the_number_of_rows(
    shape: tuple[int, int], dtype: torch.dtype, threads: int, torch_threads
) -> None:
    need_packed(dtype)
    torch_threads(threads)
    torch.manual_seed(0)
    linear, x = PackedLinear(torch.randn(shape[::-1]).to(dtype)), torch.randn(512, shape[0]).to(dtype)
    factor = torch.randn(512, shape[1]).to(dtype)
    eights = [slice(start, start + 8) for start in range(0, 512, 8)]
    for product in (linear, linear.silu):
        by_eights = torch.cat([product(x[rows]) for rows in eights])
        assert all(torch.equal(product(x[:count]), by_eights[:count]) for count in (16, 24, 56, 64, 128, 264, 512))
    for product in (linear.plus, linear.times):
        by_eights = torch.cat([product(x[rows], factor[rows]) for rows in eights])
        assert all(torch.equal(product(x[:n], factor[:n].clone()), by_eights[:n]) for n in (16, 24, 56, 128, 264, 512))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_product_is_the_exact_one_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(130, 96).mul_(0.1).to(dtype), torch.randn(130).to(dtype)
    x, other = torch.randn(9, 96).to(dtype), torch.randn(9, 130).to(dtype)
    wide = WideLinear(weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    ulp = torch.finfo(dtype).eps
    for found, expected in ((wide(x), exact), (wide.plus(x, other), exact + other)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=ulp, atol=1e-5)
    gate = torch.randn(2 * 130, 96).mul_(0.1).to(dtype)
    left, right = F.linear(x.double(), gate.double()).split(130, dim=-1)
    found = WideGate(gate, 130)(x)
    torch.testing.assert_close(found.double(), F.silu(left) * right, rtol=ulp, atol=1e-5)


def test_a_type_without_packed_products_is_packed_in_a_wider_one() -> None:
    assert packing(torch.float32, "cpu") == torch.float32
    assert packing(torch.float16, "cpu") == torch.float32
    assert packing(torch.bfloat16, "cpu") == (torch.bfloat16 if can_pack(torch.bfloat16, "cpu") else torch.float32)
    assert packing(torch.float16, "cuda") is None


def test_the_arithmetic_has_a_name_that_hangs_on_the_packing_and_not_on_the_threads(monkeypatch, torch_threads) -> None:
    names = set()
    for threads in (1, 2, 3):
        torch_threads(threads)
        arithmetic.cache_clear()
        names.add((arithmetic(torch.float32, "cpu"), arithmetic(torch.float16, "cpu")))
    ((single, half),) = names
    assert single.startswith("float32-") and half == single
    arithmetic.cache_clear()
    monkeypatch.setattr(linear_module, "can_pack", lambda dtype, device: False)
    assert arithmetic(torch.float32, "cpu") == "plain"
    arithmetic.cache_clear()


def test_other_instructions_give_the_arithmetic_another_name() -> None:
    told = "import torch; from kvbank.workers.models.linear import arithmetic; print(arithmetic(torch.float32, 'cpu'))"
    names = [subprocess.run([sys.executable, "-c", told], env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa}, capture_output=True,
                            text=True, check=True, stdin=subprocess.DEVNULL).stdout for isa in ("SSE41", "DEFAULT")]
    assert names[0] != names[1]


def test_a_device_or_dtype_without_packed_products_is_told() -> None:
    assert not can_pack(torch.float16, "cpu")
    assert not can_pack(torch.float32, "cuda")
