"""Draw from laws: one index per row.

Everything is an exponential race: with E_i i.i.d. unit exponentials the first of the arrival times E_i / p_i is that
of index i with probability p_i / sum(p) (the Gumbel-max trick without logarithms).

A race over a whole vocabulary would need one number of noise per entry, and the generator's integer arithmetic would
take longer than reading the row. `draw` therefore runs two races: one over the masses of blocks of DRAW_BLOCK entries,
whose noise comes from a stream of its own, and one inside the block that won. An index i of block b wins with
probability mass_b / sum(p) * p_i / mass_b, so the law is exactly p / sum(p). A row of one block has no race of blocks.

Letters: R rows, V vocabulary.

Source: Maddison et al., "A* sampling", NIPS 2014 (the race, as the Gumbel-max trick).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.kernels.cpu import address, build
from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.sampling.noise import BLOCK_STREAM, exponential, exponentials, unit_exponential

DRAW_BLOCK = 4096
"""Entries of a block."""
_BLOCK_STREAM = BLOCK_STREAM if tl is None else tl.constexpr(BLOCK_STREAM)  # as kernels may read it


def draw_reference(
    probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool = False
) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)`; entries of probability zero are never drawn.

    Args:
        probs: [R, V] float, non-negative, at least one positive entry a row; a row with NaN gives some index in range.
        seed, position, node: [R] int64, the noise key of each row.
        stream: the use this noise is put to (see `specdec.kernels.sampling.noise`).
        flat: one race over the whole row, where noise must belong to an id and not to its block: rows that share a
            key then tend to draw the same id.

    Returns:
        [R] int64.
    """
    width = probs.shape[-1] if flat else min(probs.shape[-1], DRAW_BLOCK)
    blocks = torch.stack(pad(probs.float(), (0, -probs.shape[-1] % width)).split(width, -1), 1)
    noise = exponential(seed, position, node, stream + BLOCK_STREAM, blocks.shape[1])
    block = (blocks.sum(-1) / noise).argmax(-1)
    inside = blocks[torch.arange(len(probs), device=probs.device, dtype=torch.int64), block]
    noise = exponential(seed, position, node, stream, width, first=block * width)
    return block * width + (inside / noise).argmax(-1)


@cache
def _cpp() -> Callable[..., None] | None:
    return build("draw.cpp", "draw", (ctypes.c_void_p,) * 5 + (ctypes.c_int64,) * 5)


def draw_cpu(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool = False) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)` (see `draw_reference`)."""
    if (kernel := _cpp()) is None:
        return draw_reference(probs, seed, position, node, stream, flat)
    out = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    probs = probs.float()
    probs = probs if probs.stride(-1) == 1 else probs.contiguous()  # rows may be one and the same
    keys = [x.contiguous() for x in (seed, position, node)]
    width = max(probs.shape[1], 1) if flat else DRAW_BLOCK
    integers = (address(x, torch.int64) for x in (*keys, out))
    p_rows = address(probs, torch.float32, is_dense=False)
    kernel(p_rows, *integers, *probs.shape, probs.stride(0), stream, width)
    return out


@jit
def block_score(mass, seed, position, node, stream, block):
    """The score in the race of blocks of block number `block` with this mass: ints and floats, or blocks of them.

    The highest score wins; it is -1 where there is no mass, or NaN.
    """
    noise = unit_exponential(seed, position, node, stream + _BLOCK_STREAM, block)
    return tl.where(mass > 0, mass / noise, -1.0)


@jit
def entry_scores(weights, seed, position, node, stream, first, BLOCK: tl.constexpr):
    """The scores in the race inside a block of `weights` [BLOCK], float32, of entries first ... first + BLOCK - 1.

    The highest score wins; it is -1 where the weight is zero, or NaN.
    """
    noise = exponentials(seed, position, node, stream, first, BLOCK)
    return tl.where(weights > 0, weights / noise, -1.0)


@jit
def _draw_kernel(
    probs_ptr, seed_ptr, position_ptr, node_ptr, out_ptr, V, stride_pr, stride_pv, stream,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a row; GROUP blocks of BLOCK weights at a time, then once more the block that won.

    With FLAT all blocks run one race, each entry with the noise of its own index.
    """
    i_r = tl.program_id(0).to(tl.int64)
    seed, position, node = tl.load(seed_ptr + i_r), tl.load(position_ptr + i_r), tl.load(node_ptr + i_r)
    p_row = probs_ptr + i_r * stride_pr
    begin, end = 0, V
    if not FLAT:
        if V > BLOCK:
            best = -1.0
            for block in range(0, tl.cdiv(V, BLOCK), GROUP):
                blocks = block + tl.arange(0, GROUP)
                i = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
                weights = tl.load(p_row + i.to(tl.int64) * stride_pv, mask=i < V, other=0).to(tl.float32)
                scores = block_score(tl.sum(weights, 1), seed, position, node, stream, blocks)
                score = tl.max(scores, 0)
                begin = tl.where(score > best, (block + tl.argmax(scores, 0)) * BLOCK, begin)
                best = tl.maximum(score, best)
            end = begin + BLOCK
    best, winner = -1.0, begin
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weights = tl.load(p_row + i.to(tl.int64) * stride_pv, mask=i < V, other=0).to(tl.float32)
        score, at = tl.max(entry_scores(weights, seed, position, node, stream, start, BLOCK), 0, return_indices=True)
        winner = tl.where(score > best, start + at, winner)
        best = tl.maximum(score, best)
    tl.store(out_ptr + i_r, winner)


def race_config(size: int) -> dict[str, int]:
    """How a kernel races rows of this many entries: in blocks of BLOCK, by so many warps."""
    block = min(max(triton.next_power_of_2(size), 4), DRAW_BLOCK)
    return {"BLOCK": block, "num_warps": 16 if size > DRAW_BLOCK else min(max(block // 512, 1), 8)}


def draw_triton(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool = False) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)` (see `draw_reference`)."""
    n_rows, size = probs.shape
    keys = [x.contiguous() for x in (seed, position, node)]
    out = torch.empty(n_rows, dtype=torch.int64, device=probs.device)
    if n_rows > 0:
        config = race_config(size)
        _draw_kernel[(n_rows,)](probs, *keys, out, size, *probs.stride(), stream, FLAT=flat, GROUP=4, **config)
    return out


def _draw_fake(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, flat: bool = False) -> Tensor:
    return probs.new_empty(probs.shape[0], dtype=torch.int64)


draw = register(
    "draw(Tensor probs, Tensor seed, Tensor position, Tensor node, int stream, bool flat=False) -> Tensor",
    cpu=draw_cpu,
    launcher=draw_triton,
    fake=_draw_fake,
    kernel=_cpp,
)
