"""Draw from laws: the truncated draft law kept for verification, and one token from a law.

`top_support` keeps the K most probable ids of a row and renormalises, and `draw` samples by an exponential race:
with E_i i.i.d. unit exponentials, argmax_i p_i / E_i has law p / sum(p) (the Gumbel-max trick without logarithms).
Drafts are drawn from exactly the truncated law that verification later sees, and compared in float32: a draft drawn
from one law and verified against another is a biased sampler.

Letters: R rows, V vocabulary, K support size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.cpu import has_compiler
from specdec.kernels.library import register
from specdec.kernels.noise import cpu_functions, exponential


def top_support_reference(probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` most probable ids of each row and their renormalised probabilities.

    Args:
        probs: [R, V] float32, rows need not be normalised.
        size: K, at most V.

    Returns:
        ids [R, K] int64 and support_probs [R, K] float32, most probable first, each row summing to one.
    """
    top, ids = probs.topk(size, dim=-1)
    return ids, top / top.sum(-1, keepdim=True)


def draw_reference(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)`; entries of probability zero are never drawn.

    Args:
        probs: [R, V] float32, non-negative, at least one positive entry a row.
        seed, position, node: [R] int64, the noise key of each row.
        stream: the use this noise is put to (see `specdec.kernels.noise`).

    Returns:
        [R] int64.
    """
    return (probs / exponential(seed, position, node, stream, probs.shape[-1])).argmax(-1)


def draw_cpu(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)` (see `draw_reference`)."""
    if not has_compiler():
        return draw_reference(probs, seed, position, node, stream)
    inputs = [x.contiguous() for x in (probs, seed, position, node)]
    n_rows, size = probs.shape
    out = torch.empty(n_rows, dtype=torch.int64)
    cpu_functions().draw(*(x.data_ptr() for x in inputs), out.data_ptr(), n_rows, size, stream)
    return out


def _top_support_fake(probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    shape = (probs.shape[0], size)
    return probs.new_empty(shape, dtype=torch.int64), probs.new_empty(shape)


def _draw_fake(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    return probs.new_empty(probs.shape[0], dtype=torch.int64)


top_support = register(
    "top_support(Tensor probs, int size) -> (Tensor, Tensor)",
    cpu=top_support_reference,
    triton=None,
    fake=_top_support_fake,
)
draw = register(
    "draw(Tensor probs, Tensor seed, Tensor position, Tensor node, int stream) -> Tensor",
    cpu=draw_cpu,
    triton=None,
    fake=_draw_fake,
    inline=False,
)
