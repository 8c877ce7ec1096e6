"""Ancestor words: which uncommitted nodes a node of a token tree may attend to.

    bits[n] = bits[parent[n]] | 1 << n          (64 bits a word; roots inherit nothing)

Bit i of `bits[n]` is set when node i is node n itself or one of its ancestors. Attention over the committed text is
always allowed, so these words are the whole mask: depth is `popcount - 1`, and the words of a shallower tree are a
prefix of the deeper tree's.

Source: SpecInfer, arXiv 2305.09781, section 4 (topology-aware mask), stored as bits.
Letters: B samples, N nodes, W = ceil(N / 64) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.library import jit, register, tl, triton


def n_words(n_nodes: int) -> int:
    """Words of 64 bits needed for `n_nodes` nodes."""
    return (n_nodes + 63) // 64


def unpack_words(bits: Tensor, n_nodes: int) -> Tensor:
    """The words as booleans: [..., W] int64 to [..., n_nodes] bool."""
    shifts = torch.arange(64, device=bits.device, dtype=torch.int64)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :n_nodes].bool()


def ancestor_words_reference(parents: Tensor) -> Tensor:
    """Ancestor words of trees given by parent indices.

    Args:
        parents: [B, N] int64, the parent of each node, -1 for a root; a parent comes before its children. There may
            be several roots.

    Returns:
        bits [B, N, W] int64.
    """
    n_batch, n_nodes = parents.shape
    bits = parents.new_zeros(n_batch, n_nodes, n_words(n_nodes))
    rows = torch.arange(n_batch, device=parents.device, dtype=torch.int64)
    for node in range(n_nodes):
        parent = parents[:, node]
        inherited = torch.where((parent >= 0)[:, None], bits[rows, parent.clamp(min=0)], 0)
        inherited[:, node // 64] |= 1 << (node % 64) if node % 64 < 63 else -(1 << 63)
        bits[:, node] = inherited
    return bits


def ancestor_words_cpu(parents: Tensor) -> Tensor:
    """As `ancestor_words_reference`, in log2(N) rounds: after round r every node knows its 2^r nearest ancestors."""
    n_batch, n_nodes = parents.shape
    node = torch.arange(n_nodes, device=parents.device, dtype=torch.int64)[:, None]
    word = torch.arange(n_words(n_nodes), device=parents.device, dtype=torch.int64)
    bits = torch.where(node // 64 == word, torch.ones_like(node) << node % 64, 0).expand(n_batch, -1, -1)
    for _ in range(int(n_nodes - 1).bit_length()):
        above = parents.clamp(min=0)  # where a climb has ended, node 0: a root, whose parent is -1
        inherited = bits.gather(1, above[..., None].expand_as(bits))
        bits = bits | torch.where((parents >= 0)[..., None], inherited, 0)
        parents = parents.gather(1, above)
    return bits.contiguous()


@jit
def _ancestor_words_kernel(parents_ptr, bits_ptr, n_nodes, stride_pb, stride_pn, BLOCK_N: tl.constexpr):
    """One word of BLOCK_N nodes of a sample: every node climbs until it is above this word's nodes."""
    i_sample = tl.program_id(0).to(tl.int64)
    i_word = tl.program_id(2)
    first = i_word * 64
    o_node = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_parents = parents_ptr + i_sample * stride_pb
    at = tl.where(o_node < n_nodes, o_node, -1)
    word = tl.zeros([BLOCK_N], tl.int64)
    while tl.max(at, 0) >= first:
        bit = at - first
        here = (bit >= 0) & (bit < 64)
        word |= here.to(tl.int64) << tl.where(here, bit, 0).to(tl.int64)
        parent = tl.load(p_parents + at * stride_pn, mask=bit >= 0, other=-1)
        # Whatever the parents hold, a climb goes up and ends.
        at = tl.where(parent >= 0, tl.minimum(parent, at - 1), -1).to(tl.int32)
    p_bits = bits_ptr + (i_sample * n_nodes + o_node) * tl.num_programs(2) + i_word
    tl.store(p_bits, word, mask=o_node < n_nodes)


def ancestor_words_triton(parents: Tensor) -> Tensor:
    n_batch, n_nodes = parents.shape
    bits = torch.empty(n_batch, n_nodes, n_words(n_nodes), dtype=torch.int64, device=parents.device)
    if bits.numel():
        block = 64
        grid = (n_batch, triton.cdiv(n_nodes, block), bits.shape[2])
        # One warp: the loop's condition then needs no shared memory.
        _ancestor_words_kernel[grid](parents, bits, n_nodes, *parents.stride(), BLOCK_N=block, num_warps=1)
    return bits


def _fake(parents: Tensor) -> Tensor:
    return parents.new_empty(*parents.shape, n_words(parents.shape[1]))


ancestor_words = register(
    "ancestor_words(Tensor parents) -> Tensor",
    cpu=ancestor_words_cpu,
    launcher=ancestor_words_triton,
    fake=_fake,
)
