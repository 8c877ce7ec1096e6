"""A model and its wrapping, which must generate the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import specdec
from specdec.hf import names
from specdec.hf.adaptive import AdaptiveTokens

Tiny = Callable[..., PreTrainedModel]
Prompts = Callable[..., dict[str, Tensor]]
RAGGED = [9, 2, 1, 6]
PAST = names.output_name()
"""What this transformers calls a cache that is handed to `generate()` and back."""


def wrap(model: PreTrainedModel, draft: Any = "ngram", **options: Any) -> PreTrainedModel:
    """As `specdec.compile` does, but eager, and drafting the whole tree whatever it costs."""
    return specdec.compile(model, draft=draft, compile=False, **{"adapt": False, **options})


def same(wrapped: PreTrainedModel, model: PreTrainedModel, **arguments: Any) -> Tensor:
    """Both generate the same, the wrapped one without falling back."""
    expected = model.generate(**arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(**arguments)
    assert torch.equal(out, expected)
    return out


def tokens_of(model: PreTrainedModel, n_slots: int = 4, std: float = 0.3) -> AdaptiveTokens:
    """Adaptive tokens that say something of their own."""
    tokens = AdaptiveTokens.new(model, n_slots, rank=4)
    for weight in tokens.parameters():
        nn.init.normal_(weight, std=std, generator=torch.Generator().manual_seed(weight.numel()))
    return tokens
