"""The two attentions of a step, fused on a CPU and dense anywhere, against the definition."""

from __future__ import annotations

import pytest
import torch

from specdec.attention import masked_attention
from specdec.kernels.ragged_attention import ragged_attention
from specdec.nodes import Nodes
from specdec.tree import TokenTree

TREES = {
    "chain": TokenTree.chain(5),
    "root": TokenTree.chain(0),
    "bush": TokenTree((-1, 0, 0, 0, 1, 1, 2, 4, 4, 6)),
    "wide": TokenTree((-1, *([0] * 69), *range(1, 30))),  # 99 nodes: two ancestor words
}


def causal(batch, head, query, key):
    return key <= query


def windowed(window):
    return lambda batch, head, query, key: (key <= query) & (query - key < window)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("n_heads", "n_groups", "head_dim"), [(4, 2, 16), (3, 1, 24), (2, 2, 64), (6, 2, 80)])
@pytest.mark.parametrize(("window", "softcap"), [(0, None), (7, None), (0, 5.0), (3, 2.0)])
def test_both_attentions_agree_with_the_definition(tree, n_heads, n_groups, head_dim, window, softcap):
    torch.manual_seed(0)
    shape = TREES[tree]
    bits, depths = shape.tensors(torch.device("cpu"))
    lengths, n_nodes = torch.tensor([0, 1, 30, 77]), len(shape)
    n_slots, scale = 77 + n_nodes + 9, head_dim**-0.5
    q = torch.randn(4 * n_nodes, n_heads, head_dim)
    k, v = torch.randn(2, 4 * n_nodes, n_groups, head_dim)
    k_cache, v_cache = (torch.randn(n_groups, 4, n_slots, head_dim) for _ in range(2))
    nodes = Nodes.packed(lengths, torch.full((4,), n_nodes), torch.arange(4 * n_nodes), n_nodes, n_slots, bits, depths)
    mask = nodes.mask(windowed(window) if window else causal, n_slots, torch.float32)[:, 0]

    # By definition: every visible key of every query, one at a time.
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for cache, new in ((expected_k, k), (expected_v, v)):
        for b, length in enumerate(lengths.tolist()):
            cache[:, b, length : length + n_nodes] = new.view(4, n_nodes, n_groups, head_dim)[b].transpose(0, 1)
    expected = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        for n in range(n_nodes):
            ancestors, node = [], n
            while node >= 0:
                ancestors.append(node)
                node = shape.parents[node]
            seen = [(s, s) for s in range(length)] + [(length + i, length + shape.depths[i]) for i in ancestors]
            slots = [s for s, p in seen if not window or length + shape.depths[n] - p < window]
            for h in range(n_heads):
                g = h // (n_heads // n_groups)
                scores = expected_k[g, b, slots].double() @ q[b * n_nodes + n, h].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                expected[b * n_nodes + n, h] = scores.softmax(-1) @ expected_v[g, b, slots].double()

    grid = q.view(4, n_nodes, n_heads, head_dim)
    dense = masked_attention(grid, expected_k, expected_v, mask, scale, softcap)
    torch.testing.assert_close(dense.flatten(0, 1), expected, atol=2e-6, rtol=1e-5)

    table = torch.tensor([k_cache.data_ptr(), v_cache.data_ptr(), n_slots])
    fused = ragged_attention(
        q, k, v, table, nodes.slot, nodes.starts, lengths, nodes.node, bits, depths, window, scale, softcap or 0.0,
    )  # fmt: skip
    torch.testing.assert_close(fused, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(k_cache, expected_k, atol=0, rtol=0)
    torch.testing.assert_close(v_cache, expected_v, atol=0, rtol=0)


def test_large_scores_neither_overflow_nor_lose_the_small():
    """exp() of the fused attention over its whole range, against float64."""
    keys = torch.linspace(-200, 90, 600)
    k_cache = torch.zeros(1, 1, 601, 16)
    v_cache = torch.zeros(1, 1, 601, 16)
    k_cache[0, 0, :600, 0], v_cache[0, 0, :600, 0] = keys, torch.linspace(1, 2, 600)
    q = torch.zeros(1, 1, 16)
    q[..., 0] = 1
    bits, depths = TokenTree.chain(0).tensors(torch.device("cpu"))
    nodes = Nodes.packed(torch.tensor([600]), torch.tensor([1]), torch.arange(1), 1, 601, bits, depths)
    table = torch.tensor([k_cache.data_ptr(), v_cache.data_ptr(), 601])
    out = ragged_attention(
        q, torch.full((1, 1, 16), -300.0), torch.zeros(1, 1, 16), table, nodes.slot, nodes.starts, nodes.lengths,
        nodes.node, bits, depths, 0, 1.0, 0.0,
    )  # fmt: skip
    expected = (keys.double().softmax(-1) * torch.linspace(1, 2, 600).double()).sum()
    assert abs(out[0, 0, 0].item() - expected.item()) < 1e-6


def test_text_packed_without_padding_attends_like_each_text_alone():
    torch.manual_seed(0)
    lengths, counts, n_slots = torch.tensor([3, 0, 9]), torch.tensor([4, 0, 2]), 20
    nodes = Nodes.packed(lengths, counts, torch.arange(8), 4, n_slots)  # two tokens belong to nobody
    assert nodes.position.tolist()[:6] == [3, 4, 5, 6, 9, 10]
    assert nodes.slot.tolist() == [3, 4, 5, 6, 49, 50, 59, 59]  # the last two: scratch
    x = torch.randn(8, 2)
    torch.testing.assert_close(nodes.from_grid(nodes.to_grid(x))[:6], x[:6])
    mask = nodes.mask(causal, n_slots, torch.float32)[:, 0]
    seen = (mask == 0).sum(-1)
    assert seen[0].tolist() == [4, 5, 6, 7]
    assert seen[2, :2].tolist() == [10, 11]


def test_each_sample_brings_as_many_nodes_as_it_likes():
    torch.manual_seed(0)
    bits, depths = TREES["bush"].tensors(torch.device("cpu"))
    lengths, counts, n_slots, n_tokens = torch.tensor([3, 9, 0, 20]), [4, 0, 10, 1], 40, 18  # 3 tokens are nobody's
    nodes = Nodes.packed(lengths, torch.tensor(counts), torch.arange(n_tokens), 10, n_slots, bits, depths)
    keys, values = torch.randn(2, 2, 4, n_slots, 16)
    alone_keys, alone_values = keys.clone(), values.clone()
    q, k, v = torch.randn(n_tokens, 4, 16), *torch.randn(2, n_tokens, 2, 16)

    def attend(q, k, v, keys, values, nodes):
        table = torch.tensor([keys.data_ptr(), values.data_ptr(), n_slots])
        where = (nodes.slot, nodes.starts, nodes.lengths, nodes.node, bits, depths)
        return ragged_attention(q, k, v, table, *where, 4, 0.3, 0.0)

    out = attend(q, k, v, keys, values, nodes)
    assert (out[sum(counts) :] == 0).all()
    dense = masked_attention(
        nodes.to_grid(q), keys, values, nodes.mask(windowed(4), n_slots, torch.float32)[:, 0], 0.3, None
    )
    torch.testing.assert_close(nodes.from_grid(dense)[: sum(counts)], out[: sum(counts)], atol=2e-6, rtol=1e-5)
    start = 0
    for b, count in enumerate(counts):
        own = slice(start, start + count)
        one = Nodes.packed(lengths[b : b + 1], torch.tensor([count]), torch.arange(count), 10, n_slots, bits, depths)
        cache = [x[:, b : b + 1].contiguous() for x in (alone_keys, alone_values)]
        if count:
            alone = attend(q[own].contiguous(), k[own].contiguous(), v[own].contiguous(), *cache, one)
            assert torch.equal(alone, out[own])
        for mine, together in zip(cache, (keys, values), strict=True):
            assert torch.equal(mine[:, 0], together[:, b])
        start += count
