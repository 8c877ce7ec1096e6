"""Proof: is a model's ragged forward the model's own? Found out when a model is first used.

Two texts of unequal lengths, each with a small tree behind it, run plainly through the user's model, path by path, and
at once through its view. Where the logits agree the family is supported, whatever its name; where they do not, its
calls run transformers' own loop. What a few tokens cannot show is asked of the model instead: the mask rule of every
layer, at positions far apart, against the window that the layer tells its attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.errors import Unsupported, warn
from specdec.hf import names
from specdec.nodes import Nodes
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.view import ModelView

TREE = TokenTree((-1, 0, 0, 1))
PATHS = (0, 1, 3), (0, 2)
LENGTHS = 7, 4
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the difference of two rows of logits, relative to what they vary; other types round to about 0.01."""
ROUGH = 0.2

_REFUSED: WeakKeyDictionary[PreTrainedModel, tuple[object, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Asked:
    """What a layer asked of its attention: a window, 0 for none, and sinks; and the rule of the mask it brought."""

    window: int
    has_sinks: bool
    rule: Callable[..., Tensor] | None


@dataclass(frozen=True)
class Plain:
    """What the user's model makes of the texts: the shapes of its layers' caches, `(G, D, Dv)` each, and the logits
    [B * N, V] of all nodes."""

    shapes: list[tuple[int, int, int]]
    logits: Tensor


def _family(model: PreTrainedModel) -> str:
    return f"models of type {model.config.model_type}"


def check_forward(model: PreTrainedModel) -> None:
    """What can be told without running a model.

    Raises:
        Unsupported: it cannot run raggedly.
    """
    if model.config.is_encoder_decoder:
        raise Unsupported(f"{_family(model)}, with an encoder")
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise Unsupported(f"{_family(model)}, whose forward takes no position_ids")


@torch.no_grad()
def run_plainly(model: PreTrainedModel, texts: list[Tensor]) -> Plain:
    """Run every path of every text on its own.

    Args:
        texts: prompt and the tree's tokens, [length + N] int64 each.

    Raises:
        Unsupported: the model keeps something else than keys and values of one width in every layer.
    """
    shapes, rows = None, []
    for text in texts:
        nodes: dict[int, Tensor] = {}
        for path in PATHS:
            ids = torch.cat([text[: -len(TREE)], text[-len(TREE) :][list(path)]])
            try:
                out = model(input_ids=ids[None], use_cache=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # transformers' own loop will say it better
                raise Unsupported(f"{_family(model)}: its forward fails: {error}") from None
            nodes |= dict(zip(path, out.logits[0, -len(path) :], strict=True))
            shapes = shapes or _shapes(model, out)
        rows += [nodes[node] for node in range(len(TREE))]
    assert shapes is not None
    logits = torch.stack(rows)
    if not logits.isfinite().any(-1).all():
        raise Unsupported(f"{_family(model)}: its own logits are not finite")
    return Plain(shapes, logits)


def _shapes(model: PreTrainedModel, out: Any) -> list[tuple[int, int, int]]:
    layers = getattr(names.cache_in(out), "layers", None)
    if not layers or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise Unsupported(f"{_family(model)}, whose layers do not all keep keys and values")
    shapes = []
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer) not in (names.DynamicLayer, names.DynamicSlidingWindowLayer) or keys is None or values is None:
            raise Unsupported(f"{_family(model)}, whose layers do not all keep keys and values")
        shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
    if len(set(shapes)) > 1:
        raise Unsupported(f"{_family(model)}, whose layers keep keys and values of different shapes")
    return shapes


def prove(view: ModelView) -> None:
    """Let the view attend in the fastest way that is right.

    Raises:
        Unsupported: none is.
    """
    model = view.source
    check_forward(model)
    if (known := _REFUSED.get(model)) is not None and known[0] == view.traits:
        raise Unsupported(known[1])
    try:
        _prove(view)
    except Unsupported as reason:
        _REFUSED[model] = view.traits, str(reason)
        raise


def _prove(view: ModelView) -> None:
    model, cache = view.source, view.cache
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    sizes = [n + len(TREE) for n in LENGTHS]
    texts = [torch.randint(vocabulary, (n,), generator=generator, dtype=torch.int64, device="cpu") for n in sizes]
    texts = [text.to(view.device) for text in texts]
    plain = run_plainly(model, texts)
    view.layer_shapes = plain.shapes
    can_fuse, cache.can_fuse = cache.can_fuse, False
    try:
        cache.asked = {}
        difference = _difference(view, texts, plain)
        asked, cache.asked = cache.asked, None
        if difference is not None:
            cache.is_flat = True
            difference = _difference(view, texts, plain)
        if difference is not None:
            raise Unsupported(f"{_family(model)}: {difference}")
        if cache.is_asked_for_length:
            raise Unsupported(f"{_family(model)}, whose layers ask the cache how long the text is")
        if can_fuse and not cache.is_flat and _suits_kernels(view, asked):
            cache.can_fuse = True
            difference = _difference(view, texts, plain)
            if difference is not None:  # a kernel is broken
                cache.can_fuse = False
                warn(f"specdec leaves attention to PyTorch, {_family(model)}: {difference}")
    finally:
        cache.asked = None
        cache.release()
        cache.generation = 0  # nobody knows of it yet


def _suits_kernels(view: ModelView, asked: dict[int, Asked]) -> bool:
    """Whether the kernels do all that the layers asked of their attention."""
    _, key_dim, value_dim = view.layer_shapes[0]
    longest = getattr(view.source.config.get_text_config(), "max_position_embeddings", None) or 0
    return (
        len(asked) == len(view.layer_shapes)
        and key_dim == value_dim
        and all(
            not ask.has_sinks and ask.rule is not None and is_window(ask.rule, ask.window, longest, view.device)
            for ask in set(asked.values())
        )
    )


def is_window(rule: Callable[..., Tensor], window: int, longest: int, device: torch.device) -> bool:
    """Whether a mask rule lets a token see just itself and what is before it, the last `window` tokens if that is not
    0. Asked at the window's edges, and as far as texts go."""
    last = max(min(longest, 2**20), 2 * window + 2, 1024)
    places = {0, 1, 5, 6, *(window + i for i in (-1, 0, 1, 7)), 2 * window + 1, last // 2, last - 1}
    query = torch.tensor(sorted(p for p in places if 0 <= p < last), device=device, dtype=torch.int64)[:, None]
    key = torch.arange(last, device=device, dtype=torch.int64)[None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    try:
        seen = rule(zero, zero, query, key).expand(len(query), last)
    except Exception:
        return False
    return torch.equal(seen, (key <= query) & ((key > query - window) if window else True))


@torch.no_grad()
def _difference(view: ModelView, texts: list[Tensor], plain: Plain) -> str | None:
    """What is wrong with the ragged forward as the view runs it now; None if nothing is."""
    device, n_rows, n_nodes = view.device, len(texts), len(TREE)
    bits, depths = TREE.tensors(device)
    try:
        view.allocate(n_rows, max(LENGTHS) + n_nodes + 1)  # the last slot is scratch
        view.prefill({row: (0, text[:-n_nodes]) for row, text in enumerate(texts)})
        lengths = torch.tensor(LENGTHS, device=device, dtype=torch.int64)
        token = torch.arange(n_rows * n_nodes, device=device, dtype=torch.int64)
        counts = torch.full_like(lengths, n_nodes)
        nodes = Nodes.packed(lengths, counts, token, n_nodes, view.cache.n_slots, bits, depths)
        logits = view.forward(torch.cat([text[-n_nodes:] for text in texts]), nodes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"a ragged forward fails: {(str(error) or type(error).__name__).splitlines()[0]}"
    wanted = plain.logits.double()
    off = (logits.double() - wanted).norm(dim=-1) / (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    if off.max() <= TOLERANCE.get(logits.dtype, ROUGH):
        return None
    return f"a ragged forward is not the model's own, by {100 * off.max():.3g}%"
