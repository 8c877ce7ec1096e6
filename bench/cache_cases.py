"""Cases of what reads and writes a cache: attention, and the moves of its entries.

Letters: B samples, N nodes a tree, T = B * N tokens, Q queries, G key/value heads, S slots, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Ways, head_shape
from specdec.engine.packing import Nodes
from specdec.engine.tree import TokenTree
from specdec.hf.cache import RaggedLayer
from specdec.kernels.attention.masked_attention import masked_attention, masked_attention_reference
from specdec.kernels.attention.ragged_attention import ragged_attention, ragged_attention_reference
from specdec.kernels.attention.tree_attention import tree_attention, tree_attention_reference
from specdec.kernels.cache.kv_cache import (
    cache_table,
    kv_append_,
    kv_append_reference_,
    kv_commit_,
    kv_commit_reference_,
)
from specdec.zoo import SIZES


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, N, D], keys and values [B, G, S, D], additive mask [B, 1, N, S]."""
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def attention(op: str, size: str, batch: int, n_nodes: int, n_slots: int, dtype: torch.dtype) -> Case:
    """One layer's attention of a step over full caches. Making PyTorch's mask is not part of it.

    Args:
        op: "ragged_attention", which writes the new keys and values first, or "tree_attention", which only reads.
    """
    heads, groups, dim = head_shape(size)
    length, tokens, writes = n_slots - n_nodes - 1, batch * n_nodes, op == "ragged_attention"

    def ways(device: torch.device) -> Ways:
        bits, depths = TokenTree.chain(n_nodes - 1).tensors(device)
        lengths = torch.full((batch,), length, device=device)
        counts, token = torch.full_like(lengths, n_nodes), torch.arange(tokens, device=device)
        nodes = Nodes.packed(lengths, counts, token, n_nodes, n_slots, bits, depths)
        keys, values = (torch.randn(groups, batch, n_slots, dim, dtype=dtype, device=device) for _ in "kv")
        q = torch.randn(tokens, heads, dim, dtype=dtype, device=device)
        mask = nodes.mask(lambda b, h, query, key: key <= query, n_slots, dtype)
        grid = q.view(batch, n_nodes, heads, dim).transpose(1, 2)
        plain = grid, keys.transpose(0, 1), values.transpose(0, 1), mask
        place, scale = (nodes.starts, lengths, nodes.node), dim**-0.5
        if writes:
            k, v = (torch.randn(tokens, groups, dim, dtype=dtype, device=device) for _ in "kv")
            layer = RaggedLayer(keys, values)
            where = (nodes.slot, *place, bits, depths)
            found: Ways = {
                "op": partial(
                    _keep(ragged_attention, layer), q, k, v, layer.table, *where, n_slots, 0, scale, 0.0
                ),
                "reference": partial(ragged_attention_reference, q, k, v, keys, values, *where, 0, scale, 0.0),
                "pytorch": partial(_put_and_sdpa, (keys, values, k, v, nodes.slot), plain),
            }  # fmt: skip
        else:
            args = q, keys, values, *place, bits[None], depths[None], 0, scale, 0.0, None
            found = {
                "op": partial(tree_attention, *args), "reference": partial(tree_attention_reference, *args),
                "pytorch": partial(_sdpa, *plain),
            }  # fmt: skip
        if device.type != "cpu":
            del found["reference"]
        return found

    seen = length + n_nodes
    moved = 2 * groups * batch * (seen + writes * n_nodes) * dim + 2 * tokens * heads * dim
    flops = 4 * tokens * heads * dim * seen
    return Case(op, f"{size} B {batch} S {n_slots} N {n_nodes}", ways, dtype.itemsize * moved, flops)


