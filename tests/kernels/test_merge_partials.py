"""Merging: a golden vector, any partition, blind parts, and the fixed tree."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from kvbank.kernels import reference
from kvbank.kernels.merge_partials import merge_fast, merge_pair, merge_run, merge_tree

NEG_INF = float("-inf")
MERGES = pytest.mark.parametrize("merge", [merge_fast, merge_run], ids=["fast", "run"])


def golden(rows: slice) -> tuple[Tensor, Tensor]:
    """A worked example: one query [1, 2], four keys."""
    q = torch.tensor([[[1.0, 2.0]]])
    k = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]])[rows, None]
    v = torch.tensor([[1.0, 0], [0, 1], [2, 2], [4, 0]])[rows, None]
    return reference.dense_attention(q, k, v, torch.ones(1, len(k), dtype=torch.bool), 1 / math.sqrt(2))


def partial(generator: torch.Generator, rows: int = 5, heads: int = 3, dim: int = 7) -> tuple[Tensor, Tensor]:
    out = torch.randn(rows, heads, dim, generator=generator)
    return out, 4 * torch.randn(rows, heads, generator=generator)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Equal bytes; unlike torch.equal this tells 0 from -0."""
    return all(bytes_of(x).equal(bytes_of(y)) for x, y in zip(a, b, strict=True))


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def test_the_golden_vector() -> None:
    first, rest = golden(slice(0, 1)), golden(slice(1, 4))
    assert first[0].flatten().tolist() == [1.0, 0.0]
    assert first[1].item() == pytest.approx(0.70710678)
    assert rest[0].flatten().tolist() == pytest.approx([1.53724876, 1.54566549])
    assert rest[1].item() == pytest.approx(2.59938015)
    whole = golden(slice(0, 4))
    assert whole[0].flatten().tolist() == pytest.approx([1.46687697, 1.34320575])
    for merged in (merge_pair(first, rest), merge_fast([rest, first]), merge_run([first, rest])):
        assert merged[0].flatten().tolist() == pytest.approx([1.46687697, 1.34320575])
        assert merged[1].item() == pytest.approx(whole[1].item())


@MERGES
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("seed", range(8))
def test_any_partition_in_any_order_merges_to_the_whole(seed, scale, merge) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_keys = 50
    q, k, v = (torch.randn(n, 4, 16, generator=generator) for n in (3, num_keys, num_keys))
    v = v / v.abs().max()
    seen = torch.rand(3, num_keys, generator=generator) < 0.7
    whole = reference.dense_attention(q.double(), k.double(), v.double(), seen, scale / 4)
    keys = rng.sample(range(num_keys), num_keys)
    cuts = sorted(rng.sample(range(1, num_keys), rng.randint(1, 6)))
    parts = [keys[a:b] for a, b in zip([0, *cuts], [*cuts, num_keys], strict=True)] + [[]]
    partials = [reference.dense_attention(q, k[part], v[part], seen[:, part], scale / 4) for part in parts]
    partials = [(torch.nan_to_num(out), lse) for out, lse in partials]
    for merged in (merge(partials), reference.merge(partials)):
        assert (merged[0] - whole[0]).abs().max() < 5e-6
        assert (merged[1] - whole[1]).abs().max() < 1e-4


@MERGES
def test_extreme_scores_neither_overflow_nor_drown(merge) -> None:
    high = (torch.ones(1, 1, 2), torch.tensor([[3e4]]))
    low = (torch.zeros(1, 1, 2), torch.tensor([[-3e4]]))
    for parts in ([high, low], [low, high]):
        out, lse = merge(parts)
        assert out.tolist() == [[[1.0, 1.0]]] and lse.item() == 3e4
    assert merge([low, low])[1].item() == pytest.approx(-3e4 + math.log(2), abs=0.01)


