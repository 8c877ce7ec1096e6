"""From a GenerationConfig's processors to the law tokens are drawn from.

transformers' own warpers compute the law, so it is theirs to the last rounding. Their numbers (temperature, top-p,
...) become tensors, so that a new value does not compile a new step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Position-independent warpers, and the attribute that becomes a tensor. top_k stays a number: it is a shape.
_NUMBERS: dict[type, str | None] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: None,
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
    TypicalLogitsWarper: "mass",
}


@dataclass(frozen=True)
class SamplingLaw:
    """What the next token's law is, given logits.

    Attributes:
        greedy: take the argmax.
        warpers: transformers' warpers, in their order.
        key: equal for laws that share one compiled step.
    """

    greedy: bool
    warpers: tuple[LogitsProcessor, ...] = ()
    key: tuple[object, ...] = ()

    @classmethod
    def from_processors(cls, processors: LogitsProcessorList, do_sample: bool, device: torch.device) -> SamplingLaw:
        """The law of a `generate()` call.

        Raises:
            NotImplementedError: naming the processors that need more than a token's own logits.
        """
        unknown = sorted({type(p).__name__ for p in processors if type(p) not in _NUMBERS})
        if unknown:
            raise NotImplementedError(f"logits processors {', '.join(unknown)}")
        warpers: list[LogitsProcessor] = []
        key: list[object] = [do_sample]
        for processor in processors:
            warper, name = copy.copy(processor), _NUMBERS[type(processor)]
            if name is not None:  # float64: promotes and rounds as the Python number it stands for
                number = torch.tensor(float(getattr(processor, name)), dtype=torch.float64, device=device)
                setattr(warper, name, number)
            warpers.append(warper)
            key.append((type(warper), getattr(warper, "top_k", None), warper.__dict__.get("min_tokens_to_keep")))
        return cls(not do_sample, tuple(warpers), tuple(key))

    def scores(self, logits: Tensor) -> Tensor:
        """Warped float32 scores of logits [T, V]; -inf where a token is ruled out."""
        scores = logits.float()
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores

    def probs(self, logits: Tensor) -> Tensor:
        """The law [T, V], float32, of logits [T, V]."""
        return self.scores(logits).softmax(-1)
