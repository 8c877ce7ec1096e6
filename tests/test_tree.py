"""Token trees: what is one, how a node finds its children, how a shallower one relates to a deeper one, drawings."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from specdec.engine.tree import TokenTree

CPU = torch.device("cpu")
TREES = {
    "root": TokenTree.chain(0),
    "chain": TokenTree.chain(3),
    "bush": TokenTree((-1, 0, 0, 0, 1, 1, 3, 4, 4, 6)),
    "wide": TokenTree((-1, *([0] * 69), *range(1, 30))),  # 99 nodes: two ancestor words
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any tree of up to 150 nodes: up to three ancestor words."""
    parents = [-1]
    for node in range(1, draw(st.integers(1, 150))):
        parents.append(draw(st.integers(max(parents[-1], 0), node - 1)))
    return TokenTree(tuple(parents))


@settings(max_examples=30, deadline=None)
@example(TokenTree.chain(99))
@example(TokenTree.from_widths(4, 4, 4))
@given(trees())
def test_a_prefix_is_a_slice(tree: TokenTree) -> None:
    bits, depths = tree.tensors(CPU)
    for depth in range(tree.depth + 1):
        short = tree.prefix(depth)
        assert len(short) == sum(d <= depth for d in tree.depths)
        bits_short, depths_short = short.tensors(CPU)
        assert torch.equal(bits[: len(short), : bits_short.shape[1]], bits_short)
        assert not bits[: len(short), bits_short.shape[1] :].any()
        assert torch.equal(depths[: len(short)], depths_short)


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
    assert [list(tree.children(node)) for node in range(len(tree))] == children
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


@pytest.mark.parametrize("widths", [(), (3,), (1, 1, 1), (4, 2, 2, 1), (1, 3, 2)])
def test_widths_are_the_numbers_of_children_by_level(widths: tuple[int, ...]) -> None:
    tree = TokenTree.from_widths(*widths)
    assert tree.n_children == tuple((*widths, 0)[depth] for depth in tree.depths)
    assert [tree.depths.count(depth) for depth in range(tree.depth + 1)] == [
        math.prod(widths[:depth]) for depth in range(len(widths) + 1)
    ]


def test_a_fork_is_chains_from_the_root() -> None:
    assert TokenTree.fork(2, 3).parents == (-1, 0, 0, 1, 2, 3, 4)
    assert TokenTree.fork(1, 5) == TokenTree.from_widths(1, 1, 1, 1, 1) == TokenTree.chain(5)


def test_a_width_or_depth_that_is_not_positive_is_named() -> None:
    with pytest.raises(ValueError, match="level 2 needs at least one child for every node above it, got 0"):
        TokenTree.from_widths(4, 0, 2)
    with pytest.raises(ValueError, match="got -3"):
        TokenTree.fork(-3, 2)
    with pytest.raises(ValueError, match="got depth 0"):
        TokenTree.fork(2, 0)


def test_a_tree_prints_as_a_drawing() -> None:
    assert str(TREES["bush"]).splitlines() == [
        "9 drafted nodes, depth 3",
        "0",
        "├── 1",
        "│   ├── 4",
        "│   │   └── 7-8 x 2",
        "│   └── 5",
        "├── 2",
        "└── 3",
        "    └── 6",
        "        └── 9",
    ]
    assert repr(TREES["chain"]) == "TokenTree(parents=(-1, 0, 1, 2))"


def test_siblings_alike_are_drawn_once() -> None:
    assert str(TokenTree.from_widths(4, 2, 2, 1)).splitlines() == [
        "44 drafted nodes, depth 4",
        "0",
        "└── 1-4 x 4",
        "    └── 5-6 x 2",
        "        └── 13-14 x 2",
        "            └── 29",
    ]
    assert str(TokenTree.chain(1)).startswith("1 drafted node, depth 1\n")


@settings(deadline=None)
@given(trees())
def test_a_drawing_accounts_for_every_node(tree: TokenTree) -> None:
    copies: list[int] = []  # of the line at each depth
    drawn = [0] * (tree.depth + 1)
    for line in str(tree).splitlines()[1:]:
        match = re.fullmatch(r"(\D*)\d+(?:-\d+ x (\d+))?", line)
        assert match, line
        depth, n_alike = len(match[1]) // 4, int(match[2] or 1)
        copies[depth:] = [n_alike * (copies[depth - 1] if depth else 1)]
        drawn[depth] += copies[depth]
    assert drawn == [tree.depths.count(depth) for depth in range(tree.depth + 1)]


def test_a_long_chain_can_be_drawn() -> None:
    assert str(TokenTree.chain(2000)).endswith("└── 2000")


@settings(deadline=None)
@given(trees())
def test_nodes_of_a_plot_stand_apart_and_above_their_children(tree: TokenTree) -> None:
    columns = tree.columns
    for node in range(1, len(tree)):
        if tree.depths[node] == tree.depths[node - 1]:
            assert columns[node] - columns[node - 1] >= 1
    for node in tree.inner:
        first, *_, last = (*tree.children(node), tree.children(node)[-1])
        assert columns[first] <= columns[node] <= columns[last]


def test_a_plot_shows_nodes_and_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (saved.append(self), save(self, *a, **kw)))
    tree = TREES["bush"]
    tree.plot(str(tmp_path / "tree.png"))
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = saved[0].axes
    places = {int(text.get_text()): text.xy for text in axes.texts}
    assert places == {node: (tree.columns[node], -tree.depths[node]) for node in range(len(tree))}
    edges = {tuple(line.get_xydata().ravel().tolist()) for line in axes.lines}
    assert edges == {(*places[parent], *places[node]) for node, parent in enumerate(tree.parents[1:], 1)}
