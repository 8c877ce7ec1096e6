"""The law drafts are drawn from: the K best entries of each row of logits, truncated and renormalised.

With z = logit * inverse temperature, sorted by (logit descending, id ascending), the first K entries are listed and of
them are kept, in this order:

- top-k: the first `top_k` of the list, where top_k > 0;
- top-p: entries before which lies less than top_p * total, where total is the mass of the first top_k entries if
  0 < top_k <= K, and the mass of the whole row otherwise; top_p >= 1 keeps everything;
- min-p: entries with p_i >= min_p * p_max.

The best entry always stays; dropped ones get probability zero. Whatever is dropped the decoding stays lossless, because
drafts are drawn from exactly this law, in float32, and verified against it.

How: the K best entries of a row lie in those K groups of consecutive entries whose own best entries are best (were an
entry's group not among them, K groups would each hold a better one). So one pass over the row, split over programs,
keeps the maximum of each group, and sorting is left for the maxima and for the entries of K groups. Keys that sort are
64 bits: an order-preserving image of the float32 logit, then the inverted id, so no two are equal.

Letters: R rows, V vocabulary, K size of the list.

Source: groups and their maxima are the delegates of Gaihre et al., "Dr. Top-k: delegate-centric top-k on GPUs",
SC 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton

MAX_SIZE = 256
"""The largest K."""
_BLOCK = 8192  # entries a program of the first kernel reads


def top_support_reference(logits: Tensor, knobs: Tensor, top_k: int, size: int) -> tuple[Tensor, Tensor]:
    """The best `size` ids of each row and their law after temperature, top-k, top-p and min-p.

    Args:
        logits: [R, V] float, any strides; -inf has probability zero.
        knobs: [3] float32: inverse temperature, top_p, min_p; (1, 1, 0) changes nothing.
        top_k: 0 is off.
        size: K, at most V and MAX_SIZE.

    Returns:
        ids [R, K] int64, ordered by logit descending, then id ascending; probs [R, K] float32, each row sums to one.
    """
    _check_size(logits, size)
    scores, ids = logits.float().sort(descending=True, stable=True)
    mass = _mass(scores, scores[:, :1], knobs[0])
    total = mass[:, : top_k if 0 < top_k <= size else None].sum(-1, keepdim=True)
    return ids[:, :size].clone(), _truncate(mass[:, :size], total, knobs, top_k)


def _mass(scores: Tensor, best: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Probabilities up to a factor, the best having mass 1 even where it is infinite."""
    return torch.where(scores == best, 1.0, ((scores - best) * inverse_temperature).exp())


def _truncate(mass: Tensor, total: Tensor, knobs: Tensor, top_k: int) -> Tensor:
    """The law of entries of this `mass` [R, K], best first, where `total` [R, 1] is what top-p refers to."""
    _, top_p, min_p = knobs.unbind()
    place = torch.arange(mass.shape[-1], device=mass.device, dtype=torch.int64)
    keep = (mass.cumsum(-1) - mass < top_p * total) | (top_p >= 1)
    keep &= mass >= min_p
    if top_k > 0:
        keep &= place < top_k
    mass = torch.where(keep | (place == 0), mass, 0)
    return mass / mass.sum(-1, keepdim=True)


def _check_size(logits: Tensor, size: int) -> None:
    if not 0 < size <= min(logits.shape[-1], MAX_SIZE):
        raise ValueError(f"size {size} is not in 1 ... {min(logits.shape[-1], MAX_SIZE)}")


def _best_keys(scores: Tensor, ids: Tensor, size: int) -> Tensor:
    """The `size` largest sort keys of `scores`, float32, best first; `ids` broadcasts. See `sort_key`."""
    bits = scores.view(torch.int32)
    bits = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return ((bits.to(torch.int64) << 32) | (0x7FFFFFFF - ids)).topk(size).values


def _key_ids(keys: Tensor) -> Tensor:
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def top_support_cpu(logits: Tensor, knobs: Tensor, top_k: int, size: int) -> tuple[Tensor, Tensor]:
    """The best `size` ids of each row, best first, and their truncated law (see `top_support_reference`)."""
    _check_size(logits, size)
    n_rows, n_vocab = logits.shape
    n_groups, group = n_vocab // 64, 64
    if n_groups < max(size, 128):  # no time is saved by groups
        ids = _key_ids(_best_keys(logits.float(), torch.arange(n_vocab, dtype=torch.int64, device="cpu"), size))
    else:
        maxima = logits[:, : n_groups * group].unflatten(1, (n_groups, group)).amax(-1).float()
        first = _key_ids(_best_keys(maxima, torch.arange(n_groups, dtype=torch.int64, device="cpu"), size)) * group
        rest = torch.arange(n_groups * group, n_vocab, dtype=torch.int64, device="cpu").expand(n_rows, -1)
        candidates = torch.cat(
            [(first[..., None] + torch.arange(group, dtype=torch.int64, device="cpu")).flatten(1), rest], 1
        )
        ids = _key_ids(_best_keys(logits.gather(1, candidates).float(), candidates, size))
    scores = logits.gather(1, ids).float()
    mass = _mass(scores, scores[:, :1], knobs[0])
    if 0 < top_k <= size:
        total = mass[:, :top_k].sum(-1, keepdim=True)
    else:
        total = _mass(logits.float(), scores[:, :1], knobs[0]).sum(-1, keepdim=True)
    return ids, _truncate(mass, total, knobs, top_k)


