"""Several linear layers of one input: the numbers of each alone, as near to the exact ones as the library's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from aot import compiles_without_spilling, meta
from torch import Tensor

from specdec.kernels.library import INTERPRETED, runs_triton
from specdec.kernels.linear.joined_linear import (
    MAX_ROWS,
    gated_linear,
    gated_linear_reference,
    gated_linear_triton,
    joined_linear,
    joined_linear_reference,
    joined_linear_triton,
)

pytestmark = pytest.mark.kernels
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALVES = [F16] if INTERPRETED else [BF16, F16]  # Triton's interpreter multiplies the bits of bfloat16
ROWS = [1, 2, 3, 17, 33, 64]
SIZES = [(128, (32, 16, 16)), (256, (33, 7, 1)), (130, (40,)), (97, (1, 65)), (7, (5, 3, 2, 4))]
"""Inputs, and outputs of each weight."""


def _layers(
    n_rows: int, n_in: int, n_outs: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(n_rows * n_in)
    x = torch.randn(n_rows, n_in)
    weights, biases = [torch.randn(n, n_in) / n_in**0.5 for n in n_outs], [torch.randn(n) for n in n_outs]
    return x.to(device, dtype), *([w.to(device, dtype) for w in each] for each in (weights, biases))


def _unit(dtype: torch.dtype) -> float:
    """How far rounding to the nearest may be off, relatively."""
    return torch.finfo(dtype).eps / 2


def _check_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Rounded once, after a sum in float32."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    assert (out.dtype, out.shape, out.is_contiguous()) == (x.dtype, exact.shape, True)
    assert ((out.double() - exact).abs() <= exact.abs() * _unit(x.dtype) * 1.01 + terms * _unit(F32) * 4).all()


@pytest.mark.parametrize("has_biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n_rows", ROWS)
def test_are_products_rounded_once(
    n_rows: int, dtype: torch.dtype, has_biases: bool, device: torch.device, poisoned: None
) -> None:
    for n_in, n_outs in SIZES:
        x, weights, biases = _layers(n_rows, n_in, n_outs, dtype, device)
        outs = joined_linear(x, weights, biases if has_biases else [])
        assert len(outs) == len(n_outs)
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            _check_product(out, x, weight, bias if has_biases else None)


def _integers(
    n_rows: int, n_in: int, n_outs: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Integers, and sixteenths, whose sums are exact in float32, in any order, and not in half precision."""
    torch.manual_seed(n_in)
    x, *weights = (torch.randint(-60, 61, (n, n_in)).to(device, dtype) for n in (n_rows, *n_outs))
    return x, [weight / 16 for weight in weights]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("n_in", [64, 130, 384])
