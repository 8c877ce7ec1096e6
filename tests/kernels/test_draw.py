"""Draws make the same decisions everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aot import compiles_without_spilling, meta
from frequencies import in_bulk
from rows import far_apart, random_laws
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
from specdec.kernels.noise import BONUS, DRAFT

pytestmark = pytest.mark.kernels


def _keys(n_rows: int, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n_rows,), generator=generator)
    position, node = (torch.randint(500, (n_rows,), generator=generator) for _ in range(2))
    return [x.to(device) for x in (seeds, position, node)]


SIZES = [1, 2, 3, 4, 5, 97, 4095, 4096, 4097, 8191, 8192, 16384, 16385, 20001]


@pytest.mark.parametrize("size", SIZES)
def test_draws_are_the_reference(size: int, device: torch.device, poisoned: None) -> None:
    probs, keys = random_laws(4, size, 0.6), _keys(4, size)
    expected = draw_reference(probs, *keys, DRAFT)
    assert torch.equal(draw(probs.to(device), *_keys(4, size, device), DRAFT).cpu(), expected)
    assert torch.equal(draw_cpu(probs, *keys, DRAFT), expected)
    assert (probs[torch.arange(4), expected] > 0).all()


@in_bulk
def test_many_draws_are_the_reference(device: torch.device) -> None:
    for size, n_rows in [(3, 2000), (97, 1000), (DRAW_BLOCK + 5, 50), (5 * DRAW_BLOCK, 50)]:
        for zeros in (0.0, 0.9):
            probs, keys = random_laws(n_rows, size, zeros), _keys(n_rows, size)
            drawn = draw(probs.to(device), *(x.to(device) for x in keys), BONUS)
            assert torch.equal(drawn.cpu(), draw_reference(probs, *keys, BONUS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_raced_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    probs, keys = random_laws(3, 9000).clamp(max=1e4).to(device, dtype), _keys(3, 1, device)
    assert torch.equal(draw(probs, *keys, DRAFT), draw_reference(probs, *keys, DRAFT))
    few = probs[:, :100]
    assert torch.equal(draw_distinct(few, *keys, DRAFT, 5), draw_distinct_reference(few, *keys, DRAFT, 5))


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    probs, keys = random_laws(3, 4500).to(device), _keys(3, 2, device)
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
    far = far_apart(random_laws(3, 4500).to(device, torch.bfloat16))
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


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 97, 1000, 4096])
def test_distinct_draws_are_the_reference(size: int, device: torch.device, poisoned: None) -> None:
    probs, keys = random_laws(3, size, 0.5), _keys(3, size, device)
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


def test_are_well_formed_ops_and_trace(device: torch.device) -> None:
    arguments = random_laws(3, 40).to(device), *_keys(3, 0, device), DRAFT
    torch.library.opcheck(draw.op, arguments)
    torch.library.opcheck(draw_distinct.op, (*arguments, 4))
    traced = torch.compile(
        lambda *x: (draw(*x, DRAFT), draw_distinct(*x, DRAFT, 4)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    one, several = traced(*arguments[:-1])
    assert torch.equal(one, draw(*arguments))
    assert torch.equal(several, draw_distinct(*arguments, 4))


def _launch(launcher: Callable[..., Tensor], size: int, *rest: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return launcher(meta(64, size, dtype=dtype), *(meta(64) for _ in "spn"), DRAFT, *rest)


LAUNCHES = {
    "float32, V 128256": lambda: _launch(draw_triton, 128_256),
    "bfloat16, V 50257": lambda: _launch(draw_triton, 50_257, dtype=torch.bfloat16),
    "float32, C 64": lambda: _launch(draw_triton, 64),
    "8 of C 64": lambda: _launch(draw_distinct_triton, 64, 8),
    "8 of C 4096": lambda: _launch(draw_distinct_triton, 4096, 8),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
