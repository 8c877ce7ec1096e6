"""The operator library: every op is a well-formed custom op, and does what its definition says on awkward inputs."""

from __future__ import annotations

import importlib
import math
import pkgutil
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec.kernels
from specdec.kernels.draw import draw, draw_reference, top_support, top_support_reference
from specdec.kernels.kv_cache import kv_append_, kv_commit_
from specdec.kernels.noise import uniform, uniform_reference
from specdec.kernels.ragged_attention import ragged_attention
from specdec.kernels.skinny_linear import MAX_ROWS, skinny_linear
from specdec.kernels.tree_attention import tree_attention, tree_attention_reference
from specdec.kernels.tree_mask import ancestor_words, n_words, unpack_words
from specdec.kernels.verify import (
    verify_chain,
    verify_chain_reference,
    verify_greedy,
    verify_greedy_reference,
)
from specdec.tree import TokenTree

for _module in pkgutil.iter_modules(specdec.kernels.__path__):
    importlib.import_module(f"specdec.kernels.{_module.name}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _random_parents(n_nodes: int, seed: int = 0) -> list[int]:
    """Parents of a random tree in which every node comes after its parent."""
    rng = random.Random(seed)
    return [-1] + [rng.randrange(max(0, n - 5), n) for n in range(1, n_nodes)]


def _ragged_case() -> tuple[list[Any], Tensor, Tensor]:
    """Arguments of `ragged_attention`, and the cache behind its table."""
    n_batch, n_rows, n_groups, group, dim, n_slots = 3, 5, 2, 2, 24, 40
    keys, values = (torch.randn(n_groups, n_batch, n_slots, dim) for _ in range(2))
    bits, depths = TokenTree((-1, 0, 0, 1, 2)).tensors(torch.device("cpu"))
    lengths = torch.tensor([0, 7, 30])
    row_node = torch.arange(n_rows).repeat(n_batch, 1)
    slot = (torch.arange(n_batch) * n_slots + lengths)[:, None] + row_node
    q = torch.randn(n_batch * n_rows, n_groups * group, dim)
    k, v = (torch.randn(n_batch * n_rows, n_groups, dim) for _ in range(2))
    table = torch.tensor([keys.data_ptr(), values.data_ptr(), n_slots])
    position = lengths[:, None] + depths
    return [q, k, v, table, slot.flatten(), lengths, row_node, position, bits, depths, 4, 0.3, 2.0], keys, values


def _verify_case(n_batch: int = 3, n_places: int = 2, vocab: int = 5, size: int = 3) -> list[Tensor]:
    ids, support = top_support_reference(torch.rand(n_batch * n_places, vocab), size)
    ids, support = ids.view(n_batch, n_places, size), support.view(n_batch, n_places, size)
    return [
        torch.rand(n_batch, n_places + 1, vocab).softmax(-1), ids[..., 0], torch.randint(n_places + 1, (n_batch,)),
        ids, support, torch.arange(n_batch), torch.arange(n_batch) + 4,
    ]  # fmt: skip


_KEPT_ALIVE = []


def _ragged_args() -> list[Any]:
    arguments, *cache = _ragged_case()
    _KEPT_ALIVE.append(cache)  # the op knows it by its address only
    return arguments


CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[Any]]]] = {
    "uniform": (uniform, lambda: [torch.arange(6).view(2, 3) - 2, *(torch.arange(6).view(2, 3) for _ in "pn"), 1]),
    "draw": (draw, lambda: [torch.rand(3, 7), torch.arange(3), torch.arange(3), torch.ones(3).long(), 1]),
    "top_support": (top_support, lambda: [torch.rand(3, 7), 4]),
    "verify_greedy": (
        verify_greedy,
        lambda: [torch.randint(2, (3, 5)), torch.randint(2, (3, 4)), torch.tensor([0, 4, 2])],
    ),
    "verify_chain": (verify_chain, _verify_case),
    "ancestor_words": (ancestor_words, lambda: [torch.tensor([_random_parents(70), _random_parents(70, 1)])]),
    "kv_append_": (
        kv_append_,
        lambda: [*(torch.randn(2, 3, 8, 4) for _ in "kv"), *(torch.randn(2, 3, 4) for _ in "kv"),
                 torch.tensor([0, 9, 5])],
    ),
    "kv_commit_": (
        kv_commit_,
        lambda: [*(torch.randn(2, 2, 8, 4) for _ in "kv"), torch.tensor([1, 3]), torch.tensor([[0, 2], [0, 1]]),
                 torch.tensor([2, 1])],
    ),
    "skinny_linear": (skinny_linear, lambda: [torch.randn(3, 17), torch.randn(5, 17)]),
    "tree_attention": (
        tree_attention,
        lambda: [torch.randn(2, 3, 4, 8), *(torch.randn(2, 2, 6, 8) for _ in "kv"), torch.zeros(2, 3, 6), 0.4, 3.0],
    ),
    "ragged_attention": (ragged_attention, _ragged_args),
}  # fmt: skip


