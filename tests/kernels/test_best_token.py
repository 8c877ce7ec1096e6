"""The best token is that of `torch.argmax`: the first of equals, and a NaN before anything else."""

from __future__ import annotations

import math

import pytest
import torch
from aot import compiles_without_spilling, meta
from torch import Tensor

from specdec.kernels.sampling.best_token import best_token, best_token_triton

pytestmark = pytest.mark.kernels


def _first_best(row: list[float]) -> int:
    """The definition."""
    nans = [i for i, x in enumerate(row) if math.isnan(x)]
    return nans[0] if nans else row.index(max(row))


def _check(logits: Tensor, device: torch.device) -> None:
    found = best_token(logits.to(device))
    assert (found.dtype, found.shape) == (torch.int64, logits.shape[:1])
    assert found.tolist() == [_first_best(row) for row in logits.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 2, 97, 2048, 2049, 9000])
def test_is_the_first_of_the_largest(vocab: int, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator)
    logits[1] = logits[1].round()  # many equals
    logits[2] = -logits[2].abs()
    logits[3] = 0.0
    logits[3, ::2] = -0.0  # equal to the other zero
    logits[4] = -math.inf
    _check(logits.to(dtype), device)


def test_doubles_that_are_one_float(device: torch.device) -> None:
    _check(torch.tensor([[1.0, 1.0 + 2**-40, 1.0]], dtype=torch.float64), device)


@pytest.mark.parametrize("place", [0, 1, 2047, 2048, 4999])
def test_a_nan_comes_first(place: int, device: torch.device) -> None:
    logits = torch.randn(3, 5000)
    logits[:, 30] = math.inf
    logits[0, place] = math.nan
    logits[1, place] = -math.nan  # its sign bit is set
    logits[2, place:] = math.nan
    _check(logits, device)


def test_strides(device: torch.device) -> None:
    logits = torch.randn(3000, 4).t()
    assert logits.stride() == (1, 4)
    assert torch.equal(best_token(logits.to(device)).cpu(), logits.argmax(-1))
    rows = torch.randn(8, 3000).to(device)[::3, :2999]
    assert torch.equal(best_token(rows), rows.argmax(-1))


def test_nothing(device: torch.device) -> None:
    assert best_token(torch.empty(0, 5, device=device)).shape == (0,)


def test_is_a_well_formed_op_and_traces(device: torch.device) -> None:
    logits = torch.randn(3, 5000).to(device)
    torch.library.opcheck(best_token.op, (logits,))
    traced = torch.compile(lambda x: best_token(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(logits), best_token(logits))


LAUNCHES = {
    "bfloat16, T 1, V 128256": lambda: best_token_triton(meta(1, 128_256, dtype=torch.bfloat16)),
    "float16, T 64, V 50257": lambda: best_token_triton(meta(64, 50_257, dtype=torch.float16)),
    "float32, T 64, V 262144": lambda: best_token_triton(meta(64, 262_144, dtype=torch.float32)),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
