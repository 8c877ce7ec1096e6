"""torchao's int8 weights. Importing transformers imports torchao where it is installed, seconds and messages: so it is
not in everyone's test environment, and `make test` gives it to these tests alone."""

from __future__ import annotations

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from transformers import PreTrainedModel

import specdec

pytestmark = pytest.mark.torchao


def _quantize(model: PreTrainedModel) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def test_weights_quantised_after_a_call(fresh: Tiny, prompts: Prompts) -> None:
    """Drafting for itself, a model takes two steps for twelve tokens."""
    model, asked = fresh("llama"), {**prompts(RAGGED), "max_new_tokens": 12}
    wrapped = wrap(model, model)
    plain = same(wrapped, model, **asked)
    _quantize(model)
    wrapped.specdec.stats.reset()
    assert not torch.equal(same(wrapped, model, **asked), plain)
    assert wrapped.specdec.stats.steps == 2
    steps = wrapped.specdec._decoders.get(wrapped.specdec.draft)
    same(wrapped, model, **asked)
    assert wrapped.specdec._decoders.get(wrapped.specdec.draft) is steps


@pytest.mark.slow
def test_compiled(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama", num_hidden_layers=1)
    _quantize(model)
    wrapped = specdec.compile(model, draft=None)
    same(wrapped, model, **prompts([6]), max_new_tokens=12)
    assert wrapped.specdec.stats.steps == 12
