"""Draw from laws: one index per row, or several distinct ones.

Everything is an exponential race: with E_i i.i.d. unit exponentials the first of the arrival times E_i / p_i is that
of index i with probability p_i / sum(p) (the Gumbel-max trick without logarithms). The second to arrive, given the
first, is drawn from the law without the first, and so on: the first n arrivals are n draws without replacement.

A race over a whole vocabulary would need one number of noise per entry, and the generator's integer arithmetic would
take longer than reading the row. `draw` therefore runs two races: one over the masses of blocks of DRAW_BLOCK entries,
whose noise comes from a stream of its own, and one inside the block that won. An index i of block b wins with
probability mass_b / sum(p) * p_i / mass_b, so the law is exactly p / sum(p). A row of one block has no race of blocks.

Letters: R rows, V vocabulary, C size of a support, n how many are drawn.

Source: Gumbel-max and Gumbel-top-k as in Kool et al., "Stochastic beams and where to find them", ICML 2019.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.kernels.cpu import build, has_compiler
from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.noise import BLOCK_STREAM, NOISE_CPP, exponential, exponentials, unit_exponential

DRAW_BLOCK = 4096
"""Entries of a block of `draw`, and the largest support of `draw_distinct`."""
_BLOCK_STREAM = BLOCK_STREAM if tl is None else tl.constexpr(BLOCK_STREAM)  # as kernels may read it


def draw_reference(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)`; entries of probability zero are never drawn.

    Args:
        probs: [R, V] float, non-negative, at least one positive entry a row; a row with NaN gives some index in range.
        seed, position, node: [R] int64, the noise key of each row.
        stream: the use this noise is put to (see `specdec.kernels.noise`).

    Returns:
        [R] int64.
    """
    width = min(probs.shape[-1], DRAW_BLOCK)
    blocks = torch.stack(pad(probs.float(), (0, -probs.shape[-1] % width)).split(width, -1), 1)
    noise = exponential(seed, position, node, stream + BLOCK_STREAM, blocks.shape[1])
    block = (blocks.sum(-1) / noise).argmax(-1)
    inside = blocks[torch.arange(len(probs), device=probs.device), block]
    noise = exponential(seed, position, node, stream, width, first=block * DRAW_BLOCK)
    return block * DRAW_BLOCK + (inside / noise).argmax(-1)


def draw_distinct_reference(
    probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, count: int
) -> Tensor:
    """The first `count` arrivals of each row's race, in order: draws without replacement from `probs / probs.sum(-1)`.

    Args:
        probs: [R, C] float, non-negative, C at most DRAW_BLOCK.
        seed, position, node: [R] int64, the noise key of each row; the first of the draws is that of `draw`.
        stream: the use this noise is put to (see `specdec.kernels.noise`).
        count: n, how many to draw.

    Returns:
        [R, n] int64, -1 once a row has no more positive entries.
    """
    _check_support(probs)
    scores = torch.where(probs > 0, probs.float() / exponential(seed, position, node, stream, probs.shape[-1]), -1)
    scores, order = pad(scores, (0, max(0, count - probs.shape[-1])), value=-1).sort(descending=True, stable=True)
    return torch.where(scores[:, :count] >= 0, order[:, :count], -1)


def _check_support(probs: Tensor) -> None:
    if probs.shape[-1] > DRAW_BLOCK:
        raise ValueError(f"draw_distinct takes supports of at most {DRAW_BLOCK} entries, not {probs.shape[-1]}")


