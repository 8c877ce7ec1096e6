"""What drafts for an assisted `generate()` call, as its arguments say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specdec.arguments import whole
from specdec.config import Config
from specdec.drafters.vocabulary import ForeignDraft
from specdec.errors import Unsupported
from specdec.hf import names
from specdec.hf.adapters import unwrapped
from specdec.hf.names import PreTrainedModel

if TYPE_CHECKING:
    from specdec.handle import Handle


def draft_of_call(call: names.LoopCall, handle: Handle) -> tuple[PreTrainedModel | ForeignDraft | str, Config]:
    """The drafter named by the arguments of a `generate()` call, and the options that go with it."""
    generation_config, assistant_model = call.generation_config, unwrapped(call.assistant_model)
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
