"""Children are drawn by their nodes' rules: the same decisions on every path."""

from __future__ import annotations

import math

import pytest
import torch
from aot import compiles_without_spilling, meta
from frequencies import in_bulk
from rows import far_apart, random_laws
from torch import Tensor

from specdec.kernels.sampling.draw import draw
from specdec.kernels.sampling.draw_children import (
    draw_children,
    draw_children_cpu,
    draw_children_reference,
    draw_children_triton,
)
from specdec.kernels.sampling.noise import DRAFT
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT

pytestmark = pytest.mark.kernels

HUBS = [WITH_REPLACEMENT, 0, 1, 99]
"""Of rows in turn: none and with replacement, none, one, all."""


def _case(n_rows: int, size: int, n_children: int, *, zeros: float = 0.3, seed: int = 0) -> list[Tensor]:
    """ids, probs, n_hubs, counts and keys: best first, hubs in turn, as many children as there are at most or fewer."""
    generator = torch.Generator().manual_seed(seed + size + n_children)
    probs = random_laws(n_rows, size, zeros, seed).sort(-1, descending=True)[0]
    ids = torch.stack([torch.randperm(3 * size, generator=generator)[:size] for _ in range(n_rows)])
    row = torch.arange(n_rows)
    fewer = torch.randint(n_children + 1, (n_rows,), generator=generator)
    counts = torch.where(row % 8 < 4, n_children, fewer)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n_rows,), generator=generator)
    position, node = (torch.randint(500, (n_rows,), generator=generator) for _ in range(2))
    return [ids, probs, torch.tensor(HUBS)[row % 4], counts, seeds, position, node]


def _on(device: torch.device, case: list[Tensor]) -> list[Tensor]:
    return [x.to(device) for x in case]


def _drawn(case: list[Tensor], n_children: int, shared: bool, device: torch.device) -> Tensor:
    """What is drawn, the same on every path."""
    rest = DRAFT, n_children, shared
    expected = draw_children_reference(*case, *rest)
    assert expected.dtype == torch.int64
    assert torch.equal(draw_children(*_on(device, case), *rest).cpu(), expected)
    assert torch.equal(draw_children_cpu(*case, *rest), expected)
    return expected


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 97, 1000, 4096])
def test_children_are_the_reference(size: int, shared: bool, device: torch.device, poisoned: None) -> None:
    for n_children in {1, 3, min(size + 2, 16)}:
        case = _case(12, size, n_children)
        _, probs, n_hubs, counts, *_ = case
        drawn = _drawn(case, n_children, shared, device)
        for row, law, hubs, count in zip(drawn.tolist(), probs, n_hubs.tolist(), counts.tolist(), strict=True):
            found, n_possible = [place for place in row if place >= 0], int((law > 0).sum())
            assert (law[found] > 0).all()
            assert row[count:] == [-1] * (n_children - count)
            assert len(found) == (count if hubs == WITH_REPLACEMENT else min(count, n_possible))
            if hubs != WITH_REPLACEMENT:
                assert row[: len(found)] == found
                assert len(set(found)) == len(found)
            n_best = min(max(hubs, 0), count)
            assert found[:n_best] == list(range(min(n_best, n_possible)))


@in_bulk
def test_many_children_are_the_reference(device: torch.device) -> None:
    for size, n_children in [(4, 3), (97, 8), (4096, 2)]:
        for zeros in (0.0, 0.9):
            case = _case(200, size, n_children, zeros=zeros)
            assert len(_drawn(case, n_children, False, device)[:2].unique()) > 1


@pytest.mark.parametrize("n_hubs", [WITH_REPLACEMENT, 0])
@pytest.mark.parametrize("size", [1, 64, 97, 4096])
def test_an_only_child_is_a_draw(n_hubs: int, size: int, device: torch.device) -> None:
    case = _on(device, _case(5, size, 1))
    case[2], case[3] = torch.full_like(case[2], n_hubs), torch.ones_like(case[3])
    assert torch.equal(draw_children(*case, DRAFT, 1, False)[:, 0], draw(case[1], *case[4:], DRAFT))


@pytest.mark.parametrize("shared", [False, True])
def test_laws_run_out(shared: bool, device: torch.device, poisoned: None) -> None:
    """Two entries of positive probability, one, none; and more children than entries."""
    laws = [[1.0, 1e-9, 0.0], [1e-20, 0.0, math.nan], [0.0, 0.0, 0.0], [math.nan] * 3]
    probs = torch.tensor(laws).repeat_interleave(len(HUBS), 0)
    n_rows = len(probs)
    n_hubs = torch.tensor(HUBS).repeat(len(laws))
    ids, key = torch.tensor([5, 0, 9]).expand(n_rows, -1), torch.arange(n_rows)
    for n_children in (2, 3, 5):
        case = [ids, probs, n_hubs, torch.full((n_rows,), n_children), key, key, key]
        drawn = _drawn(case, n_children, shared, device).view(len(laws), len(HUBS), n_children).tolist()
        for one, found in zip(drawn, [[0, 1], [0], [], []], strict=True):
            iid, *others = one
            assert set(iid) <= set(found or [-1])
            for places in others:
                assert sorted(places[: len(found)]) == found
                assert places[len(found) :] == [-1] * (n_children - len(found))


