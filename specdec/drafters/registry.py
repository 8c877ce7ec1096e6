"""Drafters from what users give: a model, a name, a drafter of their own, or None."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from specdec.arguments import DRAFTS
from specdec.config import Config
from specdec.drafters.adaptive import Adaptive
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.lookup import LookUp
from specdec.drafters.mixed import MixedDrafter
from specdec.drafters.model import SUPPORT_SIZE, ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.vocabulary import ForeignDraft, Overlap
from specdec.engine.roles import Drafter
from specdec.engine.tree import TokenTree
from specdec.hf.call import Assistance
from specdec.hf.early_exit import early_exit
from specdec.hf.names import PreTrainedModel
from specdec.hf.support import has_own_forward, moving_rope
from specdec.hf.view import ModelView
from specdec.verifiers import VERIFIERS

ModelSource: TypeAlias = PreTrainedModel | ForeignDraft | EarlyExit
"""A model that drafts."""
DraftSource: TypeAlias = ModelSource | Adaptive | Drafter | str | tuple[Any, ...] | None

MODEL_DEPTH, NGRAM_DEPTH = 5, 8
"""Tokens drafted a step, unless the user says how many."""


def draft_model(draft: DraftSource, target: PreTrainedModel) -> PreTrainedModel | None:
    """The model that drafts, if one does, alone.

    Raises:
        Unsupported: it cannot be made of the target.
    """
    if isinstance(draft, EarlyExit):
        return draft.model(target)
    draft = draft.model if isinstance(draft, ForeignDraft) else draft
    return draft if isinstance(draft, PreTrainedModel) else None


def named_draft(assistance: Assistance) -> DraftSource:
    """What drafts for a call that names it."""
    if assistance.early_exit is not None:
        return EarlyExit(assistance.early_exit)
    if assistance.model is None:
        return "ngram"
    return ForeignDraft(assistance.model, *assistance.tokenizers) if assistance.tokenizers else assistance.model


def check_draft(draft: Any, target: PreTrainedModel, config: Config) -> None:
    """Whether this can draft for a target.

    Raises:
        TypeError: it is none of what a draft can be. ValueError: draft, target and options do not fit together.
    """
    if isinstance(draft, tuple):
        by_model = _beside_ngrams(draft)
        if config.tree is not None:
            raise ValueError(
                f"tree={config.tree.parents} is what a draft model drafts alone; with n-grams it drafts a chain"
            )
        check_draft(by_model, target, config)
        return
    if isinstance(draft, Adaptive):
        draft.check(config)
    elif isinstance(draft, ModelSource):
        _check_model(draft, target, config)
    elif isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(f"draft must be {DRAFTS}, got {draft!r}")
    elif draft is not None and (isinstance(draft, type) or not callable(getattr(draft, "draft", None))):
        raise TypeError(f"draft must be {DRAFTS}, got {type(draft).__name__}")


def _check_model(draft: ModelSource, target: PreTrainedModel, config: Config) -> None:
    """The same of a model that drafts."""
    if config.tree is not None and (widest := max(config.tree.n_children)) > SUPPORT_SIZE:
        raise ValueError(f"tree has a node with {widest} children; a draft model drafts {SUPPORT_SIZE} at most")
    if isinstance(draft, EarlyExit):
        draft.check(target)
        return
    if isinstance(draft, ForeignDraft):
        draft.overlap(target)
        draft = draft.model
    else:
        ours, theirs = (m.config.get_text_config().vocab_size for m in (target, draft))
        if ours != theirs:
            raise ValueError(
                f"draft vocabulary {theirs} does not match target vocabulary {ours}; given both tokenizers, "
                "compile(model, draft, tokenizer=..., draft_tokenizer=...), it drafts the tokens that both have"
            )
    if draft.device != target.device:
        raise ValueError(f"draft is on {draft.device}, target is on {target.device}")
    if has_own_forward(draft):
        raise ValueError("the draft has a forward of its own; give specdec the model as it was loaded")
    if not isinstance(draft.get_input_embeddings(), torch.nn.Embedding):
        raise ValueError(
            "the draft's embeddings were replaced, as transformers' loop does when it samples with two "
            "tokenizers; give specdec the model as it was loaded"
        )
    if (rope := moving_rope(draft.config)) is not None:
        raise ValueError(f"drafts with {rope} rope are not supported")


def _beside_ngrams(draft: tuple[Any, ...]) -> ModelSource | Adaptive:
    """What drafts beside n-grams.

    Raises:
        ValueError: they are something else.
    """
    models = [source for source in draft if isinstance(source, ModelSource | Adaptive)]
    if len(draft) != 2 or len(models) != 1 or "ngram" not in [each for each in draft if isinstance(each, str)]:
        given = ", ".join(repr(each) if isinstance(each, str) else type(each).__name__ for each in draft)
        raise ValueError(f'several drafts are a model and "ngram", got [{given}]')
    return models[0]


def make_drafter(draft: DraftSource, target: ModelView, config: Config) -> Drafter:
    """The drafter that the user means, for a target.

    Raises:
        Unsupported: the draft model cannot run raggedly.
    """
    depth = config.depth
    if draft is None:
        return NoDrafter()
    verifier, look_up = VERIFIERS[config.verifier], None
    if isinstance(draft, tuple):
        draft = _beside_ngrams(draft)
        look_up = LookUp(depth or NGRAM_DEPTH, config.max_ngram, config.remember)
    if isinstance(draft, Adaptive):
        return draft.drafter(target, config, verifier, look_up)
    if isinstance(draft, ModelSource):
        view, overlap = _viewed(draft, target)
        options: dict[str, Any] = {"stop_below": config.stop_below, "shares_cache": view.cache is target.cache}
        if look_up is not None:
            return MixedDrafter(view, depth or MODEL_DEPTH, look_up, verifier, overlap, **options)
        return ModelDrafter(view, config.tree or TokenTree.chain(depth or MODEL_DEPTH), verifier, overlap, **options)
    if isinstance(draft, str):
        return NgramDrafter(depth or NGRAM_DEPTH, config.max_ngram, config.remember)
    return draft


def _viewed(draft: ModelSource, target: ModelView) -> tuple[ModelView, Overlap | None]:
    """A draft model as it is run, and what its vocabulary and the target's share, where they differ."""
    if isinstance(draft, EarlyExit):
        return early_exit(target, draft.n_layers), None
    if isinstance(draft, ForeignDraft):
        return ModelView(draft.model), draft.overlap(target.source)
    return ModelView(draft), None
