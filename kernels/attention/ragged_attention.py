"""The step's attention: append keys and values, then attend over what is really there.

The same attention as `specdec.kernels.attention.tree_attention`, of a tree that all samples share or of one a sample: a
token sees the committed slots of its own sample and the uncommitted ones of its ancestors and itself, as far back as
the window reaches.
On a CPU one task per (sample, key/value head) writes its own new entries and reads each key and value once for all
query rows of the group: no mask tensor, no unused capacity, no padding between samples. On a GPU one kernel writes,
and those of `tree_attention` read.

The cache is handed over as a table of addresses, because a graph that owns a tensor copies it before a write it
cannot prove safe, and layers are compiled once for all only if they mutate nothing that they are given.

Source: EMS-SD, arXiv 2405.07542 (ragged lengths); SpecInfer, arXiv 2305.09781 (ancestor mask).
Letters: B samples, T tokens, H query heads, G key/value heads, S slots, D head dim, N nodes, W words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.attention.tree_attention import start_kernels, tree_attention_reference
from specdec.kernels.cache.kv_cache import alignment, kv_append_reference_
from specdec.kernels.cpu import bind, has_kernels
from specdec.kernels.library import jit, register, runs_triton, tl, triton


def ragged_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, starts: Tensor, lengths: Tensor,
    node: Tensor, bits: Tensor, depths: Tensor, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """By definition, with the caches themselves, [G, B, S, D], in place of their addresses; they are mutated."""
    n_text = int(starts[-1])
    kv_append_reference_(k_cache, v_cache, k[:n_text].transpose(0, 1), v[:n_text].transpose(0, 1), slot[:n_text])
    return tree_attention_reference(
        q, k_cache, v_cache, starts, lengths, node, *_by_sample(bits, depths), window, scale, softcap, None
    )


def _by_sample(bits: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
    return (bits, depths) if bits.dim() == 3 else (bits[None], depths[None])


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dtype == k.dtype == v.dtype and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        raise ValueError("ragged_attention: q, k and v are contiguous, and of one dtype")


@cache
def _kernel() -> Callable[..., None] | None:
    types = ["float*"] * 4 + ["int64_t*"] * 7 + ["int64_t"] * 10 + ["float", "float", "int64_t"]
    return bind("ragged_attention.cpp", ", ".join(types))


def can_run(tensor: Tensor) -> bool:
    """Whether the op has a kernel for tensors like this one. In C++ it is built here and now: nothing can stand in for
    it later, because only C++ finds a cache by its address."""
    return runs_triton(tensor) or (has_kernels(tensor) and _kernel() is not None)


def ragged_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    slot: Tensor,
    starts: Tensor,
    lengths: Tensor,
    node: Tensor,
    bits: Tensor,
    depths: Tensor,
    n_slots: int,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Write the new keys and values into the cache behind `table`, and attend.

    Args:
        q: [T, H, D]; k, v: [T, G, D]; of one dtype, contiguous; on a CPU float32.
        table: [3] int64, see `cache_table`: addresses of the keys and values, [G, B, S, D] of the same dtype.
        slot: [T] int64, flat slot of each new token. lengths: [B] int64, committed entries.
        starts: [B + 1] int64, tokens `starts[b] .. starts[b + 1] - 1` are sample b's; those past the last are nobody's
            and write nothing.
        node: [T] int64, the node of each token. bits: [N, W], depths: [N] int64, of the tree, or [B, N, W] and
            [B, N], of a tree a sample; contiguous.
        n_slots: S, for the host, which cannot read the table: how a GPU shares out the work depends on it.
        window: keys farther back than this are not seen; 0 for no limit. softcap: 0 for none.

    Returns:
        [T, H, D] of q's dtype; zeros for tokens of no sample.
    """
    _check(q, k, v)
    if q.dtype != torch.float32:
        raise ValueError(f"ragged_attention: on a CPU float32 only, not {q.dtype}")
    out = torch.empty_like(q)
    n_tokens, n_heads, dim = q.shape
    kernel = _kernel()
    assert kernel is not None, "can_run() says where the op runs"
    kernel(
        q, k, v, out, table, slot, starts, lengths, node, bits, depths, lengths.shape[0], n_tokens, n_heads,
        k.shape[1], dim, *bits.shape[-2:], bits.dim() - 2, n_slots, window, scale, softcap, torch.get_num_threads(),
    )  # fmt: skip
    return out


@jit
def _append_kernel(
    table_ptr, k_ptr, v_ptr, slot_ptr, starts_ptr, n_batch, n_groups, n_slots,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows (token, key/value head) of the new keys and values."""
    p_keys = tl.multiple_of(tl.load(table_ptr).to(k_ptr.dtype), ALIGN)
    p_values = tl.multiple_of(tl.load(table_ptr + 1).to(k_ptr.dtype), ALIGN)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_token, i_group = o_row // n_groups, o_row % n_groups
    is_text = i_token < tl.load(starts_ptr + n_batch)
    place = i_group * n_batch * n_slots + tl.load(slot_ptr + i_token, mask=is_text, other=0)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    own = is_text[:, None] & (o_d < D)
    k = tl.load(k_ptr + (o_row[:, None] * D + o_d), mask=own)
    v = tl.load(v_ptr + (o_row[:, None] * D + o_d), mask=own)
    tl.store(p_keys + (place[:, None] * D + o_d), k, mask=own)
    tl.store(p_values + (place[:, None] * D + o_d), v, mask=own)


def ragged_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, slot: Tensor, starts: Tensor, lengths: Tensor, node: Tensor,
    bits: Tensor, depths: Tensor, n_slots: int, window: int, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    _check(q, k, v)
    n_tokens, n_groups, dim = k.shape
    n_batch, align = lengths.shape[0], alignment(dim * k.itemsize)
    slot, starts = slot.contiguous(), starts.contiguous()
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, 2048 // (block_d * k.itemsize))  # 16 bytes a thread
    _append_kernel[(triton.cdiv(n_tokens * n_groups, block_r),)](
        table, k, v, slot, starts, n_batch, n_groups, n_slots,
        D=dim, ALIGN=align, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    strides = n_batch * n_slots * dim, n_slots * dim, dim
    return start_kernels(
        q, (table, table), (n_groups, n_batch, n_slots, dim), strides * 2, align, starts, lengths, node,
        *_by_sample(bits, depths), window, scale, softcap, None,
    )  # fmt: skip


def _fake(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q)


ragged_attention = register(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor slot, Tensor starts, Tensor lengths, "
    "Tensor node, Tensor bits, Tensor depths, SymInt n_slots, int window, float scale, float softcap) -> Tensor",
    cpu=ragged_attention_cpu,
    launcher=ragged_attention_triton,
    fake=_fake,
    kernel=_kernel,
)
