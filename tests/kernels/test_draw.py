"""Draws: the same decisions everywhere, and the laws they are draws from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from math import prod
from typing import Any

import pytest
import torch
from aot import ARCHITECTURES, compile_launches
from scipy.stats import chisquare
from torch import Tensor

from specdec.kernels.draw import (
    DRAW_BLOCK,
    draw,
    draw_cpu,
    draw_distinct,
    draw_distinct_cpu,
    draw_distinct_reference,
    draw_distinct_triton,
    draw_reference,
    draw_triton,
)
from specdec.kernels.library import INTERPRETED
from specdec.kernels.noise import BONUS, DRAFT

pytestmark = pytest.mark.kernels

in_bulk = pytest.mark.skipif(INTERPRETED, reason="as many programs as draws; their decisions are the CPU's")


def _keys(n_rows: int, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n_rows,), generator=generator)
    position, node = (torch.randint(500, (n_rows,), generator=generator) for _ in range(2))
    return [x.to(device) for x in (seeds, position, node)]


def _laws(n_rows: int, size: int, zeros: float = 0.3, seed: int = 0) -> Tensor:
    """Random laws, not normalised, far from flat, with some probabilities zero and one certainly positive a row."""
    generator = torch.Generator().manual_seed(seed + size)
    probs = torch.randn(n_rows, size, generator=generator).mul(3).exp()
    probs *= torch.rand(n_rows, size, generator=generator) >= zeros
    probs[:, torch.randint(size, (1,), generator=generator)] += 0.01
    return probs


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without being written holds a number far from any index."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-(2**40)))


SIZES = [1, 2, 3, 4, 5, 97, 4095, 4096, 4097, 8191, 8192, 16384, 16385, 20001]


@pytest.mark.parametrize("size", SIZES)
def test_draws_are_the_reference(size: int, device: torch.device, poisoned: None) -> None:
    probs, keys = _laws(4, size, 0.6), _keys(4, size)
    expected = draw_reference(probs, *keys, DRAFT)
    assert torch.equal(draw(probs.to(device), *_keys(4, size, device), DRAFT).cpu(), expected)
    assert torch.equal(draw_cpu(probs, *keys, DRAFT), expected)
    assert (probs[torch.arange(4), expected] > 0).all()


@in_bulk
def test_many_draws_are_the_reference(device: torch.device) -> None:
    for size, n_rows in [(3, 2000), (97, 1000), (DRAW_BLOCK + 5, 50), (5 * DRAW_BLOCK, 50)]:
        for zeros in (0.0, 0.9):
            probs, keys = _laws(n_rows, size, zeros), _keys(n_rows, size)
            drawn = draw(probs.to(device), *(x.to(device) for x in keys), BONUS)
            assert torch.equal(drawn.cpu(), draw_reference(probs, *keys, BONUS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_raced_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    probs, keys = _laws(3, 9000).clamp(max=1e4).to(device, dtype), _keys(3, 1, device)
    assert torch.equal(draw(probs, *keys, DRAFT), draw_reference(probs, *keys, DRAFT))
    few = probs[:, :100]
    assert torch.equal(draw_distinct(few, *keys, DRAFT, 5), draw_distinct_reference(few, *keys, DRAFT, 5))


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    probs, keys = _laws(3, 4500).to(device), _keys(3, 2, device)
    rows, columns = torch.full((3, 6000), 99.0, device=device), torch.full((4500, 7), 99.0, device=device)
    rows[:, 50:4550], columns[:, 1::2] = probs, probs.T
    spread = torch.full((3, 3), 99, device=device)
    spread[:, 1] = keys[0]
    for strided in (rows[:, 50:4550], columns[:, 1::2].T):
        assert torch.equal(draw(strided, spread[:, 1], *keys[1:], DRAFT), draw(probs, *keys, DRAFT))
        drawn = draw_distinct(strided[:, :70], spread[:, 1], *keys[1:], DRAFT, 4)
        assert torch.equal(drawn, draw_distinct(probs[:, :70].contiguous(), *keys, DRAFT, 4))
    same = probs[:1].expand(3, -1)
    assert torch.equal(draw(same, *keys, DRAFT), draw(same.contiguous(), *keys, DRAFT))


def test_rows_beyond_31_bits(device: torch.device) -> None:
    far = torch.empty(2**31 + 5000, dtype=torch.bfloat16, device=device).as_strided((3, 4500), (2**30, 1))
    far.copy_(_laws(3, 4500))
    keys = _keys(3, 3, device)
    assert torch.equal(draw(far, *keys, DRAFT), draw(far.clone(), *keys, DRAFT))


@pytest.mark.parametrize("size", [7, 5000, 13000])
def test_rows_that_are_no_laws_give_an_index_in_range(size: int, device: torch.device, poisoned: None) -> None:
    probs = torch.zeros(5, size)
    probs[1] = float("nan")
    probs[2, size // 2] = float("nan")
    probs[3, size - 1], probs[3, 0] = 1, float("nan")
    probs[4, ::2] = float("inf")
    drawn = draw(probs.to(device), *_keys(5, 0, device), DRAFT)
    assert (drawn >= 0).all()
    assert (drawn < size).all()


@pytest.mark.parametrize("index", [0, 4095, 4096, 12288, 16383, 16384])
def test_the_only_positive_entry_is_drawn(index: int, device: torch.device) -> None:
    probs = torch.zeros(2, 16385, device=device)
    probs[0, index], probs[1, index] = 1e-30, 1e30
    assert draw(probs, *_keys(2, index, device), DRAFT).tolist() == [index, index]


def test_nothing(device: torch.device) -> None:
    assert draw(torch.empty(0, 5, device=device), *_keys(0, 0, device), DRAFT).shape == (0,)
    assert draw_distinct(torch.empty(0, 5, device=device), *_keys(0, 0, device), DRAFT, 3).shape == (0, 3)
    assert draw_distinct(torch.ones(2, 5, device=device), *_keys(2, 0, device), DRAFT, 0).shape == (2, 0)


def _long_law() -> Tensor:
    """A law over many blocks: some all zeros, masses from 1e-3 to 0.5, and weight where both races' noise has low
    indices, which would show if they shared it."""
    size = 6 * DRAW_BLOCK + 300
    probs = torch.zeros(size, dtype=torch.float64)
    probs[:6] = torch.tensor([5, 1, 3, 1, 2, 4])
    probs[DRAW_BLOCK : 2 * DRAW_BLOCK : 97] = 0.3
    probs[2 * DRAW_BLOCK + 5] = 0.1
    probs[4 * DRAW_BLOCK - 1], probs[4 * DRAW_BLOCK] = 2, 7
    probs[6 * DRAW_BLOCK :: 3] = torch.arange(1, 101) / 200
    return probs / probs.sum()


def _assert_law(drawn: Tensor, probs: Tensor) -> None:
    """By chi-square, over single indices and then over blocks."""
    counts = torch.bincount(drawn, minlength=len(probs))
    assert (counts[probs == 0] == 0).all()
    expected = probs.double() / probs.double().sum() * len(drawn)
    assert expected[expected > 0].min() > 10
    assert chisquare(counts[expected > 0].numpy(), expected[expected > 0].numpy()).pvalue > 1e-4
    blocks = [[x.sum().item() for x in y.split(DRAW_BLOCK) if x.sum() > 0] for y in (counts, expected)]
    assert len(probs) <= DRAW_BLOCK or chisquare(*blocks).pvalue > 1e-4


@in_bulk
def test_long_rows_are_drawn_from_their_law(device: torch.device) -> None:
    probs = _long_law()
    n = 250_000
    position = torch.arange(n, device=device)
    seed, node = torch.full_like(position, 11), torch.zeros_like(position)
    rows = probs.float().to(device).expand(n, -1)
    _assert_law(draw(rows, seed, position, node, DRAFT).cpu(), probs)
    some = rows[:99], seed[:99], position[:99], node[:99]
    assert not torch.equal(draw(*some, BONUS), draw(*some, DRAFT))


@in_bulk
@pytest.mark.parametrize("size", [2, 7, 97])
def test_short_rows_are_drawn_from_their_law(size: int, device: torch.device) -> None:
    probs = _laws(1, size, seed=3)[0].clamp(0.05, 20) * (torch.arange(size) % 5 != 2)
    n = 200_000
    seed = torch.arange(n, device=device) * 2**20
    zeros = torch.zeros_like(seed)
    _assert_law(draw(probs.to(device).expand(n, -1), seed, zeros, zeros + 3, DRAFT).cpu(), probs)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 97, 1000, 4096])
def test_distinct_draws_are_the_reference(size: int, device: torch.device, poisoned: None) -> None:
    probs, keys = _laws(3, size, 0.5), _keys(3, size, device)
    for count in {1, 3, min(size + 2, 40)}:
        drawn = draw_distinct(probs.to(device), *keys, DRAFT, count).cpu()
        assert torch.equal(drawn, draw_distinct_reference(probs, *_keys(3, size), DRAFT, count))
        assert torch.equal(drawn, draw_distinct_cpu(probs, *_keys(3, size), DRAFT, count))
        assert torch.equal(drawn[:, 0], draw(probs.to(device), *keys, DRAFT).cpu())
        for row, law in zip(drawn.tolist(), probs, strict=True):
            found = [i for i in row if i >= 0]
            assert row == found + [-1] * (count - len(found))
            assert len(set(found)) == len(found) == min(count, int((law > 0).sum()))
            assert (law[found] > 0).all()


def test_distinct_draws_run_out(device: torch.device, poisoned: None) -> None:
    probs = torch.zeros(3, 9)
    probs[0, 8], probs[1, 2], probs[1, 5], probs[2] = 1e-20, 1, 1e-9, float("nan")
    drawn = draw_distinct(probs.to(device), *_keys(3, 0, device), DRAFT, 3).tolist()
    assert [sorted(row) for row in drawn] == [[-1, -1, 8], [-1, 2, 5], [-1, -1, -1]]
    assert drawn[0][0] == 8
    assert drawn[1][2] == -1


def test_distinct_draws_take_one_block(device: torch.device) -> None:
    for op in (draw_distinct, draw_distinct_reference, draw_distinct_triton):
        with pytest.raises(ValueError, match="at most 4096"):
            op(torch.ones(1, 4097, device=device), *_keys(1, 0, device), DRAFT, 2)


@in_bulk
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_distinct_draws_follow_the_law_without_replacement(count: int, device: torch.device) -> None:
    """Every ordered outcome, against the product of the laws renormalised without what was drawn before."""
    law = [0.55, 0.05, 0.3, 0.1]
    n = 300_000
    position = torch.arange(n, device=device)
    probs = torch.tensor(law, device=device).mul(3).expand(n, -1)
    seed, node = torch.full_like(position, -5), torch.full_like(position, 2)
    drawn = draw_distinct(probs, seed, position, node, DRAFT, count).cpu()
    outcomes = list(permutations(range(4), count))
    expected = [prod(law[i] / (1 - sum(law[j] for j in o[:k])) for k, i in enumerate(o)) * n for o in outcomes]
    weights = 4 ** torch.arange(count)
    counts = torch.bincount((drawn * weights).sum(1), minlength=4**count)
    observed = [int(counts[sum(i * 4**k for k, i in enumerate(o))]) for o in outcomes]
    assert sum(observed) == n
    assert chisquare(observed, expected).pvalue > 1e-4


def test_are_well_formed_ops_and_trace(device: torch.device) -> None:
    arguments = _laws(3, 40).to(device), *_keys(3, 0, device), DRAFT
    torch.library.opcheck(draw.op, arguments)
    torch.library.opcheck(draw_distinct.op, (*arguments, 4))
    traced = torch.compile(
        lambda *x: (draw(*x, DRAFT), draw_distinct(*x, DRAFT, 4)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    one, several = traced(*arguments[:-1])
    assert torch.equal(one, draw(*arguments))
    assert torch.equal(several, draw_distinct(*arguments, 4))


def _launch(launcher: Callable[..., Tensor], size: int, *rest: int, dtype: torch.dtype = torch.float32) -> Tensor:
    probs = torch.empty(64, size, dtype=dtype, device="meta")
    return launcher(probs, *(x.to("meta") for x in _keys(64)), DRAFT, *rest)


LAUNCHES: dict[str, Callable[[], object]] = {
    "float32, V 128256": lambda: _launch(draw_triton, 128_256),
    "bfloat16, V 50257": lambda: _launch(draw_triton, 50_257, dtype=torch.bfloat16),
    "float32, C 64": lambda: _launch(draw_triton, 64),
    "8 of C 64": lambda: _launch(draw_distinct_triton, 64, 8),
    "8 of C 4096": lambda: _launch(draw_distinct_triton, 4096, 8),
}


@pytest.mark.aot
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", LAUNCHES)
def test_compiles_without_spilling(case: str, arch: int, compiled_table: list[Any]) -> None:
    for kernel in compile_launches(LAUNCHES[case], arch):
        compiled_table.append((case, arch, kernel))
        assert kernel.stack == 0
