"""Ancestor words: which uncommitted nodes a node of a token tree may attend to.

Bit i of `bits[n]` (64 bits a word) is set when node i is node n itself or one of its ancestors. Attention over the
committed text is always allowed, so these words are the whole mask: depth is `popcount - 1`, and the words of a
shallower tree are a prefix of the deeper tree's.

Source: SpecInfer, arXiv 2305.09781, section 4 (topology-aware mask), stored as bits.
Letters: B samples, N nodes, W = ceil(N / 64) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import register


def n_words(n_nodes: int) -> int:
    """Words of 64 bits needed for `n_nodes` nodes."""
    return (n_nodes + 63) // 64


def ancestor_words_reference(parents: Tensor) -> Tensor:
    """Ancestor words of trees given by parent indices.

    Args:
        parents: [B, N] int64, the parent of each node, -1 for a root; a parent comes before its children.

    Returns:
        bits [B, N, W] int64.
    """
    n_batch, n_nodes = parents.shape
    bits = parents.new_zeros(n_batch, n_nodes, n_words(n_nodes))
    rows = torch.arange(n_batch, device=parents.device)
    for node in range(n_nodes):
        parent = parents[:, node]
        inherited = torch.where((parent >= 0)[:, None], bits[rows, parent.clamp(min=0)], 0)
        inherited[:, node // 64] |= 1 << (node % 64) if node % 64 < 63 else -(1 << 63)
        bits[:, node] = inherited
    return bits


def unpack_words(bits: Tensor, n_nodes: int) -> Tensor:
    """The words as booleans: [..., W] int64 to [..., n_nodes] bool."""
    shifts = torch.arange(64, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :n_nodes].bool()


def _fake(parents: Tensor) -> Tensor:
    return parents.new_empty(*parents.shape, n_words(parents.shape[1]))


ancestor_words = register(
    "ancestor_words(Tensor parents) -> Tensor",
    cpu=ancestor_words_reference,
    triton=None,
    fake=_fake,
)
