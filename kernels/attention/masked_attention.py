"""Attention of a few queries over a padded cache, reading only what the mask lets through.

    out[h, i] = sum_s softmax_s(scale * q[h, i] . k[g, s] + mask[i, s]) v[g, s],        g = h // (H / G)

A static cache is as long as the longest text it may ever hold, and its mask hides what is not written yet. Here a
block of keys that no query sees costs nothing, the heads that share keys read them once, and nothing is expanded. The
result is the dense formula's for any mask, because a hidden key has weight zero.

Where keys are split among programs, each takes an equal share of the blocks that are seen: of a long cache with little
in it, all but one would find nothing in a share of all blocks. A kernel before looks for them, reading the mask once,
many programs at a time. Left to the attention's own programs, each would read the mask of all slots, for every group
and split anew, before it could begin.

Source: Shazeer, arXiv 1911.02150 (shared keys); Dao, arXiv 2307.08691, and "Flash-Decoding", 2023 (split keys).
Letters: B samples, H query heads, G key/value heads, Q queries, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.attention.tree_attention import absorb, blocks, combine, n_splits, partials
from specdec.kernels.cpu import bind, check
from specdec.kernels.library import jit, register, tl, triton

MAX_QUERIES = 32
"""Above this attention is no longer bound by reading keys, and the library's blocked product is the better one."""


@cache
def _kernel() -> Callable[..., None] | None:
    types = ["float*"] + ["void*"] * 3 + ["float*"] + ["int64_t"] * 15 + ["float", "int64_t"]
    return bind("masked_attention.cpp", ", ".join(types))


def masked_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's attention over all slots; arguments as for `masked_attention_cpu`."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def masked_attention_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of Q queries a sample over the slots their mask lets through.

    Args:
        q: [B, H, Q, D] float32. k: [B, G, S, D], v: [B, G, S, Dv] float32, heads of any strides, G divides H.
        mask: [B, H, Q, S] or broadcast to it; bool, True where visible, or float32, added to the scores.
        scale: factor on the products.

    Returns:
        [B, H, Q, Dv] float32, in memory as [B, Q, H, Dv]. A query that sees nothing gives 0.
    """
    n_batch, n_heads, n_queries, dim = q.shape
    n_groups, n_slots, dim_v = k.shape[1], k.shape[2], v.shape[3]
    out = q.new_empty(n_batch, n_queries, n_heads, dim_v)
    if (kernel := _kernel()) is None:
        return out.transpose(1, 2).copy_(masked_attention_reference(q, k, v, mask, scale))
    # What is kept densely is the slots of a head: a cache may be a slice of a larger one.
    k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (k, v))
    mask = mask.expand(n_batch, n_heads, n_queries, n_slots)
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    is_bool = mask.dtype == torch.bool
    for x, dtype in ((k, torch.float32), (v, torch.float32), (mask, torch.bool if is_bool else torch.float32)):
        check(x, dtype, is_dense=False)
    kernel(
        q.contiguous(), k, v, mask, out, is_bool, n_batch, n_heads, n_groups, n_queries, n_slots, dim,
        dim_v, *k.stride()[:2], *v.stride()[:2], *mask.stride()[:3], scale, torch.get_num_threads(),
    )  # fmt: skip
    return out.transpose(1, 2)


@jit
def _seen_kernel(
    mask_ptr, seen_ptr, stride_mb, stride_mh, stride_mq, stride_ms, n_queries, n_slots, n_tiles, n_blocks,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    IS_BOOL: tl.constexpr,
):  # fmt: skip
    """Grid (B * tiles, G or 1, runs of blocks): which blocks of keys any of the tile's queries sees."""
    i_sample, i_group = tl.program_id(0) // n_tiles, tl.program_id(1)
    o_row = tl.arange(0, BLOCK_M)
    o_query = tl.program_id(0) % n_tiles * BLOCK_Q + o_row // HEADS
    o_head = i_group * HEADS + o_row % HEADS
    own = (o_row < BLOCK_Q * HEADS) & (o_query < n_queries)
    p_mask = mask_ptr + i_sample.to(tl.int64) * stride_mb
    p_mask += o_head.to(tl.int64) * stride_mh + o_query.to(tl.int64) * stride_mq
    first = tl.program_id(2) * BLOCKS
    o_key = (first * BLOCK_N + tl.arange(0, BLOCKS * BLOCK_N)).to(tl.int64)
    is_there = own[:, None] & (o_key < n_slots)[None, :]
    HIDDEN: tl.constexpr = 0 if IS_BOOL else float("-inf")
    mask = tl.load(p_mask[:, None] + o_key[None, :] * stride_ms, mask=is_there, other=HIDDEN)
    seen = tl.max(tl.reshape(tl.max((mask != HIDDEN).to(tl.int32), 0), [BLOCKS, BLOCK_N]), 1)
    o_block = first + tl.arange(0, BLOCKS)
    p_seen = seen_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + i_group) * n_blocks
    tl.store(p_seen + o_block, seen, mask=o_block < n_blocks)


