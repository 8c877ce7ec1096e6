"""Plans: how deep the next step drafts, and how many nodes of each sample the target judges."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec.engine.tree import TokenTree

CALIBRATE, EXPLORE = "calibrate", "explore"


@dataclass(frozen=True)
class Plan:
    """What the next step does, for n unfinished samples.

    Attributes:
        depth: levels to draft, 0 for none. allowed: [n], drafted nodes of each sample that the target judges, at most.
        n_tokens: T, tokens of the target's forward. trial: why it is tried, CALIBRATE or EXPLORE, if not for being the
            best. n_drafted: samples that the drafter drafts for, if not for all: others have found their drafts.
    """

    depth: int
    allowed: tuple[int, ...]
    n_tokens: int
    trial: str = ""
    n_drafted: int | None = None

    def within(self, most: Sequence[int]) -> Plan:
        """The same where the samples have [n] so many drafted nodes at most."""
        allowed = tuple(map(min, self.allowed, most))
        return replace(self, allowed=allowed, n_tokens=min(self.n_tokens, len(allowed) + sum(allowed)))


class Shape:
    """What plans can choose from.

    Args:
        tree: a whole draft. depths: levels that can be drafted, ascending (see `Drafter`). source_levels: of what each
            source drafts, the drafter first. rides: whether drafting takes no time of its own, but a
            row for each level beside each token that is judged.

    Attributes:
        n_levels: of the tree. nodes_to: [n_levels + 1], drafted nodes down to each level.
    """

    def __init__(
        self, tree: TokenTree, depths: Sequence[int], source_levels: Sequence[int] | None = None, rides: bool = False
    ) -> None:
        self.depths, self.n_levels, self.source_levels = depths, tree.depth, source_levels or (tree.depth,)
        self.rides = rides
        self.nodes_to = [bisect_right(tree.depths, level) - 1 for level in range(tree.depth + 1)]

    def rows(self, n_tokens: int, depth: int) -> int:
        """Of a forward that judges so many tokens, in a step that drafts so many levels."""
        return n_tokens * (1 + min(depth, self.source_levels[0])) if self.rides else n_tokens

    def whole_levels(self, n_nodes: int) -> int:
        """Levels that the first `n_nodes` drafted nodes fill."""
        return bisect_right(self.nodes_to, n_nodes) - 1

    def uniform(self, n: int, levels: int, depth: int | None = None, trial: str = "") -> Plan:
        """The first `levels` levels for each of `n` samples, of a draft of that depth or more."""
        if not levels:
            return Plan(0, (0,) * n, n, trial)
        nodes = self.nodes_to[levels]
        depth = depth or next(d for d in self.depths if d >= levels)
        return Plan(depth, (nodes,) * n, n * (nodes + 1), trial)
