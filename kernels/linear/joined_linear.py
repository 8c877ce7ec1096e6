"""Linear layers of few rows that read one input, as one launch: the queries', keys' and values', or a gated unit.

    out_i[t, n] = sum_k x[t, k] * weight_i[n, k] + bias_i[n]                            joined_linear
    out[t, n] = silu(sum_k x[t, k] * gate[n, k]) * sum_k x[t, k] * up[n, k]             gated_linear

Decoding multiplies T = 1 .. 64 rows, and is bound by reading weights: a program streams BLOCK_N rows of a weight once
and multiplies them with all rows of x. Between launches that a layer saves nothing is read. Weights stay where they
are, none is copied beside another. Sums are float32, and rounded where PyTorch rounds: every product, and the
activation, to the dtype of x. More rows than that, and float32, are the library's product, weight by weight.

Which of the two runs depends on shapes alone: were it chosen by a clock, equal seeds would not give equal texts.

Source: Shazeer, arXiv 2002.05202 (gated units).
Letters: T rows, K inputs, N outputs, of each weight its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton

MAX_ROWS = 64
"""Above this the product is bound by arithmetic, and the library's is the better one."""
DTYPES = (torch.bfloat16, torch.float16)
_PROGRAMS = 2 * 132  # fewer leave multiprocessors idle that could read


def joined_linear_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Linear layers of one input.

    Args:
        x: [..., K]. weights: [N, K] each, of x's dtype, contiguous. biases: [N] each, or none at all.

    Returns:
        [..., N] of each weight, of x's dtype.
    """
    return [F.linear(x, weight, biases[i] if biases else None) for i, weight in enumerate(weights)]


def gated_linear_reference(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """A gated unit, SwiGLU.

    Args:
        x: [..., K]. gate, up: [N, K] of x's dtype, contiguous.

    Returns:
        [..., N] of x's dtype.
    """
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@jit
def _products(
    x_ptr, w_ptr, up_ptr, i_block, T, N, K, stride_xt,
    IS_GATED: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_T, BLOCK_N]: all rows of x times a block of a weight's, and of a second weight's.

    Rows past a weight's last one read that one again; what they give is not stored."""
    o_t, o_k = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_K)[None, :]
    o_n = tl.minimum(i_block * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)[:, None]
    o_x, o_w = o_t * stride_xt + o_k, o_n * K + o_k
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if IS_EVEN:
            x = tl.load(x_ptr + (o_x + i_k), mask=o_t < T, other=0.0)
            w = tl.load(w_ptr + (o_w + i_k))
        else:
            x = tl.load(x_ptr + (o_x + i_k), mask=(o_t < T) & (o_k < K - i_k), other=0.0)
            w = tl.load(w_ptr + (o_w + i_k), mask=o_k < K - i_k, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc)
        if IS_GATED:
            if IS_EVEN:
                up = tl.load(up_ptr + (o_w + i_k))
            else:
                up = tl.load(up_ptr + (o_w + i_k), mask=o_k < K - i_k, other=0.0)
            acc_up = tl.dot(x, tl.trans(up), acc_up)
    return acc, acc_up


