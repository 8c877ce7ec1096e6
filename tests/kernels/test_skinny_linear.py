"""The product of a few rows with large weights, a CPU kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specdec.kernels.linear import skinny_linear as module
from specdec.kernels.linear.skinny_linear import FEW_ROWS, ROWS, max_rows, skinny_linear, skinny_linear_cpu

SHAPES = [(1, 1), (3, 130), (4, 16), (5, 17), (13, 64), (11, 95)]
"""Weights [N, K]: fewer rows than a panel, panels and what is left of them, vectors and what is left of them."""


@pytest.fixture(autouse=True)
def kernel_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "max_rows", lambda: 300)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_rows_are_products_and_stand_alone(n_out: int, n_in: int) -> None:
    """A row's bits are the same beside any number of others, and in any place."""
    torch.manual_seed(0)
    x, weight = torch.randn(max(ROWS), n_in), torch.randn(n_out, n_in)
    alone = torch.cat([skinny_linear(row, weight) for row in x.split(1)])
    torch.testing.assert_close(alone.double(), product(x, weight), atol=1e-5 * n_in**0.5, rtol=0)
    for n_rows in range(2, max(ROWS) + 1):
        assert torch.equal(skinny_linear(x[:n_rows], weight), alone[:n_rows])
        assert torch.equal(skinny_linear(x[-n_rows:], weight), alone[-n_rows:])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_change_nothing(n_threads: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(23, 70), torch.randn(37, 70)
    expected = skinny_linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert torch.equal(skinny_linear(x, weight), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_in", [64, 70])
def test_what_is_not_finite_stays_in_its_row(value: float, n_in: int) -> None:
    """And in its column; at either end of them."""
    torch.manual_seed(0)
    x, weight = torch.randn(17, n_in), torch.randn(9, n_in).abs() + 0.1
    expected = skinny_linear(x, weight)
    for row, k in ((0, 0), (3, n_in - 1), (16, 5)):
        x_bad, weight_bad = x.clone(), weight.clone()
        x_bad[row, k] = value
        out = skinny_linear(x_bad, weight)
        assert torch.equal(out[row].nan_to_num(7), torch.full((9,), value).nan_to_num(7))
        others = torch.arange(17) != row
        assert torch.equal(out[others], expected[others])
        weight_bad[row % 9, k] = value
        out = skinny_linear(x, weight_bad)
        assert not out[:, row % 9].isfinite().any()
        others = torch.arange(9) != row % 9
        assert torch.equal(out[:, others], expected[:, others])


def test_nothing_beside_the_inputs_is_used() -> None:
    """They lie between numbers that would be seen."""
    torch.manual_seed(0)
    for n_rows, n_out, n_in in ((7, 5, 17), (1, 1, 1), (12, 8, 31)):
        room = [torch.full((n + 64,), torch.nan) for n in (n_rows * n_in, n_out * n_in)]
        x, weight = (r[32:-32].view(n, n_in).normal_() for r, n in zip(room, (n_rows, n_out), strict=True))
        torch.testing.assert_close(skinny_linear(x, weight), product(x, weight).float(), atol=1e-4, rtol=0)


def test_rows_of_any_layout() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 20, 6), torch.randn(9, 20)
    turned, repeated = x.transpose(1, 2), torch.randn(1, 20).expand(5, 20)
    for given in (turned, turned[::2, 1:], turned[0], turned[0, 0], repeated):
        out = skinny_linear(given, weight)
        assert out.is_contiguous()
        torch.testing.assert_close(out, product(given, weight).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    assert skinny_linear(torch.randn(shape), torch.randn(9, 20)).shape == (*shape[:-1], 9)


# Where the library takes over.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The kernel is slower from so many rows on; a test says how many."""
    slow_from = [0]

    def seconds(way: object) -> float:
        is_kernel = way.func is not torch.mm  # type: ignore[attr-defined]
        return float(way.args[0].shape[0] >= slow_from[0]) if is_kernel else 0.5  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "_seconds", seconds)
    max_rows.cache_clear()
    yield slow_from
    max_rows.cache_clear()


@pytest.mark.parametrize(
    ("slow_from", "expected"),
    [(1000, max(ROWS)), (128, 96), (33, 32), (25, 24), (17, 16), (16, FEW_ROWS), (1, FEW_ROWS)],
)
def test_the_kernel_is_for_rows_with_which_it_is_faster(clock: list[int], slow_from: int, expected: int) -> None:
    clock[0] = slow_from
    threads = torch.get_num_threads()
    assert max_rows() == expected
    clock[0] = 1
    assert max_rows() == expected  # once and for all
    assert torch.get_num_threads() == threads


def test_the_library_computes_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "_kernel", lambda: lambda *arguments: seen.append(arguments[3]))
    monkeypatch.setattr(module, "max_rows", lambda: 48)
    weight = torch.randn(9, 20)
    for n_rows in (1, FEW_ROWS, 48, 49):
        skinny_linear_cpu(torch.randn(n_rows, 20), weight)
    assert seen == [1, FEW_ROWS, 48]


def test_few_rows_need_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "max_rows", lambda: pytest.fail("measured"))
    assert module.is_few(FEW_ROWS)
