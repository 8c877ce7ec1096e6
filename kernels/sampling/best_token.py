"""The token with the largest logit of each row, the lowest id among equals; a NaN is larger than any number, as for
`torch.argmax`.

A row of a large vocabulary is one long dependent chain for a single program, and decoding has few rows. So a program
takes a block of a row and gives the largest of its sort keys (see `top_support`), and a second kernel takes the largest
of a row's.

Letters: T rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.sampling.top_support import key_id, sort_key

_BLOCK = 2048  # entries a program of the first kernel reads


def best_token_reference(logits: Tensor) -> Tensor:
    """The id of each row's largest logit, the lowest of equals, or the first NaN.

    Args:
        logits: [T, V] bfloat16, float16, float32 or float64, any strides.

    Returns:
        [T] int64.
    """
    return logits.argmax(-1)


@jit
def _blocks_kernel(logits_ptr, keys_ptr, V, n_blocks, stride_lt, stride_lv, BLOCK: tl.constexpr):
    """One program a row and block: the largest key."""
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = i_b * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + i_t * stride_lt + i.to(tl.int64) * stride_lv, mask=i < V, other=float("-inf"))
    x = x.to(tl.float32)
    LARGEST: tl.constexpr = 0x7FFFFFFF  # bits of a NaN beyond infinity's, whatever the NaN's own
    keys = tl.where(x == x, sort_key(x, i), (LARGEST << 32) | (LARGEST - i).to(tl.int64))
    tl.store(keys_ptr + i_t * n_blocks + i_b, tl.max(tl.where(i < V, keys, -(2**63)), 0))


@jit
def _rows_kernel(keys_ptr, ids_ptr, n_blocks, BLOCK_N: tl.constexpr):
    """One program a row."""
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    keys = tl.load(keys_ptr + i_t * n_blocks + i_b, mask=i_b < n_blocks, other=-(2**63))
    tl.store(ids_ptr + i_t, key_id(tl.max(keys, 0)).to(tl.int64))


def best_token_triton(logits: Tensor) -> Tensor:
    """The id of each row's largest logit (see `best_token_reference`)."""
    if logits.dtype == torch.float64:  # keys are of float32's bits, where different logits may be equal
        return logits.argmax(-1)
    n_rows, n_vocab = logits.shape
    n_blocks = triton.cdiv(n_vocab, _BLOCK)
    ids = torch.empty((n_rows,), dtype=torch.int64, device=logits.device)
    keys = torch.empty((n_rows, n_blocks), dtype=torch.int64, device=logits.device)
    if n_rows > 0:
        _blocks_kernel[(n_rows, n_blocks)](logits, keys, n_vocab, n_blocks, *logits.stride(), BLOCK=_BLOCK, num_warps=4)
        _rows_kernel[(n_rows,)](keys, ids, n_blocks, BLOCK_N=triton.next_power_of_2(n_blocks), num_warps=1)
    return ids


def _best_token_fake(logits: Tensor) -> Tensor:
    return torch.empty((logits.shape[0],), dtype=torch.int64, device=logits.device)


best_token = register(
    "best_token(Tensor logits) -> Tensor",
    cpu=best_token_reference,
    launcher=best_token_triton,
    fake=_best_token_fake,
)