@jit
def _store(out_ptr, out, i_block, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write a block of an output, [T, N]."""
    o_t, o_n = tl.arange(0, BLOCK_T)[:, None], i_block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + (o_t * N + o_n), out.to(out_ptr.dtype.element_ty), mask=(o_t < T) & (o_n < N))


@jit
def _joined_linear_kernel(
    x_ptr, w_ptrs, bias_ptrs, out_ptrs, n_outs, T, K, stride_xt,
    IS_EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a block of one weight: those of the first weight, then those of the second, and so on."""
    i_block = tl.program_id(0)
    for i in tl.static_range(len(w_ptrs)):
        N = n_outs[i]
        if (i_block >= 0) & (i_block < tl.cdiv(N, BLOCK_N)):
            out, _ = _products(
                x_ptr, w_ptrs[i], w_ptrs[i], i_block, T, N, K, stride_xt, False, IS_EVEN, BLOCK_T, BLOCK_N, BLOCK_K
            )
            if len(bias_ptrs) > 0:
                o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
                out += tl.load(bias_ptrs[i] + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
            _store(out_ptrs[i], out, i_block, T, N, BLOCK_T, BLOCK_N)
        i_block -= tl.cdiv(N, BLOCK_N)


@jit
def _gated_linear_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, T, N, K, stride_xt,
    IS_EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a block of outputs."""
    i_block = tl.program_id(0)
    gate, up = _products(x_ptr, gate_ptr, up_ptr, i_block, T, N, K, stride_xt, True, IS_EVEN, BLOCK_T, BLOCK_N, BLOCK_K)
    gate, up = gate.to(x_ptr.dtype.element_ty).to(tl.float32), up.to(x_ptr.dtype.element_ty).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(x_ptr.dtype.element_ty).to(tl.float32)
    _store(out_ptr, active * up, i_block, T, N, BLOCK_T, BLOCK_N)


def _tile(n_rows: int, n_in: int, n_outs: int, n_weights: int) -> dict[str, int]:
    """How a kernel is started, where a program reads `n_weights` weights.

    A multiprocessor has to have some 40 KiB on their way to keep memory busy, and all programs should run at once: a
    few that come later would read alone. So tiles are small, and wider only where there are enough of them, or where
    many rows of x would be read again for each. Rows that are not aligned to 16 bytes go through registers. Left alone,
    ptxas spills some bytes in order to fit one more program on a multiprocessor (`maxnreg`).
    """
    block_t = max(16, triton.next_power_of_2(n_rows))
    block_n = max(16 if n_outs < 32 * _PROGRAMS else 32, block_t // n_weights)
    block_k = 128 // n_weights if n_in % 16 == 0 else 32
    blocks = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "num_warps": 4, "num_stages": 4, "maxnreg": 255}


def _is_few(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel is for rows [T, K] and weights like these."""
    is_known = x.dtype in DTYPES and all(w.dtype == x.dtype and w.is_contiguous() for w in weights)
    return is_known and 0 < x.shape[0] <= MAX_ROWS and x.shape[1] > 0


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [T, K], dense in K."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def joined_linear_triton(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Start the kernel (arguments as for `joined_linear_reference`), or of many rows the library's products."""
    n_in = x.shape[-1]
    rows, n_outs = _rows(x), [len(weight) for weight in weights]
    if not _is_few(rows, weights):
        return joined_linear_reference(x, weights, biases)
    outs = [torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device) for n in n_outs]
    tile = _tile(len(rows), n_in, sum(n_outs), 1)
    n_blocks = sum(triton.cdiv(n, tile["BLOCK_N"]) for n in n_outs)
    _joined_linear_kernel[(n_blocks,)](
        rows, tuple(weights), tuple(bias.contiguous() for bias in biases), tuple(outs), tuple(n_outs), len(rows), n_in,
        rows.stride(0), n_in % tile["BLOCK_K"] == 0, **tile,
    )  # fmt: skip
    return outs


def gated_linear_triton(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Start the kernel (arguments as for `gated_linear_reference`), or of many rows the library's products."""
    n_out, n_in = gate.shape
    rows = _rows(x)
    if not _is_few(rows, [gate, up]):
        return gated_linear_reference(x, gate, up)
    out = torch.empty((*x.shape[:-1], n_out), dtype=x.dtype, device=x.device)
    tile = _tile(len(rows), n_in, n_out, 2)
    _gated_linear_kernel[(triton.cdiv(n_out, tile["BLOCK_N"]),)](
        rows, gate, up, out, len(rows), n_out, n_in, rows.stride(0), n_in % tile["BLOCK_K"] == 0, **tile
    )
    return out


def _joined_linear_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _gated_linear_fake(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate.shape[0])


joined_linear = register(
    "joined_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    cpu=joined_linear_reference,
    launcher=joined_linear_triton,
    fake=_joined_linear_fake,
)
gated_linear = register(
    "gated_linear(Tensor x, Tensor gate, Tensor up) -> Tensor",
    cpu=gated_linear_reference,
    launcher=gated_linear_triton,
    fake=_gated_linear_fake,
)