@jit
def _masked_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seen_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_ms,
    n_batch, n_heads, n_queries, n_slots, n_tiles, n_seen, scale,
    GROUP: tl.constexpr, HEAD_D: tl.constexpr, HEAD_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCKS: tl.constexpr, IS_BOOL: tl.constexpr,
    IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * tiles, G, splits): a tile of queries with all heads of a group, over a share of the blocks it sees.
    Scores are powers of two: `scale` comes with log2(e) in it."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    i_sample = tl.program_id(0) // n_tiles
    i_group, i_split = tl.program_id(1), tl.program_id(2)
    o_row = tl.arange(0, BLOCK_M)
    o_query = tl.program_id(0) % n_tiles * BLOCK_Q + o_row // GROUP
    o_head = i_group * GROUP + o_row % GROUP
    own = (o_row < BLOCK_Q * GROUP) & (o_query < n_queries)
    o_d, o_dv, o_in_block = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    sample, group = i_sample.to(tl.int64), i_group.to(tl.int64)
    p_q = q_ptr + sample * stride_qb + o_head.to(tl.int64) * stride_qh + o_query.to(tl.int64) * stride_qq
    q = tl.load(p_q[:, None] + o_d[None, :], mask=own[:, None] & (o_d < HEAD_D)[None, :], other=0.0)
    k_base = k_ptr + sample * stride_kb + group * stride_kg
    v_base = v_ptr + sample * stride_vb + group * stride_vg
    p_mask = mask_ptr + sample * stride_mb + o_head.to(tl.int64) * stride_mh + o_query.to(tl.int64) * stride_mq
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], -3.0e38, tl.float32)  # finite: rows that see nothing yet need no special case
    total = tl.zeros([BLOCK_M], tl.float32)
    begin, end = 0, tl.cdiv(n_slots, BLOCK_N)
    if IS_SPLIT:
        o_block = tl.arange(0, BLOCKS)
        p_seen = seen_ptr + (tl.program_id(0).to(tl.int64) * n_seen + i_group % n_seen) * end
        # How many blocks are seen up to each. A share ends before the first block of the next one.
        seen = tl.cumsum(tl.load(p_seen + o_block, mask=o_block < end, other=0).to(tl.int32), 0)
        share = tl.cdiv(tl.max(seen, 0), tl.num_programs(2))
        begin = tl.sum((seen <= i_split * share).to(tl.int32), 0)
        end = tl.minimum(tl.sum((seen <= (i_split + 1) * share).to(tl.int32), 0), end)
    for i_block in range(begin, end):
        o_key = (i_block * BLOCK_N + o_in_block).to(tl.int64)
        is_there = own[:, None] & (o_key < n_slots)[None, :]
        if IS_BOOL:
            bias = tl.where(tl.load(p_mask[:, None] + o_key[None, :] * stride_ms, mask=is_there, other=0) != 0, 0.0,
                            float("-inf"))  # fmt: skip
        else:
            bias = tl.load(p_mask[:, None] + o_key[None, :] * stride_ms, mask=is_there, other=float("-inf"))
            # The lowest finite number stays finite, and above `top`'s first value: alone, it means an even law.
            bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias.to(tl.float32) * 1.4426950408889634, -2.9e38))
        if tl.max(tl.max(bias, 1), 0) > float("-inf"):  # else nobody sees these keys, and nothing reads them
            own_k = (o_key < n_slots)[:, None] & (o_d < HEAD_D)[None, :]
            own_v = (o_key < n_slots)[:, None] & (o_dv < HEAD_DV)[None, :]
            k = tl.load(k_base + o_key[:, None] * stride_ks + o_d[None, :], mask=own_k, other=0.0)
            v = tl.load(v_base + o_key[:, None] * stride_vs + o_dv[None, :], mask=own_v, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
            acc, top, total = absorb(scores, v, acc, top, total, PRECISION)
    is_empty = total == 0
    total = tl.where(is_empty, 1.0, total)
    n_rows = n_batch * n_queries * n_heads
    o_out = (sample * n_queries + o_query) * n_heads + o_head
    if IS_SPLIT:
        o_out += i_split.to(tl.int64) * n_rows
        tl.store(lse_ptr + o_out, tl.where(is_empty, float("-inf"), top + tl.log2(total)), mask=own)
        own = own & (is_empty == 0)  # nobody reads what has no weight
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    p_out = out_ptr + o_out[:, None] * HEAD_DV + o_dv[None, :]
    tl.store(p_out, out, mask=own[:, None] & (o_dv < HEAD_DV)[None, :])


def masked_attention_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Start the kernels (arguments as for `masked_attention_cpu`, in any floating dtype)."""
    n_batch, n_heads, n_queries, head_d = q.shape
    n_groups, n_slots, head_dv = v.shape[1:]
    group = n_heads // n_groups
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    is_bool = mask.dtype == torch.bool
    mask = mask.expand(n_batch, n_heads, n_queries, n_slots)
    block_m, block_n, warps, _ = blocks(n_queries * group, max(head_d, head_dv), q.element_size())
    block_m = max(block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_d, head_dv))
    n_tiles = triton.cdiv(n_queries, block_q)
    splits = n_splits(n_batch * n_queries, n_batch, n_groups, n_slots, block_q)
    out = torch.empty((n_batch, n_queries, n_heads, head_dv), dtype=q.dtype, device=q.device)
    part, lse = partials(out, splits)
    mask = mask.view(torch.uint8) if is_bool else mask
    n_blocks, seen = triton.cdiv(n_slots, block_n), None
    n_seen, heads = (n_groups, group) if mask.stride(1) else (1, 1)  # heads may share a mask
    if splits > 1:
        seen = torch.empty((n_batch * n_tiles, n_seen, n_blocks), dtype=torch.int64, device=q.device)
        rows = triton.next_power_of_2(block_q * heads)
        run = max(4096 // (rows * block_n), 1)
        _seen_kernel[(n_batch * n_tiles, n_seen, triton.cdiv(n_blocks, run))](
            mask, seen, *mask.stride(), n_queries, n_slots, n_tiles, n_blocks, heads, block_q, rows, block_n, run,
            is_bool, num_warps=4,
        )  # fmt: skip
    _masked_attention_kernel[(n_batch * n_tiles, n_groups, splits)](
        q, k, v, mask, seen, part, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride(), n_batch,
        n_heads, n_queries, n_slots, n_tiles, n_seen, scale * 1.4426950408889634, group, head_d, head_dv, block_m,
        block_n, block_d, block_dv, triton.next_power_of_2(n_blocks), is_bool, splits > 1,
        "ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        combine(part, lse, None, out)
    return out.transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    n_batch, n_heads, n_queries, _ = q.shape
    return q.new_empty(n_batch, n_queries, n_heads, v.shape[3]).transpose(1, 2)


masked_attention = register(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor",
    cpu=masked_attention_cpu,
    launcher=masked_attention_triton,
    fake=_fake,
    kernel=_kernel,
)
