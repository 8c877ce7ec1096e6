"""Attention of the step: every token sees its own sample's committed text and its own ancestors.

For token t of sample b (node n = node[t], length = lengths[b], query head h of key/value head g = h // (H / G)):
    seen    = {s : s < length}  ∪  {length + i : bit i of bits[n] is set}      (causal text: i <= n)
              of these, with a window, only keys with position(t) - position(s) < window
    score_s = softcap(scale * q_th · k_s)                                      softcap(x) = c * tanh(x / c)
    out_th  = sum_seen exp(score_s) v_s / (sum_seen exp(score_s) + exp(sink_h))
Committed slot s is at position s, uncommitted slot length + i at length + depth(i). A token that sees no key gives 0.

The kernel: one program per (tile of one sample's tokens, key/value head, split of the keys). The query heads of a
key/value head are packed as rows of one product, so that each key is read once for all of them; a split takes an equal
share of the key blocks that really exist, and a second kernel joins what the splits found (softmax is associative).
Blocks that every row sees in full need no mask; only the blocks of the tree look at ancestor words.

Source: SpecInfer, 2305.09781 (ancestor mask); EMS-SD, 2405.07542 (no padding between samples); FlashAttention-2,
2307.08691 (online softmax); Flash-Decoding (splits over the keys); attention sinks as in gpt-oss, 2508.10925.
Letters: T tokens, B samples, H query heads, G key/value heads, S slots, D head dim, N uncommitted slots, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton


def tree_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, node: Tensor, bits: Tensor | None,
    depths: Tensor | None, window: int, scale: float, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention by definition, in float32: every token against every slot, and a mask.

    Args:
        q: [T, H, D], any strides with a contiguous last dimension, as the caches.
        k_cache: [G, B, S, D]; v_cache: [G, B, S, Dv]; the new entries are in place already.
        starts: [B + 1] int64 from 0: tokens starts[b] to starts[b + 1] - 1 are sample b's; a sample may have none.
            Tokens from starts[B] on belong to nobody; their output is 0.
        lengths: [B] int64, committed slots; -1 for a root that has no slot (slots then begin with node 1).
        node: [T] int64: token t of sample b is in slot lengths[b] + node[t].
        bits: [1 or B, N, W] int64, ancestor words of the uncommitted slots (see tree_mask), parents before children;
            None for causal text, where a token sees all earlier slots.
        depths: [1 or B, N] int64, needed with `bits` and a window only; in causal text the depth of slot i is i.
        window: positions a token sees, itself included; 0 for no limit. softcap: 0 for none.
        scale: factor on the products. sinks: [H], logits that join the sum of the softmax and nothing else, or None.

    Returns:
        [T, H, Dv] of q's dtype. Keys and values that are not finite show in the output of who sees them; slots past
        the end and other branches may hold anything.
    """
    n_tokens = q.shape[0]
    n_groups, n_batch, n_slots, _ = k_cache.shape
    tokens, slots = (torch.arange(n, device=q.device, dtype=torch.int64) for n in (n_tokens, n_slots))
    owner = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    sample = owner.clamp(max=n_batch - 1)
    length = lengths[sample][:, None]
    other = slots - length  # [T, S]: which uncommitted slot; committed ones are negative
    if bits is None:
        seen, place, key_place = other <= node[:, None], node[:, None], slots
    else:
        own = node.clamp(0, bits.shape[1] - 1)
        words = bits.expand(n_batch, -1, -1)[sample, own].gather(1, (other >> 6).clamp(0, bits.shape[2] - 1))
        is_ancestor = (words >> (other & 63)) & 1 == 1
        seen = (other < 0) | (is_ancestor & (other < 64 * bits.shape[2]))
        if window > 0:
            assert depths is not None
            depth = depths.expand(n_batch, -1)[sample]
            place = depth.gather(1, own[:, None])
            key_place = torch.where(other < 0, slots, length + depth.gather(1, other.clamp(0, depth.shape[1] - 1)))
    if window > 0:
        seen = seen & (length + place - key_place < window)
    at_home = owner[:, None] == torch.arange(n_batch, device=q.device, dtype=torch.int64)
    seen = (at_home[:, :, None] & seen[:, None]).flatten(1)[:, None, None]  # [T, 1, 1, B * S]

    keys, values = (cache.float().flatten(1, 2) for cache in (k_cache, v_cache))
    rows = q.float().unflatten(1, (n_groups, -1))
    scores = torch.einsum("tghd,gsd->tghs", rows, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # 0 * NaN is NaN: values that are not finite go into the scores, where the mask keeps them to those who see them.
    finite = values.isfinite().all(-1)
    values = torch.where(finite[..., None], values, 0)
    scores = torch.where(seen, torch.where(finite[None, :, None], scores, torch.nan), -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, n_groups, -1, 1).expand(n_tokens, -1, -1, -1)
        scores = torch.cat([scores, sink], -1)
    probs = torch.where(seen, scores.softmax(-1)[..., : seen.shape[-1]], 0)
    return torch.einsum("tghs,gsd->tghd", probs, values).flatten(1, 2).to(q.dtype)


@jit
def absorb(scores, v, acc, top, total, PRECISION: tl.constexpr):
    """Online softmax: a block's scores [M, N], powers of two, and values [N, Dv] join what earlier blocks came to:
    acc [M, Dv] weighted values, top [M] largest score, total [M] weight, both relative to exp2(top)."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    probs = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_top, total


@jit
def _tree_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr, lengths_ptr, node_ptr, bits_ptr, depths_ptr, sinks_ptr,
    stride_qt, stride_qh, stride_kg, stride_kb, stride_ks, stride_vg, stride_vb, stride_vs,
    stride_bb, stride_bn, stride_bw, stride_db, stride_dn,
    n_tokens, n_heads, n_batch, n_slots, n_nodes, n_words, window, scale, cap,
    GROUP: tl.constexpr, HEAD_D: tl.constexpr, HEAD_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_DENSE: tl.constexpr, IS_TREE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, TABLE_ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (T // BLOCK_Q + B + 1, G, splits). To the output, or if `IS_SPLIT` partial results and their log-sum-exp.
    Scores are powers of two: `scale` and `cap` come with log2(e) in them."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    if TABLE_ALIGN:  # `k_ptr` is a table of addresses; loads of 16 bytes at once need to know how these are aligned
        v_ptr = tl.multiple_of(tl.load(k_ptr + 1).to(q_ptr.dtype), TABLE_ALIGN)
        k_ptr = tl.multiple_of(tl.load(k_ptr).to(q_ptr.dtype), TABLE_ALIGN)
    if IS_DENSE:  # neighbouring slots are neighbours in memory: offsets in a block are constants
        stride_ks = HEAD_D
        stride_vs = HEAD_DV
    # Sample b's tiles begin at starts[b] // BLOCK_Q + b, which leaves it at least the ceil(n / BLOCK_Q) it needs;
    # sample B are the tokens of nobody. Last tiles first: in causal text they have most to do.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_group = tl.program_id(1)
    i_split = tl.program_id(2)
    i_sample = tl.full([], -1, tl.int32)
    for first in range(0, n_batch + 1, 128):
        o_sample = first + tl.arange(0, 128)
        start = tl.load(starts_ptr + o_sample, mask=o_sample <= n_batch, other=0).to(tl.int32)
        i_sample += tl.sum(((o_sample <= n_batch) & (start // BLOCK_Q + o_sample <= i_tile)).to(tl.int32), 0)
    is_text = i_sample < n_batch
    start = tl.load(starts_ptr + i_sample).to(tl.int32)
    end = tl.load(starts_ptr + i_sample + 1, mask=is_text, other=n_tokens).to(tl.int32)
    token = start + (i_tile - start // BLOCK_Q - i_sample) * BLOCK_Q
    if token >= end:
        return

    # Rows: the tokens of the tile, each with the query heads of this key/value head.
    o_row = tl.arange(0, BLOCK_M)
    o_token = token + o_row // GROUP
    o_head = i_group * GROUP + o_row % GROUP
    own = (o_row < BLOCK_Q * GROUP) & (o_token < end)
    has_node = (o_row < BLOCK_Q * GROUP) & (o_token < tl.where(is_text, end, 0))
    node = tl.load(node_ptr + o_token, mask=has_node, other=0).to(tl.int32)
    length = tl.load(lengths_ptr + i_sample, mask=is_text, other=0).to(tl.int32)

    # Keys before end_key are looked at, and before full_key all rows see them all, but for a window: its first blocks
    # are skipped by slot, which is never less than the position.
    end_key = tl.maximum(tl.minimum(length + tl.max(node, 0) + 1, n_slots), 0)
    end_key = tl.where(is_text, end_key, 0)
    full_key = length
    place = length + node
    if IS_TREE:
        o_words = i_sample * stride_bb + node * stride_bn
        if HAS_WINDOW:
            p_depths = depths_ptr + i_sample * stride_db
            place = length + tl.load(p_depths + node * stride_dn, mask=has_node, other=0).to(tl.int32)
    else:
        full_key += 1 + tl.min(tl.where(own, node, n_slots), 0)
    full_key = tl.maximum(tl.minimum(full_key, end_key), 0)
    first_block = 0
    if HAS_WINDOW:
        earliest = place - window + 1
        first_block = tl.maximum(tl.min(tl.where(own, earliest, n_slots), 0), 0) // BLOCK_N
    # An equal share for every split, but no crumbs: of a short text the last splits get nothing.
    n_blocks = tl.cdiv(end_key, BLOCK_N) - first_block
    share = tl.maximum(tl.cdiv(n_blocks, tl.num_programs(2)), 128 // BLOCK_N)
    begin = first_block + i_split * share
    finish = tl.minimum(begin + share, first_block + n_blocks)
    middle = tl.maximum(tl.minimum(full_key // BLOCK_N, finish), begin)
    edge = begin
    if HAS_WINDOW:  # blocks that some row's window has left behind
        edge = tl.maximum(tl.minimum(tl.cdiv(tl.max(tl.where(own, earliest, 0), 0), BLOCK_N), middle), begin)

    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_q = q_ptr + o_token.to(tl.int64) * stride_qt + o_head.to(tl.int64) * stride_qh
    q = tl.load(p_q[:, None] + o_d[None, :], mask=own[:, None] & (o_d < HEAD_D)[None, :], other=0.0)
    k_base = k_ptr + i_sample.to(tl.int64) * stride_kb + i_group.to(tl.int64) * stride_kg
    v_base = v_ptr + i_sample.to(tl.int64) * stride_vb + i_group.to(tl.int64) * stride_vg
    zero = tl.full([], 0, tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], -3.0e38, tl.float32)  # finite: rows that see nothing yet need no special case
    total = tl.zeros([BLOCK_M], tl.float32)
    # Blocks that all rows see in full, without masks; those before and after, in halves to spare registers.
    for PART in tl.static_range(0 if HAS_WINDOW else 1, 3):
        o_in_block = tl.arange(0, BLOCK_N // (1 + (PART != 1)))
        tile_k = o_in_block.to(tl.int64)[:, None] * stride_ks + o_d[None, :]
        tile_v = o_in_block.to(tl.int64)[:, None] * stride_vs + o_dv[None, :]
        if PART == 0:
            first_block, end_block = 2 * begin, 2 * edge
        elif PART == 1:
            first_block, end_block = edge, middle
        else:
            first_block, end_block = 2 * middle, 2 * finish
        for i_block in tl.range(first_block, end_block, num_stages=2 if PART != 1 else None):
            first = i_block * (BLOCK_N // (1 + (PART != 1)))
            o_key = first + o_in_block
            p_k = k_base + (zero + first) * stride_ks + tile_k
            p_v = v_base + (zero + first) * stride_vs + tile_v
            if PART != 1:
                k = tl.load(p_k, mask=(o_key < end_key)[:, None] & (o_d < HEAD_D)[None, :], other=0.0)
                v = tl.load(p_v, mask=(o_key < end_key)[:, None] & (o_dv < HEAD_DV)[None, :], other=0.0)
            else:
                if HEAD_D == BLOCK_D:
                    k = tl.load(p_k)
                else:
                    k = tl.load(p_k, mask=(o_d < HEAD_D)[None, :], other=0.0)
                if HEAD_DV == BLOCK_DV:
                    v = tl.load(p_v)
                else:
                    v = tl.load(p_v, mask=(o_dv < HEAD_DV)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if HAS_CAP:
                scores = cap - 2 * cap / (tl.exp2(scores) + 1)
            if PART != 1:
                if IS_TREE:
                    # The ancestor bits of this block's keys, a word for each row, shifted together from two words
                    # (the first may be word -1: committed keys; and before a window's edge both may be).
                    o_word = tl.full([BLOCK_M], 0, tl.int32) + ((first - length) >> 6)
                    shift = ((first - length) & 63).to(tl.uint64)
                    p_word = bits_ptr + (o_words + o_word * stride_bw)
                    low = tl.load(p_word, mask=(o_word >= 0) & (o_word < n_words), other=0)
                    high = tl.load(p_word + stride_bw, mask=(o_word >= -1) & (o_word < n_words - 1), other=0)
                    word = (low.to(tl.uint64) >> shift) | ((high.to(tl.uint64) << (63 - shift)) << 1)
                    seen = ((word[:, None] >> o_in_block.to(tl.uint64)[None, :]) & 1) != 0
                    seen |= (o_key < length)[None, :]
                else:
                    seen = o_key[None, :] <= place[:, None]
                # 0 * NaN is NaN: values that are not finite go into the scores (as in the reference).
                is_finite = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 1) != 0
                v = tl.where(is_finite[:, None], v, 0.0)
                scores = tl.where(is_finite[None, :], scores, float("nan"))
                scores = tl.where(seen & (o_key < end_key)[None, :], scores, float("-inf"))
            if HAS_WINDOW and PART != 1:
                key_place = o_key
                if IS_TREE:
                    is_node = (o_key >= length) & (o_key - length < n_nodes)
                    depth = tl.load(p_depths + (o_key - length) * stride_dn, mask=is_node, other=0).to(tl.int32)
                    key_place = tl.where(is_node, length + depth, o_key)
                scores = tl.where(key_place[None, :] >= earliest[:, None], scores, float("-inf"))
            acc, top, total = absorb(scores, v, acc, top, total, PRECISION)

    if HAS_SINKS and not IS_SPLIT:
        sink = tl.load(sinks_ptr + o_head, mask=own, other=0.0).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.exp2(sink - new_top)
        acc *= fade[:, None]
    is_empty = total == 0
    total = tl.where(is_empty, 1.0, total)
    o_out = (i_split.to(tl.int64) * n_tokens + o_token) * n_heads + o_head
    if IS_SPLIT:
        tl.store(lse_ptr + o_out, tl.where(is_empty, float("-inf"), top + tl.log2(total)), mask=own)
        own = own & (is_empty == 0)  # nobody reads what has no weight
    p_out = out_ptr + o_out[:, None] * HEAD_DV + o_dv[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(p_out, out, mask=own[:, None] & (o_dv < HEAD_DV)[None, :])


@jit
def _combine_kernel(
    part_ptr, lse_ptr, sinks_ptr, out_ptr, n_rows, n_heads, n_splits,
    HEAD_DV: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_SPLIT: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Rows (token, head) of the output from the splits' partial results [splits, T * H, Dv]."""
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_split, o_dv = tl.arange(0, BLOCK_SPLIT), tl.arange(0, BLOCK_DV)
    own = o_row < n_rows
    o_part = o_split.to(tl.int64)[None, :] * n_rows + o_row[:, None]
    lse = tl.load(lse_ptr + o_part, mask=own[:, None] & (o_split < n_splits)[None, :], other=float("-inf"))
    top = tl.maximum(tl.max(lse, 1), -3.0e38)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + o_row % n_heads, mask=own, other=0.0).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    weight = tl.exp2(lse - top[:, None])
    total = tl.sum(weight, 1)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    total = tl.where(total == 0, 1.0, total)
    has_part = (lse != float("-inf"))[:, :, None] & (o_dv < HEAD_DV)[None, None, :]
    part = tl.load(part_ptr + o_part[:, :, None] * HEAD_DV + o_dv[None, None, :], mask=has_part, other=0.0)
    out = tl.sum(part * weight[:, :, None], 1) / total[:, None]
    p_out = out_ptr + o_row.to(tl.int64)[:, None] * HEAD_DV + o_dv[None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=own[:, None] & (o_dv < HEAD_DV)[None, :])


