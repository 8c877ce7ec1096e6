"""Verifiers by name: how children are drawn, and the rule that accepts them. Every one keeps the output law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT

HUB_SHARE = 0.2
"""From which share of what is left of a draft law on the next best token becomes a hub."""

Hubs = Callable[[Tensor, Tensor], Tensor]
"""How many of a node's children are hubs (see `specdec.kernels.verify.tree_rules`): of draft laws [R, C], best first,
and numbers of children [R] int64, [R] int64."""


def _with_replacement(probs: Tensor, counts: Tensor) -> Tensor:
    return torch.full_like(counts, WITH_REPLACEMENT)


def _none(probs: Tensor, counts: Tensor) -> Tensor:
    return torch.zeros_like(counts)


def _all_but_one(probs: Tensor, counts: Tensor) -> Tensor:
    return counts - 1


def _all(probs: Tensor, counts: Tensor) -> Tensor:
    return counts


def _likely(probs: Tensor, counts: Tensor) -> Tensor:
    """The best tokens, as long as each has HUB_SHARE of what those before it leave, and one child is drawn.

    A hub pays where the draft is sure: it is there for certain, whatever is drawn beside it. Where the law is flat it
    only takes the place of a token that, drawn, would cover more of the target's law.
    """
    rest = 1 - probs.cumsum(-1) + probs
    return torch.minimum((probs >= HUB_SHARE * rest).long().cumprod(-1).sum(-1), counts - 1)


@dataclass(frozen=True)
class Verifier:
    """A way to draw drafted tokens and to verify them.

    Attributes:
        name: as given to `specdec.compile`.
        hubs: how many of a node's children are the best of its law; the others are drawn.
        sequence: whether the weights of nodes are handed down the tree (see `specdec.kernels.verify.verify_tree`).
        coupled: whether target and draft share the noise of a position, and a draft is accepted exactly when the
            target draws the same token: fewer tokens a step, and for equal seeds one text with any draft or none.
    """

    name: str
    hubs: Hubs
    sequence: bool = True
    coupled: bool = False


AUTO = Verifier("auto", _likely)
VERIFIERS = {
    v.name: v
    for v in (
        AUTO,
        Verifier("seqhub", _all_but_one),
        Verifier("traversal", _none),
        Verifier("block", _none),
        Verifier("spechub", _all_but_one, sequence=False),
        Verifier("rrsw", _none, sequence=False),
        Verifier("rrs", _with_replacement, sequence=False),
        Verifier("target", _all, sequence=False),
        Verifier("coupled", _none, coupled=True),
    )
}