@pytest.mark.parametrize("shared", [False, True])
def test_probabilities_of_nan_are_none(shared: bool, device: torch.device, poisoned: None) -> None:
    case = _case(8, 60, 4)
    without = [x.clone() for x in case]
    case[1][:, 1::7], without[1][:, 1::7] = math.nan, 0
    drawn = _drawn(case, 4, shared, device)
    assert torch.equal(drawn, draw_children_reference(*without, DRAFT, 4, shared))
    assert (drawn.max(1).values > 7).any()


def test_shared_noise_belongs_to_ids(device: torch.device) -> None:
    """Whatever place an id has in the law, and whatever others there are that don't win."""
    ids, probs, *rest = _on(device, _case(12, 90, 3, zeros=0.0))
    rest[0] = rest[0].clamp(max=0)
    assert rest[0][:2].tolist() == [WITH_REPLACEMENT, 0]
    rest[1] = torch.full_like(rest[1], 3)
    drawn = ids.gather(1, draw_children(ids, probs, *rest, DRAFT, 3, True))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0)).to(device)
    places = draw_children(ids[:, order], probs[:, order], *rest, DRAFT, 3, True)
    assert torch.equal(ids[:, order].gather(1, places), drawn)
    kept = (ids[..., None] == drawn[:, None]).any(-1) | (torch.arange(90, device=device) % 2 == 0)
    fewer = draw_children(ids, torch.where(kept, probs, 0), *rest, DRAFT, 3, True)
    assert torch.equal(ids.gather(1, fewer), drawn)
    assert (drawn[::4] == drawn[::4, :1]).all()  # with replacement: one race, one winner
    assert not torch.equal(draw_children(ids, probs, *rest, DRAFT, 3, False), places)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_raced_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    case = _case(8, 100, 5)
    case[1] = case[1].clamp(max=1e4).to(dtype)
    assert _drawn(case, 5, False, device).max() > 10


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    case = _on(device, _case(8, 70, 4))
    for shared in (False, True):
        expected = draw_children(*case, DRAFT, 4, shared)
        for i in range(len(case) + 1):  # one at a time, and all
            strided = [_strided(x) if i in (j, len(case)) else x for j, x in enumerate(case)]
            assert torch.equal(draw_children(*strided, DRAFT, 4, shared), expected)


def _strided(x: Tensor) -> Tensor:
    """The same values, transposed in memory, with other numbers between them."""
    wide = x.new_full((2 * x.shape[-1] + 1, *reversed(x.shape[:-1])), 3)
    return wide[1::2].permute(*reversed(range(x.dim()))).copy_(x)


def test_rows_beyond_31_bits(device: torch.device) -> None:
    ids, probs, *rest = _on(device, _case(3, 70, 4))
    far = far_apart(probs.to(torch.bfloat16))
    for n_hubs in HUBS:
        rest[0] = torch.full_like(rest[0], n_hubs)
        drawn = draw_children(ids, far, *rest, DRAFT, 4, False)
        assert torch.equal(drawn, draw_children(ids, far.clone(), *rest, DRAFT, 4, False))


def test_a_law_is_one_block(device: torch.device) -> None:
    case = _case(1, 4097, 2)
    for op in (draw_children, draw_children_reference, draw_children_cpu, draw_children_triton):
        with pytest.raises(ValueError, match="at most 4096"):
            op(*_on(device, case), DRAFT, 2, False)


def test_nothing(device: torch.device) -> None:
    case = _on(device, _case(2, 5, 3))
    assert draw_children(*(x[:0] for x in case), DRAFT, 3, False).shape == (0, 3)
    case[3] = torch.zeros_like(case[3])
    assert draw_children(*case, DRAFT, 0, False).shape == (2, 0)
    assert (draw_children(*case, DRAFT, 3, False) == -1).all()


@pytest.mark.parametrize("shared", [False, True])
def test_is_a_well_formed_op_and_traces(shared: bool, device: torch.device) -> None:
    case = _on(device, _case(8, 40, 3))
    torch.library.opcheck(draw_children.op, (*case, DRAFT, 3, shared))
    traced = torch.compile(
        lambda *x: draw_children(*x, DRAFT, 3, shared), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    assert torch.equal(traced(*case), draw_children(*case, DRAFT, 3, shared))


def _launch(size: int, n_children: int, shared: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    laws = meta(64, size), meta(64, size, dtype=dtype)
    return draw_children_triton(*laws, *(meta(64) for _ in "rcspn"), DRAFT, n_children, shared)


LAUNCHES = {
    "8 of C 64": lambda: _launch(64, 8),
    "8 of C 64, shared": lambda: _launch(64, 8, shared=True),
    "1 of C 1": lambda: _launch(1, 1),
    "16 of C 256": lambda: _launch(256, 16),
    "16 of C 4096": lambda: _launch(4096, 16),
    "16 of C 4096, shared": lambda: _launch(4096, 16, shared=True),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
