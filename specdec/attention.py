"""The "specdec" entry in transformers' attention registry, and the mask hook that goes with it.

Both read the forward's `Nodes` from the cache that hangs on the (private) configuration of the running view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from specdec.cache import RaggedCache
from specdec.kernels.ragged_attention import ragged_attention
from specdec.kernels.tree_attention import tree_attention

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the flat tokens over the ragged cache.

    Args:
        query: [1, H, T, D]. key, value: what the cache's `update` returned: the whole layer, [G, B, S, D], or for the
            fused attention the new entries, [1, G, T, D]. attention_mask: from `build_mask`.

    Returns:
        [1, T, H, D] and None in place of attention weights.
    """
    config: Any = module.config
    cache: RaggedCache = config.specdec_cache
    nodes = cache.nodes
    assert nodes is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.is_fused:
        layer: Any = module
        assert nodes.bits is not None and nodes.depths is not None
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = ragged_attention(
            q, k, v, cache.layers[layer.layer_idx].table, nodes.slot, nodes.lengths, nodes.row_node,
            nodes.row_position, nodes.bits, nodes.depths, sliding_window or 0, scale, softcap or 0.0,
        )  # fmt: skip
        return out[None], None
    assert attention_mask is not None
    grid = nodes.to_grid(query[0].transpose(0, 1))
    out = tree_attention(grid, key, value, attention_mask[:, 0], scale, softcap)
    return nodes.from_grid(out)[None], None


def build_mask(
    *, mask_function: Callable[..., Tensor], config: Any, dtype: torch.dtype, **kwargs: Any
) -> Tensor | None:
    """The mask of the forward in flight, [B, 1, R, S], under the model's own rule (causal, sliding window, ...).

    The fused attention needs none: it reads lengths, ancestor words and the window.
    """
    cache: RaggedCache = config.specdec_cache
    if cache.is_fused:
        return None
    assert cache.nodes is not None
    return cache.nodes.mask(mask_function, cache.n_slots, dtype)


def install() -> None:
    """Register both with transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, build_mask)
