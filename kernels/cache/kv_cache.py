"""Writing keys and values of new tokens, and moving those of an accepted path into place.

A cache is [G, B, S, D]: per key/value head and sample, S contiguous slots. A token is addressed by its flat slot
`sample * S + offset`. Slot S - 1 of every sample is scratch: it is never attended to, and tokens that belong to no
sample are written to some sample's. Within a step, node n of sample b occupies slot `lengths[b] + n`; after
verification the accepted path's entries move to the end of the committed text,

    cache[:, b, lengths[b] + j] = cache[:, b, lengths[b] + path[b, j]]          j < n_path[b]

and rejected ones are overwritten by the next step. A chain is accepted in place and moves nothing.

All layers' moves are one launch, and find their caches in a table of addresses: a graph that owns the caches as
tensors copies them before a write it cannot prove safe.

Source: EMS-SD, arXiv 2405.07542 (cache without padding between samples); SpecInfer, arXiv 2305.09781 (tree commit).
Letters: L layers, T tokens, B samples, G key/value heads, S slots, D and Dv head dims of keys and values, P path
length.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from specdec.kernels.cpu import address, build
from specdec.kernels.library import jit, register, tl, triton


def kv_append_reference_(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """Write the keys and values of T new tokens into their slots.

    Args:
        k_cache, v_cache: [G, B, S, D] and [G, B, S, Dv], contiguous; mutated.
        k, v: [G, T, D] and [G, T, Dv], any strides, dtypes of the caches.
        slot: [T] int64, flat slot of each token. Of several tokens with one slot any may win.
    """
    k_cache.flatten(1, 2).index_copy_(1, slot, k)
    v_cache.flatten(1, 2).index_copy_(1, slot, v)


def alignment(n_bytes: int) -> int:
    """What every row of `n_bytes` in a cache is aligned to, at most 16 bytes."""
    return min(n_bytes & -n_bytes, 16)


def cache_table(caches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The table that `kv_commit_` takes, on the caches' device.

    Args:
        caches: keys [G, B, S, D] and values [G, B, S, Dv] of each layer; S may differ from layer to layer.

    Returns:
        [L, 3] int64: address of the keys, address of the values, S. It holds as long as the tensors are not moved.
    """
    for tensor in (tensor for pair in caches for tensor in pair):
        if not tensor.is_contiguous() or tensor.data_ptr() % alignment(tensor.shape[3] * tensor.itemsize):
            raise ValueError("cache_table: keys and values must be contiguous, and their addresses aligned like rows")
    rows = [(keys.data_ptr(), values.data_ptr(), keys.shape[2]) for keys, values in caches]
    return torch.tensor(rows, dtype=torch.int64, device=caches[0][0].device if caches else None).view(-1, 3)


