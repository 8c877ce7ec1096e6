"""Coupled: target and draft read the same noise at a position, and a draft is accepted where both draw the same token.

Fewer tokens a step than by rejection, and for equal seeds one text with any draft or none.

Source: Gumbel-max coupling, Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant
Speculative Decoding", arXiv 2408.07978.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS
from specdec.verifiers.base import Candidates, DraftLaw, RowLaw, Verdict
from specdec.verifiers.greedy import follow


@dataclass(frozen=True)
class Coupled:
    """The verifier that goes by noise alone."""

    name: str = "coupled"
    coupled: bool = True

    def hubs(self, probs: Tensor, counts: Tensor) -> Tensor:
        """None: the noise says which children there are."""
        return torch.zeros_like(counts)

    def judge(self, laws: RowLaw, candidates: Candidates, drawn: DraftLaw) -> Verdict:
        """See `Verifier.judge`; what the drafts were drawn from does not matter."""
        c = candidates
        row = torch.arange(len(laws.logits), device=laws.logits.device, dtype=torch.int64)
        none = c.node[:, None][:, :0]
        place = c.position[c.sample] + c.depths[c.node]
        chosen = draw_row(*laws, row, none, none.float(), c.seeds[c.sample], place, c.node * 0, BONUS, True)
        return follow(chosen, c)
