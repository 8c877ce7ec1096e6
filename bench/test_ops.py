"""Micro-benchmarks of the ops: each against its reference and against plain PyTorch.

An op that is PyTorch code runs compiled, as it does inside a step; compiling is not timed. Arguments rotate, so that
weights and caches come from memory and not from the core's own cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.cache import RaggedLayer
from specdec.kernels import draw, kv_cache, ragged_attention, skinny_linear, tree_attention, tree_mask, verify
from specdec.nodes import Nodes
from specdec.tree import TokenTree
from specdec.zoo import SIZES

DRAFTED, N_SLOTS, LENGTH = 5, 512, 300
Function = Callable[..., object]


def measure(benchmark: Any, group: str, function: Function, arguments: list[tuple], compiled: bool = False) -> None:
    """Time `function`, called with one set of arguments after the other."""
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True)
    turn = itertools.cycle(arguments)
    benchmark.group = group
    with torch.no_grad():
        benchmark.pedantic(lambda: function(*next(turn)), rounds=50, iterations=4, warmup_rounds=5)


def three(op: Function, reference: Function, plain: Function, **functions: Function) -> Any:
    """The ways to run an op, as a parameter."""
    ways = {"op": op, "reference": reference, "pytorch": plain, **functions}
    return pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in ways.items()])


def is_inlined(function: Function) -> bool:
    """Whether this is an op made of PyTorch code: a step runs it compiled."""
    opaque = (skinny_linear.skinny_linear, ragged_attention.ragged_attention)
    return hasattr(function, "op") and function not in opaque


@three(skinny_linear.skinny_linear, skinny_linear.skinny_linear_reference, F.linear)
@pytest.mark.parametrize("rows", [3, 6, 16])
@pytest.mark.parametrize("size", ["25m", "100m", "300m"])
def test_linear(benchmark: Any, size: str, rows: int, function: Function) -> None:
    """The first matrix of the MLP."""
    n_in, n_out = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    arguments = [(torch.randn(rows, n_in), torch.randn(n_out, n_in)) for _ in range(16)]
    measure(benchmark, f"linear {size} {rows} rows", function, arguments)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: None) -> Tensor:
    q, keys, values = q.transpose(1, 2), keys.transpose(0, 1), values.transpose(0, 1)
    return F.scaled_dot_product_attention(q, keys, values, mask[:, None], scale=scale, enable_gqa=True)


@three(
    tree_attention.tree_attention, tree_attention.tree_attention_reference, _sdpa,
    fused_op=ragged_attention.ragged_attention,
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", ["25m", "100m", "300m"])
def test_attention(benchmark: Any, size: str, batch: int, function: Function) -> None:
    """One layer's attention of a step: the pending token and its drafts over a text. The fused op also writes to the
    cache, and needs no mask; making the mask is not timed."""
    heads, groups, dim = (SIZES[size][f"{x}"] for x in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rows = DRAFTED + 1
    bits, depths = TokenTree.chain(DRAFTED).tensors(torch.device("cpu"))
    lengths = torch.full((batch,), LENGTH)
    valid = torch.ones(batch, rows, dtype=torch.bool)
    nodes = Nodes.of_tree(lengths, bits, depths, 0, rows, valid, N_SLOTS)
    mask = nodes.mask(lambda b, h, query, key: key <= query, N_SLOTS, torch.float32)[:, 0]
    layers = [RaggedLayer(*torch.randn(2, groups, batch, N_SLOTS, dim)) for _ in range(16)]
    q, new = torch.randn(batch, rows, heads, dim), torch.randn(batch * rows, groups, dim)
    if function is ragged_attention.ragged_attention:
        where = (nodes.slot, lengths, nodes.row_node, nodes.row_position, bits, depths)
        arguments = [(q.flatten(0, 1), new, new, layer.table, *where, 0, dim**-0.5, 0.0) for layer in layers]
    else:
        arguments = [(q, layer.keys, layer.values, mask, dim**-0.5, None) for layer in layers]
    measure(benchmark, f"attention {size} batch {batch}", function, arguments, is_inlined(function))


def _put(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    keys.flatten(1, 2)[:, slot] = k
    values.flatten(1, 2)[:, slot] = v


@three(kv_cache.kv_append_, kv_cache.kv_append_reference_, _put)
@pytest.mark.parametrize("size", ["25m", "300m"])
def test_append(benchmark: Any, size: str, function: Function) -> None:
    groups, dim = SIZES[size]["num_key_value_heads"], SIZES[size]["head_dim"]
    keys, values, slot = *torch.zeros(2, groups, 4, N_SLOTS, dim), torch.arange(24) * 80
    arguments = [(keys, values, *torch.randn(2, groups, 24, dim), slot) for _ in range(4)]
    measure(benchmark, f"append {size}", function, arguments, is_inlined(function))


def _gather(keys: Tensor, values: Tensor, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
    source = (lengths[:, None] + path)[None, ..., None].expand(len(keys), -1, -1, keys.shape[-1])
    target = (lengths[:, None] + torch.arange(path.shape[1]))[None, ..., None].expand_as(source)
    for cache in (keys, values):
        cache.scatter_(2, target, cache.gather(2, source))


@three(kv_cache.kv_commit_, kv_cache.kv_commit_reference_, _gather)
@pytest.mark.parametrize("size", ["25m", "300m"])
def test_commit(benchmark: Any, size: str, function: Function) -> None:
    groups, dim = SIZES[size]["num_key_value_heads"], SIZES[size]["head_dim"]
    keys, values = torch.zeros(2, groups, 4, N_SLOTS, dim)
    path, n_path = torch.tensor([[0, 2, 5]]).expand(4, -1), torch.full((4,), 3)
    arguments = [(keys, values, torch.full((4,), LENGTH), path, n_path)]
    measure(benchmark, f"commit {size}", function, arguments, is_inlined(function))


def _sort(probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    top, ids = probs.sort(-1, descending=True)
    return ids[:, :size], top[:, :size] / top[:, :size].sum(-1, keepdim=True)


@three(draw.top_support, draw.top_support_reference, _sort)
@pytest.mark.parametrize("vocabulary", [4096, 128256])
def test_top_support(benchmark: Any, vocabulary: int, function: Function) -> None:
    arguments = [(torch.randn(4, vocabulary).softmax(-1), 64) for _ in range(4)]
    measure(benchmark, f"top_support {vocabulary}", function, arguments, is_inlined(function))


def _multinomial(probs: Tensor, seed: Tensor, position: Tensor, node: Tensor, stream: int) -> Tensor:
    return torch.multinomial(probs, 1)[:, 0]


@three(draw.draw, draw.draw_reference, _multinomial)
@pytest.mark.parametrize("vocabulary", [64, 4096, 128256])
def test_draw(benchmark: Any, vocabulary: int, function: Function) -> None:
    arguments = [(torch.randn(4, vocabulary).softmax(-1), *torch.arange(12).view(3, 4), 0) for _ in range(4)]
    measure(benchmark, f"draw {vocabulary}", function, arguments, is_inlined(function))


def _greedy_loop(target_ids: Tensor, drafts: Tensor, n_drafted: Tensor) -> list[tuple[int, int]]:
    accepted = []
    for ids, draft, count in zip(target_ids.tolist(), drafts.tolist(), n_drafted.tolist(), strict=True):
        n = next((i for i in range(count) if ids[i] != draft[i]), count)
        accepted.append((n, ids[n]))
    return accepted


@three(verify.verify_greedy, verify.verify_greedy_reference, _greedy_loop)
@pytest.mark.parametrize("batch", [1, 16])
def test_verify_greedy(benchmark: Any, batch: int, function: Function) -> None:
    arguments = [(torch.randint(2, (batch, 6)), torch.randint(2, (batch, 5)), torch.full((batch,), 5))]
    measure(benchmark, f"verify_greedy batch {batch}", function, arguments, is_inlined(function))


def _dense_chain(p: Tensor, drafts: Tensor, n: Tensor, ids: Tensor, q: Tensor, seed: Tensor, at: Tensor) -> Tensor:
    """Rejection sampling as it is usually written: dense draft laws, torch's own random numbers."""
    dense = F.pad(torch.zeros_like(p[:, :-1]).scatter_(2, ids, q), (0, 0, 0, 1))
    ratio = (p[:, :-1] / dense[:, :-1]).gather(2, drafts[..., None])[..., 0]
    accepted = (torch.rand_like(ratio) < ratio).long().cumprod(-1).sum(-1)
    row = torch.arange(len(p))
    return torch.multinomial((p[row, accepted] - dense[row, accepted]).clamp(min=0) + 1e-20, 1)


