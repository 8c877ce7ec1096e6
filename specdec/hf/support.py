"""Whether specdec decodes with a model as it is now, to the tokens that its own forward gives; or why it does not."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from specdec.errors import Unsupported
from specdec.hf import names, wrap
from specdec.hf.proof import check_forward
from specdec.hf.view import learned_positions
from specdec.kernels.library import triton


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
    if (name := _foreign_method(model)) is not None:
        raise Unsupported(f"a model with a {name} of its own, which is called at each token in transformers' loop")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise Unsupported("weights on several devices", ", ".join(devices))
    if model.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"models on {model.device.type}")
    if model.device.type == "cuda" and triton is None:
        raise Unsupported("CUDA without Triton")
    if _ignores_softcap(model.config):
        raise Unsupported(f"{model.config._attn_implementation} attention, which ignores this model's softcap")
    if (own := _own_attention(model)) is not None:
        raise Unsupported("attention by a function that is not transformers' own", own)


def check_mode(model: PreTrainedModel) -> None:
    """Whether no module of it acts as in training. One put in later comes in training mode, and most have no other.

    Raises:
        Unsupported: one does, by its name.
    """
    kinds: set[Any] = {type(module) for module in model.modules() if module.training}
    if heeding := {kind for kind in kinds if _heeds_mode(kind)}:
        found = (name for name, module in model.named_modules() if module.training and type(module) in heeding)
        raise Unsupported("the model is in training mode", next(found))


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


@cache
def _methods_of_the_loop() -> tuple[str, ...]:
    """Methods of a model that transformers' sampling loop calls, and with what it is given: those that these call too,
    by looking at their code."""
    found: dict[str, None] = {}
    todo = ["get_compiled_call", "_prepare_cache_for_generation", "_assisted_decoding", "_sample"]
    while todo:
        name = todo.pop()
        method = inspect.unwrap(getattr(GenerationMixin, name, getattr(PreTrainedModel, name, None)) or len)
        if name not in found and isinstance(method, FunctionType):
            found[name] = None
            todo += [name for name in method.__code__.co_names if hasattr(GenerationMixin, name)]
    return tuple(sorted(found))


def _foreign_method(model: PreTrainedModel) -> str | None:
    """A method of transformers' loop that this model, or its class, has from elsewhere: it might choose another token,
    or stop, and nobody would call it here. Transformers' own families may have theirs, but no loop."""
    for name in _methods_of_the_loop():
        homes = [(kind.__module__, vars(kind)[name]) for kind in type(model).__mro__ if name in vars(kind)]
        home, method = next((home, method) for home, method in homes if method.__module__ != wrap.__name__)
        known = "transformers.generation." if name in ("_sample", "_assisted_decoding") else "transformers."
        is_known = home.startswith(known) and _is_transformers(method)
        if not is_known or (name in vars(model) and not _is_own_method(model, name)):
            return name
    return None


def _is_transformers(method: Any) -> bool:
    """Whether a method is transformers' own, and so is what is around it, but for torch's decorators and Python's."""
    homes = []
    while method is not None:
        function = getattr(method, "__func__", method)  # of a static method
        homes.append(getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0])
        method = getattr(function, "__wrapped__", None)
    return homes[-1] == "transformers" and {*homes} <= {"transformers", "torch", "contextlib", "functools"}


def _hook(model: PreTrainedModel) -> str | None:
    """The name of a hook that a forward of this model runs. Transformers' own act only where states are asked for."""
    modules = torch.nn.modules.module
    hooks = [*modules._global_forward_pre_hooks.values(), *modules._global_forward_hooks.values()]
    for module in model.modules():
        hooks += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    foreign = (hook for hook in hooks if not names.is_own_hook(hook))
    return next((getattr(hook, "__qualname__", type(hook).__qualname__) for hook in foreign), None)


def _ignores_softcap(config: Any) -> bool:
    """Whether the model's attention drops the softcap of its configuration, as some versions' sdpa does for Gemma 2."""
    attend = names.ATTENTION_FUNCTIONS.get(config._attn_implementation)  # None for "eager", the model's own
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    return has_softcap and attend is not None and "softcap" not in inspect.signature(attend).parameters


def _own_attention(model: PreTrainedModel) -> str | None:
    """The name of a function that makes masks or attends in this model, and is not transformers' own: what it does far
    away no short text shows, and in a view specdec's would take its place."""
    if not isinstance(sdpa := torch.nn.functional.scaled_dot_product_attention, BuiltinFunctionType):
        return getattr(sdpa, "__qualname__", type(sdpa).__qualname__)
    functions = (x.func if isinstance(x, partial) else x for x in _attention_functions(model))
    own = next((function for function in functions if not _is_transformers(function)), None)
    return None if own is None else getattr(own, "__qualname__", type(own).__qualname__)


def _attention_functions(model: PreTrainedModel) -> Iterator[Any]:
    """All that attends and makes masks by name, or is called for "eager", in the files that this model's classes are
    of: each may look names up in a table of its own."""
    modules = list(model.get_decoder().modules())
    files = [vars(sys.modules[name]) for name in {type(module).__module__ for module in modules} if name in sys.modules]
    configs = [module.config for module in modules if hasattr(module, "config")]
    for how in {getattr(config, "_attn_implementation", None) or "eager" for config in configs}:
        own = "eager_attention_forward"
        found = [
            file.get("ALL_ATTENTION_FUNCTIONS", names.ATTENTION_FUNCTIONS).get(how, file.get(own)) for file in files
        ]
        yield from (x for x in (*found, names.MASK_FUNCTIONS.get(how)) if x is not None)


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
