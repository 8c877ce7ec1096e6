"""Models within what is given for one: in a PEFT model, or in a wrapping of ours."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def within_adapters(model: Any) -> Any:
    """The transformers model in a PEFT model, whose layers hold the adapters; any other model itself."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def unwrapped(draft: Any) -> Any:
    """What drafts: the model in a PEFT model or in a wrapping of ours, or whatever else this is."""
    draft = within_adapters(draft)
    return getattr(getattr(draft, "specdec", None), "model", draft)


def replaced(module: Any, old: nn.Module, new: nn.Module) -> Any:
    """A module with another one in place of one in it: a copy, as of all that hold it, and of nothing else."""
    if module is old:
        return new
    if old not in module.modules():
        return module
    twin = copy.copy(module)
    twin._modules = {name: replaced(child, old, new) for name, child in module._modules.items()}
    return twin
