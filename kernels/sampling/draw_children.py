"""Draw the children of the nodes of a tree: which places of each node's draft law become drafted tokens.

All nodes of a level, of all samples, are the rows of one call. The first children of a row are its hubs (see
`specdec.kernels.verify.tree_rules`), the best of the law; the others are drawn from the rest of it, without
replacement: they are the first to arrive in an exponential race, as in `specdec.kernels.sampling.draw`. A row drawn
with replacement has no hubs, and every child wins a race of its own.

With `shared` noise a race's numbers belong to ids and not to places: whoever draws with the same key from a law of its
own, as coupled verification does for the target, tends to draw the same id.

Letters: R rows, C support size, K children.
Source: Gumbel-top-k as in Kool et al., "Stochastic beams and where to find them", ICML 2019; SpecHub, arXiv 2411.05289.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.cpu import address, build
from specdec.kernels.library import jit, register, tl, triton
from specdec.kernels.sampling.draw import entry_scores, race_config
from specdec.kernels.sampling.noise import exponential, unit_exponential
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT

MAX_SUPPORT = 4096
"""The largest C."""


def draw_children_reference(
    ids: Tensor, probs: Tensor, n_hubs: Tensor, counts: Tensor, seed: Tensor, position: Tensor, node: Tensor,
    stream: int, n_children: int, shared: bool,
) -> Tensor:  # fmt: skip
    """The children of each row, as places in its law.

    Args:
        ids, probs: [R, C] int64 and float32, the laws, not necessarily normalised; with hubs, best first.
        n_hubs: [R] int64, or WITH_REPLACEMENT. counts: [R] int64, how many children each row has, at most K.
        seed, position, node: [R] int64, the noise key of each row. stream: see `specdec.kernels.sampling.noise`.
        n_children: K, of the result. shared: noise belongs to ids, and there is one race a row.

    Returns:
        [R, K] int64 places, -1 where a row has no such child: past its count, and where no entry of positive
        probability is left for it.

    Reads its numbers on the host: a definition, which steps run only without a compiler, eagerly and on a CPU.
    """
    _check(probs)
    size = probs.shape[-1]
    keys = seed, position, node, stream
    if shared:
        noise = exponential(*keys, int(ids.max()) + 1 if ids.numel() else 1).gather(1, ids)
    else:
        noise = exponential(*keys, size)
    out = torch.full((len(probs), n_children), -1, dtype=torch.int64, device=probs.device)
    for r, (hubs, count) in enumerate(zip(n_hubs.tolist(), counts.tolist(), strict=True)):
        law = torch.where(probs[r] > 0, probs[r], 0)
        for k in range(min(hubs, count, size)):
            out[r, k] = k if law[k] > 0 else -1
        law[: max(hubs, 0)] = 0
        for k in range(max(hubs, 0), count):
            arrivals = law / noise[r]
            if hubs == WITH_REPLACEMENT and not shared:
                first = torch.full_like(position[r, None], k * -(-size // 4) * 4)
                own = seed[r, None], position[r, None], node[r, None]
                arrivals = law / exponential(*own, stream, size, first=first)[0]
            if arrivals.max() > 0:
                out[r, k] = arrivals.argmax()
            if hubs != WITH_REPLACEMENT:
                law[out[r, k]] = 0
    return out


def _check(probs: Tensor) -> None:
    if probs.shape[-1] > MAX_SUPPORT:
        raise ValueError(f"draw_children takes supports of at most {MAX_SUPPORT} entries, not {probs.shape[-1]}")


@cache
def _cpp() -> Callable[..., None] | None:
    return build("draw_children.cpp", "draw_children", (ctypes.c_void_p,) * 8 + (ctypes.c_int64,) * 5)


def draw_children_cpu(
    ids: Tensor, probs: Tensor, n_hubs: Tensor, counts: Tensor, seed: Tensor, position: Tensor, node: Tensor,
    stream: int, n_children: int, shared: bool,
) -> Tensor:  # fmt: skip
    """[R, K] places of the drafted children in their nodes' laws (see `draw_children_reference`)."""
    if (kernel := _cpp()) is None:
        return draw_children_reference(ids, probs, n_hubs, counts, seed, position, node, stream, n_children, shared)
    _check(probs)
    out = _fake(ids, probs, n_hubs, counts, seed, position, node, stream, n_children, shared)
    ids, probs = ids.long().contiguous(), probs.float().contiguous()
    rows = [x.long().contiguous() for x in (n_hubs, counts, seed, position, node)]
    integers = (address(x, torch.int64) for x in (*rows, out))
    law = address(ids, torch.int64), address(probs, torch.float32)
    kernel(*law, *integers, *probs.shape, n_children, stream, int(shared))
    return out