_SOURCE = r"""
static inline float sum(const float* p, int64_t n) {
  vec lanes[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; j++) lanes[j] += load(p + i + j * LANES);
  float rest = 0;
  for (; i < n; i++) rest += p[i];
  return total((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest;
}

// `use(i, score)` for the entries begin ... end - 1 that can win, in order: their score is p[i] / E_i.
template <typename Use>
static inline void race(
    const float* p, int64_t begin, int64_t end, int64_t seed, int64_t position, int64_t node, int64_t stream, Use use) {
  for (int64_t i = begin; i < end; i += 4) {
    bool any = false;
    for (int64_t j = i; j < std::min(i + 4, end); j++) any |= p[j] > 0;
    if (!any) continue;  // truncated laws are mostly zeros
    const Words w = philox(seed, uint32_t(i / 4), uint32_t(position), uint32_t(node), uint32_t(stream));
    for (int64_t j = i; j < std::min(i + 4, end); j++)
      if (p[j] > 0) use(j, p[j] / exponential(w, j - i));
  }
}

extern "C" void draw(
    const float* probs, const int64_t* seed, const int64_t* position, const int64_t* node, int64_t* out, int64_t rows,
    int64_t size, int64_t stride, int64_t stream) {
  const int64_t n_blocks = (size + DRAW_BLOCK - 1) / DRAW_BLOCK;
  std::vector<float> mass(n_blocks);
  for (int64_t r = 0; r < rows; r++) {
    const float* p = probs + r * stride;
    float best = -1;
    int64_t winner = 0;
    const auto use = [&](int64_t i, float score) { if (score > best) best = score, winner = i; };
    if (n_blocks > 1) {
      for (int64_t b = 0; b < n_blocks; b++)
        mass[b] = sum(p + b * DRAW_BLOCK, std::min(DRAW_BLOCK, size - b * DRAW_BLOCK));
      race(mass.data(), 0, n_blocks, seed[r], position[r], node[r], stream + BLOCK_STREAM, use);
    }
    const int64_t begin = winner * DRAW_BLOCK;
    best = -1;
    winner = begin;
    race(p, begin, std::min(begin + DRAW_BLOCK, size), seed[r], position[r], node[r], stream, use);
    out[r] = winner;
  }
}

extern "C" void draw_distinct(
    const float* probs, const int64_t* seed, const int64_t* position, const int64_t* node, int64_t* out, int64_t rows,
    int64_t size, int64_t stride, int64_t stream, int64_t count) {
  std::vector<std::pair<float, int64_t>> entries;
  for (int64_t r = 0; r < rows; r++) {
    entries.clear();
    race(probs + r * stride, 0, size, seed[r], position[r], node[r], stream,
         [&](int64_t i, float score) { entries.emplace_back(-score, i); });
    const int64_t found = std::min<int64_t>(count, entries.size());
    std::partial_sort(entries.begin(), entries.begin() + found, entries.end());
    for (int64_t i = 0; i < count; i++) out[r * count + i] = i < found ? entries[i].second : -1;
  }
}
"""


@cache
def _cpp() -> ctypes.CDLL:
    sizes = f"constexpr int64_t DRAW_BLOCK = {DRAW_BLOCK}, BLOCK_STREAM = {BLOCK_STREAM};\n"
    library = build("#include <algorithm>\n#include <utility>\n" + sizes + NOISE_CPP + _SOURCE)
    library.draw.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4
    library.draw_distinct.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5
    library.draw.restype = library.draw_distinct.restype = None
    return library


def _call_cpp(name: str, out: Tensor, probs: Tensor, keys: tuple[Tensor, ...], *numbers: int) -> Tensor:
    probs = probs.float()
    inputs = [probs if probs.stride(-1) == 1 else probs.contiguous(), *(x.contiguous() for x in keys)]
    sizes = *probs.shape, inputs[0].stride(0)
    getattr(_cpp(), name)(*(x.data_ptr() for x in inputs), out.data_ptr(), *sizes, *numbers)
    return out


