"""Linear layers of a few rows on a CPU: each weight is read from memory once.

    out[t, n] = sum_k x[t, k] * weight[n, k]          t < T, T small

A decoding step multiplies T rows, 1 to about 128, with every weight of the model. For the fewest the time should be
that of streaming the weights from memory, and a library's product takes two to three times that; for more it should be
that of the arithmetic. One kernel does both: weights pass once, a few rows of them at a time, and all rows of x go over
these in tiles of sums that stay in registers. Every output is its own dot product in one fixed order, so a row's result
does not depend on how many rows there are.

From some number of rows on the library is as fast or faster. Which number depends on the processor and the library, and
is measured.

CPU only: the matrix product of a GPU is left to its library.
Letters: T rows, N outputs, K inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.cpu import bind
from specdec.kernels.library import register

FEW_ROWS = 8
"""Up to here the kernel is faster on any processor: a library reads its weights more slowly than memory gives them."""
ROWS = 128, 96, 64, 48, 32, 24, 16
"""How many rows the kernel is tried with, most first. From there on a library's time is that of the arithmetic, too."""
MIN_WEIGHTS = 2**16
"""Below this (256 KiB) the product is short, and the library as fast."""


@cache
def _kernel() -> Callable[..., None] | None:
    return bind("skinny_linear.cpp", ", ".join(["float*"] * 3 + ["int64_t"] * 4))


def is_few(n_rows: int) -> bool:
    """Whether the kernel is for so many rows."""
    return n_rows <= FEW_ROWS or n_rows <= max_rows()


@cache
def max_rows() -> int:
    """The most rows of `ROWS` with which the kernel is not slower than the library, or `FEW_ROWS`.

    Measured by the first who asks, in 15 to 100 ms, and kept: in one process a row is always computed alike. On one
    thread: where cores are shared with other programs, threads that wait for each other measure those.
    """
    if (kernel := _kernel()) is None:
        return FEW_ROWS
    n_out, n_in, most = 512, 1024, ROWS[0]
    x, weight, out = (
        torch.ones(shape, dtype=torch.float32, device="cpu") for shape in ((most, n_in), (n_out, n_in), (most, n_out))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n_rows in ROWS:
            ways = (
                partial(kernel, x[:n_rows], weight, out[:n_rows], n_rows, n_out, n_in, 1),
                partial(torch.mm, x[:n_rows], weight.t(), out=out[:n_rows]),
            )
            rounds = [[_seconds(way) for way in ways] for _ in range(5)]
            ours, theirs = map(min, zip(*rounds, strict=True))
            if ours <= theirs:
                return n_rows
    finally:
        torch.set_num_threads(threads)
    return FEW_ROWS


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
    if not is_few(n_rows) or (kernel := _kernel()) is None:
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
