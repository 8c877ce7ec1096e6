"""What a model makes of a text by itself: random texts, each with a small tree behind it, node by node over the cache
that `generate()` would fill."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported
from specdec.hf import names

TREE = TokenTree((-1, 0, 0, 1))
PATHS = (0, 1, 3), (0, 2)


@dataclass(frozen=True)
class Plain:
    """What the user's model makes of texts, each a prompt and the tree's tokens, [length + N] int64: the shapes of its
    layers' caches, `(G, D, Dv)` each, how many tokens each of them keeps, 0 for all, and the logits [B * N, V] of all
    nodes."""

    texts: list[Tensor]
    shapes: list[tuple[int, int, int]]
    kept: list[int]
    logits: Tensor


def family_of(model: PreTrainedModel) -> str:
    return f"models of type {model.config.model_type}"


@torch.no_grad()
def draw_texts(model: PreTrainedModel, lengths: list[int], seed: int) -> list[Tensor]:
    """Prompts of random tokens and a tree's behind them, [length + N] int64 each, of those tokens that the model has
    something for: rows of its embeddings that no text uses may hold anything.

    Raises:
        Unsupported: there are too few.
    """
    sizes = [length + len(TREE) for length in lengths]
    embeddings, generator, n_tokens = model.get_input_embeddings(), torch.Generator("cpu").manual_seed(seed), sum(sizes)
    drawn = torch.randint(
        embeddings.num_embeddings, (4 * n_tokens,), generator=generator, dtype=torch.int64, device="cpu"
    ).to(model.device)
    drawn = drawn[embeddings(drawn).isfinite().flatten(1).all(1)]
    if len(drawn) < n_tokens:
        raise Unsupported(f"{family_of(model)}: its embeddings are not finite")
    return list(drawn[:n_tokens].split(sizes))


@torch.no_grad()
def run_plainly(model: PreTrainedModel, texts: list[Tensor]) -> Plain:
    """Run every path of every text on its own, its nodes one by one.

    Raises:
        Unsupported: the model keeps something else than keys and values of one width in every layer.
    """
    shapes: list[tuple[int, int, int]] = []
    kept: list[int] = []
    rows: list[Tensor] = []
    for text in texts:
        length = len(text) - len(TREE)
        try:
            cache = names.DynamicCache(config=model.config.get_text_config(decoder=True))
            _, cache = _feed(model, cache, text[:length], 0)
            shapes, kept = _layers(model, cache)
            nodes: dict[int, Tensor] = {}
            for path in PATHS:
                own = copy.deepcopy(cache)
                for depth, node in enumerate(path):
                    nodes[node], own = _feed(model, own, text[length + node, None], length + depth)
        except (torch.OutOfMemoryError, Unsupported):
            raise
        except Exception as error:  # transformers' own loop will say it better
            raise Unsupported(f"{family_of(model)}: its forward fails", str(error)) from None
        rows += [nodes[node] for node in range(len(TREE))]
    logits = torch.stack(rows)
    if (logits == -torch.inf).all(-1).any():
        raise Unsupported(f"{family_of(model)}: its own logits are all -inf")
    if not (logits < torch.inf).all():
        raise Unsupported(f"{family_of(model)}: its own logits are not finite")
    return Plain(texts, shapes, kept, logits)


def _feed(model: PreTrainedModel, cache: Any, tokens: Tensor, start: int) -> tuple[Tensor, Any]:
    """The last logits after a text's tokens, [n] int64, from place `start` on, and the cache; called as by
    `generate()`."""
    position = torch.arange(start, start + len(tokens), device=tokens.device, dtype=torch.int64)
    given = {names.cache_argument(model): cache}
    out = model(input_ids=tokens[None], position_ids=position[None], use_cache=True, **given)
    return out.logits[0, -1], names.cache_in(out)


def _layers(model: PreTrainedModel, cache: Any) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Shapes of a cache's layers, and how many tokens they keep, as in `Plain`."""
    layers, shapes = getattr(cache, "layers", None), []
    if not layers or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise Unsupported(f"{family_of(model)}, whose layers do not all keep keys and values")
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer) not in (names.DynamicLayer, names.DynamicSlidingWindowLayer) or keys is None or values is None:
            raise Unsupported(f"{family_of(model)}, whose layers do not all keep keys and values")
        shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
    if len(set(shapes)) > 1:
        raise Unsupported(f"{family_of(model)}, whose layers keep keys and values of different shapes")
    return shapes, [getattr(layer, "sliding_window", 0) for layer in layers]
