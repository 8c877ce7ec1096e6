"""A draft: the candidates of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.engine.tree import TokenTree
from specdec.verifiers.base import DraftLaw


@dataclass
class Draft:
    """The candidates of one step: a tree of tokens a sample.

    Attributes:
        tokens: [B, N - 1] int64, of the drafter's tree without its root, or of its first levels.
        counts: [B] int64, how many of the N - 1 each sample drafted, the leading ones. Whether a node is there may
            depend on the text, and on the tokens and draft laws of its ancestors, but never on its own token, its
            siblings' or anything below: a draft that drops a token because of what was drawn changes the output law.
        law: what tokens were drawn from, or None for tokens that follow from the text without chance. Not looked at
            when decoding greedily.
    """

    tokens: Tensor
    counts: Tensor
    law: DraftLaw | None = None


def without_chance(tokens: Tensor, tree: TokenTree) -> DraftLaw:
    """The law of `tokens` [B, N - 1] which follow from the text without chance."""
    children = [tree.children(node) for node in tree.inner]
    widest = max(tree.n_children)
    # Where a node has no k-th child its first stands again, and whoever repeats a sibling proposes nothing.
    grid = [tokens[:, (own[k] if k < len(own) else own[0]) - 1] for own in children for k in range(widest)]
    ids = torch.stack(grid, 1).unflatten(1, (-1, widest)) if grid else tokens.new_zeros(len(tokens), 0, 1)
    is_first = [(ids[..., :k] != ids[..., k : k + 1]).all(-1) for k in range(ids.shape[-1])]
    ordinals = [torch.full_like(tokens[:, 0], k) for own in children for k in range(len(own))]
    places = torch.stack(ordinals, 1) if ordinals else tokens
    return DraftLaw(places, ids, torch.stack(is_first, -1).float(), torch.full_like(ids[..., 0], widest))
