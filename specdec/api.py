"""compile(): wrap a Hugging Face causal LM so that its `generate()` decodes speculatively."""

from __future__ import annotations

from typing import Any

from specdec.config import Config
from specdec.drafters.registry import check_draft, draft_model
from specdec.drafters.vocabulary import ForeignDraft
from specdec.engine.roles import Drafter
from specdec.errors import Unsupported, warn
from specdec.handle import Handle
from specdec.hf import names
from specdec.hf.names import PreTrainedModel, PreTrainedTokenizerBase
from specdec.hf.wrap import unwrapped, with_replaced, within_adapters, wrap


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
        tokenizer: the model's, where the draft has another, or where one tokenizer's vocabulary is padded to different
            sizes. The draft then proposes the tokens that both have.
        draft_tokenizer: the draft's; the two go together.
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
    draft = unwrapped(draft)
    if isinstance(inner := within_adapters(model), PreTrainedModel) and inner is not model:
        return with_replaced(
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
    if "generate" in vars(model):
        warn("specdec leaves this model's calls alone: it has a generate() of its own, as custom_generate loads it")
    source: Any = draft if tokenizer is None else ForeignDraft(draft, tokenizer, draft_tokenizer)
    config = Config(**options)
    check_draft(source, model, config)
    if config.tree is not None and draft_model(source) is None:
        raise ValueError(
            f"tree={config.tree.parents} is what a draft model drafts, and the draft is {draft!r}; n-grams are chains, "
            "and a Drafter brings its own"
        )
    return wrap(Handle(model, source, config))
