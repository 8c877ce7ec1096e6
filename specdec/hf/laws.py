"""From a GenerationConfig's processors to the law tokens are drawn from.

The warpers stay transformers' own, so on a CPU the law is theirs to the last rounding.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specdec.engine.laws import SamplingLaw
from specdec.hf import names

TemperatureLogitsWarper = names.processor("TemperatureLogitsWarper")
TopKLogitsWarper = names.processor("TopKLogitsWarper")
TopPLogitsWarper = names.processor("TopPLogitsWarper")
MinPLogitsWarper = names.processor("MinPLogitsWarper")
TypicalLogitsWarper = names.processor("TypicalLogitsWarper")

# Position-independent warpers, and the attribute that becomes a tensor. top_k stays a number: it is a shape.
NUMBERS: dict[type, str | None] = {
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
    return type(processor) in NUMBERS


@torch.inference_mode(False)  # whose tensors are of another kind, which compiled steps would not take
def law_of(
    processors: LogitsProcessorList, do_sample: bool, device: torch.device, by_text: bool = False
) -> SamplingLaw:
    """The law of a `generate()` call; of processors that look at the text it knows nothing.

    Args:
        by_text: ask on the host even where no processor looks at the text, for its scores.
    """
    by_text |= not all(map(is_of_a_row, processors))
    processors = LogitsProcessorList(filter(is_of_a_row, processors))
    warpers: list[LogitsProcessor] = []
    numbers: list[Tensor] = []
    key: list[object] = [do_sample, by_text]
    for processor in processors:
        warper, name = copy.copy(processor), NUMBERS[type(processor)]
        if name is not None:  # float64: promotes and rounds as the Python number it stands for
            numbers.append(torch.tensor(float(getattr(processor, name)), dtype=torch.float64, device=device))
            setattr(warper, name, numbers[-1])
        warpers.append(warper)
        key.append((type(warper), *(vars(warper).get(n) for n in ("top_k", "min_tokens_to_keep", "filter_value"))))
    knobs, top_k = _cuts(processors, device)
    key.append(knobs is None)
    return SamplingLaw(not do_sample, tuple(warpers), tuple(key), tuple(numbers), knobs, top_k, by_text)


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
