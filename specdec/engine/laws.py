"""The laws that tokens are drawn from: what a step makes of a row of logits.

Where Triton runs, the usual ones (temperature, top-k, top-p, min-p) are three numbers a row, and no row of the
vocabulary is ever copied. All others, and on a CPU all, are what warpers compute. Their settings are tensors, so that a
new value compiles no new step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.library import runs_triton
from specdec.kernels.sampling.best_token import best_token
from specdec.kernels.sampling.row_law import row_law
from specdec.kernels.sampling.top_support import top_support
from specdec.verifiers.base import RowLaw

Warper = Callable[[None, Tensor], Tensor]
"""From nothing, in a text's place, and scores [T, V] float32 to scores [T, V], which look at nothing but their row."""


@dataclass(frozen=True)
class SamplingLaw:
    """What the next token's law is, given logits.

    Attributes:
        greedy: take the argmax.
        by_text: the law depends on the text, and is asked for on the host; what is said here is what drafts are drawn
            from.
        warpers: in their order. Objects, not closures: a copy of a law has tensors of its own.
        key: equal for laws that share one compiled step. numbers: the tensors that the warpers hold.
        knobs: [3] float32, inverse temperature, top-p and min-p, if these and `top_k` say all that the warpers do.
        top_k: 0 for no limit.
    """

    greedy: bool
    warpers: tuple[Warper, ...] = ()
    key: tuple[object, ...] = ()
    numbers: tuple[Tensor, ...] = ()
    knobs: Tensor | None = None
    top_k: int = 0
    by_text: bool = False

    def tensors(self) -> list[Tensor]:
        """The numbers of the law that are on the device, in an order that laws of one key share."""
        return [*self.numbers, *([] if self.knobs is None else [self.knobs])]

    def choose(self, logits: Tensor) -> Tensor:
        """The greedy choice after each of the logits [T, V]: [T] int64."""
        return best_token(logits)

    def scores(self, logits: Tensor) -> Tensor:
        """Warped float32 scores of logits [T, V]; -inf where a token is ruled out."""
        scores = logits.float()
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores

    def rows(self, logits: Tensor) -> RowLaw:
        """The law of logits [T, V]."""
        if self.knobs is not None and runs_triton(logits):
            return RowLaw(logits, self.knobs, *row_law(logits, self.knobs, self.top_k))
        scores = self.scores(logits)
        best = scores.amax(-1, keepdim=True)  # taken off: at low temperatures its last digits are worth a probability
        scores = scores - torch.where(best.isfinite(), best, 0)
        log_total = scores.logsumexp(-1)
        first = torch.zeros_like(log_total, dtype=torch.int64)
        return RowLaw(scores, _neutral(logits.device), log_total, torch.full_like(log_total, -math.inf), first)

    def support(self, logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The `size` most probable ids of logits [R, V] and their law: [R, size] int64 and float32."""
        size = min(size, logits.shape[-1])
        if self.knobs is not None:
            return top_support(logits, self.knobs, self.top_k, size)
        return top_support(self.scores(logits), _neutral(logits.device), 0, size)


def _neutral(device: torch.device) -> Tensor:
    """Knobs that change nothing."""
    knobs = torch.ones(3, device=device, dtype=torch.float32)
    knobs[2:] = 0  # a fill; an index would copy a number from the host
    return knobs