@jit
def _draw_children_kernel(
    ids_ptr, probs_ptr, n_hubs_ptr, counts_ptr, seed_ptr, position_ptr, node_ptr, out_ptr, C, K, stream, stride_ir,
    stride_ic, stride_pr, stride_pc, SHARED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a row: its hubs, then the winners of races of the others."""
    i_r = tl.program_id(0).to(tl.int64)
    seed, position, node = tl.load(seed_ptr + i_r), tl.load(position_ptr + i_r), tl.load(node_ptr + i_r)
    n_hubs, count = tl.load(n_hubs_ptr + i_r).to(tl.int32), tl.load(counts_ptr + i_r).to(tl.int32)
    first = tl.minimum(tl.maximum(n_hubs, 0), count)  # of the children that are drawn
    i_k, i_c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK)
    p_row = probs_ptr + i_r * stride_pr
    is_hub = i_k < tl.minimum(first, C)
    prob = tl.load(p_row + i_k.to(tl.int64) * stride_pc, mask=is_hub, other=0)
    places = tl.where(is_hub & (prob > 0), i_k, -1)

    mask = (i_c >= first) & (i_c < C)
    weights = tl.load(p_row + i_c.to(tl.int64) * stride_pc, mask=mask, other=0).to(tl.float32)
    if SHARED:
        ids = tl.load(ids_ptr + i_r * stride_ir + i_c.to(tl.int64) * stride_ic, mask=mask, other=0)
        scores = tl.where(weights > 0, weights / unit_exponential(seed, position, node, stream, ids), -1.0)
    else:
        scores = entry_scores(weights, seed, position, node, stream, 0, BLOCK)
    for k in range(first, count):
        if not SHARED:
            if n_hubs < 0:
                scores = entry_scores(weights, seed, position, node, stream, k * tl.cdiv(C, 4) * 4, BLOCK)
        best, winner = tl.max(scores, 0, return_indices=True)
        places = tl.where(i_k == k, tl.where(best >= 0, winner, -1), places)
        scores = tl.where((n_hubs >= 0) & (i_c == winner), -1.0, scores)
    tl.store(out_ptr + i_r * K + i_k, places.to(tl.int64), mask=i_k < K)


def draw_children_triton(
    ids: Tensor, probs: Tensor, n_hubs: Tensor, counts: Tensor, seed: Tensor, position: Tensor, node: Tensor,
    stream: int, n_children: int, shared: bool,
) -> Tensor:  # fmt: skip
    """[R, K] places of the drafted children in their nodes' laws (see `draw_children_reference`)."""
    _check(probs)
    n_rows, size = probs.shape
    out = torch.empty((n_rows, n_children), dtype=torch.int64, device=probs.device)
    if n_rows > 0 and n_children > 0:
        _draw_children_kernel[(n_rows,)](
            ids, probs, *(x.contiguous() for x in (n_hubs, counts, seed, position, node)), out, size, n_children,
            stream, *ids.stride(), *probs.stride(), SHARED=shared, BLOCK_K=triton.next_power_of_2(n_children),
            maxnreg=255, **race_config(size),  # left to itself ptxas spills at 128
        )  # fmt: skip
    return out


def _fake(
    ids: Tensor, probs: Tensor, n_hubs: Tensor, counts: Tensor, seed: Tensor, position: Tensor, node: Tensor,
    stream: int, n_children: int, shared: bool,
) -> Tensor:  # fmt: skip
    _check(probs)
    return ids.new_empty((ids.shape[0], n_children))


draw_children = register(
    "draw_children(Tensor ids, Tensor probs, Tensor n_hubs, Tensor counts, Tensor seed, Tensor position, Tensor node, "
    "int stream, int n_children, bool shared) -> Tensor",
    cpu=draw_children_cpu,
    launcher=draw_children_triton,
    fake=_fake,
    kernel=_cpp,
)
