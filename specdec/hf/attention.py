"""The "specdec" entry in transformers' attention registry, and the mask hook that goes with it.

Both read the forward's `Nodes`, and the way it attends, from the cache that hangs on the (private) configuration of the
running view (see `specdec.hf.cache.Way`). `specdec.hf.proof` finds out which way is right for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.hf import names
from specdec.hf.cache import RaggedCache, Way, readable
from specdec.hf.windows import Asked
from specdec.kernels.attention.ragged_attention import ragged_attention
from specdec.kernels.attention.tree_attention import tree_attention

NAME = "specdec"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the flat tokens over the ragged cache.

    Args:
        query: [1, H, T, D]. key, value: what the cache's `update` returned: the whole layer, [G, B, S, D] or flat
            [1, G, B * S, D], or for the fused attention the new entries, [1, G, T, D].
        attention_mask: from `build_mask`.

    Returns:
        [1, T, H, D] and None in place of attention weights.
    """
    layer: Any = module
    cache: RaggedCache = layer.config.specdec_cache
    nodes = cache.nodes
    assert nodes is not None
    if cache.asked is not None:
        rule = getattr(attention_mask, "rule", None)
        cache.asked[layer.layer_idx] = Asked(sliding_window or 0, s_aux is not None, rule)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.now is Way.FUSED:
        assert nodes.bits is not None and nodes.depths is not None
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = ragged_attention(
            q, k, v, cache.layers[layer.layer_idx].table, nodes.slot, nodes.starts, nodes.lengths, nodes.node,
            nodes.bits, nodes.depths, cache.n_slots, sliding_window or 0, scale, softcap or 0.0,
        )  # fmt: skip
        return out[None], None
    q = query[0].transpose(0, 1)
    if cache.now is Way.OWN:
        assert attention_mask is not None
        keys, values = (x.transpose(0, 1) for x in (key, value))
        return masked_attention(q[None], keys, values, attention_mask[:, 0], scale, softcap, s_aux), None
    if cache.now is Way.CAUSAL:
        out = tree_attention(
            q, key, value, nodes.starts, nodes.lengths, nodes.node, None, None, sliding_window or 0, scale,
            softcap or 0.0, None,
        )  # fmt: skip
        return out[None], None
    assert attention_mask is not None
    if nodes.among is not None:
        key, value = (x[:, nodes.among, : nodes.reach] for x in (key, value))
    if cache.way is Way.FUSED:  # what kernels will read is written as it is
        key, value = readable(key, value, ~value.isfinite().all(-1).all(0), torch.nan)
    out = masked_attention(nodes.to_grid(q), key, value, attention_mask[:, 0], scale, softcap, s_aux)
    return nodes.from_grid(out)[None], None


def masked_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention of each query row over its own sample's slots.

    Args:
        q: [B, R, H, D]. k_cache, v_cache: [G, B, S, D] and [G, B, S, Dv].
            Values are finite; where they could not be, keys are NaN, and so are the rows that see them.
        mask: [B, R, S], 0 where visible and less elsewhere; every row sees at least one key.
        scale: factor on the scores. softcap: bound c of the scores, c * tanh(scores / c), or None.
        sinks: [H], logits that join the sum of the softmax and nothing else, or None.

    Returns:
        [B, R, H, Dv] of q's dtype.
    """
    n_batch, n_rows, n_heads, head_dim = q.shape
    n_groups, group = k_cache.shape[0], n_heads // k_cache.shape[0]
    packed = (q * scale).view(n_batch, n_rows, n_groups, group, head_dim).permute(2, 0, 3, 1, 4)
    packed = packed.reshape(n_groups, n_batch, group * n_rows, head_dim)
    scores = torch.matmul(packed, k_cache.transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = mask[None, :, None]  # selected, not added: a hidden key may be NaN
    scores = torch.where(hidden < 0, hidden, scores.view(n_groups, n_batch, group, n_rows, -1))
    if sinks is not None:
        sink = sinks.view(n_groups, 1, group, 1, 1).expand(-1, n_batch, -1, n_rows, -1)
        scores = torch.cat([scores, sink.to(scores.dtype)], -1)
    probs = scores.float().softmax(-1).to(q.dtype)[..., : k_cache.shape[2]]
    probs = probs.reshape(n_groups, n_batch, group * n_rows, -1)
    out = torch.matmul(probs, v_cache).view(n_groups, n_batch, group, n_rows, -1)
    return out.permute(1, 3, 0, 2, 4).reshape(n_batch, n_rows, n_heads, -1)


def build_mask(
    *, mask_function: Callable[..., Tensor], config: Any, dtype: torch.dtype, **kwargs: Any
) -> Tensor | None:
    """The mask of the forward in flight, [B, 1, R, S], under the model's own rule (causal, sliding window, ...); for
    the model's own attention [1, 1, T, B * S].

    The kernels need none: they read lengths, ancestor words and the window.
    """
    cache: RaggedCache = config.specdec_cache
    nodes = cache.nodes
    assert nodes is not None
    if cache.now in (Way.FUSED, Way.CAUSAL):
        return None
    if cache.now is Way.OWN:
        mask = nodes.flat_mask(mask_function, cache.n_slots, dtype)
    else:
        mask = nodes.mask(mask_function, cache.n_slots if nodes.among is None else nodes.reach, dtype)
    if cache.asked is not None:
        vars(mask)["rule"] = mask_function
    return mask


def install() -> None:
    """Register both with transformers; doing it again changes nothing."""
    names.AttentionInterface.register(NAME, attention_forward)
    names.AttentionMaskInterface.register(NAME, build_mask)