@jit
def sort_key(x, i):
    """int64 keys of floats `x` with ids `i`: larger for larger x, and for the lower id among equals, -0 = +0."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # from sign and magnitude to two's complement
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64)


@jit
def key_value(key):
    """The float32 of a sort key."""
    bits = (key >> 32).to(tl.int32)
    magnitude = tl.abs(bits).to(tl.float32, bitcast=True)
    return tl.where(bits < 0, -magnitude, magnitude)


@jit
def key_id(key):
    """The id of a sort key, int32."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@jit
def _bit(n: tl.constexpr, bit: tl.constexpr):
    """0 and 1 along one axis of a [2] * n cube: that of bit `bit` of the flat index."""
    return tl.reshape(tl.arange(0, 2), [1] * (n - 1 - bit) + [2] + [1] * bit)


@jit
def _merge(cube, n: tl.constexpr, bits: tl.constexpr, descending):
    """Sort the bitonic runs of 2**bits keys in a [2] * n cube, in the direction given."""
    for i in tl.static_range(bits):
        other = tl.sum(cube, n - bits + i, keep_dims=True) - cube  # wraps around, and back
        first = _bit(n, bits - 1 - i) == 0
        cube = tl.where((cube > other) == (first == (descending == 1)), cube, other)
    return cube


@jit
def best_keys(keys, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The 2**LOG_K largest of 2**LOG_N different int64 keys, best first, by a bitonic sort; LOG_K is at least 1.

    `tl.topk`, but of reductions that Triton's interpreter leaves to NumPy instead of calling back for every key.
    """
    cube = tl.reshape(keys, [2] * LOG_N)
    for bits in tl.static_range(1, LOG_K + 1):  # runs of 2**bits, every other one descending
        cube = _merge(cube, LOG_N, bits, _bit(LOG_N, bits) if bits < LOG_N else 1)
    for i in tl.static_range(LOG_N - LOG_K):  # the better halves of pairs of runs are bitonic again
        cube = tl.max(cube, LOG_N - 1 - i - LOG_K)
        cube = _merge(cube, LOG_N - 1 - i, LOG_K, _bit(LOG_N - 1 - i, LOG_K) if i < LOG_N - LOG_K - 1 else 1)
    return tl.reshape(cube, [2**LOG_K])


@jit
def _mass_of(x, best, inverse_temperature):
    return tl.where(x == best, 1.0, tl.exp((x - best) * inverse_temperature))


@jit
def _groups_kernel(
    logits_ptr, knobs_ptr, maxima_ptr, blocks_ptr, V, n_groups, n_blocks, stride_lr, stride_lv,
    HAS_TOTAL: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of the vocabulary: the maximum of each group, the block's maximum and its mass."""
    i_r, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = i_b * BLOCK + tl.arange(0, BLOCK)
    p_logits = logits_ptr + i_r * stride_lr + i.to(tl.int64) * stride_lv
    x = tl.load(p_logits, mask=i < V, other=float("-inf")).to(tl.float32)
    maxima = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), 1)
    i_g = i_b * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(maxima_ptr + i_r * n_groups + i_g, maxima, mask=i_g < n_groups)
    if HAS_TOTAL:
        best = tl.max(maxima, 0)
        mass = _mass_of(x, best, tl.load(knobs_ptr))
        p_block = blocks_ptr + (i_r * n_blocks + i_b) * 2
        tl.store(p_block, best)
        tl.store(p_block + 1, tl.sum(mass, 0))


