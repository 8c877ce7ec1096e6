"""Whether specdec decodes with a model as it is now, to the tokens that its own forward gives; or why it does not."""

from __future__ import annotations

import inspect
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.errors import Unsupported
from specdec.hf import names
from specdec.kernels.library import triton
from specdec.proof import check_forward
from specdec.view import learned_positions


def check_model(model: PreTrainedModel) -> None:
    """Whether specdec decodes with this model as it is now, to the tokens that its own forward gives.

    Raises:
        Unsupported: with the reason.
    """
    names.check()
    check_forward(model)
    decoders_config = getattr(model.get_decoder(), "config", None)
    if decoders_config is not None and decoders_config is not model.config.get_text_config():
        raise Unsupported("a model given another config than its layers have")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise Unsupported("weights that accelerate's hooks move: offloaded, or spread over several devices")
    if has_own_forward(model):
        raise Unsupported("a model with a forward of its own, as assigning torch.compile(model.forward) gives it")
    if (hook := _hook(model)) is not None:
        raise Unsupported("a model with a forward hook, which would see drafts too", hook)
    if not _is_own_method(model, "prepare_inputs_for_generation"):
        raise Unsupported("a model given a prepare_inputs_for_generation of its own, as PEFT's prompt learning does")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise Unsupported("weights on several devices", ", ".join(devices))
    if model.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"models on {model.device.type}")
    if model.device.type == "cuda" and triton is None:
        raise Unsupported("CUDA without Triton")
    if _ignores_softcap(model.config):
        raise Unsupported(f"{model.config._attn_implementation} attention, which ignores this model's softcap")


def check_mode(model: PreTrainedModel) -> None:
    """Whether no module of it acts as in training. One put in later comes in training mode, and most have no other.

    Raises:
        Unsupported: one does, by its name.
    """
    kinds: set[Any] = {type(module) for module in model.modules() if module.training}
    if heeding := {kind for kind in kinds if _heeds_mode(kind)}:
        names = (name for name, module in model.named_modules() if module.training and type(module) in heeding)
        raise Unsupported("the model is in training mode", next(names))


@lru_cache(maxsize=1024)
def _heeds_mode(kind: Any) -> bool:
    """Whether something in a class of modules reads `training`, as in dropout."""
    methods = (m for base in kind.__mro__ if base is not nn.Module for m in vars(base).values() if callable(m))
    return any(_mentions(getattr(inspect.unwrap(m), "__code__", None), "training") for m in methods)


def _mentions(code: CodeType | None, name: str) -> bool:
    """Whether code, or a function in it, has this name of an attribute."""
    if code is None:
        return False
    within = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in (*code.co_names, *code.co_consts) or any(_mentions(part, name) for part in within)


def has_own_forward(model: PreTrainedModel) -> bool:
    """Whether a module has been given another forward than its class's: a copy of it would still run the original."""
    return any("forward" in vars(module) and not _is_own_method(module, "forward") for module in model.modules())


def _is_own_method(module: Any, name: str) -> bool:
    """Whether a method is the class's, also where it was put back after something had taken its place."""
    method = getattr(module, name)
    is_its = getattr(getattr(method, "__self__", None), "__dict__", None) is vars(module)  # also a wrapping of it
    return is_its and method.__func__ is getattr(type(module), name)


def _hook(model: PreTrainedModel) -> str | None:
    """The name of a hook that a forward of this model runs. Transformers' own act only where states are asked for."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not names.is_own_hook(hook):
                return getattr(hook, "__qualname__", type(hook).__qualname__)
    return None


def _ignores_softcap(config: Any) -> bool:
    """Whether the model's attention drops the softcap of its configuration, as some versions' sdpa does for Gemma 2."""
    attend = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)  # None for "eager", the model's own
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    return has_softcap and attend is not None and "softcap" not in inspect.signature(attend).parameters


def check_context(model: PreTrainedModel, longest: int) -> None:
    """Whether a text of `longest` tokens has positions, each by itself.

    Raises:
        Unsupported: with the reason.
    """
    config = model.config
    if (n_positions := learned_positions(config)) is not None and longest > n_positions:
        raise Unsupported(
            "a text longer than the model has positions", f"a text of {longest} tokens for {n_positions} positions"
        )
    if (rope := moving_rope(config)) is not None:
        raise Unsupported(f"{rope} rope, whose frequencies depend on the longest text of a forward")


def moving_rope(config: Any) -> str | None:
    """The rope type of a model whose frequencies depend on a forward's largest position, which a neighbour or a draft
    would change; None for all others."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}  # some: by layer type
    return next((kind for kind in ("dynamic", "longrope") if kind in kinds), None)
