"""Distances between a target's law p and a draft's q, as means over positions: what distillation makes small.

All take log-probabilities [..., outcomes], are 0 where p = q and only there, and have a zero gradient there. Source:
Zhou et al., DistillSpec, arXiv 2310.08461, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p, q) = sum p (log p - log q): q must cover all that the target writes."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(q, p) = sum q (log q - log p): q must not propose what the target would not write."""
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """1/2 sum |p - q|: the chance that speculative sampling rejects a token drafted from q."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()


class Objective(str, Enum):
    """What a draft minimises."""

    forward = "forward"
    reverse = "reverse"
    tv = "tv"

    @property
    def function(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Of (log p, log q)."""
        return {"forward": forward_kl, "reverse": reverse_kl, "tv": total_variation}[self.value]

    @property
    def formula(self) -> str:
        """For a card: p are the target's probabilities, q the draft's."""
        return {"forward": "KL(p, q)", "reverse": "KL(q, p)", "tv": "total variation, 1/2 sum |p - q|"}[self.value]
