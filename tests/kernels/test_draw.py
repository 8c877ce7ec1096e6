"""Draws make the same decisions everywhere."""

from __future__ import annotations

import pytest
import torch
from aot import compiles_without_spilling, meta
from frequencies import in_bulk
from rows import far_apart, random_laws
from torch import Tensor

from specdec.kernels.sampling.draw import DRAW_BLOCK, draw, draw_cpu, draw_reference, draw_triton
from specdec.kernels.sampling.noise import BONUS, DRAFT

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


@pytest.mark.parametrize("size", [1, 97, 4096, 4097, 13_000])
def test_flat_draws_are_the_reference(size: int, device: torch.device, poisoned: None) -> None:
    probs, keys = random_laws(6, size, 0.6), _keys(6, size)
    expected = draw_reference(probs, *keys, DRAFT, True)
    assert torch.equal(draw(probs.to(device), *_keys(6, size, device), DRAFT, True).cpu(), expected)
    assert torch.equal(draw_cpu(probs, *keys, DRAFT, True), expected)
    assert torch.equal(expected, draw_reference(probs, *keys, DRAFT)) == (size < 2 * DRAW_BLOCK)


def test_a_heavier_entry_takes_from_the_others_alike(device: torch.device) -> None:
    """With the same key a row in which one entry weighs more gives that entry, or what it gave before."""
    probs, keys = torch.zeros(2, 5000), _keys(24, 5, device)
    probs[:, ::250], probs[1, 250] = 1, 15
    before, after = (draw(row.to(device).expand(24, -1), *keys, DRAFT, True) for row in probs)
    assert torch.equal(after, torch.where(after == 250, after, before))
    assert 0 < (after == before).sum() < 24
    assert set((before // DRAW_BLOCK).tolist()) == {0, 1}
    by_blocks = [draw(row.to(device).expand(24, -1), *keys, DRAFT) for row in probs]
    assert ((by_blocks[1] != 250) & (by_blocks[1] != by_blocks[0])).any()


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


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    probs, keys = random_laws(3, 4500).to(device), _keys(3, 2, device)
    rows, columns = torch.full((3, 6000), 99.0, device=device), torch.full((4500, 7), 99.0, device=device)
    rows[:, 50:4550], columns[:, 1::2] = probs, probs.T
    spread = torch.full((3, 3), 99, device=device)
    spread[:, 1] = keys[0]
    for strided in (rows[:, 50:4550], columns[:, 1::2].T):
        assert torch.equal(draw(strided, spread[:, 1], *keys[1:], DRAFT), draw(probs, *keys, DRAFT))
        assert torch.equal(draw(strided, spread[:, 1], *keys[1:], DRAFT, True), draw(probs, *keys, DRAFT, True))
    same = probs[:1].expand(3, -1)
    assert torch.equal(draw(same, *keys, DRAFT), draw(same.contiguous(), *keys, DRAFT))


def test_rows_beyond_31_bits(device: torch.device) -> None:
    far = far_apart(random_laws(3, 4500).to(device, torch.bfloat16))
    keys = _keys(3, 3, device)
    for flat in (False, True):
        assert torch.equal(draw(far, *keys, DRAFT, flat), draw(far.clone(), *keys, DRAFT, flat))


@pytest.mark.parametrize("size", [7, 5000, 13000])
def test_rows_that_are_no_laws_give_an_index_in_range(size: int, device: torch.device, poisoned: None) -> None:
    probs = torch.zeros(5, size)
    probs[1] = float("nan")
    probs[2, size // 2] = float("nan")
    probs[3, size - 1], probs[3, 0] = 1, float("nan")
    probs[4, ::2] = float("inf")
    for flat in (False, True):
        drawn = draw(probs.to(device), *_keys(5, 0, device), DRAFT, flat)
        assert (drawn >= 0).all()
        assert (drawn < size).all()


@pytest.mark.parametrize("index", [0, 4095, 4096, 12288, 16383, 16384])
def test_the_only_positive_entry_is_drawn(index: int, device: torch.device) -> None:
    probs = torch.zeros(2, 16385, device=device)
    probs[0, index], probs[1, index] = 1e-30, 1e30
    for flat in (False, True):
        assert draw(probs, *_keys(2, index, device), DRAFT, flat).tolist() == [index, index]


def test_nothing(device: torch.device) -> None:
    assert draw(torch.empty(0, 5, device=device), *_keys(0, 0, device), DRAFT).shape == (0,)


def test_are_well_formed_ops_and_trace(device: torch.device) -> None:
    arguments = random_laws(3, 40).to(device), *_keys(3, 0, device), DRAFT
    torch.library.opcheck(draw.op, arguments)
    torch.library.opcheck(draw.op, (*arguments, True))
    traced = torch.compile(
        lambda *x: (draw(*x, DRAFT), draw(*x, DRAFT, True)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for drawn in traced(*arguments[:-1]):
        assert torch.equal(drawn, draw(*arguments))


def _launch(size: int, flat: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw_triton(meta(64, size, dtype=dtype), *(meta(64) for _ in "spn"), DRAFT, flat)


LAUNCHES = {
    "float32, V 128256": lambda: _launch(128_256),
    "bfloat16, V 50257": lambda: _launch(50_257, dtype=torch.bfloat16),
    "float32, C 64": lambda: _launch(64),
    "float32, V 128256, flat": lambda: _launch(128_256, flat=True),
    "bfloat16, V 50257, flat": lambda: _launch(50_257, flat=True, dtype=torch.bfloat16),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
