"""Ancestor words: the walk to the root, as bits."""

from __future__ import annotations

import random

import pytest
import torch
from aot import compiles_without_spilling, meta
from torch import Tensor

from specdec.kernels.attention.tree_mask import (
    ancestor_words,
    ancestor_words_cpu,
    ancestor_words_reference,
    ancestor_words_triton,
    n_words,
    unpack_words,
)

pytestmark = pytest.mark.kernels


def _random_parents(n_nodes: int, seed: int = 0, reach: int = 5, n_roots: int = 1) -> list[int]:
    """Parents of a random tree or forest in which every node comes after its parent, at most `reach` places."""
    rng = random.Random(seed)
    roots = [-1] * min(n_roots, n_nodes)
    return roots + [rng.randrange(max(0, n - reach), n) for n in range(len(roots), n_nodes)]


def _ancestors(parents: list[int]) -> list[set[int]]:
    found: list[set[int]] = []
    for node, parent in enumerate(parents):
        found.append({node} | (found[parent] if parent >= 0 else set()))
    return found


def _assert_is_walk(bits: Tensor, trees: list[list[int]]) -> None:
    for tree, parents in enumerate(trees):
        for node, ancestors in enumerate(_ancestors(parents)):
            words = [w % 2**64 for w in bits[tree, node].tolist()]
            assert {64 * i + b for i, w in enumerate(words) for b in range(64) if w >> b & 1} == ancestors


@pytest.mark.parametrize("n_nodes", [1, 2, 63, 64, 65, 127, 128, 129])
def test_bits_are_the_walk_to_the_root(n_nodes: int, device: torch.device, poisoned: None) -> None:
    trees = [_random_parents(n_nodes), _random_parents(n_nodes, 1, reach=40, n_roots=3), [-1] * n_nodes]
    bits = ancestor_words(torch.tensor(trees, device=device))
    assert bits.shape == (3, n_nodes, n_words(n_nodes))
    assert bits.dtype == torch.int64
    _assert_is_walk(bits, trees)
    seen = unpack_words(bits, n_nodes)
    for tree, parents in enumerate(trees):
        for node, ancestors in enumerate(_ancestors(parents)):
            assert set(seen[tree, node].nonzero()[:, 0].tolist()) == ancestors


@pytest.mark.parametrize("n_nodes", [65, 130])
def test_a_chain_sees_all_before_it(n_nodes: int, device: torch.device, poisoned: None) -> None:
    parents = torch.arange(-1, n_nodes - 1, device=device)[None]
    expected = torch.ones(n_nodes, n_nodes, dtype=torch.bool, device=device).tril()
    assert torch.equal(unpack_words(ancestor_words(parents), n_nodes)[0], expected)


def test_sixteen_words(device: torch.device, poisoned: None) -> None:
    trees = [_random_parents(1000, reach=300, n_roots=4)]
    _assert_is_walk(ancestor_words(torch.tensor(trees, device=device)), trees)


def test_what_is_defined_is_the_walk() -> None:
    trees = [_random_parents(130, seed, n_roots=seed + 1) for seed in range(3)]
    for function in (ancestor_words_reference, ancestor_words_cpu):
        _assert_is_walk(function(torch.tensor(trees)), trees)


def test_strides_do_not_matter(device: torch.device, poisoned: None) -> None:
    trees = [_random_parents(70, seed) for seed in range(3)]
    plain = torch.tensor(trees, device=device)
    wide = plain.new_full((70, 7), 99)
    wide[:, 1::2] = plain.T
    _assert_is_walk(ancestor_words(wide[:, 1::2].T), trees)
    _assert_is_walk(ancestor_words(plain[:1].expand(2, -1)), trees[:1] * 2)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing(shape: tuple[int, int], device: torch.device) -> None:
    bits = ancestor_words(torch.empty(shape, dtype=torch.int64, device=device))
    assert bits.shape == (*shape, n_words(shape[1]))


def test_is_a_well_formed_op_and_traces(device: torch.device) -> None:
    trees = [_random_parents(70), _random_parents(70, 1)]
    parents = torch.tensor(trees, device=device)
    torch.library.opcheck(ancestor_words.op, (parents,))
    traced = torch.compile(lambda x: ancestor_words(x), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(traced(parents), ancestor_words(parents))


LAUNCHES = {
    "tree of 16": lambda: ancestor_words_triton(meta(8, 16)),
    "tree of 128": lambda: ancestor_words_triton(meta(32, 128)),
    "beams, 1000 nodes": lambda: ancestor_words_triton(meta(1, 1000)),
}

test_compiles_without_spilling = compiles_without_spilling(LAUNCHES)