def draw_cpu(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)` (see `draw_reference`)."""
    if not has_compiler():
        return draw_reference(probs, seed, position, node, stream)
    out = torch.empty(len(probs), dtype=torch.int64)
    return _call_cpp("draw", out, probs, (seed, position, node), stream)


def draw_distinct_cpu(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, count: int) -> Tensor:
    """Draws [R, count] without replacement, in order, from each row's law (see `draw_distinct_reference`)."""
    if not has_compiler():
        return draw_distinct_reference(probs, seed, position, node, stream, count)
    _check_support(probs)
    out = torch.empty((len(probs), count), dtype=torch.int64)
    return _call_cpp("draw_distinct", out, probs, (seed, position, node), stream, count)


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
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a row; GROUP blocks of BLOCK weights at a time, then once more the block that won."""
    i_r = tl.program_id(0).to(tl.int64)
    seed, position, node = tl.load(seed_ptr + i_r), tl.load(position_ptr + i_r), tl.load(node_ptr + i_r)
    p_row = probs_ptr + i_r * stride_pr
    winner = 0
    if V > BLOCK:
        best = -1.0
        for block in range(0, tl.cdiv(V, BLOCK), GROUP):
            blocks = block + tl.arange(0, GROUP)
            i = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            weights = tl.load(p_row + i.to(tl.int64) * stride_pv, mask=i < V, other=0).to(tl.float32)
            scores = block_score(tl.sum(weights, 1), seed, position, node, stream, blocks)
            score = tl.max(scores, 0)
            winner = tl.where(score > best, block + tl.argmax(scores, 0), winner)
            best = tl.maximum(score, best)
    i = winner * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(p_row + i.to(tl.int64) * stride_pv, mask=i < V, other=0).to(tl.float32)
    scores = entry_scores(weights, seed, position, node, stream, winner * BLOCK, BLOCK)
    tl.store(out_ptr + i_r, (winner * BLOCK + tl.argmax(scores, 0)).to(tl.int64))


@jit
def _draw_distinct_kernel(
    probs_ptr, seed_ptr, position_ptr, node_ptr, out_ptr, C, stride_pr, stride_pc, stream, count, BLOCK: tl.constexpr
):
    """One program a row: the winner of the race, `count` times, taken out of it each time."""
    i_r = tl.program_id(0).to(tl.int64)
    seed, position, node = tl.load(seed_ptr + i_r), tl.load(position_ptr + i_r), tl.load(node_ptr + i_r)
    i = tl.arange(0, BLOCK)
    p_row = probs_ptr + i_r * stride_pr
    weights = tl.load(p_row + i.to(tl.int64) * stride_pc, mask=i < C, other=0).to(tl.float32)
    scores = entry_scores(weights, seed, position, node, stream, 0, BLOCK)
    for place in range(count):
        best, winner = tl.max(scores, 0, return_indices=True)
        tl.store(out_ptr + i_r * count + place, tl.where(best >= 0, winner, -1).to(tl.int64))
        scores = tl.where(i == winner, -1.0, scores)


def _race_config(size: int) -> dict[str, int]:
    block = min(max(triton.next_power_of_2(size), 4), DRAW_BLOCK)
    return {"BLOCK": block, "num_warps": 16 if size > DRAW_BLOCK else min(max(block // 512, 1), 8)}


def draw_triton(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    """One index per row from the law `probs / probs.sum(-1)` (see `draw_reference`)."""
    n_rows, size = probs.shape
    keys = [x.contiguous() for x in (seed, position, node)]
    out = torch.empty(n_rows, dtype=torch.int64, device=probs.device)
    if n_rows > 0:
        config = _race_config(size)
        _draw_kernel[(n_rows,)](probs, *keys, out, size, *probs.stride(), stream, GROUP=4, **config)
    return out


def draw_distinct_triton(
    probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, count: int
) -> Tensor:
    """Draws [R, count] without replacement, in order, from each row's law (see `draw_distinct_reference`)."""
    _check_support(probs)
    n_rows, size = probs.shape
    keys = [x.contiguous() for x in (seed, position, node)]
    out = torch.empty((n_rows, count), dtype=torch.int64, device=probs.device)
    if n_rows > 0:
        config = _race_config(size)
        _draw_distinct_kernel[(n_rows,)](probs, *keys, out, size, *probs.stride(), stream, count, **config)
    return out


def _draw_fake(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    return probs.new_empty(probs.shape[0], dtype=torch.int64)


def _draw_distinct_fake(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int, count: int) -> Tensor:
    _check_support(probs)
    return probs.new_empty((probs.shape[0], count), dtype=torch.int64)


draw = register(
    "draw(Tensor probs, Tensor seed, Tensor position, Tensor node, int stream) -> Tensor",
    cpu=draw_cpu,
    launcher=draw_triton,
    fake=_draw_fake,
    inline=False,
)
draw_distinct = register(
    "draw_distinct(Tensor probs, Tensor seed, Tensor position, Tensor node, int stream, int count) -> Tensor",
    cpu=draw_distinct_cpu,
    launcher=draw_distinct_triton,
    fake=_draw_distinct_fake,
    inline=False,
)
