"""Attention of the step: every query sees its own sample's committed text and its own ancestors.

For query token t (sample b, visible keys by `mask[b, row]`):
    out_t = softmax(softcap(q_t · K_b * scale) + mask) · V_b      softcap(x) = c * tanh(x / c)
Queries are grouped: the H / G query heads of a key/value head share its keys, packed as rows of one product.

Source: EMS-SD (2405.07542) for the ragged layout, SpecInfer (2305.09781) for the ancestor mask.
Letters: B samples, R query rows a sample, H query heads, G key/value heads, S slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import register


def tree_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention by definition, in float32.

    Args:
        q: [B, R, H, D].
        k_cache, v_cache: [G, B, S, D].
        mask: [B, R, S] additive, 0 where visible and -inf elsewhere; every row sees at least one key.
        scale: factor on the scores.
        softcap: bound c of the scores, or None.

    Returns:
        [B, R, H, D] of q's dtype.
    """
    group = q.shape[2] // k_cache.shape[0]
    keys, values = (cache.repeat_interleave(group, 0).float() for cache in (k_cache, v_cache))
    scores = torch.einsum("brhd,hbsd->bhrs", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probs = (scores + mask[:, None].float()).softmax(-1)
    return torch.einsum("bhrs,hbsd->brhd", probs, values).to(q.dtype)


def tree_attention_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention of each query row over its own sample's keys (see the module's docstring)."""
    n_batch, n_rows, n_heads, head_dim = q.shape
    n_groups, group = k_cache.shape[0], n_heads // k_cache.shape[0]
    packed = (q * scale).view(n_batch, n_rows, n_groups, group, head_dim).permute(2, 0, 3, 1, 4)
    packed = packed.reshape(n_groups, n_batch, group * n_rows, head_dim)
    scores = torch.matmul(packed, k_cache.transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(n_groups, n_batch, group, n_rows, -1) + mask[None, :, None]
    probs = scores.float().softmax(-1).to(q.dtype).view(n_groups, n_batch, group * n_rows, -1)
    out = torch.matmul(probs, v_cache).view(n_groups, n_batch, group, n_rows, -1)
    return out.permute(1, 3, 0, 2, 4).reshape(n_batch, n_rows, n_heads, -1)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    return q.new_empty(*q.shape[:3], v_cache.shape[-1])


tree_attention = register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor mask, float scale, float? softcap) -> Tensor",
    cpu=tree_attention_cpu,
    triton=None,
    fake=_fake,
)