@MERGES
def test_blind_rows_are_skipped_and_a_row_blind_everywhere_stays_blind(merge) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = partial(generator), partial(generator)
    a[0][:2], a[1][:2] = 0.0, NEG_INF
    b[0][1:3], b[1][1:3] = 0.0, NEG_INF
    out, lse = merge([a, b])
    assert torch.allclose(out[0], b[0][0]) and torch.allclose(out[2], a[0][2])
    assert not out[1].any() and (lse[1] == NEG_INF).all()
    assert not out.isnan().any() and not lse.isnan().any()


def test_a_pair_skips_a_blind_side_without_touching_a_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    a = partial(generator)
    a[0][0, 0, 0] = -0.0
    a[0][4], a[1][4] = 0.0, NEG_INF
    blind = (torch.zeros_like(a[0]), torch.full_like(a[1], NEG_INF))
    assert same(merge_pair(a, blind), a) and same(merge_pair(blind, a), a)
    half = (a[0].clone(), a[1].clone())
    half[0][:, 1], half[1][:, 1] = 0.0, NEG_INF
    b = partial(generator)
    merged = merge_pair(half, b)
    assert same((merged[0][:, 1], merged[1][:, 1]), (b[0][:, 1], b[1][:, 1]))


def test_a_run_gives_the_same_bits_with_and_without_its_blind_spans() -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [partial(generator) for _ in range(5)]
    parts[0][0][0, 0, 0] = -0.0
    blind = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], NEG_INF))
    alone = merge_run(parts)
    assert same(merge_run([blind, parts[0], blind, *parts[1:3], blind, *parts[3:]]), alone)
    assert same(merge_run([blind, parts[0]]), merge_run([parts[0]]))


@pytest.mark.parametrize("merge", [merge_pair, lambda a, b: merge_run([a, b, a])], ids=["pair", "run"])
def test_a_rows_bits_do_not_depend_on_its_company(merge) -> None:
    generator = torch.Generator().manual_seed(3)
    for heads, dim in ((4, 16), (3, 80), (1, 7)):
        a, b = partial(generator, 67, heads, dim), partial(generator, 67, heads, dim)
        a[0][5], a[1][5] = 0.0, NEG_INF
        whole = merge(a, b)
        for first in range(20):
            for count in (1, 2, 3, 7, 8, 9, 40):
                rows = slice(first, first + count)
                cut = merge((a[0][rows], a[1][rows]), (b[0][rows], b[1][rows]))
                assert same(cut, (whole[0][rows], whole[1][rows]))
        turned = [tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in part) for part in (a, b)]
        assert same(merge(*turned), whole)


def test_a_tree_takes_nodes_at_any_level() -> None:
    generator = torch.Generator().manual_seed(4)
    spans = {(-1, i): partial(generator) for i in range(43)}             # runs 0..4 whole, 3 spans of run 5
    whole = merge_tree(spans, 43)
    runs = [merge_run([spans[-1, 8 * r + i] for i in range(8)]) for r in range(5)]
    lower = merge_pair(merge_pair(runs[0], runs[1]), merge_pair(runs[2], runs[3]))
    last = merge_run([spans[-1, i] for i in range(40, 43)])
    assert same(whole, merge_pair(lower, merge_pair(runs[4], last)))
    mixed = {key: value for key, value in spans.items() if not 8 <= key[1] < 32}
    mixed |= {(0, 1): runs[1], (1, 1): merge_pair(runs[2], runs[3])}
    assert same(merge_tree(mixed, 43), whole)
    assert same(merge_tree(mixed, 1000), whole)                          # the height of the tree changes nothing
    few = {(2, 0): lower, (0, 4): runs[4], **{(-1, i): spans[-1, i] for i in range(40, 43)}}
    assert same(merge_tree(few, 43), whole)


def test_merging_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no part"):
        merge_fast([])
    with pytest.raises(ValueError, match="no holder"):
        merge_tree({}, 4)


def test_one_part_is_itself() -> None:
    part = partial(torch.Generator().manual_seed(5))
    assert same(merge_fast([part]), part)
    assert same(merge_tree({(3, 0): part}, 64), part)
