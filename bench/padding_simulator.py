"""What padding costs a batch, counted: slots of the KV cache and rows of the forwards, ragged and padded to the batch's
most.

A trace says what each sample feeds and what it gets in each step; neither depends on the other samples. Vanilla
batches make all samples as long as the longest, in the cache (the most tokens that any of them got) and in the forward
(the most rows that any of them feeds); EMS-SD, which this library's steps follow, does neither.

For i.i.d. drafts of depth γ, each token accepted with probability a if those before it are, a step adds A tokens,
1 <= A <= γ + 1, with P(A > k) = a^k. Then

    E[A] = (1 - a^(γ + 1)) / (1 - a)        E[max of B] = Σ_k 1 - (1 - a^k)^B, k = 0 ... γ

and of a long text's cache E[max of B] / E[A] - 1 slots a token are padding, at most (γ + 1) / E[A] - 1.

Source: EMS-SD, arXiv 2405.07542. Letters: B samples, S steps, A tokens added by a step, γ drafted tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIMULATED: dict[tuple[int, float], dict[int, float]] = {
    (4, 0.6): {2: 0.32, 4: 0.65, 8: 0.94, 16: 1.10, 24: 1.15},
    (4, 0.8): {2: 0.25, 4: 0.42, 8: 0.48, 16: 0.49, 24: 0.49},
    (7, 0.7): {2: 0.36, 4: 0.76, 8: 1.12, 16: 1.39, 24: 1.48},
}
"""Another program's padding ratios of texts of 128 tokens, by (γ, a) and B."""


@dataclass(frozen=True)
class Trace:
    """What the samples of a batch feed and get, step by step.

    Attributes:
        fed: [..., S, B] int64, rows: the pending token and the drafts; 0 once a sample has finished.
        added: [..., S, B] int64, tokens: the accepted drafts and one more. As many entries of the cache stay: the
            pending token's and those of the accepted drafts.
    """

    fed: Tensor
    added: Tensor

    @property
    def live(self) -> Tensor:
        """[..., S, B] bool: who has not finished when a step begins."""
        return self.fed > 0

    def slots(self, pads: bool, drop_finished: bool = True) -> Tensor:
        """[..., S, B] int64, by how many slots of the cache each sample grows; see `padded`."""
        return padded(self.added, self.live, drop_finished) if pads else self.added

    def rows(self, pads: bool, drop_finished: bool = True) -> Tensor:
        """[..., S, B] int64, how many rows of the forward are each sample's; see `padded`."""
        return padded(self.fed, self.live, drop_finished) if pads else self.fed

    def padding_ratio(self) -> Tensor:
        """[...] float64, padding a token in the caches of a vanilla batch, each counted until its sample finishes."""
        return self.slots(True).sum((-2, -1)).double() / self.added.sum((-2, -1)) - 1

    def undrafted(self) -> Trace:
        """The same texts, one token a step."""
        n_tokens = self.added.sum(-2, keepdim=True)
        one = (torch.arange(int(n_tokens.max()))[:, None] < n_tokens).long()
        return Trace(one, one)


def padded(counts: Tensor, live: Tensor, drop_finished: bool) -> Tensor:
    """Every sample's count, made as large as the batch's largest.

    Args:
        counts: [..., S, B] int64, 0 for the finished. live: [..., S, B] bool. drop_finished: finished samples leave
            the batch; else they are padded like the others, as long as there are others.
    """
    most = counts.amax(-1, keepdim=True).expand_as(counts)
    return torch.where(live, most, 0) if drop_finished else most


def expected_tokens(depth: int, acceptance: float) -> float:
    """E[A]: tokens a step."""
    return math.fsum(acceptance**k for k in range(depth + 1))


def expected_most(depth: int, acceptance: float, n_batch: int) -> float:
    """E[max of B]: the most tokens that any sample of a batch gets in a step."""
    return math.fsum(1 - (1 - acceptance**k) ** n_batch for k in range(depth + 1))


def asymptote(depth: int, acceptance: float, n_batch: int) -> float:
    """The padding ratio of long texts."""
    return expected_most(depth, acceptance, n_batch) / expected_tokens(depth, acceptance) - 1


def limit(depth: int, acceptance: float) -> float:
    """The padding ratio of long texts in large batches."""
    return (depth + 1) / expected_tokens(depth, acceptance) - 1


def draw(depth: int, acceptance: float, n_batch: int, n_tokens: int, n_runs: int, noise: torch.Generator) -> Trace:
    """Traces [n_runs, n_tokens, B] of batches that write `n_tokens` tokens a sample; what goes past them is cut off."""
    uniform = torch.rand(n_runs, n_tokens, n_batch, generator=noise, dtype=torch.float64)
    added = 1 + (uniform.log() / math.log(acceptance)).floor().long().clamp(max=depth)  # P(A > k) = P(u <= a^k)
    left = n_tokens - (added.cumsum(-2) - added)
    return Trace(torch.where(left > 0, depth + 1, 0), torch.minimum(added, left.clamp(min=0)))
