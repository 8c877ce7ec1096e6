"""Proof: is a model's ragged forward the model's own? Found out when a model is first used.

Two texts, a short and a longer one, each with a small tree behind it, run plainly through the user's model, node by
node over the cache that `generate()` would fill, and at once through its view. Where the logits agree the family is
supported, whatever its name; where they do not, its calls run transformers' own loop.

The longer text goes past every window that the configuration names, up to `LONGEST`. Beyond, one key among so many
moves the logits by less than they are compared to, and rules, which are exact, are compared instead, at positions far
apart: the mask rule of every layer with the window that the layer tells its attention, and with what its cache keeps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.packing import Nodes
from specdec.engine.roles import Target
from specdec.errors import Unsupported, warn
from specdec.hf.cache import RaggedCache, Way
from specdec.hf.plain import TREE, Plain, draw_texts, family_of, run_plainly
from specdec.hf.windows import Asked, is_window, is_within, named_windows

SHORT, LONG, LONGEST = 7, 64, 1024
"""Tokens of the short text; of the longer one, at least; and the longest window that it goes past."""
PIECE = 256
"""Tokens of a ragged forward of the texts: the scores of all at once would take a gigabyte in a large model."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the difference of two rows of logits, relative to what they vary; other types round to about 0.01."""
ROUGH, TRIES = 0.2, 3
"""With more than one pair of texts: where two experts are all but even, rounding may choose between them."""

_REFUSED: WeakKeyDictionary[PreTrainedModel, tuple[dict[int, object], str, str]] = WeakKeyDictionary()


class View(Target, Protocol):
    """What is proved, as `specdec.hf.view.ModelView` has it.

    Attributes:
        source: the user's model. module: the copy that runs. cache: attends in the way that is tried.
        layer_shapes: (G, D, Dv) of each layer; found out here. written: what forwards write to.
    """

    source: PreTrainedModel
    module: PreTrainedModel
    cache: RaggedCache
    layer_shapes: list[tuple[int, int, int]]
    written: set[int]

    @property
    def traits(self) -> dict[int, object]: ...

    def check_untouched(self, run: Callable[[], object]) -> None: ...

    def prefill(self, texts: Mapping[int, tuple[int, Tensor]], chunk: int = ...) -> None: ...


def check_forward(model: PreTrainedModel) -> None:
    """What can be told without running a model.

    Raises:
        Unsupported: it cannot run raggedly.
    """
    if model.config.is_encoder_decoder:
        raise Unsupported(f"{family_of(model)}, with an encoder")
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise Unsupported(f"{family_of(model)}, whose forward takes no position_ids")


def prove(view: View) -> None:
    """Let the view attend in the fastest way that is right.

    Raises:
        Unsupported: none is.
    """
    model = view.source
    check_forward(model)
    traits, *why = _REFUSED.get(model, ({}, ""))
    if traits and all(view.traits.get(key) == trait for key, trait in traits.items()):
        raise Unsupported(*why)
    try:
        _prove(view)
    except Unsupported as why:
        _REFUSED[model] = view.traits, why.reason, why.detail
        raise


def _prove(view: View) -> None:
    model, cache = view.source, view.cache
    ends = [LONG, *(window + 8 for window in _named_windows(model).values() if window <= LONGEST)]
    lengths = [SHORT, max(1, min(max(ends), _context(model) - TREE.depth - 1))]
    plain = functools.cache(lambda seed: run_plainly(model, draw_texts(model, lengths, seed)))
    others = [max(1, length - 1) for length in lengths]
    with _taking_back(view):
        view.layer_shapes = plain(0).shapes
        view.check_untouched(lambda: run_plainly(model, draw_texts(model, others, seed=TRIES)))
    has_kernel = cache.way is Way.FUSED
    try:
        for cache.way in Way.MASKED, Way.OWN:
            asked: dict[int, Asked] = {}
            cache.asked = asked
            difference = _difference(view, plain)
            if difference is None:
                break
        if difference is not None:
            raise difference
        cache.asked = None
        if cache.is_asked_for_length:
            raise Unsupported(f"{family_of(model)}, whose layers ask the cache how long the text is")
        _check_windows(view, plain(0), asked)
        if has_kernel and cache.way is Way.MASKED and _suits_kernels(view, asked):
            cache.way = Way.FUSED
            difference = _difference(view, plain)
            if difference is not None:  # a kernel is broken
                cache.way = Way.MASKED
                warn(f"specdec leaves attention to PyTorch, {difference}")
    finally:
        cache.asked = None
        cache.release()
        cache.generation = 0  # nobody knows of it yet


