"""Rejection on trees: children are hubs or drawn, and accepted by the rules of `specdec.kernels.verify.tree_rules`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT
from specdec.kernels.verify.verify_tree import verify_tree
from specdec.verifiers.base import Candidates, DraftLaw, RowLaw, Verdict

HUB_SHARE = 0.2
"""From which share of what is left of a draft law on the next best token becomes a hub."""


def with_replacement(probs: Tensor, counts: Tensor) -> Tensor:
    return torch.full_like(counts, WITH_REPLACEMENT)


def none(probs: Tensor, counts: Tensor) -> Tensor:
    return torch.zeros_like(counts)


def all_but_one(probs: Tensor, counts: Tensor) -> Tensor:
    return counts - 1


def every(probs: Tensor, counts: Tensor) -> Tensor:
    return counts


def likely(probs: Tensor, counts: Tensor) -> Tensor:
    """The best tokens, as long as each has HUB_SHARE of what those before it leave, and one child is drawn.

    A hub pays where the draft is sure: it is there for certain, whatever is drawn beside it. Where the law is flat it
    only takes the place of a token that, drawn, would cover more of the target's law.
    """
    rest = 1 - probs.cumsum(-1) + probs
    return torch.minimum((probs >= HUB_SHARE * rest).long().cumprod(-1).sum(-1), counts - 1)


@dataclass(frozen=True)
class Rejection:
    """A verifier that accepts a draft with a probability made of both laws.

    Attributes:
        rule: how many of a node's children are the best of its law (see `Verifier.hubs`); the others are drawn.
        sequence: whether the weights of nodes are handed down the tree (see `specdec.kernels.verify.verify_tree`).
    """

    name: str
    rule: Callable[[Tensor, Tensor], Tensor]
    sequence: bool = True
    coupled: bool = False

    def hubs(self, probs: Tensor, counts: Tensor) -> Tensor:
        """See `Verifier.hubs`."""
        return self.rule(probs, counts)

    def judge(self, laws: RowLaw, candidates: Candidates, drawn: DraftLaw) -> Verdict:
        """See `Verifier.judge`."""
        c = candidates
        path, n_accepted, row, ids, weights = verify_tree(
            *laws, c.topology, drawn.places, c.n_nodes, drawn.support_ids, drawn.support_probs, drawn.n_hubs, c.seeds,
            c.position, c.starts, c.depth, self.sequence,
        )  # fmt: skip
        at = c.position + n_accepted
        bonus = draw_row(*laws, row, ids, weights, c.seeds, at, torch.zeros_like(at), BONUS, False)
        return Verdict(path, n_accepted, bonus)