@jit
def _support_kernel(
    logits_ptr, knobs_ptr, maxima_ptr, blocks_ptr, ids_ptr, probs_ptr,
    V, n_groups, n_blocks, K, top_k, stride_lr, stride_lv,
    HAS_TOTAL: tl.constexpr, BLOCK_N: tl.constexpr, LOG_M: tl.constexpr, LOG_G: tl.constexpr, LOG_K: tl.constexpr,
):  # fmt: skip
    """One program per row: the best groups, 2**LOG_M maxima at a time, their best entries, and the law of those."""
    i_r = tl.program_id(0).to(tl.int64)
    BLOCK_M: tl.constexpr = 2**LOG_M
    GROUP: tl.constexpr = 2**LOG_G
    BLOCK_K: tl.constexpr = 2**LOG_K
    NOTHING: tl.constexpr = -(2**63)  # less than any key
    best = tl.full([BLOCK_K], NOTHING, tl.int64)
    for start in range(0, n_groups, BLOCK_M):
        i_g = start + tl.arange(0, BLOCK_M)
        maxima = tl.load(maxima_ptr + i_r * n_groups + i_g, mask=i_g < n_groups, other=0)
        keys = best_keys(tl.where(i_g < n_groups, sort_key(maxima, i_g), NOTHING), LOG_M, LOG_K)
        best = best_keys(tl.reshape(tl.join(best, keys), [2 * BLOCK_K]), LOG_K + 1, LOG_K)
    i = key_id(best)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = (best != NOTHING)[:, None] & (i < V)
    x = tl.load(logits_ptr + i_r * stride_lr + i.to(tl.int64) * stride_lv, mask=mask, other=0)
    keys = tl.where(mask, sort_key(x, i), NOTHING)
    best = best_keys(tl.reshape(keys, [BLOCK_K * GROUP]), LOG_K + LOG_G, LOG_K)

    place = tl.arange(0, BLOCK_K)
    x = key_value(best)
    top = tl.max(tl.where(place == 0, x, float("-inf")), 0)
    inverse_temperature, top_p, min_p = tl.load(knobs_ptr), tl.load(knobs_ptr + 1), tl.load(knobs_ptr + 2)
    listed = place < K
    if top_k > 0:
        listed = place < tl.minimum(K, top_k)
    mass = tl.where(listed, _mass_of(x, top, inverse_temperature), 0.0)
    if HAS_TOTAL:
        i_b = tl.arange(0, BLOCK_N)
        p_blocks = blocks_ptr + (i_r * n_blocks + i_b) * 2
        tops = tl.load(p_blocks, mask=i_b < n_blocks, other=float("-inf"))
        sums = tl.load(p_blocks + 1, mask=i_b < n_blocks, other=0)
        total = tl.sum(sums * _mass_of(tops, top, inverse_temperature), 0)
    else:
        total = tl.sum(mass, 0)
    limit = tl.where(top_p < 1, top_p * total, float("inf"))
    keep = (tl.cumsum(mass, 0) - mass < limit) & (mass >= min_p)
    mass = tl.where(keep | (place == 0), mass, 0.0)
    tl.store(ids_ptr + i_r * K + place, key_id(best).to(tl.int64), mask=place < K)
    tl.store(probs_ptr + i_r * K + place, mass / tl.sum(mass, 0), mask=place < K)


def _sizes(n_vocab: int, size: int) -> tuple[int, int, int]:
    """log2 of the padded K, of the entries of a group, and of the maxima sorted at a time: what registers hold."""
    log_k = max((size - 1).bit_length(), 1)
    log_g = min(6, max(12 - log_k, 3))
    return log_k, log_g, max(log_k, min(11, (triton.cdiv(n_vocab, 2**log_g) - 1).bit_length()))


def top_support_triton(logits: Tensor, knobs: Tensor, top_k: int, size: int) -> tuple[Tensor, Tensor]:
    """The best `size` ids of each row, best first, and their truncated law (see `top_support_reference`)."""
    _check_size(logits, size)
    n_rows, n_vocab = logits.shape
    ids = torch.empty((n_rows, size), dtype=torch.int64, device=logits.device)
    probs = torch.empty((n_rows, size), dtype=torch.float32, device=logits.device)
    if n_rows == 0:
        return ids, probs
    log_k, log_g, log_m = _sizes(n_vocab, size)
    n_groups, n_blocks = triton.cdiv(n_vocab, 2**log_g), triton.cdiv(n_vocab, _BLOCK)
    has_total = not 0 < top_k <= size
    knobs = knobs.contiguous()
    maxima = torch.empty((n_rows, n_groups), dtype=torch.float32, device=logits.device)
    blocks = torch.empty((n_rows, n_blocks, 2), dtype=torch.float32, device=logits.device)
    _groups_kernel[(n_rows, n_blocks)](
        logits, knobs, maxima, blocks, n_vocab, n_groups, n_blocks, *logits.stride(),
        HAS_TOTAL=has_total, GROUP=2**log_g, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    _support_kernel[(n_rows,)](
        logits, knobs, maxima, blocks, ids, probs, n_vocab, n_groups, n_blocks, size, top_k, *logits.stride(),
        HAS_TOTAL=has_total, BLOCK_N=triton.next_power_of_2(n_blocks), LOG_M=log_m, LOG_G=log_g, LOG_K=log_k,
        num_warps=16 if max(log_m, log_k + log_g) > 11 else 8, maxnreg=128,  # left to itself ptxas may spill at 64
    )  # fmt: skip
    return ids, probs


def _top_support_fake(logits: Tensor, knobs: Tensor, top_k: int, size: int) -> tuple[Tensor, Tensor]:
    _check_size(logits, size)
    shape = (logits.shape[0], size)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


top_support = register(
    "top_support(Tensor logits, Tensor knobs, int top_k, int size) -> (Tensor ids, Tensor probs)",
    cpu=top_support_cpu,
    launcher=top_support_triton,
    fake=_top_support_fake,
)
