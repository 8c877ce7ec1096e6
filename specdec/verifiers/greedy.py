"""Greedy: a draft is accepted where it is the target's best token."""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.verify.verify_greedy import verify_greedy
from specdec.verifiers.base import Candidates, Verdict


def follow(chosen: Tensor, candidates: Candidates) -> Verdict:
    """The path along which every drafted token is the target's own choice.

    Args:
        chosen: [T] int64, what the target takes after each node.
    """
    c = candidates
    return Verdict(*verify_greedy(chosen, c.tokens, c.n_nodes, c.topology, c.bits, c.starts, c.depth))
