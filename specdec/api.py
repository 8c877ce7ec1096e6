"""compile(): wrap a Hugging Face causal LM so that its `generate()` decodes speculatively."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.config import Config
from specdec.drafters.base import Drafter
from specdec.drafters.make import check_draft
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.vocabulary import ForeignDraft
from specdec.errors import Unsupported, warn
from specdec.handle import Handle
from specdec.hf import names


def compile(  # the name is the point: specdec.compile
    model: PreTrainedModel, draft: PreTrainedModel | Drafter | str | None = None, *,
    tokenizer: PreTrainedTokenizerBase | None = None, draft_tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> PreTrainedModel:  # fmt: skip
    """Wrap a causal LM: same class, same weights, same `generate()`, same output law, fewer steps.

    Args:
        model: a decoder-only transformers model, or a PEFT model around one. It is not changed, and shares its weights
            with the result.
        draft: a smaller transformers model, `"ngram"` (look the text's last words up in the text), a `Drafter`, or None
            to decode without drafting.
        tokenizer, draft_tokenizer: the model's and the draft's, where these differ, or pad one tokenizer's vocabulary
            to different sizes. The draft then proposes the tokens that both have.
        options: fields of `specdec.config.Config`.

    Returns:
        A model whose `specdec` attribute holds the statistics, the seeds, `warmup()` and `tune()`. Calls it cannot
        speed up run transformers' own loop and warn once with the reason.

    Raises:
        TypeError: `model`, `draft` or a tokenizer is none of the above, or an option is unknown.
        ValueError: the model is compiled already, draft and target do not fit together (vocabulary, device), or one
            tokenizer is missing.
    """
    if hasattr(model, "specdec"):
        raise ValueError("this model is already compiled with specdec; compile the original instead")
    draft = _within_adapters(draft)
    if isinstance(inner := _within_adapters(model), PreTrainedModel) and inner is not model:
        return _replaced(
            model, inner, compile(inner, draft, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, **options)
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if (tokenizer is None) != (draft_tokenizer is None):
        missing = "tokenizer" if tokenizer is None else "draft_tokenizer"
        raise ValueError(f"tokenizer and draft_tokenizer go together, and there is no {missing}")
    try:  # a release that lacks a loop would never ask, and so never say why nothing is decoded here
        names.check()
    except Unsupported as why:
        warn(f"specdec runs transformers' own loop: {why}")
    source: Any = draft if tokenizer is None else ForeignDraft(draft, tokenizer, draft_tokenizer)
    return Handle(model, source, Config(**options)).attach(_subclass(type(model)))  # type: ignore[arg-type]


def _within_adapters(model: Any) -> Any:
    """The transformers model in a PEFT model, whose layers hold the adapters; any other model itself."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def _replaced(module: Any, old: nn.Module, new: nn.Module) -> Any:
    """A module with another one in place of one in it: a copy, as of all that hold it, and of nothing else."""
    if module is old:
        return new
    if old not in module.modules():
        return module
    twin = copy.copy(module)
    twin._modules = {name: _replaced(child, old, new) for name, child in module._modules.items()}
    return twin


def _restore(model: PreTrainedModel, draft: Any, config: Config) -> PreTrainedModel:
    return compile(model, draft, **vars(config))


@cache
def _subclass(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model class whose decoding loops are ours; `generate()` looks loops up on the class."""

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        parents_loop = partial(parent._sample, self, *args, **kwargs)
        try:
            names.check()
            call = names.LoopCall.read(parent._sample, self, *args, **kwargs)
        except Unsupported as why:
            return self.specdec._fall_back(why, parents_loop)
        return self.specdec.generate(parents_loop, call)

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        parents_loop = partial(parent._assisted_decoding, self, *args, **kwargs)
        try:
            names.check()
            call = names.LoopCall.read(parent._assisted_decoding, self, *args, **kwargs)
            draft = _draft_of_call(call)
            check_draft(draft, self.specdec._model, self.specdec.config)
        except (Unsupported, TypeError, ValueError) as error:
            why = error if isinstance(error, Unsupported) else Unsupported(str(error))
            return self.specdec._fall_back(why, parents_loop)
        return self.specdec.generate(parents_loop, call, draft)

    def _beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.specdec._fall_back(Unsupported("beams"), partial(parent._beam_search, self, *args, **kwargs))

    def __reduce__(self: Any) -> Any:
        plain = object.__new__(parent)
        plain.__dict__ = {name: value for name, value in self.__dict__.items() if name != "specdec"}
        return _restore, (plain, self.specdec._draft, self.specdec.config)

    methods = {
        "_sample": _sample, "_assisted_decoding": _assisted_decoding, "_beam_search": _beam_search,
        "__reduce__": __reduce__,
    }  # fmt: skip
    loaders = {"from_pretrained": parent.from_pretrained}  # what is loaded is nobody's wrapping yet
    labels = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    return type(parent.__name__, (parent,), {**methods, **loaders, **labels})


@cache
def _ngrams(depth: int, max_ngram: int) -> NgramDrafter:
    return NgramDrafter(depth, max_ngram)


def _draft_of_call(call: names.LoopCall) -> PreTrainedModel | ForeignDraft | Drafter:
    """The drafter named by the arguments of a `generate()` call."""
    generation_config, assistant_model = call.generation_config, _within_adapters(call.assistant_model)
    for name in ("use_mtp", "speculation_type", "assistant_early_exit", "assistant_ensemble_weight"):
        if getattr(generation_config, name, None):
            raise Unsupported(name)
    if assistant_model is not None and call.assistant_tokenizer is not None:
        return ForeignDraft(assistant_model, call.tokenizer, call.assistant_tokenizer)
    if assistant_model is not None:
        return assistant_model
    if generation_config.prompt_lookup_num_tokens is not None:
        return _ngrams(generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size or 2)
    raise Unsupported("assisted generation without an assistant model or prompt lookup")
