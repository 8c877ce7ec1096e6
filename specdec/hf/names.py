"""What transformers calls things: the one place that knows, by looking, never by version.

Releases rename: 5.24 took `past_key_values` for `cache` in every forward, argument and output, and models loaded from
the hub with code of their own keep the old name. So a forward is asked what it takes, an output what it has, and a
class that is not there leaves a stand-in that nothing is an instance of. `missing()` says what could not be found;
without that no call is decoded here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import import_module
from typing import Any

import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from specdec.errors import Unsupported

TESTED = "5.17.0", "5.24.0"
"""The oldest and the newest release that the tests have passed with."""
CACHE_NAMES = "cache", "past_key_values"
"""What the keys and values of earlier tokens are called, by arguments and in outputs; newest first."""

_MISSING: list[str] = []


def _class(path: str, *, optional: bool = False) -> Any:
    """A class by its full name; where there is none, one without instances."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        if not optional:
            _MISSING.append(path)
        return type(name, (), {})


Cache = _class("transformers.cache_utils.Cache")
DynamicCache = _class("transformers.cache_utils.DynamicCache")
DynamicLayer = _class("transformers.cache_utils.DynamicLayer")
DynamicSlidingWindowLayer = _class("transformers.cache_utils.DynamicSlidingWindowLayer")
AttentionInterface = _class("transformers.AttentionInterface")
AttentionMaskInterface = _class("transformers.AttentionMaskInterface")
ATTENTION_FUNCTIONS = _class("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")
MASK_FUNCTIONS = _class("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS")
DecoderLayer = _class("transformers.modeling_layers.GradientCheckpointingLayer")
Conv1D = _class("transformers.pytorch_utils.Conv1D", optional=True)
DecoderOnlyOutput = _class("transformers.generation.GenerateDecoderOnlyOutput")
EosTokenCriteria = _class("transformers.generation.stopping_criteria.EosTokenCriteria")
MaxLengthCriteria = _class("transformers.generation.stopping_criteria.MaxLengthCriteria")
MaxTimeCriteria = _class("transformers.generation.stopping_criteria.MaxTimeCriteria")
StopStringCriteria = _class("transformers.generation.stopping_criteria.StopStringCriteria")
PROCESSORS_MODULE = "transformers.generation.logits_process"


@cache
def processor(name: str) -> Any:
    """A class of logits processors. One that is gone is nobody's: what took its place is not known, and runs
    transformers' own loop by its name."""
    return _class(f"{PROCESSORS_MODULE}.{name}", optional=True)


@dataclass(frozen=True)
class LoopCall:
    """What transformers' `generate()` calls a decoding loop with. Fields are named as the loops' arguments are.

    Attributes:
        self: the model. model_kwargs: what is for its forward.
    """

    self: PreTrainedModel
    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    synced_gpus: bool
    model_kwargs: dict[str, Any]
    streamer: Any = None
    inputs_tensor: Tensor | None = None
    assistant_model: PreTrainedModel | None = None
    assistant_tokenizer: PreTrainedTokenizerBase | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def read(cls, loop: Callable[..., Any], *args: Any, **kwargs: Any) -> LoopCall:
        """The call `loop(*args, **kwargs)`.

        Raises:
            Unsupported: the loop has been given something that is not known here.
        """
        signature = inspect.signature(loop)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        unknown = bound.arguments.keys() - {field.name for field in fields(cls)}
        given = [name for name in sorted(unknown) if bound.arguments[name] is not signature.parameters[name].default]
        if given:
            raise Unsupported(f"an argument of {loop.__name__} that is not known, {', '.join(given)}", hint())
        return cls(**{name: value for name, value in bound.arguments.items() if name not in unknown})


_READ = {field.name for field in fields(LoopCall) if field.default is MISSING}
_LOOPS = {
    "_sample": _READ | {"streamer"},
    "_assisted_decoding": _READ | {"streamer", "assistant_model", "assistant_tokenizer", "tokenizer"},
    "_beam_search": _READ,
}
"""The decoding loops that a wrapped model overrides, and what of their arguments is needed."""


