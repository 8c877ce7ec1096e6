"""TokenTree: the shape of a draft, as parent indices in level order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdec.kernels.tree_mask import ancestor_words


@dataclass(frozen=True)
class TokenTree:
    """A level-order tree of N nodes. Node 0 is the root, the pending token; the others are drafted.

    Args:
        parents: the parent of each node; -1 for the root alone. Depths never decrease along the list.

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
        if any(a > b for a, b in zip(self.depths, self.depths[1:], strict=False)):
            raise ValueError(f"nodes are not in level order: their depths are {self.depths}")

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

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self) - 1))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ancestor words [N, W] and depths [N], int64, on `device`."""
        parents = torch.tensor([self.parents])
        return ancestor_words(parents)[0].to(device), torch.tensor(self.depths, device=device)