def blocks(n_rows: int, head_dim: int, itemsize: int, has_two_masks: bool = False) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, pipeline stages).

    Args:
        n_rows: query rows of an average sample: tokens times query heads a key/value head. head_dim: the larger one.
        has_two_masks: a tree's and a window's, which take the registers that more keys at once would need.

    A tile that holds all rows of a sample reads each key from memory once, so BLOCK_M follows the rows until the
    accumulator fills the registers. float32 multiplies without tensor cores and takes small tiles.
    """
    if itemsize == 4:
        return 16, 32, 8, 2
    if n_rows <= 16:
        return 16, 64 if head_dim <= 128 else 32, 4, 3
    if head_dim <= 128:
        block_n = 32 if has_two_masks else 64
        return (64, block_n, 4, 3) if n_rows <= 64 else (128, block_n, 8, 3)
    return (32, 32, 8, 3) if n_rows <= 32 else (64, 32, 8, 2)


def n_splits(n_tokens: int, n_batch: int, n_groups: int, n_keys: int, block_q: int) -> int:
    """Into how many parts the keys are split, from shapes alone, so that a captured graph holds for any lengths.

    Decoding has few (tile, head) pairs and many keys: without splits most of the chip would idle. The aim is four
    programs for each of about 132 multiprocessors, two of which run at a time; more would only add partial results
    to write and read. A split has at least 256 keys, or its start-up costs more than its work.
    """
    n_samples = max(min(n_batch, n_tokens), 1)  # no more of them have tokens: a batch whose texts end gets more splits
    tiles = n_samples * triton.cdiv(triton.cdiv(n_tokens, n_samples), block_q)
    return max(1, min(4 * 132 // max(tiles * n_groups, 1), n_keys // 256, 64))


def tree_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, node: Tensor, bits: Tensor | None,
    depths: Tensor | None, window: int, scale: float, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Start the kernels (arguments as in `tree_attention_reference`)."""
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (q, k_cache, v_cache)):
        raise ValueError("q, k_cache and v_cache must be contiguous in their last dimension")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache differ in dtype: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    return start_kernels(
        q, (k_cache, v_cache), v_cache.shape, (*k_cache.stride()[:3], *v_cache.stride()[:3]), 0, starts, lengths, node,
        bits, depths, window, scale, softcap, sinks,
    )  # fmt: skip


