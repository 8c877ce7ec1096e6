"""From a GenerationConfig's processors to the law tokens are drawn from.

On a CPU transformers' own warpers compute the law, so it is theirs to the last rounding. Where Triton runs, the usual
ones (temperature, top-k, top-p, min-p) become three numbers a row, and no row of the vocabulary is ever copied. Their
settings become tensors, so that a new value compiles no new step.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specdec.hf import names
from specdec.kernels.library import runs_triton
from specdec.kernels.sampling.row_law import row_law
from specdec.kernels.sampling.top_support import top_support
from specdec.verifiers.base import RowLaw

TemperatureLogitsWarper = names.processor("TemperatureLogitsWarper")
TopKLogitsWarper = names.processor("TopKLogitsWarper")
TopPLogitsWarper = names.processor("TopPLogitsWarper")
MinPLogitsWarper = names.processor("MinPLogitsWarper")
TypicalLogitsWarper = names.processor("TypicalLogitsWarper")

# Position-independent warpers, and the attribute that becomes a tensor. top_k stays a number: it is a shape.
_NUMBERS: dict[type, str | None] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: None,
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
    TypicalLogitsWarper: "mass",
}

# What a row's law can say without copying the row, in the order in which transformers applies it.
_CUTS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def is_of_a_row(processor: object) -> bool:
    """Whether a step can do what the processor does: it looks at nothing but a token's own logits."""
    return type(processor) in _NUMBERS


@dataclass(frozen=True)
class SamplingLaw:
    """What the next token's law is, given logits.

    Attributes:
        greedy: take the argmax.
        by_text: the law depends on the text, and is asked for on the host (see `specdec.hf.processors`); what is said
            here is what drafts are drawn from.
        warpers: transformers' warpers, in their order.
        key: equal for laws that share one compiled step.
        knobs: [3] float32, inverse temperature, top-p and min-p, if these and `top_k` say all that the warpers do.
        top_k: 0 for no limit.
    """

    greedy: bool
    warpers: tuple[LogitsProcessor, ...] = ()
    key: tuple[object, ...] = ()
    knobs: Tensor | None = None
    top_k: int = 0
    by_text: bool = False

    @classmethod
    @torch.inference_mode(False)  # whose tensors are of another kind, which compiled steps would not take
    def from_processors(
        cls, processors: LogitsProcessorList, do_sample: bool, device: torch.device, by_text: bool = False
    ) -> SamplingLaw:
        """The law of a `generate()` call; of processors that look at the text it knows nothing.

        Args:
            by_text: ask on the host even where no processor looks at the text, for its scores.
        """
        by_text |= not all(map(is_of_a_row, processors))
        processors = LogitsProcessorList(filter(is_of_a_row, processors))
        warpers: list[LogitsProcessor] = []
        key: list[object] = [do_sample, by_text]
        for processor in processors:
            warper, name = copy.copy(processor), _NUMBERS[type(processor)]
            if name is not None:  # float64: promotes and rounds as the Python number it stands for
                number = torch.tensor(float(getattr(processor, name)), dtype=torch.float64, device=device)
                setattr(warper, name, number)
            warpers.append(warper)
            key.append((type(warper), *(vars(warper).get(n) for n in ("top_k", "min_tokens_to_keep", "filter_value"))))
        knobs, top_k = _cuts(processors, device)
        return cls(not do_sample, tuple(warpers), (*key, knobs is None), knobs, top_k, by_text)

    def tensors(self) -> list[Tensor]:
        """The numbers of the law that are on the device, in an order that laws of one key share."""
        found = [getattr(w, name) for w in self.warpers if (name := _NUMBERS[type(w)]) is not None]
        return found if self.knobs is None else [*found, self.knobs]

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


def _cuts(processors: LogitsProcessorList, device: torch.device) -> tuple[Tensor | None, int]:
    """Knobs and top-k, if the warpers are cuts in transformers' order with nothing unusual about them."""
    types = [type(p) for p in processors]
    unusual = any(
        getattr(p, "min_tokens_to_keep", 1) != 1 or p.__dict__.get("filter_value", -math.inf) != -math.inf
        for p in processors
    )
    if types != [t for t in _CUTS if t in types] or unusual:
        return None, 0
    knobs, top_k = [1.0, 1.0, 0.0], 0
    for processor in processors:
        if isinstance(processor, TemperatureLogitsWarper):
            knobs[0] = 1 / processor.temperature
        elif isinstance(processor, TopKLogitsWarper):
            top_k = processor.top_k
        elif isinstance(processor, TopPLogitsWarper):
            knobs[1] = processor.top_p
        else:
            knobs[2] = processor.min_p
    return torch.tensor(knobs, device=device, dtype=torch.float32), top_k