def _put(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    keys.flatten(1, 2)[:, slot] = k
    values.flatten(1, 2)[:, slot] = v


def _put_and_sdpa(written: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> Tensor:
    keys, values, k, v, slot = written
    _put(keys, values, k.transpose(0, 1), v.transpose(0, 1), slot)
    return _sdpa(*read)


def _sdpa_repeated(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """As transformers calls it: keys and values repeated for every query head."""
    group = q.shape[1] // keys.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(len(x), -1, *x.shape[2:]) for x in (keys, values))
    return F.scaled_dot_product_attention(q, k, v, mask)


def masked(size: str, batch: int, n_queries: int, n_slots: int, dtype: torch.dtype) -> Case:
    """One layer's attention over a static cache, a quarter of which is written. Hidden slots need not be read."""
    heads, groups, dim = head_shape(size)
    seen, tokens = n_slots // 4, batch * n_queries

    def ways(device: torch.device) -> Ways:
        q = torch.randn(batch, n_queries, heads, dim, dtype=dtype, device=device).transpose(1, 2)
        keys, values = (torch.randn(batch, groups, n_slots, dim, dtype=dtype, device=device) for _ in "kv")
        last = torch.arange(seen - n_queries, seen, device=device)  # the slot of each query
        mask = (torch.arange(n_slots, device=device) <= last[:, None]).expand(batch, 1, -1, -1).contiguous()
        return {
            "op": partial(masked_attention, q, keys, values, mask, dim**-0.5),
            "reference": partial(masked_attention_reference, q, keys, values, mask, dim**-0.5),
            "pytorch": partial(_sdpa_repeated, q, keys, values, mask),
        }

    moved = dtype.itemsize * (2 * groups * batch * seen * dim + 2 * tokens * heads * dim) + tokens * n_slots
    shape = f"{size} B {batch} Q {n_queries} S {n_slots}, 25% visible"
    return Case("masked_attention", shape, ways, moved, 4 * tokens * heads * dim * seen)


def append(size: str, batch: int, n_nodes: int, n_slots: int, dtype: torch.dtype) -> Case:
    _, groups, dim = head_shape(size)
    tokens = batch * n_nodes

    def ways(device: torch.device) -> Ways:
        caches = [torch.zeros(groups, batch, n_slots, dim, dtype=dtype, device=device) for _ in "kv"]
        new = [torch.randn(tokens, groups, dim, dtype=dtype, device=device).transpose(0, 1) for _ in "kv"]
        slot = (torch.arange(batch)[:, None] * n_slots + n_slots // 2 + torch.arange(n_nodes)).flatten().to(device)
        args = (*caches, *new, slot)
        return {
            "op": partial(kv_append_, *args),
            "reference": partial(kv_append_reference_, *args),
            "pytorch": partial(_put, *args),
        }

    return Case("kv_append_", f"{size} T {tokens}", ways, 4 * tokens * groups * dim * dtype.itemsize)


def _gather(caches: list[tuple[Tensor, Tensor]], lengths: Tensor, path: Tensor) -> None:
    places = torch.arange(path.shape[1], device=path.device)
    for pair in caches:
        for cache in pair:
            source = (lengths[:, None] + path)[None, ..., None].expand(len(cache), -1, -1, cache.shape[-1])
            target = (lengths[:, None] + places)[None, ..., None].expand_as(source)
            cache.scatter_(2, target, cache.gather(2, source))


def commit(size: str, batch: int, n_path: int, n_slots: int, dtype: torch.dtype) -> Case:
    """All layers; every accepted node but the root moves."""
    _, groups, dim = head_shape(size)
    layers = SIZES[size]["num_hidden_layers"]

    def ways(device: torch.device) -> Ways:
        caches = [
            tuple(torch.zeros(groups, batch, n_slots, dim, dtype=dtype, device=device) for _ in "kv")
            for _ in range(layers)
        ]
        path = torch.tensor([0, *range(2, n_path + 1)], device=device).expand(batch, -1).contiguous()
        lengths, counts = (torch.full((batch,), n, device=device) for n in (n_slots // 2, n_path))
        row = dim * dtype.itemsize
        return {
            "op": partial(_keep(kv_commit_, caches), cache_table(caches), lengths, path, counts, groups, row, row),
            "reference": partial(kv_commit_reference_, caches, lengths, path, counts),
            "pytorch": partial(_gather, caches, lengths, path),
        }

    moved = layers * 4 * batch * (n_path - 1) * groups * dim * dtype.itemsize
    return Case("kv_commit_", f"{size} B {batch} P {n_path}", ways, moved)


def _keep(function: Callable[..., Any], alive: object) -> Callable[..., Any]:
    """A function that keeps what it knows only by its address alive."""

    def call(*args: Any) -> Any:
        return function(*args) if alive else None

    return call
