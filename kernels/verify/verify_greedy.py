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

from specdec.kernels.attention.tree_mask import unpack_words
from specdec.kernels.library import jit, register, tl, triton


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
    node = torch.arange(n_all, device=tokens.device, dtype=torch.int64)
    rows = (starts[:-1, None] + node).clamp(max=len(chosen) - 1)
    choices = chosen[rows]  # [B, N]
    # Tokens are padded before they are compared: bools and indices inside two masks become C++ that Inductor's own
    # headers may refuse.
    own = torch.nn.functional.pad(tokens, (1, 0))
    differs = ((own != choices[:, parents.clamp(min=0)]) | (node >= n_nodes[:, None])) & (node > 0)
    words = torch.nn.functional.pad(differs.long(), (0, -n_all % 64)).unflatten(1, (-1, 64))
    words = (words << torch.arange(64, device=tokens.device, dtype=torch.int64)).sum(-1)  # [B, W]
    is_path = ((words[:, None] & bits) == 0).all(-1)
    ancestors = unpack_words(bits, n_all)
    end = torch.where(is_path, depths * n_all + n_all - node, 0).argmax(1)  # the deepest, of equals the first
    place = torch.arange(depth + 1, device=tokens.device, dtype=torch.int64)
    on_path = ancestors[end][:, None] & (depths == place[:, None])  # [B, P, N]
    path = torch.where(place <= depths[end][:, None], (on_path * node).sum(-1), end[:, None])
    return path, depths[end], choices.gather(1, end[:, None])[:, 0]


@jit
def _verify_greedy_kernel(
    chosen_ptr, tokens_ptr, n_nodes_ptr, topology_ptr, bits_ptr, starts_ptr, path_ptr, n_accepted_ptr, bonus_ptr, T, N,
    P, W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program a sample."""
    i_b = tl.program_id(0).to(tl.int64)
    i_n, i_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    root, n_nodes = tl.load(starts_ptr + i_b), tl.load(n_nodes_ptr + i_b)
    is_path = i_n < N
    for word in range(W):
        i = word * 64 + tl.arange(0, 64)
        drafted = (i > 0) & (i < n_nodes)
        parent = tl.load(topology_ptr + i, mask=drafted, other=0)
        token = tl.load(tokens_ptr + i_b * (N - 1) + i - 1, mask=drafted, other=0)
        choice = tl.load(chosen_ptr + tl.minimum(root + parent, T - 1), mask=drafted, other=0)
        differs = (i > 0) & ((i >= n_nodes) | (token != choice))
        differing = tl.sum(differs.to(tl.int64) << tl.arange(0, 64).to(tl.int64), 0)
        ancestors = tl.load(bits_ptr + i_n * W + word, mask=i_n < N, other=0)
        is_path &= (ancestors & differing) == 0
    depth = tl.load(topology_ptr + N + i_n, mask=i_n < N, other=0).to(tl.int32)
    end = tl.argmax(tl.where(is_path, depth * BLOCK_N + BLOCK_N - i_n, 0), 0)  # the deepest, of equals the first
    n_accepted = tl.load(topology_ptr + N + end)
    tl.store(n_accepted_ptr + i_b, n_accepted)
    tl.store(bonus_ptr + i_b, tl.load(chosen_ptr + tl.minimum(root + end, T - 1)))
    ancestors = tl.load(bits_ptr + end * W + i_n // 64, mask=i_n < N, other=0)
    on_path = ((ancestors >> (i_n % 64).to(tl.int64)) & 1) != 0
    tl.store(path_ptr + i_b * P + depth, i_n.to(tl.int64), mask=on_path)
    tl.store(path_ptr + i_b * P + i_p, end.to(tl.int64), mask=(i_p > n_accepted) & (i_p < P))


def verify_greedy_triton(
    chosen: Tensor, tokens: Tensor, n_nodes: Tensor, topology: Tensor, bits: Tensor, starts: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """path [B, P], n_accepted [B] and bonus [B] (see `verify_greedy_reference`)."""
    out = _fake(chosen, tokens, n_nodes, topology, bits, starts, depth)
    n_batch, n_all, n_words = n_nodes.shape[0], *bits.shape
    if n_batch > 0:
        _verify_greedy_kernel[(n_batch,)](
            *(x.contiguous() for x in (chosen, tokens, n_nodes, topology, bits, starts)), *out, len(chosen), n_all,
            depth + 1, W=n_words, BLOCK_N=triton.next_power_of_2(n_all), BLOCK_P=triton.next_power_of_2(depth + 1),
            num_warps=1,
        )  # fmt: skip
    return out


def _fake(
    chosen: Tensor, tokens: Tensor, n_nodes: Tensor, topology: Tensor, bits: Tensor, starts: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    n_batch = n_nodes.shape[0]
    shapes = (n_batch, depth + 1), (n_batch,), (n_batch,)
    path, n_accepted, bonus = (torch.empty(shape, dtype=torch.int64, device=n_nodes.device) for shape in shapes)
    return path, n_accepted, bonus


verify_greedy = register(
    "verify_greedy(Tensor chosen, Tensor tokens, Tensor n_nodes, Tensor topology, Tensor bits, Tensor starts, "
    "int depth) -> (Tensor path, Tensor n_accepted, Tensor bonus)",
    cpu=verify_greedy_reference,
    launcher=verify_greedy_triton,
    fake=_fake,
)
