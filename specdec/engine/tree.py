"""TokenTree: the shape of a draft, as parent indices in level order."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from specdec.errors import needs_cli
from specdec.kernels.attention.tree_mask import ancestor_words


@dataclass(frozen=True)
class TokenTree:
    """A tree of N nodes in level order. Node 0 is the root, the pending token; the others are drafted.

    Args:
        parents: the parent of each node; -1 for the root alone. Parents never decrease along the list, so that levels
            follow each other and the children of a node are contiguous.

    Raises:
        ValueError: if the parents do not describe one level-order tree.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"node 0 must be the root with parent -1, got parents {self.parents[:1]}")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}, which does not come before it")
            if parent < self.parents[node - 1]:
                raise ValueError(
                    f"nodes are not in level order: node {node} has parent {parent}, "
                    f"and node {node - 1} before it has parent {self.parents[node - 1]}"
                )
        # Now and not on first use: compiled steps read them, and Dynamo can't enter a cached property.
        _ = self.depths, self.first_child, self.n_children, self.inner, self.is_chain

    @classmethod
    def chain(cls, n_drafted: int) -> TokenTree:
        """The root followed by `n_drafted` tokens, each the child of the one before."""
        return cls(tuple(range(-1, n_drafted)))

    @classmethod
    def from_widths(cls, *widths: int) -> TokenTree:
        """Every node of level d - 1 has `widths[d - 1]` children: `from_widths(4, 2, 2, 1)` drafts 4 + 8 + 16 + 16.

        Source: multi-candidate speculative decoding, arXiv 2401.06706.

        Raises:
            ValueError: if a width is not positive.
        """
        parents, level = [-1], range(1)
        for depth, width in enumerate(widths, 1):
            if width < 1:
                raise ValueError(f"level {depth} needs at least one child for every node above it, got {width}")
            parents += [node for node in level for _ in range(width)]
            level = range(level.stop, len(parents))
        return cls(tuple(parents))

    @classmethod
    def fork(cls, width: int, depth: int) -> TokenTree:
        """`width` chains of `depth` tokens from the root.

        Source: arXiv 2409.10644.

        Raises:
            ValueError: if one of the two is not positive.
        """
        if depth < 1:
            raise ValueError(f"the chains of a fork need at least one token, got depth {depth}")
        return cls.from_widths(width, *[1] * (depth - 1))

    def prefix(self, depth: int) -> TokenTree:
        """The levels down to `depth`: the leading nodes, whose ancestor words are the leading ones of this tree's."""
        return TokenTree(self.parents[: bisect_right(self.depths, depth)])

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Depth of the last level: the most tokens a path drafts."""
        return self.depths[-1]

    @cached_property
    def n_children(self) -> tuple[int, ...]:
        counts = Counter(self.parents)
        return tuple(counts[node] for node in range(len(self)))

    @cached_property
    def first_child(self) -> tuple[int, ...]:
        """Each node's first child; the others follow it. N for a leaf."""
        first = [len(self)] * len(self)
        for node in range(len(self) - 1, 0, -1):
            first[self.parents[node]] = node
        return tuple(first)

    def children(self, node: int) -> range:
        return range(self.first_child[node], self.first_child[node] + self.n_children[node])

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The nodes with children, ascending."""
        return tuple(node for node, count in enumerate(self.n_children) if count)

    @property
    def summary(self) -> str:
        """Its shape in a few words."""
        return f"chain of {self.depth}" if self.is_chain else f"tree of {len(self) - 1} nodes, depth {self.depth}"

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self) - 1))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ancestor words [N, W] and depths [N], int64, on `device`."""
        parents = torch.tensor([self.parents], dtype=torch.int64, device="cpu")
        return ancestor_words(parents)[0].to(device), torch.tensor(self.depths, device=device, dtype=torch.int64)

    def topology(self, device: torch.device) -> Tensor:
        """[5, N] int64 on `device`: each node's parent, depth, first child, number of children, place in `inner`.

        A leaf's first child is N, its place in `inner` -1.
        """
        places = {node: place for place, node in enumerate(self.inner)}
        place = [places.get(node, -1) for node in range(len(self))]
        rows = [self.parents, self.depths, self.first_child, self.n_children, place]
        return torch.tensor(rows, device=device, dtype=torch.int64)

    def __str__(self) -> str:
        """A drawing, one node a line. Neighbours with equal subtrees are drawn once, as `1-4 x 4`: all their numbers,
        and below them those of the first one's descendants."""
        shapes: dict[tuple[int, ...], int] = {}  # a subtree's shape is the shapes of its children, numbered here
        shape = [0] * len(self)
        for node in reversed(range(len(self))):
            shape[node] = shapes.setdefault(tuple(shape[child] for child in self.children(node)), len(shapes))
        lines = [self._title]
        waiting = [(0, "0", "")]  # a stack, for a chain may be longer than Python recurses: node, line, indent below
        while waiting:
            node, line, indent = waiting.pop()
            lines.append(line)
            groups = [list(group) for _, group in groupby(self.children(node), key=shape.__getitem__)]
            for group in reversed(groups):
                name = str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]} x {len(group)}"
                branch, below = ("└── ", "    ") if group is groups[-1] else ("├── ", "│   ")
                waiting.append((group[0], indent + branch + name, indent + below))
        return "\n".join(lines)

    @property
    def _title(self) -> str:
        n_drafted = len(self) - 1
        return f"{n_drafted} drafted node{'' if n_drafted == 1 else 's'}, depth {self.depth}"

    @cached_property
    def columns(self) -> tuple[float, ...]:
        """Where a drawing with levels as rows puts each node: leaves side by side, 1 apart, parents above the middle
        of their leaves."""
        n_leaves = [0 if count else 1 for count in self.n_children]
        for node in range(len(self) - 1, 0, -1):
            n_leaves[self.parents[node]] += n_leaves[node]
        left = [0] * len(self)  # leaves to the left of a node's own
        for node in self.inner:
            start = left[node]
            for child in self.children(node):
                left[child] = start
                start += n_leaves[child]
        return tuple(start + (n - 1) / 2 for start, n in zip(left, n_leaves, strict=True))

    def plot(self, path: str) -> None:
        """The tree with its nodes' numbers, as a PNG at `path`."""
        with needs_cli("a plot"):
            from matplotlib.figure import Figure

        columns, rows = self.columns, [-depth for depth in self.depths]
        n_leaves = len(self) - len(self.inner)
        size = (max(4, 0.35 * n_leaves), 1 + 0.7 * self.depth)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for node, parent in enumerate(self.parents[1:], 1):
            axes.plot([columns[parent], columns[node]], [rows[parent], rows[node]], color="gray", linewidth=1, zorder=1)
        axes.scatter(columns, rows, s=180, color="white", edgecolors="black", zorder=2)
        for node, place in enumerate(zip(columns, rows, strict=True)):
            axes.annotate(str(node), place, ha="center", va="center", fontsize=7)
        axes.set_title(self._title)
        axes.set_axis_off()
        figure.savefig(path, dpi=150)
