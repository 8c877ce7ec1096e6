"""Attention of the flat tokens: which way a forward goes, and the dense way against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from specdec.engine.packing import Nodes
from specdec.engine.tree import TokenTree
from specdec.hf import attention
from specdec.hf.attention import masked_attention
from specdec.hf.view import ModelView
from specdec.kernels.attention.tree_attention import tree_attention_reference
from specdec.kernels.library import runs_triton

Tiny = Callable[..., PreTrainedModel]

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
def test_agrees_with_the_definition(tree, n_heads, n_groups, head_dim, window, softcap):
    torch.manual_seed(0)
    shape = TREES[tree]
    bits, depths = shape.tensors(torch.device("cpu"))
    lengths, n_nodes = torch.tensor([0, 1, 30, 77]), len(shape)
    n_slots, scale = 77 + n_nodes + 9, head_dim**-0.5
    q = torch.randn(4 * n_nodes, n_heads, head_dim)
    k_cache, v_cache = (torch.randn(n_groups, 4, n_slots, head_dim) for _ in range(2))
    nodes = Nodes.packed(lengths, torch.full((4,), n_nodes), torch.arange(4 * n_nodes), n_nodes, n_slots, bits, depths)
    mask = nodes.mask(windowed(window) if window else causal, n_slots, torch.float32)[:, 0]

    # By definition: every visible key of every query, one at a time.
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
                scores = k_cache[g, b, slots].double() @ q[b * n_nodes + n, h].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                expected[b * n_nodes + n, h] = scores.softmax(-1) @ v_cache[g, b, slots].double()

    grid = q.view(4, n_nodes, n_heads, head_dim)
    dense = masked_attention(grid, k_cache, v_cache, mask, scale, softcap)
    torch.testing.assert_close(dense.flatten(0, 1), expected, atol=2e-6, rtol=1e-5)


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
    q = torch.randn(n_tokens, 4, 16)
    mask = nodes.mask(windowed(4), n_slots, torch.float32)[:, 0]
    dense = nodes.from_grid(masked_attention(nodes.to_grid(q), keys, values, mask, 0.3))
    expected = tree_attention_reference(
        q, keys, values, nodes.starts, lengths, nodes.node, bits[None], depths[None], 4, 0.3, 0.0, None
    )
    torch.testing.assert_close(dense[: sum(counts)], expected[: sum(counts)], atol=2e-6, rtol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_takes_the_fused_op_and_a_prompt_does_not(
    dtype: torch.dtype, device: torch.device, fresh: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it has a kernel: half precision on a CPU has none."""
    took = []
    fused = attention.ragged_attention
    monkeypatch.setattr(attention, "ragged_attention", lambda *args: took.append("fused") or fused(*args))
    view = ModelView(fresh("llama", num_hidden_layers=3).to(device, dtype))
    took.clear()  # while it was proved
    bits, depths = TREES["chain"].tensors(device)
    lengths, counts = torch.tensor([[5, 3], [6, 6]], device=device)
    with torch.no_grad():
        view.allocate(2, 64)
        view.prefill({0: (0, torch.arange(1, 6)), 1: (0, torch.arange(1, 4))})
        assert not took
        nodes = Nodes.packed(lengths, counts, torch.arange(12, device=device), 6, 64, bits, depths)
        logits = view.forward(torch.arange(12, device=device), nodes).logits
    assert logits.isfinite().all()
    has_kernel = dtype == torch.float32 or runs_triton(logits)
    assert took == ["fused"] * (3 if has_kernel else 0)


@pytest.mark.parametrize("own", [[3], [4, 5], [2, 3, 4]])
def test_nodes_spread_are_nodes_packed_anew(own: list[int]) -> None:
    """For samples that are there, finished, or without a root; nobody's tokens stay in scratch."""
    bits, depths = TokenTree.chain(6).tensors(torch.device("cpu"))
    lengths, counts, width = torch.tensor([4, 0, -1, 9]), torch.tensor([1, 0, 1, 1]), len(own)
    nodes = Nodes.packed(lengths, counts, torch.arange(5), 1, 32, bits, depths, 1).spread(torch.tensor(own), 32)
    again = Nodes.packed(lengths, width * counts, torch.arange(5 * width), width, 32, bits, depths, own[0])
    assert torch.equal(nodes.starts, again.starts)
    assert nodes.rows == again.rows
    for name in ("slot", "sample", "position", "node"):
        found = getattr(nodes, name)
        assert found.is_contiguous()  # C++ kernels read on from the first
        assert torch.equal(found[: 3 * width], getattr(again, name)[: 3 * width]), name
    assert (nodes.slot[3 * width :] % 32 == 31).all()


def test_a_forward_that_fails_leaves_nothing_behind(fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ModelView(fresh("llama"))
    view.allocate(1, 16)
    tokens, count = torch.tensor([3, 4]), torch.tensor([2])
    nodes = Nodes.packed(torch.zeros(1, dtype=torch.int64), count, torch.arange(2), 2, 16)
    monkeypatch.setattr(view.module, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        view.forward(tokens, nodes)
    assert view.cache.nodes is view.cache.now is view.cache.features is None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_features_are_what_comes_out_of_layers(family: str, compiled: bool, fresh: Tiny) -> None:
    model = fresh(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})
    view = ModelView(model)
    view.allocate(2, 16)
    view.keep_features([1, 0])
    ids = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    zeros, counts = torch.zeros(2, dtype=torch.int64), torch.tensor([6, 6])
    chain = TokenTree.chain(5).tensors(view.device)
    nodes = Nodes.packed(zeros, counts, torch.arange(12), 6, 16, *chain)
    forward = torch.compile(view.forward, backend="aot_eager", fullgraph=True) if compiled else view.forward
    with torch.no_grad():
        out, expected = forward(ids.flatten(), nodes), model(ids, output_hidden_states=True)
    for found, layer in zip(out.features, (1, 0), strict=True):
        torch.testing.assert_close(found.view(2, 6, -1), expected.hidden_states[layer + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits.view(2, 6, -1), expected.logits, rtol=1e-4, atol=1e-5)
    view.write({0: (0, ids[0])}, 6)  # nobody asks for those of a prompt
    assert view.cache.features is None
    with pytest.raises(ValueError, match="no layer 9: the model has"):
        view.keep_features([9])
