"""compile(): wrap a Hugging Face causal LM so that its `generate()` decodes speculatively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from specdec.arguments import DRAFTS
from specdec.config import Config
from specdec.drafters.adaptive import Adaptive
from specdec.drafters.early_exit import NAME as EARLY_EXIT
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.registry import ModelSource, check_draft
from specdec.drafters.vocabulary import ForeignDraft
from specdec.engine.roles import Drafter
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported, warn
from specdec.handle import Handle
from specdec.hf import names
from specdec.hf.load import load_draft, load_tokenizer
from specdec.hf.names import PreTrainedModel, PreTrainedTokenizerBase
from specdec.hf.wrap import unwrapped, with_replaced, within_adapters, wrap

AUTO = "auto"

if TYPE_CHECKING:

    class CompiledModel(PreTrainedModel):
        """What `compile` returns, for type checkers: a model of the user's own class, with a handle."""

        specdec: Handle


def compile(  # the name is the point: specdec.compile
    model: PreTrainedModel, draft: PreTrainedModel | Drafter | str | Sequence[PreTrainedModel | str] | None = AUTO, *,
    tokenizer: PreTrainedTokenizerBase | None = None, draft_tokenizer: PreTrainedTokenizerBase | None = None,
    depth: int | None = None, tree: TokenTree | None = None, verifier: str = "auto", adapt: bool | None = None,
    max_ngram: int = 3, remember: int = 0, stop_below: float | None = None, compile: bool = True,
    progress: bool = True, **unknown: Any,
) -> CompiledModel:  # fmt: skip
    """Wrap a causal LM: same class, same weights, same `generate()`, same output distribution, fewer steps.

        model = specdec.compile(model, draft="Qwen/Qwen3-0.6B")
        model.generate(**inputs, max_new_tokens=256)
        print(model.specdec.stats)

    Args:
        model: a decoder-only transformers model, or a PEFT model around one. It is not changed, and shares its weights
            with the result.
        draft: `"auto"`, what needs no second model: adaptive tokens, if there are some in the model's own folder, and
            n-grams; a smaller transformers model, or its folder or hub id, which is loaded in the target's dtype and on
            its device; `"early-exit:4"`, the model's own first 4 layers; `"adaptive"`, the adaptive tokens in its own
            folder, or another folder with some; `"ngram"`, which looks the text's last words up in the text (prompt
            lookup); one of these and n-grams, as `[draft, "ngram"]`: it drafts where the text has nothing to say; a
            `Drafter` of your own; or None, to decode without drafting.
        tokenizer: the model's, where the draft has another, or where one tokenizer's vocabulary is padded to different
            sizes. The draft then proposes the tokens that both have.
        draft_tokenizer: the draft's; the two go together. A draft given by its name brings its own.
        depth: tokens drafted a step, as a chain; None takes 5 for a draft model and 8 for n-grams.
        tree: a `TokenTree` that a draft model drafts instead of a chain: several candidates a place.
        verifier: how candidates are drawn and accepted when sampling, see `specdec.config.Config`.
        adapt: whether to draft less, or nothing, where that is faster. None does so where a seed's text does not
            depend on its drafts: greedily, with n-grams alone, and with `verifier="coupled"`.
        max_ngram: longest suffix that n-grams look up.
        remember: n-grams are also looked up in this many tokens of the texts decoded last, across calls, prompts and
            outputs, greedily, with n-grams alone, and with `verifier="coupled"`. They take about 400 bytes of host
            memory each.
        stop_below: end the chain of a draft model after the first token whose probability under the draft is less than
            this, which is above 0 and at most 1. The output law is the same; what it saves are verified tokens, and
            only in steps that adapt.
        compile: False runs every step eagerly, for debugging.
        progress: say on a terminal when something is compiled, and show how far a warm-up is.

    Returns:
        A model whose `specdec` attribute is its handle (`specdec.handle.Handle`): statistics, seeds, `warmup()`,
        `tune()`. Calls it cannot speed up run transformers' own loop, and warn once with the reason.

    Raises:
        TypeError: `model`, `draft`, a tokenizer or an option is none of the above, or an option is unknown.
        ValueError: the model is compiled already, draft and target do not fit together (vocabulary, device), one
            tokenizer is missing, a draft of that name cannot be loaded, or an option has a value that cannot be.
    """
    if unknown:
        raise TypeError(_unknown(next(iter(unknown))))
    config = Config(
        depth=depth, tree=tree, verifier=verifier, adapt=adapt, max_ngram=max_ngram, remember=remember,
        stop_below=stop_below, compile=compile, progress=progress,
    )  # fmt: skip
    if hasattr(model, "specdec") or hasattr(within_adapters(model), "specdec"):
        raise ValueError("this model is already compiled with specdec; compile the original instead")
    inner = within_adapters(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if isinstance(draft, str) and draft == AUTO:
        draft = _auto(inner, config)
    source = _source(inner, draft, tokenizer, draft_tokenizer)
    wrapped = _wrapped(inner, source, config)
    return with_replaced(model, inner, wrapped)


def _auto(target: PreTrainedModel, config: Config) -> Any:
    """What drafts without a second model."""
    try:
        if (own := Adaptive.beside(target)) is not None:
            own.check(config)
            return own, "ngram"
    except ValueError as why:
        warn(f"specdec leaves the model's adaptive tokens alone: {why}")
    return "ngram"


def _source(target: PreTrainedModel, draft: Any, tokenizer: Any, draft_tokenizer: Any) -> Any:
    """What drafts, loaded where it is a name, and with both tokenizers where these are given."""
    if isinstance(draft, list | tuple):
        models = [each for each in draft if each != "ngram"]
        given = (target, models[0], tokenizer, draft_tokenizer) if len(models) == 1 else None
        return tuple(_source(*given) if given and each is models[0] else each for each in draft)
    draft = unwrapped(draft)
    if isinstance(draft, str) and draft.partition(":")[0] == EARLY_EXIT:
        draft = EarlyExit.named(draft)
    if isinstance(draft, str) and draft != "ngram":
        draft = Adaptive.named(draft, target) or draft
    if isinstance(draft, str) and draft != "ngram":
        if get_close_matches(draft.lower().replace("-", "").replace("_", ""), ["ngram"], cutoff=0.8):
            raise ValueError(f"draft must be {DRAFTS}, got {draft!r}")
        if tokenizer is not None and draft_tokenizer is None:
            draft_tokenizer = load_tokenizer(draft)
        draft = load_draft(draft, target)
    if (tokenizer is None) != (draft_tokenizer is None):
        missing = "tokenizer" if tokenizer is None else "draft_tokenizer"
        raise ValueError(f"tokenizer and draft_tokenizer go together, and there is no {missing}")
    if tokenizer is None or isinstance(draft, EarlyExit | Adaptive):
        return draft
    return ForeignDraft(draft, tokenizer, draft_tokenizer)


def _wrapped(model: PreTrainedModel, source: Any, config: Config) -> Any:
    try:  # a release that lacks a loop would never ask, and so never say why nothing is decoded here
        names.check()
    except Unsupported as why:
        warn(f"specdec runs transformers' own loop: {why}")
    if "generate" in vars(model):
        warn("specdec leaves this model's calls alone: it has a generate() of its own, as custom_generate loads it")
    check_draft(source, model, config)
    if config.tree is not None and not isinstance(source, ModelSource | Adaptive):
        raise ValueError(
            f"tree={config.tree.parents} is what a draft model drafts, and the draft is {source!r}; "
            "n-grams are chains, and a Drafter brings its own"
        )
    if config.stop_below is not None and not isinstance(source, tuple | ModelSource | Adaptive):
        raise ValueError(f"stop_below={config.stop_below} ends a draft model's chain, and the draft is {source!r}")
    if config.remember and "ngram" not in (source if isinstance(source, tuple) else (source,)):
        raise ValueError(f"remember={config.remember} is for n-grams, and the draft is {source!r}")
    return wrap(Handle(model, source, config))


def _unknown(name: str) -> str:
    options = ["draft", "tokenizer", "draft_tokenizer", *(field.name for field in fields(Config))]
    near = get_close_matches(name, options, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"compile() has no option {name!r}{hint}; it has {', '.join(options)}"
