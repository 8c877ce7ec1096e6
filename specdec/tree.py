"""TokenTree: the shape of a draft, as parent indices in level order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdec.kernels.tree_mask import ancestor_words


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

    @classmethod
    def chain(cls, n_drafted: int) -> TokenTree:
        """The root followed by `n_drafted` tokens, each the child of the one before."""
        return cls(tuple(range(-1, n_drafted)))

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

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The nodes with children, ascending."""
        return tuple(node for node, count in enumerate(self.n_children) if count)

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self) - 1))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ancestor words [N, W] and depths [N], int64, on `device`."""
        parents = torch.tensor([self.parents])
        return ancestor_words(parents)[0].to(device), torch.tensor(self.depths, device=device)

    def topology(self, device: torch.device) -> Tensor:
        """[5, N] int64 on `device`: each node's parent, depth, first child, number of children, place in `inner`.

        A leaf's first child is N, its place in `inner` -1.
        """
        places = {node: place for place, node in enumerate(self.inner)}
        place = [places.get(node, -1) for node in range(len(self))]
        rows = [self.parents, self.depths, self.first_child, self.n_children, place]
        return torch.tensor(rows, device=device)
