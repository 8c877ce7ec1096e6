"""Writing keys and values of new tokens, and moving those of an accepted path into place.

A cache is [G, B, S, D]: per key/value head and sample, S contiguous slots. A token is addressed by its flat slot
`sample * S + offset`. Slot S - 1 of every sample is scratch: it is never attended to, and tokens that belong to no
sample are written to the first sample's. Within a step, node n of sample b occupies slot `lengths[b] + n`; after
verification the accepted path's entries move to `lengths[b], lengths[b] + 1, ...` and rejected ones are overwritten
by the next step. A chain is accepted in place and moves nothing.

Source: EMS-SD, arXiv 2405.07542 (cache without padding between samples).
Letters: T tokens, B samples, G key/value heads, S slots, D head dim, P path length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import register


def kv_append_reference_(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """Write the keys and values of T new tokens into their slots.

    Args:
        k_cache, v_cache: [G, B, S, D], contiguous; mutated.
        k, v: [G, T, D], any strides.
        slot: [T] int64, flat slot of each token.
    """
    k_cache.flatten(1, 2).index_copy_(1, slot, k)
    v_cache.flatten(1, 2).index_copy_(1, slot, v)


def kv_commit_reference_(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
    """Move the accepted nodes' entries to the end of the committed text.

    Args:
        k_cache, v_cache: [G, B, S, D]; mutated.
        lengths: [B] int64, committed entries before this step.
        path: [B, P] int64, accepted nodes in ascending order, the root (node 0) first; entries past `n_path` ignored.
        n_path: [B] int64.

    Sources and targets overlap; every source is read before any target is written.
    """
    n_slots = k_cache.shape[2]
    place = torch.arange(path.shape[1], device=path.device)
    base = torch.arange(path.shape[0], device=path.device)[:, None] * n_slots
    own = place < n_path[:, None]
    target = base + torch.where(own, lengths[:, None] + place, n_slots - 1)
    source = base + torch.where(own, lengths[:, None] + path, n_slots - 1)
    for cache in (k_cache, v_cache):
        flat = cache.flatten(1, 2)
        flat.index_copy_(1, target.flatten(), flat.index_select(1, source.flatten()))


def _append_fake(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    return None


def _commit_fake(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
    return None


kv_append_ = register(
    "kv_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot) -> ()",
    cpu=kv_append_reference_,
    triton=None,
    fake=_append_fake,
)
kv_commit_ = register(
    "kv_commit_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor path, Tensor n_path) -> ()",
    cpu=kv_commit_reference_,
    triton=None,
    fake=_commit_fake,
)