def test_every_registered_op_is_checked_here() -> None:
    names = {n.removeprefix("specdec::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("specdec::")}
    assert names == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    op, arguments = CASES[name]
    torch.library.opcheck(op.op, tuple(arguments()))


@pytest.mark.parametrize("name", ["uniform", "draw", "top_support", "verify_greedy", "verify_chain", "ancestor_words"])
def test_strides_do_not_matter(name: str) -> None:
    op, arguments = CASES[name]
    plain = arguments()
    strided = [_strided(a) if isinstance(a, Tensor) else a for a in plain]
    for a, b in zip(_tuple(op(*plain)), _tuple(op(*strided)), strict=True):
        assert torch.equal(a, b)


def _strided(x: Tensor) -> Tensor:
    """The same values, neither contiguous nor at the start of their storage."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 3)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 5), (7, 3), (3, 1031)])
def test_drawing_ops_equal_their_references(rows: int, vocab: int) -> None:
    probs = torch.rand(rows, vocab).softmax(-1)
    keys = (torch.randint(2**62, (rows,)), torch.arange(rows), torch.arange(rows) % 3)
    assert torch.equal(draw(probs, *keys, 2), draw_reference(probs, *keys, 2))
    assert torch.equal(uniform(*keys, 1), uniform_reference(*keys, 1))
    assert torch.equal(
        uniform(-keys[0], keys[1] + 2**31, keys[2], 0), uniform_reference(-keys[0], keys[1] + 2**31, keys[2], 0)
    )
    ids, support = top_support(probs, min(vocab, 64))
    for row in range(rows):
        best = sorted(range(vocab), key=lambda i: -probs[row, i].item())[:64]
        assert sorted(ids[row].tolist()) == sorted(best)
        assert torch.allclose(support[row], probs[row, ids[row]] / probs[row, best].sum())


@pytest.mark.parametrize("n_places", [0, 1, 7])
@pytest.mark.parametrize("vocab", [3, 129])
def test_verifying_ops_equal_their_references(n_places: int, vocab: int) -> None:
    case = _verify_case(9, n_places, vocab, 3)
    for a, b in zip(verify_chain(*case), verify_chain_reference(*case), strict=True):
        assert torch.equal(a, b)
    ids = torch.randint(2, (9, n_places + 1))
    case = [ids, torch.randint(2, (9, n_places)), torch.randint(n_places + 1, (9,))]
    for a, b in zip(verify_greedy(*case), verify_greedy_reference(*case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_nodes", [1, 2, 63, 64, 65, 127, 128, 129, 130])
def test_ancestor_words_are_the_walk_to_the_root(n_nodes: int) -> None:
    chain = list(range(-1, n_nodes - 1))
    trees = [chain, _random_parents(n_nodes), _random_parents(n_nodes, 1)]
    bits = ancestor_words(torch.tensor(trees))
    assert bits.shape == (3, n_nodes, n_words(n_nodes))
    seen = unpack_words(bits, n_nodes)
    for tree, parents in enumerate(trees):
        for node in range(n_nodes):
            ancestors, at = set(), node
            while at >= 0:
                ancestors.add(at)
                at = parents[at]
            words = [w % 2**64 for w in bits[tree, node].tolist()]
            assert {64 * i + b for i, w in enumerate(words) for b in range(64) if w >> b & 1} == ancestors
            assert set(seen[tree, node].nonzero()[:, 0].tolist()) == ancestors


def test_a_shallower_chain_is_a_prefix() -> None:
    long, short = (TokenTree.chain(n).tensors(torch.device("cpu")) for n in (99, 40))
    assert torch.equal(long[0][:41, :1], short[0])
    assert torch.equal(long[1][:41], short[1])


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 1, 0), (-1, 2, 0)])
def test_what_is_no_level_order_tree_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="node"):
        TokenTree(parents)


def test_kv_append_writes_its_slots_and_no_others() -> None:
    keys, values = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4)
    k, v = (torch.randn(5, 2, 4).transpose(0, 1) for _ in "kv")
    slot = torch.tensor([23, 0, 9, 14, 8])
    expected = [keys.clone(), values.clone()]
    for token, where in enumerate(slot.tolist()):
        for cache, new in zip(expected, (k, v), strict=True):
            cache[:, where // 8, where % 8] = new[:, token]
    kv_append_(keys, values, k, v, slot)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("seed", range(5))
def test_kv_commit_moves_overlapping_paths(seed: int) -> None:
    rng = random.Random(seed)
    n_batch, n_slots, n_path = 4, 24, 6
    keys, values = torch.randn(2, n_batch, n_slots, 3), torch.randn(2, n_batch, n_slots, 3)
    lengths = torch.tensor([0, 1, 5, 12])
    counts = torch.tensor([rng.randint(1, n_path) for _ in range(n_batch)])
    path = torch.tensor([[0, *sorted(rng.sample(range(1, 11), n_path - 1))] for _ in range(n_batch)])
    expected = [keys.clone(), values.clone()]
    for cache, old in zip(expected, (keys, values), strict=True):
        for b in range(n_batch):
            for i in range(int(counts[b])):
                cache[:, b, lengths[b] + i] = old[:, b, lengths[b] + path[b, i]]
    kv_commit_(keys, values, lengths, path, counts)
    scratch = n_slots - 1
    assert torch.equal(keys[:, :, :scratch], expected[0][:, :, :scratch])
    assert torch.equal(values[:, :, :scratch], expected[1][:, :, :scratch])


@pytest.mark.parametrize("n_rows", [1, 2, 7, 8, 9, MAX_ROWS])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (5, 17), (12, 64), (3, 130)])
def test_skinny_linear_is_the_product_and_its_rows_stand_alone(n_rows: int, n_out: int, n_in: int) -> None:
    x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
    out = skinny_linear(x, weight)
    assert torch.allclose(out.double(), x.double() @ weight.double().T, atol=1e-5 * n_in**0.5)
    for row in range(n_rows):
        assert torch.equal(out[row : row + 1], skinny_linear(x[row : row + 1].contiguous(), weight))


def _naive_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Callable[[int, int], bool], scale: float, softcap: float | None
) -> Tensor:
    """[R, D] from q [R, D] and k, v [S, D], one query at a time in float64."""
    rows = []
    for r in range(len(q)):
        seen = [s for s in range(len(k)) if visible(r, s)]
        scores = k[seen].double() @ q[r].double() * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(scores.softmax(0) @ v[seen].double())
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tree_attention_is_attention_over_visible_keys(softcap: float | None) -> None:
    n_batch, n_rows, n_slots, dim = 2, 3, 11, 8
    q, k, v = torch.randn(n_batch, n_rows, 4, dim), *(torch.randn(2, n_batch, n_slots, dim) for _ in "kv")
    seen = torch.rand(n_batch, n_rows, n_slots) < 0.4
    seen[..., 0] = True
    mask = torch.where(seen, 0.0, -math.inf)
    for function in (tree_attention, tree_attention_reference):
        out = function(q, k, v, mask, 0.37, softcap)
        for b in range(n_batch):
            for head in range(4):
                args = q[b, :, head], k[head // 2, b], v[head // 2, b]
                expected = _naive_attention(*args, lambda r, s, b=b: bool(seen[b, r, s]), 0.37, softcap)
                assert torch.allclose(out[b, :, head].double(), expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_ragged_attention_sees_the_text_the_ancestors_and_the_window(window: int, softcap: float) -> None:
    arguments, keys, values = _ragged_case()
    arguments[-3], arguments[-1] = window, softcap
    q, k, v, _, slot, lengths, _, _, _, depths = arguments[:10]
    expected_keys, expected_values = keys.clone(), values.clone()
    kv_append_(expected_keys, expected_values, k.transpose(0, 1), v.transpose(0, 1), slot)
    out = ragged_attention(*arguments)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    ancestors = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 2, 4}]
    for b, length in enumerate(lengths.tolist()):

        def visible(r: int, s: int, length: int = length) -> bool:
            at = s if s < length else length + int(depths[s - length]) if s - length < 5 else -1
            known = s < length or s - length in ancestors[r]
            return known and (window == 0 or length + int(depths[r]) - at < window)

        for head in range(q.shape[1]):
            args = q[5 * b : 5 * b + 5, head], keys[head // 2, b], values[head // 2, b]
            expected = _naive_attention(*args, visible, arguments[-2], softcap)
            assert torch.allclose(out[5 * b : 5 * b + 5, head].double(), expected, atol=1e-5)