@contextmanager
def _taking_back(view: View) -> Generator[None]:
    """Where a model is refused for writing to buffers, as what observes activations does, random texts leave nothing in
    them."""
    held = [(buffer, buffer.clone()) for buffer in view.source.buffers()]
    try:
        yield
    except Unsupported:
        for buffer, before in held:
            if id(buffer) in view.written:
                buffer.copy_(before)
        raise


def _named_windows(model: PreTrainedModel) -> dict[str, int]:
    return named_windows(model.config.get_text_config(decoder=True))


def _context(model: PreTrainedModel) -> int:
    """How long a text the model is made for."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**15


def _check_windows(view: View, plain: Plain, asked: dict[int, Asked]) -> None:
    """Whether layers see as far as their masks' rules say, however long the text.

    Raises:
        Unsupported: they do not, or nobody says how far.
    """
    family, longest = family_of(view.source), _context(view.source)
    for rule, kept in {(ask.rule, plain.kept[layer]) for layer, ask in asked.items()}:
        if rule is None:
            raise Unsupported(f"{family}, whose layers make masks of their own")
        if kept and not is_within(rule, kept, longest, view.device):
            raise Unsupported(f"{family}, whose cache forgets what their masks show", f"all but {kept} tokens")
    if len(asked) < len(plain.kept):  # layers that attend by themselves tell no rule
        windows = _named_windows(view.source) | {f"layer {layer}": kept for layer, kept in enumerate(plain.kept)}
        if far := {name: window for name, window in windows.items() if LONGEST < window < longest}:
            raise Unsupported(f"{family}, whose own attention has a window too long to try out", f"{far}")


def _suits_kernels(view: View, asked: dict[int, Asked]) -> bool:
    """Whether the kernels do all that the layers asked of their attention."""
    _, key_dim, value_dim = view.layer_shapes[0]
    return (
        len(asked) == len(view.layer_shapes)
        and key_dim == value_dim
        and all(
            not ask.has_sinks
            and ask.rule is not None
            and is_window(ask.rule, ask.window, _context(view.source), view.device)
            for ask in set(asked.values())
        )
    )


def _difference(view: View, plain: Callable[[int], Plain]) -> Unsupported | None:
    """What is wrong with the ragged forward as the view runs it now; None if nothing is. `plain` gives a pair of texts
    for each of a few seeds."""
    for seed in range(1 if view.module.dtype in TOLERANCE else TRIES):
        if (found := _difference_of(view, plain(seed))) is None:
            break
    return found


@torch.no_grad()
def _difference_of(view: View, plain: Plain) -> Unsupported | None:
    device, n_nodes, family = view.device, len(TREE), family_of(view.source)
    bits, depths = TREE.tensors(device)
    prompts = [text[:-n_nodes] for text in plain.texts]
    try:
        view.allocate(len(prompts), max(map(len, plain.texts)) + 1)  # the last slot is scratch
        view.prefill({row: (0, prompt) for row, prompt in enumerate(prompts)}, PIECE)
        lengths = torch.tensor([*map(len, prompts)], device=device, dtype=torch.int64)
        token = torch.arange(len(plain.logits) + 1, device=device, dtype=torch.int64)
        counts = torch.full_like(lengths, n_nodes)
        nodes = Nodes.packed(lengths, counts, token, n_nodes, view.cache.n_slots, bits, depths)
        # The last is nobody's, and far beyond: a rope that moves with the farthest position would move the others.
        nodes.position[-1] = _context(view.source)
        tokens = torch.cat([*(text[-n_nodes:] for text in plain.texts), plain.texts[0][:1]])
        logits = view.forward(tokens, nodes).logits[:-1]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Unsupported(f"{family}: a ragged forward fails", (str(error) or type(error).__name__).splitlines()[0])
    off = distance(logits, plain.logits)
    if off <= TOLERANCE.get(logits.dtype, ROUGH):
        return None
    return Unsupported(f"{family}: a ragged forward is not the model's own", f"by {100 * off:.3g}%")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two rows of logits [n, V] of one dtype, relative to what theirs vary, or where they
    are all the same, to what they are. Theirs may be -inf here and there, where ours have to be too."""
    rounding = torch.finfo(theirs.dtype).eps
    ours, theirs = ours.double(), theirs.double()
    finite = theirs.isfinite()
    if not (finite | (ours == theirs)).all():
        return torch.inf
    mean = torch.where(finite, theirs, 0).sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)
    size, spread, off = (torch.where(finite, x, 0).norm(dim=-1) for x in (theirs, theirs - mean, ours - theirs))
    scale = torch.where(spread > rounding * size, spread, size)
    return float(torch.where(off == 0, 0, off / scale).max())
