"""The product of a few rows with large weights, a CPU kernel."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.linear.skinny_linear import MAX_ROWS, skinny_linear


@pytest.mark.parametrize("n_rows", [1, 2, 7, 8, 9, MAX_ROWS])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (5, 17), (12, 64), (3, 130)])
def test_rows_are_products_and_stand_alone(n_rows: int, n_out: int, n_in: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
    out = skinny_linear(x, weight)
    assert torch.allclose(out.double(), x.double() @ weight.double().T, atol=1e-5 * n_in**0.5)
    for row in range(n_rows):
        assert torch.equal(out[row], skinny_linear(x[[row]], weight)[0])