@cache
def missing() -> tuple[str, ...]:
    """What specdec needs of transformers and does not find, by its name there; empty with every release tested."""
    found = list(_MISSING)
    for loop, wanted in _LOOPS.items():
        there = _parameters(getattr(GenerationMixin, loop, None))
        if not there:
            found.append(f"GenerationMixin.{loop}")
        found += [f"GenerationMixin.{loop}({name}=...)" for name in sorted(wanted - there.keys()) if there]
    for path, names in (
        (AttentionInterface, ("register",)),
        (AttentionMaskInterface, ("register",)),
        (Cache, ("update", "get_seq_length", "get_mask_sizes")),
        (PreTrainedModel, ("get_decoder", "get_input_embeddings")),
        (PreTrainedConfig, ("get_text_config",)),
    ):
        found += [f"{path.__name__}.{name}" for name in names if not callable(getattr(path, name, None))]
    if output_name() is None:
        found.append(f"{DecoderOnlyOutput.__name__}({CACHE_NAMES[0]}=...)")
    return tuple(found)


def check() -> None:
    """Whether all that is needed is there.

    Raises:
        Unsupported: it is not, and what to install.
    """
    if absent := missing():
        raise Unsupported(f"transformers {transformers.__version__} has no {', '.join(absent)}", hint())


def hint() -> str:
    """What to say of a release that nobody has tested; nothing of one that was."""
    oldest, newest = TESTED
    if _numbers(oldest) <= _numbers(transformers.__version__) <= _numbers(newest):
        return ""
    return (
        f"transformers {transformers.__version__} is outside of what is tested, {oldest} to {newest}; "
        f"pip install 'transformers>={oldest},<={newest}'"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters if callable(function) else {}


@cache
def _cache_argument(forward: Any) -> str | None:
    parameters = _parameters(forward)
    named = next((name for name in CACHE_NAMES if name in parameters), None)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return named or (output_name() if takes_any else None)


def cache_argument(module: Any) -> str:
    """How this module's forward wants to be given a cache: by its own signature, or where it passes on whatever it is
    given, as transformers' generate() would.

    Raises:
        Unsupported: it takes none.
    """
    name = _cache_argument(type(module).forward)
    if name is None:
        raise Unsupported(f"models of class {type(module).__name__}, whose forward takes no cache")
    return name


def output_name() -> str | None:
    """What transformers' `generate()` calls the cache, as an argument and in what it returns."""
    there = (
        {field.name for field in fields(DecoderOnlyOutput)}
        if hasattr(DecoderOnlyOutput, "__dataclass_fields__")
        else ()
    )
    return next((name for name in CACHE_NAMES if name in there), None)


def cache_in(named: Any) -> Any:
    """The cache among arguments, or in the output of a forward; None without one."""
    given = (named.get(name) if isinstance(named, Mapping) else getattr(named, name, None) for name in CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)


def output(sequences: Any, past: Any, **kept: Any) -> Any:
    """What `generate()` returns with `return_dict_in_generate`."""
    return DecoderOnlyOutput(sequences=sequences, **{output_name() or CACHE_NAMES[0]: past}, **kept)


def pad_token(generation_config: Any) -> int:
    """What rows are filled up with after their ends, as transformers' loop has prepared it; 0 where nothing is said.

    Raises:
        Unsupported: transformers keeps it elsewhere.
    """
    if not hasattr(generation_config, "_pad_token_tensor"):
        absent = "GenerationConfig._pad_token_tensor"
        raise Unsupported(f"transformers {transformers.__version__} has no {absent}", hint())
    pad = generation_config._pad_token_tensor
    return 0 if pad is None else int(pad)


def asked(generation_config: Any, name: str) -> Any:
    """What a call's configuration says of a setting; None where it is what transformers fills in by itself."""
    value = getattr(generation_config, name, None)
    return None if value == _defaults().get(name) else value


@cache
def _defaults() -> dict[str, Any]:
    fill_in = getattr(GenerationConfig(), "_get_default_generation_params", dict)
    return fill_in()


NOT_OF_FORWARDS = {
    "generation_config", "_previous_max_cache_length", "_cached_continuous_batching_manager",
    "_compiled_call", "_last_compile_config",
}  # fmt: skip
"""Attributes of a model that `generate()` alone reads and writes."""

# What `generate()` may hand to the decoding loop without changing what a ragged forward has to do.
PLAIN_ARGUMENTS = {
    "attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", "tokenizer", *CACHE_NAMES,
}  # fmt: skip


def is_own_hook(hook: Any) -> bool:
    """Whether a forward hook is transformers' own, which acts only where inner states are asked for."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