@three(verify.verify_chain, verify.verify_chain_reference, _dense_chain)
@pytest.mark.parametrize("vocabulary", [4096, 128256])
def test_verify_chain(benchmark: Any, vocabulary: int, function: Function) -> None:
    probs = torch.randn(4, DRAFTED + 1, vocabulary).softmax(-1)
    support, ids = probs[:, :-1].topk(64)
    support /= support.sum(-1, keepdim=True)
    counts, seed, position = torch.full((4,), DRAFTED), torch.arange(4), torch.full((4,), LENGTH)
    arguments = [(probs, ids[..., 0].contiguous(), counts, ids, support, seed, position)]
    measure(benchmark, f"verify_chain {vocabulary}", function, arguments, is_inlined(function))


def _closure(parents: Tensor) -> Tensor:
    reach = F.one_hot(parents.clamp(min=0), parents.shape[1]).bool() & (parents >= 0)[..., None]
    reach = reach | torch.eye(parents.shape[1], dtype=torch.bool)
    for _ in range(parents.shape[1].bit_length()):
        reach = reach | (reach.float() @ reach.float() > 0)
    return reach


@three(tree_mask.ancestor_words, tree_mask.ancestor_words_reference, _closure)
@pytest.mark.parametrize("nodes", [8, 64])
def test_ancestor_words(benchmark: Any, nodes: int, function: Function) -> None:
    """The plain variant makes a dense boolean matrix. Built once per tree: the op is called, not compiled."""
    arguments = [((torch.arange(nodes) - 1).div(2, rounding_mode="floor").expand(4, -1).contiguous(),)]
    measure(benchmark, f"ancestor_words {nodes}", function, arguments)
