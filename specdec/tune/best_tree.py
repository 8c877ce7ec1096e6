"""Which tree to draft: the one with the most expected tokens a step, or a second.

A drafter is measured once: with what probability does a step that has reached a node go on through its j-th child?
That may depend on how many children there are (the last child of a hub is drawn from what the others leave), so there
is one list for every number of children k:

    acceptance = {1: (0.7,), 2: (0.7, 0.12), 3: (0.7, 0.12, 0.05)}

What is worth drafting below a node does not depend on how it was reached, so the best tree is made of best trees:

    best(n, d) = 1 + max over k and n_1 + ... + n_k = n - 1 of sum_j acceptance[k][j] best(n_j, d - 1)

Source: Sequoia, arXiv 2402.12374, section 3: the dynamic program, and size and depth chosen by measured cost.
Letters: n nodes, the root included; d levels of drafts; k children.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdec.engine.tree import TokenTree

Acceptance = Mapping[int, Sequence[float]]
"""By number of children k: k probabilities, that a step at such a node goes on through its j-th child."""


@dataclass(frozen=True)
class StepCost:
    """Seconds a step takes, by its tree: the target's forward plus the drafting of each level.

    Args:
        target: seconds of the target's forward by number of nodes, at a few numbers of nodes: 1, the step that drafts
            nothing, and others. Between two of them the cost is a straight line.
        level: seconds to draft one level.

    Raises:
        ValueError: if the cost of 1 node is missing, or a cost is no number of seconds.
    """

    target: Mapping[int, float]
    level: float

    def __post_init__(self) -> None:
        if min(self.target, default=0) != 1:
            raise ValueError(f"the target's cost must be known from 1 node on, got it for {sorted(self.target)}")
        for n_nodes, seconds in self.target.items():
            if not 0 < seconds < math.inf:
                raise ValueError(f"the target's cost of {n_nodes} nodes must be positive, got {seconds} s")
        if not 0 <= self.level < math.inf:
            raise ValueError(f"the cost of a level must not be negative, got {self.level} s")

    def of(self, tree: TokenTree) -> float:
        """Seconds of a step with `tree`.

        Raises:
            ValueError: if the tree has more nodes than the target's cost is known of.
        """
        if len(tree) > max(self.target):
            raise ValueError(f"the target's cost is known of up to {max(self.target)} nodes, not of {len(tree)}")
        below, above = max(n for n in self.target if n <= len(tree)), min(n for n in self.target if n >= len(tree))
        way = (len(tree) - below) / max(above - below, 1)
        return (1 - way) * self.target[below] + way * self.target[above] + self.level * tree.depth


def expected_tokens(tree: TokenTree, acceptance: Acceptance) -> float:
    """Mean number of tokens a step with `tree` adds: every node counts with the probability that it is reached, the
    root, always reached, for the bonus token.

    Raises:
        ValueError: if `acceptance` is no such thing, or has no entry for a number of children in the tree.
    """
    _check(acceptance)
    reached = [1.0] * len(tree)
    for node in tree.inner:
        slots = acceptance.get(tree.n_children[node])
        if slots is None:
            raise ValueError(f"node {node} has {tree.n_children[node]} children, acceptance is for {[*acceptance]}")
        for child, slot in zip(tree.children(node), slots, strict=True):
            reached[child] = reached[node] * slot
    return math.fsum(reached)


def best_tree(acceptance: Acceptance, n_nodes: int, depth: int) -> TokenTree:
    """The tree with the most expected tokens a step; among equals, one with the fewest nodes.

    Args:
        acceptance: what the drafter was measured to reach, by number of children; no other numbers are tried.
        n_nodes: at most this many nodes, the root included.
        depth: at most this many levels of drafts.

    Raises:
        ValueError: if `acceptance` is no such thing, `n_nodes` is not positive, or `depth` is negative.
    """
    level = _best_by_size(acceptance, n_nodes, depth)[-1]
    return _grow(max((level[n] for n in sorted(level)), key=lambda best: best.tokens))


def fastest_tree(acceptance: Acceptance, cost: StepCost, depth: int) -> TokenTree:
    """The tree with the most expected tokens a second; among equals, one of the fewest levels, then nodes.

    It has at most as many nodes as the target's cost is known of, and may be a chain, where `acceptance` has an entry
    for one child, or the root alone, where no draft pays.

    Args:
        acceptance: what the drafter was measured to reach, by number of children; no other numbers are tried.
        cost: seconds of a step by tree. depth: at most this many levels of drafts.

    Raises:
        ValueError: if `acceptance` is no such thing, or `depth` is negative.
    """
    levels = _best_by_size(acceptance, max(cost.target), depth)
    # Trees of as many nodes and levels cost the same, and the one with the most tokens is here: so is the fastest.
    choices = [level[n] for level in levels for n in sorted(level)]
    return _grow(max(choices, key=lambda best: best.tokens / cost.of(_grow(best))))


class _Best(NamedTuple):
    """The best subtree of some size, or the best for each of some slots together.

    Attributes:
        tokens: expected, given that the subtree's root is reached; of several, given that their parent is.
        subtrees: those of the root's children; of several, they themselves.
    """

    tokens: float
    subtrees: tuple[_Best, ...]


def _best_by_size(acceptance: Acceptance, n_nodes: int, depth: int) -> list[dict[int, _Best]]:
    """For each number of levels up to `depth`: the best tree of exactly n nodes, for every n that can be had."""
    _check(acceptance)
    if n_nodes < 1 or depth < 0:
        raise ValueError(f"a tree has at least 1 node and 0 levels of drafts, got {n_nodes} nodes and depth {depth}")
    levels = [{1: _Best(1.0, ())}]
    for _ in range(min(depth, n_nodes - 1)):  # a chain of all nodes is no deeper
        level = dict(levels[0])
        for _, slots in sorted(acceptance.items()):
            for n_below, best in _share(slots, levels[-1], n_nodes - 1).items():
                _keep_better(level, 1 + n_below, _Best(1 + best.tokens, best.subtrees))
        levels.append(level)
    return levels


def _share(slots: Sequence[float], below: dict[int, _Best], n_nodes: int) -> dict[int, _Best]:
    """The best subtrees of exactly n nodes together, one for each slot, for every n up to `n_nodes`."""
    shared = {0: _Best(0.0, ())}
    for slot in slots:
        longer: dict[int, _Best] = {}
        for n_before, before in shared.items():
            for n, subtree in below.items():
                if n_before + n <= n_nodes:
                    best = _Best(before.tokens + slot * subtree.tokens, (*before.subtrees, subtree))
                    _keep_better(longer, n_before + n, best)
        shared = longer
    return shared


def _keep_better(level: dict[int, _Best], n_nodes: int, best: _Best) -> None:
    if n_nodes not in level or best.tokens > level[n_nodes].tokens:
        level[n_nodes] = best


def _grow(best: _Best) -> TokenTree:
    """The tree in level order."""
    parents, nodes = [-1], [best]
    for node, subtree in enumerate(nodes):  # grows as it is read
        parents += [node] * len(subtree.subtrees)
        nodes += subtree.subtrees
    return TokenTree(tuple(parents))


def _check(acceptance: Acceptance) -> None:
    if not acceptance:
        raise ValueError("acceptance is empty: it needs the slots of at least one number of children")
    for n_children, slots in acceptance.items():
        if n_children < 1 or len(slots) != n_children:
            raise ValueError(f"acceptance of {n_children} children needs as many slots, got {len(slots)}")
        for j, slot in enumerate(slots):
            if not 0 <= slot <= 1:
                raise ValueError(f"acceptance of {n_children} children: slot {j} is {slot}, no probability")
        if math.fsum(slots) > 1 + 1e-6:  # shares of a count, rounded to float32 perhaps
            raise ValueError(f"acceptance of {n_children} children sums to {math.fsum(slots)}, over 1")