def test_exact_sums_are_rounded_as_the_librarys(
    n_rows: int, n_in: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weights = _integers(n_rows, n_in, (48, 17, 16), dtype, device)
    biases = [torch.randint(-9, 10, (len(weight),)).to(device, dtype) / 4 for weight in weights]
    for found, expected in zip(joined_linear(x, weights, biases), _rounded(x, weights, biases), strict=True):
        assert torch.equal(found, expected)


def _rounded(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [F.linear(x.float(), w.float(), b.float()).to(x.dtype) for w, b in zip(weights, biases, strict=True)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n_rows", ROWS)
def test_a_gated_unit_is_as_near_as_the_librarys(
    n_rows: int, dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    for n_in, (n_out, *_) in SIZES:
        x, (gate, up), _ = _layers(n_rows, n_in, (n_out, n_out), dtype, device)
        exact = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
        found, library = gated_linear(x, gate, up), gated_linear_reference(x, gate, up)
        assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, exact.shape, True)
        # Gate, up, activation and product are rounded: |silu(x)' x| is at most 1.1 |silu(x)| + 0.1 |x|.
        g, u = F.linear(x.double(), gate.double()), F.linear(x.double(), up.double())
        bound = ((3.2 * F.silu(g).abs() + 0.2 * g.abs()) * u.abs() * 1.1 * _unit(dtype)) + 1e-5
        assert ((found.double() - exact).abs() <= bound).all()
        rms = [(out.double() - exact).square().mean().sqrt() for out in (found, library)]
        assert rms[0] <= rms[1] * 1.05 + 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n_rows", ROWS)
def test_a_gated_unit_rounds_where_layers_apart_do(
    n_rows: int, dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    """Exact sums: gate and up are rounded before the activation, and that before the product."""
    x, (gate, up) = _integers(n_rows, 96, (33, 33), dtype, device)
    gate = gate / 512  # activations of all sizes
    exact_gates, exact_ups = (F.linear(x.float(), weight.float()) for weight in (gate, up))
    gates, ups = (exact.to(dtype).float() for exact in (exact_gates, exact_ups))
    active = F.silu(gates).to(dtype).float()
    expected, found = (active * ups).to(dtype), gated_linear(x, gate, up)
    # An exponential that ends on the other side of a rounding is one last place of the activation's off.
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert _share(found == expected) > 0.97
    others = F.silu(exact_gates).to(dtype).float() * ups, active * exact_ups, F.silu(gates) * ups
    assert all(_share(other.to(dtype) == expected) < 0.9 for other in others)


def _share(is_so: Tensor) -> float:
    return float(is_so.float().mean())


def test_inputs_of_any_shape_and_strides(device: torch.device) -> None:
    x, weights, biases = _layers(6, 64, (24, 8), F16, device)
    expected, gated = joined_linear(x, weights, biases), gated_linear(x, weights[0], weights[0])
    wide = torch.full((6, 80), torch.nan, dtype=F16, device=device)
    wide[:, :64] = x
    for same in (wide[:, :64], x.t().contiguous().t()):
        assert all(map(torch.equal, joined_linear(same, weights, biases), expected))
        assert torch.equal(gated_linear(same, weights[0], weights[0]), gated)
    for lead in ((1, 6), (2, 3), (3, 1, 2)):
        outs = joined_linear(x.view(*lead, 64), weights, biases)
        assert [out.shape for out in outs] == [(*lead, 24), (*lead, 8)]
        assert all(torch.equal(out.view(6, -1), each) for out, each in zip(outs, expected, strict=True))
        assert torch.equal(gated_linear(x.view(*lead, 64), weights[0], weights[0]).view(6, -1), gated)
    assert [out.shape for out in joined_linear(x[0], weights, biases)] == [(24,), (8,)]


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    x, weights, _ = _layers(3, 130, (24, 24), F16, device)
    clean, gated = joined_linear(x, weights, []), gated_linear(x, *weights)
    x[1, 129] = torch.nan
    for found, expected in (
        *zip(joined_linear(x, weights, []), clean, strict=True),
        (gated_linear(x, *weights), gated),
    ):
        assert found[1].isnan().all()
        assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("n_rows", [0, MAX_ROWS + 1])
def test_many_rows_and_none_are_the_librarys(n_rows: int, device: torch.device) -> None:
    x, weights, biases = _layers(n_rows, 64, (24, 24), F16, device)
    expected = joined_linear_reference(x, weights, biases)
    assert all(map(torch.equal, joined_linear(x, weights, biases), expected))
    assert torch.equal(gated_linear(x, *weights), gated_linear_reference(x, *weights))


def test_other_weights_and_dtypes_are_the_librarys(device: torch.device) -> None:
    x, weights, biases = _layers(3, 64, (64, 64), F32, device)
    assert all(map(torch.equal, joined_linear(x, weights, biases), joined_linear_reference(x, weights, biases)))
    x, weights = x.to(F16), [weight.to(F16).t() for weight in weights]
    assert all(map(torch.equal, joined_linear(x, weights, []), joined_linear_reference(x, weights, [])))
    assert torch.equal(gated_linear(x, *weights), gated_linear_reference(x, *weights))


def test_are_well_formed_ops_and_trace(device: torch.device) -> None:
    x, weights, biases = _layers(3, 64, (24, 24), F16, device)
    torch.library.opcheck(joined_linear.op, (x, weights, biases))
    torch.library.opcheck(joined_linear.op, (x[None], weights[:1], []))
    torch.library.opcheck(gated_linear.op, (x, *weights))

    def both(x: Tensor) -> list[Tensor]:
        return [*joined_linear(x, weights, biases), gated_linear(x, *weights)]

    traced = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_rows in (3, 5, MAX_ROWS + 6):
        given = torch.randn(n_rows, 64).to(device, F16)
        assert all(map(torch.equal, traced(given), both(given)))


def _joined(n_rows: int, n_in: int, n_outs: Sequence[int], dtype: torch.dtype, has_biases: bool = False) -> object:
    weights, biases = [meta(n, n_in, dtype=dtype) for n in n_outs], [meta(n, dtype=dtype) for n in n_outs]
    return joined_linear_triton(meta(1, n_rows, n_in, dtype=dtype), weights, biases * has_biases)


def _gated(n_rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> object:
    gate, up = (meta(n_out, n_in, dtype=dtype) for _ in range(2))
    return gated_linear_triton(meta(1, n_rows, n_in, dtype=dtype), gate, up)


LAUNCHES: dict[str, Callable[[], object]] = {
    **{f"8B qkv, T {t}": lambda t=t: _joined(t, 4096, (4096, 1024, 1024), BF16) for t in (1, 6, 32, 64)},
    **{f"8B gate, up, T {t}": lambda t=t: _gated(t, 4096, 14336, BF16) for t in (1, 6, 32, 64)},
    "1B qkv, T 1": lambda: _joined(1, 2048, (2048, 512, 512), BF16),
    "1B gate, up, T 1": lambda: _gated(1, 2048, 8192, BF16),
    "Qwen2 7B qkv, float16, T 16": lambda: _joined(16, 3584, (3584, 512, 512), F16, True),
    "odd sizes, T 64": lambda: _joined(64, 1001, (33, 7), BF16),
    "gated, odd sizes, T 64": lambda: _gated(64, 1001, 33, F16),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)


@pytest.mark.skipif(not runs_triton(torch.empty(0)), reason="on a CPU the reference is all there is")
def test_few_rows_start_one_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import specdec.kernels.linear.joined_linear as module

    for name in ("joined_linear_reference", "gated_linear_reference"):
        monkeypatch.setattr(module, name, None)
    x, weights, biases = _layers(MAX_ROWS, 64, (24, 24), F16, device)
    joined_linear(x, weights, biases)
    gated_linear(x, *weights)