def kv_commit_reference_(caches: list[tuple[Tensor, Tensor]], lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
    """Move the accepted nodes' entries to the end of the committed text, in the caches themselves.

    Args:
        caches: keys [G, B, S, D] and values [G, B, S, Dv] of each layer; mutated.
        lengths: [B] int64, committed entries before this step, at least 0.
        path: [B, P] int64, accepted nodes in ascending order, the root (node 0) first; entries past `n_path` ignored.
        n_path: [B] int64, 0 .. P.

    Sources and targets overlap; every source is read before any target is written. Reads its numbers on the host: a
    definition to test against, which no step runs.
    """
    for tensor in (tensor for pair in caches for tensor in pair):
        for b, (length, n) in enumerate(zip(lengths.tolist(), n_path.tolist(), strict=True)):
            tensor[:, b, length : length + n] = tensor[:, b, length + path[b, :n]]


@cache
def _commit_cpp() -> Callable[..., None] | None:
    return build("kv_commit.cpp", "kv_commit", (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 7)


def _commit_python(
    table: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor, n_groups: int, k_bytes: int, v_bytes: int
) -> None:
    """As the C++ kernel, where there is no compiler."""
    # Host reads: without a compiler steps run eagerly, and only CPU tensors come here, for which nothing waits.
    n_batch = lengths.shape[0]
    for *addresses, n_slots in table.tolist():
        for start, size in zip(addresses, (k_bytes, v_bytes), strict=True):
            for b, (length, n) in enumerate(zip(lengths.tolist(), n_path.tolist(), strict=True)):
                moves = [(j, node) for j, node in enumerate(path[b, :n].tolist()) if node != j]
                for g in range(n_groups):
                    root = start + ((g * n_batch + b) * n_slots + length) * size
                    for j, node in moves:
                        ctypes.memmove(root + j * size, root + node * size, size)


def _check_commit(table: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
    if not lengths.shape[0] == path.shape[0] == n_path.shape[0]:
        raise ValueError(
            f"kv_commit_: lengths are of {lengths.shape[0]} samples, path of {path.shape[0]} and n_path of "
            f"{n_path.shape[0]}"
        )
    if table.shape[1:] != (3,):
        raise ValueError(f"kv_commit_: the table is [L, 3], not {list(table.shape)}")


def kv_commit_cpu_(
    table: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor, n_groups: int, k_bytes: int, v_bytes: int
) -> None:
    """Move the accepted nodes' entries of all layers to the end of the committed text.

    Args:
        table: [L, 3] int64, see `cache_table`. What it points to is mutated, and it is declared so itself: an op that
            mutates nothing would be removed from a graph.
        lengths: [B] int64, committed entries before this step, at least 0.
        path: [B, P] int64, accepted nodes in ascending order, the root (node 0) first; entries past `n_path` ignored.
        n_path: [B] int64, 0 .. P.
        n_groups: G. k_bytes, v_bytes: size of one slot of one head.
    """
    _check_commit(table, lengths, path, n_path)
    if (kernel := _commit_cpp()) is None:
        return _commit_python(table, lengths, path, n_path, n_groups, k_bytes, v_bytes)
    tensors = [x.contiguous() for x in (table, lengths, path, n_path)]
    kernel(
        *(address(x, torch.int64) for x in tensors), len(table), *path.shape, n_groups, k_bytes, v_bytes,
        torch.get_num_threads(),
    )  # fmt: skip


@jit
def _kv_append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, slot_ptr, n_tokens, n_rows,
    stride_kg, stride_kt, stride_kd, stride_vg, stride_vt, stride_vd, stride_slot,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one head, keys and values."""
    i_group = tl.program_id(1).to(tl.int64)
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    own = o_token < n_tokens
    row = i_group * n_rows + tl.load(slot_ptr + o_token * stride_slot, mask=own, other=0)
    o_k, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    own_k, own_v = own[:, None] & (o_k < D)[None, :], own[:, None] & (o_v < DV)[None, :]
    p_k = k_ptr + i_group * stride_kg + o_token[:, None] * stride_kt + o_k.to(tl.int64)[None, :] * stride_kd
    p_v = v_ptr + i_group * stride_vg + o_token[:, None] * stride_vt + o_v.to(tl.int64)[None, :] * stride_vd
    k = tl.load(p_k, mask=own_k)
    v = tl.load(p_v, mask=own_v)
    tl.store(k_cache_ptr + row[:, None] * D + o_k[None, :], k, mask=own_k)
    tl.store(v_cache_ptr + row[:, None] * DV + o_v[None, :], v, mask=own_v)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kv_append_triton_(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    n_groups, n_batch, n_slots, dim = k_cache.shape
    dim_v, n_tokens = v_cache.shape[3], slot.shape[0]
    for new, kept in ((k, k_cache), (v, v_cache)):
        if new.shape != (n_groups, n_tokens, kept.shape[3]) or new.dtype != kept.dtype or not kept.is_contiguous():
            raise ValueError(
                f"kv_append_: {n_tokens} slots of a cache {list(kept.shape)} {kept.dtype} (contiguous: "
                f"{kept.is_contiguous()}) do not take {list(new.shape)} {new.dtype}"
            )
    if not n_tokens * n_groups:
        return
    # As integers of their size: rows are copied bit by bit, and dtypes that a GPU can't compute with move all the same.
    k_cache, v_cache, k, v = (x.view(_INTEGERS[x.itemsize]) for x in (k_cache, v_cache, k, v))
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    block_t = max(1, 2048 // (max(block_d, block_dv) * k.itemsize))  # 16 bytes a thread
    _kv_append_kernel[(triton.cdiv(n_tokens, block_t), n_groups)](
        k_cache, v_cache, k, v, slot, n_tokens, n_batch * n_slots, *k.stride(), *v.stride(), slot.stride(0),
        D=dim, DV=dim_v, BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_DV=block_dv, num_warps=4,
    )  # fmt: skip


@jit
def _kv_commit_kernel(
    table_ptr, lengths_ptr, path_ptr, n_path_ptr, n_batch, n_groups,
    stride_length, stride_pb, stride_pj, stride_n,
    K_TYPE: tl.constexpr, V_TYPE: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr,
    K_UNITS: tl.constexpr, V_UNITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The moves of BLOCK_G heads of one sample in one layer. Row `BLOCK_G * j + g` of a tile is entry j of head g."""
    i_sample = tl.program_id(0).to(tl.int64)
    p_table = table_ptr + tl.program_id(2) * 3
    p_keys = tl.multiple_of(tl.load(p_table).to(tl.pointer_type(K_TYPE)), K_ALIGN)
    p_values = tl.multiple_of(tl.load(p_table + 1).to(tl.pointer_type(V_TYPE)), V_ALIGN)
    n_slots = tl.load(p_table + 2)
    length = tl.load(lengths_ptr + i_sample * stride_length)
    n_path = tl.load(n_path_ptr + i_sample * stride_n).to(tl.int32)
    o_row = tl.arange(0, BLOCK_J * BLOCK_G)
    i_group = tl.program_id(1) * BLOCK_G + o_row % BLOCK_G
    root = (i_group.to(tl.int64) * n_batch + i_sample) * n_slots + length
    o_k, o_v = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_V)[None, :]
    first = 0
    while first < n_path:  # no `range`: Triton 3.6 can't interpret one that ends at a loaded number
        place = first + o_row // BLOCK_G
        own = (place < n_path) & (i_group < n_groups)
        node = tl.load(path_ptr + i_sample * stride_pb + place.to(tl.int64) * stride_pj, mask=own, other=0)
        moves = (own & (node != place))[:, None]
        own_k, own_v = moves & (o_k < K_UNITS), moves & (o_v < V_UNITS)
        source, target = (root + node)[:, None], (root + place)[:, None]
        k = tl.load(p_keys + (source * K_UNITS + o_k), mask=own_k)
        v = tl.load(p_values + (source * V_UNITS + o_v), mask=own_v)
        # A target may be a source of this tile: all of it is read before any of it is written. Of other tiles' rows,
        # later sources lie past all targets so far (path[j] >= j), and earlier ones have been read.
        tl.debug_barrier()
        tl.store(p_keys + (target * K_UNITS + o_k), k, mask=own_k)
        tl.store(p_values + (target * V_UNITS + o_v), v, mask=own_v)
        first += BLOCK_J


def _units(n_bytes: int) -> tuple[object, int]:
    """How rows of `n_bytes` are moved: the type of a unit, and how many are in a row."""
    size = min(alignment(n_bytes), 4)
    return {1: tl.int8, 2: tl.int16, 4: tl.int32}[size], n_bytes // size


def kv_commit_triton_(
    table: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor, n_groups: int, k_bytes: int, v_bytes: int
) -> None:
    _check_commit(table, lengths, path, n_path)
    (k_type, k_units), (v_type, v_units) = _units(k_bytes), _units(v_bytes)
    n_batch, n_places = path.shape
    if not len(table) * n_batch * n_places * n_groups:
        return
    # Tiles of 8 KiB: few enough programs for large batches, and all of a short path's rows in flight at once.
    row = triton.next_power_of_2(max(k_bytes, v_bytes))
    block_j = min(triton.next_power_of_2(n_places), max(8192 // row, 1), 8)
    block_g = min(triton.next_power_of_2(n_groups), max(8192 // (row * block_j), 1))
    _kv_commit_kernel[(n_batch, triton.cdiv(n_groups, block_g), len(table))](
        table.contiguous(), lengths, path, n_path, n_batch, n_groups,
        lengths.stride(0), *path.stride(), n_path.stride(0),
        K_TYPE=k_type, V_TYPE=v_type, K_ALIGN=alignment(k_bytes), V_ALIGN=alignment(v_bytes),
        K_UNITS=k_units, V_UNITS=v_units,
        BLOCK_K=triton.next_power_of_2(k_units), BLOCK_V=triton.next_power_of_2(v_units),
        BLOCK_J=block_j, BLOCK_G=block_g, num_warps=4,
    )  # fmt: skip


def _fake(*args: object) -> None:
    return None


kv_append_ = register(
    "kv_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot) -> ()",
    cpu=kv_append_reference_,
    launcher=kv_append_triton_,
    fake=_fake,
)
kv_commit_ = register(
    "kv_commit_(Tensor(a!) table, Tensor lengths, Tensor path, Tensor n_path, int n_groups, int k_bytes, "
    "int v_bytes) -> ()",
    cpu=kv_commit_cpu_,
    launcher=kv_commit_triton_,
    fake=_fake,
    kernel=_commit_cpp,
)
