"""Which path of a drafted tree equals what the target chooses, and the token it adds.

From the root the path goes on to a child as long as one equals the token the target chooses after the node: its argmax,
or a token drawn with noise that depends on nothing but seed and position (coupled verification: the text is then the
one that decoding without drafts would have drawn). The first choice that no child equals is the bonus token.

A node is on such a path if it and all its ancestors equal what was chosen after their parents, so all nodes are looked
at at once: the node's ancestor word must hold no bit of a node that differs.

Letters: B samples, T rows, N nodes, W = ceil(N / 64) words, P = depth + 1 nodes of the longest path.
Source: SpecInfer, arXiv 2305.09781, Algorithm 2 (greedy); the deepest of several equal paths is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import register
from specdec.kernels.tree_mask import unpack_words


def verify_greedy_reference(
    chosen: Tensor, tokens: Tensor, n_nodes: Tensor, topology: Tensor, bits: Tensor, starts: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's choices through each sample's tree.

    Args:
        chosen: [T] int64; entry starts[b] + n is what the target chooses after node n of sample b.
        tokens: [B, N - 1] int64, of the drafted nodes. n_nodes: [B] int64, how many leading nodes a sample has.
        topology: [5, N] int64, see `TokenTree.topology`. bits: [N, W] int64, see `tree_mask`.
        starts: [B + 1] int64. A sample without rows is given some other's, and its result means nothing.
        depth: of the tree.

    Returns:
        path [B, P] int64, the accepted nodes, the root first; past their end it holds the last of them.
        n_accepted [B] and bonus [B], int64.
    """
    parents, depths = topology[0], topology[1]
    n_all = len(parents)
    node = torch.arange(n_all, device=tokens.device)
    rows = (starts[:-1, None] + node).clamp(max=len(chosen) - 1)
    choices = chosen[rows]  # [B, N]
    differs = (tokens != choices[:, parents[1:]]) | (node[1:] >= n_nodes[:, None])
    differs = torch.nn.functional.pad(differs, (1, 0))  # the root is what it is
    ancestors = unpack_words(bits, n_all)
    is_path = ~(differs[:, None] & ancestors).any(-1)
    end = torch.where(is_path, depths * n_all + n_all - node, 0).argmax(1)  # the deepest, of equals the first
    place = torch.arange(depth + 1, device=tokens.device)
    on_path = ancestors[end][:, None] & (depths == place[:, None])  # [B, P, N]
    path = torch.where(place <= depths[end][:, None], (on_path * node).sum(-1), end[:, None])
    return path, depths[end], choices.gather(1, end[:, None])[:, 0]


def _fake(
    chosen: Tensor, tokens: Tensor, n_nodes: Tensor, topology: Tensor, bits: Tensor, starts: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    n_accepted, bonus = (n_nodes.new_empty(len(n_nodes)) for _ in range(2))
    return n_nodes.new_empty(len(n_nodes), depth + 1), n_accepted, bonus


verify_greedy = register(
    "verify_greedy(Tensor chosen, Tensor tokens, Tensor n_nodes, Tensor topology, Tensor bits, Tensor starts, "
    "int depth) -> (Tensor path, Tensor n_accepted, Tensor bonus)",
    cpu=verify_greedy_reference,
    launcher=None,
    fake=_fake,
)
