"""The best tree for a measured acceptance: nothing among all trees beats it, by tokens a step or a second."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specdec.engine.tree import TokenTree
from specdec.tune.best_tree import StepCost, best_tree, expected_tokens, fastest_tree

MOST = 7  # nodes of the trees all of which are tried
PREFIXES = {k: (0.6, 0.2, 0.1, 0.05)[:k] for k in (1, 2, 3, 4)}  # as without replacement
HUB = {1: (0.4,), 2: (0.3, 0.45), 3: (0.3, 0.1, 0.4)}  # the last child is the likeliest

probabilities = st.floats(0, 1, allow_subnormal=False)


@st.composite
def acceptances(draw: st.DrawFn) -> dict[int, tuple[float, ...]]:
    """Slots for some numbers of children up to four, each list its own, summing to at most 1."""
    acceptance = {}
    for k in draw(st.sets(st.integers(1, 4), min_size=1)):
        slots = draw(st.tuples(*[probabilities] * k))
        acceptance[k] = tuple(slot / max(1.0, sum(slots)) for slot in slots)
    return acceptance


costs = st.builds(
    StepCost,
    st.dictionaries(st.integers(2, MOST - 1), st.floats(0.5, 2)).map(lambda target: target | {1: 1.0, MOST: 1.5}),
    st.floats(0, 0.3),
)


@cache
def all_trees() -> tuple[TokenTree, ...]:
    def longer(parents: tuple[int, ...]) -> Iterator[TokenTree]:
        yield TokenTree(parents)
        if len(parents) < MOST:
            for parent in range(max(parents[-1], 0), len(parents)):
                yield from longer((*parents, parent))

    return tuple(longer((-1,)))


def allowed(acceptance: dict[int, tuple[float, ...]], n_nodes: int, depth: int) -> Iterator[TokenTree]:
    for tree in all_trees():
        if len(tree) <= n_nodes and tree.depth <= depth and set(tree.n_children) <= {0, *acceptance}:
            yield tree


def test_all_trees_are_all() -> None:
    counts = [sum(len(tree) == n for tree in all_trees()) for n in range(1, MOST + 1)]
    assert counts == [math.comb(2 * n, n) // (n + 1) for n in range(MOST)]  # Catalan


def test_expected_tokens_of_a_chain_are_a_geometric_sum() -> None:
    assert expected_tokens(TokenTree.chain(5), {1: (0.8,)}) == pytest.approx((1 - 0.8**6) / (1 - 0.8))


def test_expected_tokens_depend_on_the_slot_and_on_the_number_of_children() -> None:
    # root: two children; the second has three, of whom the first has one
    tree = TokenTree((-1, 0, 0, 2, 2, 2, 3))
    expected = 1 + 0.3 + 0.45 * (1 + 0.3 * (1 + 0.4) + 0.1 + 0.4)
    assert expected_tokens(tree, HUB) == pytest.approx(expected)


@settings(max_examples=300, deadline=None)
@example(PREFIXES, 7, 6)
@example(HUB, 7, 6)
@example({1: (0.9,), 2: (0.1, 0.1)}, 3, 1)  # all nodes are too many
@given(acceptances(), st.integers(1, MOST), st.integers(0, MOST))
def test_no_tree_has_more_expected_tokens(acceptance: dict[int, tuple[float, ...]], n_nodes: int, depth: int) -> None:
    tree = best_tree(acceptance, n_nodes, depth)
    assert tree in set(allowed(acceptance, n_nodes, depth))
    best = max(expected_tokens(other, acceptance) for other in allowed(acceptance, n_nodes, depth))
    assert expected_tokens(tree, acceptance) == pytest.approx(best, rel=1e-12)


@settings(max_examples=300, deadline=None)
@example(HUB, StepCost({1: 1.0, 3: 1.9, 4: 1.2, 7: 1.3}, 0.1), 4)  # four nodes cost less than three
@given(acceptances(), costs, st.integers(0, MOST))
def test_no_tree_has_more_expected_tokens_a_second(
    acceptance: dict[int, tuple[float, ...]], cost: StepCost, depth: int
) -> None:
    def speed(tree: TokenTree) -> float:
        return expected_tokens(tree, acceptance) / cost.of(tree)

    tree, others = fastest_tree(acceptance, cost, depth), set(allowed(acceptance, MOST, depth))
    assert tree in others
    assert speed(tree) == pytest.approx(max(map(speed, others)), rel=1e-12)


def test_slots_are_given_as_they_are() -> None:
    assert best_tree({1: (0.1,), 2: (0.1, 0.8)}, 5, 4).parents == (-1, 0, 0, 2, 2)


def test_nodes_that_add_nothing_are_not_drafted() -> None:
    assert best_tree({1: (0.5,), 2: (0.5, 0.0)}, 50, 3) == TokenTree.chain(3)
    assert best_tree({1: (0.0,)}, 50, 3) == TokenTree.chain(0)


def test_the_fastest_is_a_chain_a_tree_or_no_draft_as_costs_have_it() -> None:
    free, dear = 0.0, 5.0
    flat, steep = {1: 1.0, 40: 1.0}, {1: 1.0, 40: 40.0}
    assert fastest_tree(PREFIXES, StepCost(flat, free), 4) == best_tree(PREFIXES, 40, 4)
    assert fastest_tree(PREFIXES, StepCost(steep, free), 4) == TokenTree.chain(0)
    assert fastest_tree(PREFIXES, StepCost(flat, dear), 4) == TokenTree.chain(0)
    assert fastest_tree({1: (0.6,), 2: (0.6, 0.01)}, StepCost({1: 1.0, 40: 4.0}, free), 4).is_chain


def test_cost_is_a_straight_line_between_what_was_measured() -> None:
    cost = StepCost({9: 4.0, 1: 1.0, 5: 2.0}, level=0.25)
    assert [cost.of(TokenTree.fork(n, 1)) for n in (1, 2, 4, 6, 8)] == [1.5, 1.75, 2.25, 3.25, 4.25]
    assert cost.of(TokenTree.chain(0)) == 1
    assert cost.of(TokenTree.chain(4)) == 3
    with pytest.raises(ValueError, match="up to 9 nodes, not of 10"):
        cost.of(TokenTree.chain(9))


@pytest.mark.parametrize(
    ("acceptance", "message"),
    [
        ({}, "empty"),
        ({2: (0.5,)}, "2 children needs as many slots, got 1"),
        ({0: ()}, "0 children"),
        ({2: (0.5, -0.1)}, "slot 1 is -0.1"),
        ({1: (1.1,)}, "slot 0 is 1.1"),
        ({1: (math.nan,)}, "slot 0 is nan"),
        ({1: (0.5,), 2: (0.7, 0.4)}, "2 children sums to 1.1"),
    ],
)
def test_what_is_no_acceptance_is_refused(acceptance: dict[int, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_tree(acceptance, 4, 2)
    with pytest.raises(ValueError, match=message):
        expected_tokens(TokenTree.chain(0), acceptance)


def test_shares_of_a_count_may_sum_to_one_in_float32() -> None:
    assert len(best_tree({3: (0.33333334, 0.33333334, 0.33333334)}, 4, 1)) == 4


def test_a_tree_with_other_numbers_of_children_is_refused() -> None:
    with pytest.raises(ValueError, match=r"node 1 has 2 children, acceptance is for \[1\]"):
        expected_tokens(TokenTree.from_widths(1, 2), {1: (0.5,)})


@pytest.mark.parametrize(("n_nodes", "depth"), [(0, 2), (4, -1)])
def test_a_budget_for_no_tree_is_refused(n_nodes: int, depth: int) -> None:
    with pytest.raises(ValueError, match=f"got {n_nodes} nodes and depth {depth}"):
        best_tree(PREFIXES, n_nodes, depth)


@pytest.mark.parametrize(
    ("target", "level", "message"),
    [
        ({}, 0.0, "from 1 node on"),
        ({2: 1.0, 8: 1.0}, 0.0, r"from 1 node on, got it for \[2, 8\]"),
        ({1: 1.0, 8: 0.0}, 0.0, "8 nodes must be positive, got 0.0 s"),
        ({1: math.nan}, 0.0, "got nan s"),
        ({1: 1.0}, -0.5, "level must not be negative, got -0.5 s"),
    ],
)
def test_what_is_no_cost_is_refused(target: dict[int, float], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepCost(target, level)