def start_kernels(
    q: Tensor, caches: tuple[Tensor, Tensor], shape: Sequence[int], strides: tuple[int, ...], table_align: int,
    starts: Tensor, lengths: Tensor, node: Tensor, bits: Tensor | None, depths: Tensor | None, window: int,
    scale: float, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend over caches that are tensors, or memory that only a table on the device knows.

    Args:
        caches: keys and values, or twice the table of their addresses. shape: G, B, S, Dv of the values.
        strides: of heads, samples and slots, of the keys and then of the values.
        table_align: bytes that rows behind a table are aligned to; 0 for tensors.
        Others as in `tree_attention_reference`.
    """
    n_tokens, n_heads, head_d = q.shape
    n_groups, n_batch, n_slots, head_dv = shape
    group = n_heads // n_groups
    per_sample = triton.cdiv(n_tokens, max(n_batch, 1))
    has_two_masks = bits is not None and window > 0
    block_m, block_n, warps, stages = blocks(per_sample * group, max(head_d, head_dv), q.element_size(), has_two_masks)
    block_m = max(block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_d, head_dv))
    splits = n_splits(n_tokens, n_batch, n_groups, min(n_slots, window + per_sample) if window else n_slots, block_q)
    out = torch.empty((n_tokens, n_heads, head_dv), dtype=q.dtype, device=q.device)
    part, lse = partials(out, splits)
    log2e = 1.4426950408889634  # tanh(x) = 1 - 2 / (exp(2 x) + 1), and exp(x) = exp2(x * log2e)
    factor, cap = (scale / softcap * 2 * log2e, softcap * log2e) if softcap > 0 else (scale * log2e, 0.0)
    n_nodes, n_words = (0, 0) if bits is None else bits.shape[1:]
    bits_strides = (0, 0, 0) if bits is None else (bits.stride(0) if len(bits) > 1 else 0, *bits.stride()[1:])
    depths_strides = (0, 0) if depths is None else (depths.stride(0) if len(depths) > 1 else 0, depths.stride(1))
    # maxnreg: left alone, ptxas spills some bytes in order to fit one more program on a multiprocessor.
    _tree_attention_kernel[(n_tokens // block_q + n_batch + 1, n_groups, splits)](
        q, *caches, part, lse, starts.contiguous(), lengths.contiguous(), node.contiguous(), bits, depths,
        sinks, *q.stride()[:2], *strides, *bits_strides, *depths_strides,
        n_tokens, n_heads, n_batch, n_slots, n_nodes, n_words, window, factor, cap, group, head_d, head_dv, block_m,
        block_n, block_d, block_dv, strides[2] == head_d and strides[5] == head_dv, bits is not None,
        window > 0, softcap > 0, sinks is not None, splits > 1, "ieee" if q.dtype == torch.float32 else "tf32",
        table_align, num_warps=warps, num_stages=stages, maxnreg=255,
    )  # fmt: skip
    if splits > 1:
        combine(part, lse, sinks, out)
    return out


def partials(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits leave what they find, for `combine`; without splits the output itself, twice."""
    if splits == 1:
        return out, out
    part = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    return part, torch.empty(part.shape[:-1], dtype=torch.float32, device=out.device)


def combine(part: Tensor, lse: Tensor, sinks: Tensor | None, out: Tensor) -> None:
    """Join what the splits found.

    Args:
        part: [splits, ..., H, Dv] float32, each split's result; anything where lse is -inf.
        lse: [splits, ..., H] float32, base-2 logarithm of each split's total weight.
        sinks: [H] or None. out: [..., H, Dv], written.
    """
    splits, n_rows, dim = len(part), lse[0].numel(), part.shape[-1]
    block_split, block_d = triton.next_power_of_2(splits), max(16, triton.next_power_of_2(dim))
    block_r = max(1, 4096 // (block_split * block_d))
    _combine_kernel[(triton.cdiv(n_rows, block_r),)](
        part, lse, sinks, out, n_rows, part.shape[-2], splits, dim, sinks is not None, block_r, block_split, block_d,
        num_warps=4 if block_split * block_d <= 4096 else 8,
    )  # fmt: skip


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object) -> Tensor:
    return q.new_empty(*q.shape[:2], v_cache.shape[-1])


tree_attention = register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor lengths, Tensor node, "
    "Tensor? bits, Tensor? depths, int window, float scale, float softcap, Tensor? sinks) -> Tensor",
    cpu=tree_attention_reference,
    launcher=tree_attention_triton,
    fake=_fake,
)
