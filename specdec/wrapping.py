"""Wrapping: a model as an object of a subclass whose decoding loops are ours."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any

from torch import nn

from specdec.arguments import whole
from specdec.config import Config
from specdec.drafters.registry import check_draft
from specdec.drafters.vocabulary import ForeignDraft
from specdec.errors import Unsupported
from specdec.handle import Handle
from specdec.hf import names
from specdec.hf.names import PreTrainedModel


def within_adapters(model: Any) -> Any:
    """The transformers model in a PEFT model, whose layers hold the adapters; any other model itself."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def plain(draft: Any) -> Any:
    """What drafts: the model in a PEFT model or in a wrapping of ours, or whatever else this is."""
    draft = within_adapters(draft)
    handle = getattr(draft, "specdec", None)
    return handle.model if isinstance(handle, Handle) else draft


def replaced(module: Any, old: nn.Module, new: nn.Module) -> Any:
    """A module with another one in place of one in it: a copy, as of all that hold it, and of nothing else."""
    if module is old:
        return new
    if old not in module.modules():
        return module
    twin = copy.copy(module)
    twin._modules = {name: replaced(child, old, new) for name, child in module._modules.items()}
    return twin


def wrapping(handle: Handle) -> PreTrainedModel:
    kind: Any = type(handle.model)
    return handle.attach(_subclass(kind))


@cache
def _subclass(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model class whose decoding loops are ours; `generate()` looks loops up on the class."""

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        parents_loop = partial(parent._sample, self, *args, **kwargs)
        try:
            names.check()
            call = names.LoopCall.read(parent._sample, self, *args, **kwargs)
        except Unsupported as why:
            return self.specdec.fall_back(why, parents_loop)
        return self.specdec.generate(parents_loop, call)

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        parents_loop = partial(parent._assisted_decoding, self, *args, **kwargs)
        try:
            names.check()
            call = names.LoopCall.read(parent._assisted_decoding, self, *args, **kwargs)
            draft, config = _draft_of_call(call, self.specdec)
            check_draft(draft, self.specdec.model, config)
        except (Unsupported, TypeError, ValueError) as error:
            why = error if isinstance(error, Unsupported) else Unsupported("a draft that does not fit", str(error))
            return self.specdec.fall_back(why, parents_loop)
        return self.specdec.generate(parents_loop, call, draft, config)

    def _beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.specdec.fall_back(Unsupported("beams"), partial(parent._beam_search, self, *args, **kwargs))

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        why = Unsupported("continuous batching")
        return self.specdec.fall_back(why, partial(parent.init_continuous_batching, self, *args, **kwargs))

    def counted(name: str) -> Any:
        method = getattr(parent, name)

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.specdec.count(partial(method, self, *args, **kwargs))

        return call

    def __reduce__(self: Any) -> Any:
        return wrapping, (self.specdec,)

    methods = {
        "_sample": _sample, "_assisted_decoding": _assisted_decoding, "_beam_search": _beam_search,
        "init_continuous_batching": init_continuous_batching, "__reduce__": __reduce__,
        **{name: counted(name) for name in ("generate", "generate_batch") if hasattr(parent, name)},
    }  # fmt: skip
    loaders = {"from_pretrained": parent.from_pretrained}  # what is loaded is nobody's wrapping yet
    slots = {"__slots__": ("specdec",)}  # what the model holds is the model's own
    labels = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    return type(parent.__name__, (parent,), {**slots, **methods, **loaders, **labels})


def _draft_of_call(call: names.LoopCall, handle: Handle) -> tuple[PreTrainedModel | ForeignDraft | str, Config]:
    """The drafter named by the arguments of a `generate()` call, and the options that go with it."""
    generation_config, assistant_model = call.generation_config, plain(call.assistant_model)
    for name in ("use_mtp", "speculation_type", "assistant_early_exit", "assistant_ensemble_weight"):
        if getattr(generation_config, name, None):
            raise Unsupported(name)
    if assistant_model is not None:
        given = call.tokenizer, call.assistant_tokenizer
        draft = assistant_model if given[1] is None else ForeignDraft(assistant_model, *given)
        return draft, _options_of_call(generation_config, assistant_model, handle)
    if generation_config.prompt_lookup_num_tokens is not None:
        depth = whole("prompt_lookup_num_tokens", generation_config.prompt_lookup_num_tokens)
        longest = whole("max_matching_ngram_size", generation_config.max_matching_ngram_size or 2)
        return "ngram", replace(handle.config, depth=depth, max_ngram=longest, tree=None)
    raise Unsupported("assisted generation without an assistant model or prompt lookup")


def _options_of_call(generation_config: Any, assistant_model: Any, handle: Handle) -> Config:
    """The handle's options, with what a call says of how much is drafted, or else the assistant's own configuration,
    where transformers looks for it. What transformers fills in by itself is nobody's wish."""
    options, own = handle.config, getattr(assistant_model, "generation_config", None)

    def asked(name: str) -> Any:
        of_call = names.asked(generation_config, name)
        return getattr(own, name, None) if of_call is None else of_call

    if (depth := asked("num_assistant_tokens")) is not None:
        options = replace(options, depth=whole("num_assistant_tokens", depth), tree=None)
    schedule = asked("num_assistant_tokens_schedule")
    if schedule == "constant":
        options = replace(options, adapt=False)
    elif schedule in ("heuristic", "heuristic_transient"):
        options = replace(options, adapt=options.adapt or None)
    elif schedule is not None:
        handle.ignore(f"num_assistant_tokens_schedule={schedule!r}")
    if asked("assistant_confidence_threshold"):
        handle.ignore("assistant_confidence_threshold")
    return options
