"""A target's first layers and its head as its own draft model, over the target's own cache.

Source: Elhoushi et al., "LayerSkip", arXiv 2404.16710, which also trains models for it; Zhang et al., "Draft & Verify",
arXiv 2309.08168. What the first layers computed of a draft is not handed on to the target: verifying a few tokens takes
as long as reading the weights does, and these layers have to be read for the draft's last token anyway.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from specdec.errors import Unsupported
from specdec.hf.twin import Look
from specdec.hf.view import ModelView, decoder_layers


def first_layers(model: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """The model with the first so many of its layers, 1 to all but one, and its own norm and head; the weights are
    shared.

    Raises:
        Unsupported: its layers are not one list, or it cannot be copied.
    """
    twin = Look(model).twin(model)
    layers = decoder_layers(twin)
    stack = [m for m in twin.modules() if isinstance(m, nn.ModuleList) and [*map(id, m)] == [*map(id, layers)]]
    if len(stack) != 1:
        raise Unsupported(f"models of type {model.config.model_type}, whose layers are not one list")
    del stack[0][n_layers:]
    config = twin.config.get_text_config(decoder=True)
    config.num_hidden_layers = n_layers
    if (kinds := getattr(config, "layer_types", None)) is not None:
        config.layer_types = list(kinds)[:n_layers]
    return twin


def early_exit(target: ModelView, n_layers: int) -> ModelView:
    """The first layers of a target, which write drafts to the target's cache, where it writes them again when it
    verifies them; texts, and accepted drafts, are there already.

    Raises:
        Unsupported: they cannot run raggedly by themselves, or not as the target does.
    """
    view = ModelView(first_layers(target.source, n_layers))  # proved over a cache of its own
    if view.cache.way is not target.cache.way:
        ways = f"{view.cache.way.value}; the whole model: {target.cache.way.value}"
        raise Unsupported("first layers that attend in another way than the whole model", ways)
    view.attach(target.cache)
    return view
