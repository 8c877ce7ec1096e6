"""Token trees: what is one, how a node finds its children, and how a shallower one relates to a deeper one."""

from __future__ import annotations

import pytest
import torch

from specdec.tree import TokenTree

CPU = torch.device("cpu")
TREES = {
    "root": TokenTree.chain(0),
    "chain": TokenTree.chain(3),
    "bush": TokenTree((-1, 0, 0, 0, 1, 1, 3, 4, 4, 6)),
    "wide": TokenTree((-1, *([0] * 69), *range(1, 30))),  # 99 nodes: two ancestor words
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def test_a_shallower_chain_is_a_prefix() -> None:
    long, short = (TokenTree.chain(n).tensors(torch.device("cpu")) for n in (99, 40))
    assert torch.equal(long[0][:41, :1], short[0])
    assert torch.equal(long[1][:41], short[1])


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 1, 0), (-1, 2, 0)])
def test_what_is_no_level_order_tree_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="node"):
        TokenTree(parents)


def test_children_of_a_node_are_contiguous_or_the_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="node 4 has parent 1, and node 3 before it has parent 2"):
        TokenTree((-1, 0, 0, 2, 1))  # depths 0 1 1 2 2 never decrease


@every_tree
def test_a_node_finds_its_children(tree: TokenTree) -> None:
    children = [[child for child, parent in enumerate(tree.parents) if parent == node] for node in range(len(tree))]
    assert tree.n_children == tuple(map(len, children))
    assert tree.first_child == tuple(own[0] if own else len(tree) for own in children)
    assert tree.inner == tuple(node for node, own in enumerate(children) if own)
    assert tree.depth == max(tree.depths)


@every_tree
def test_topology_holds_the_same_in_rows(tree: TokenTree) -> None:
    topology = tree.topology(CPU)
    assert topology.dtype == torch.int64
    parents, depths, first_child, n_children, place = topology.tolist()
    assert (tuple(parents), tuple(depths)) == (tree.parents, tree.depths)
    assert (tuple(first_child), tuple(n_children)) == (tree.first_child, tree.n_children)
    assert tuple(node for node in range(len(tree)) if place[node] >= 0) == tree.inner
    assert [place[node] for node in tree.inner] == list(range(len(tree.inner)))
