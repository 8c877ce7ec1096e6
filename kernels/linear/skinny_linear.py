"""Linear layers of a few rows on a CPU, at the speed of reading the weights once.

    out[t, n] = sum_k x[t, k] * weight[n, k]          t < T, T small

A decoding step multiplies T = 1 .. 32 rows with every weight of the model. The time should be that of streaming the
weights from memory; library matrix products take about twice that for such shapes, and on some processors, of two or
three rows, four times. Here each block of weight rows is
read once and multiplied with up to eight rows of x held in registers. Every output is its own dot product in one fixed
order, so a row's result does not depend on how many rows sit beside it.

CPU only: the matrix product of a GPU is left to its library.
Letters: T rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.cpu import bind
from specdec.kernels.library import register

MAX_ROWS = 16
"""Above this the product is bound by arithmetic and the library is faster."""
MIN_WEIGHTS = 2**16
"""Below this (256 KiB) the product is short, and the library as fast."""


@cache
def _kernel() -> Callable[..., None] | None:
    return bind("skinny_linear.cpp", ", ".join(["float*"] * 3 + ["int64_t"] * 4))


def skinny_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of x [..., K] and weight [N, K]."""
    return F.linear(x, weight)


def skinny_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, reading the weights once where x has few rows; the library's product where it has not.

    Args:
        x: [..., K] float32. weight: [N, K] float32, contiguous.

    Returns:
        [..., N] float32.
    """
    n_out, n_in = weight.shape
    n_rows = x.numel() // n_in
    if n_rows > MAX_ROWS or (kernel := _kernel()) is None:
        return F.linear(x, weight)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], n_out)
    kernel(x, weight, out, n_rows, n_out, n_in, torch.get_num_threads())
    return out


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


skinny_linear = register(
    "skinny_linear(Tensor x, Tensor weight) -> Tensor",
    cpu=skinny_linear_cpu,
    launcher=None,
    fake=_fake,
    kernel=_kernel,
)
