"""The ways to decode a large model that `bench.gpu` compares, and how one call of them is timed.

A way decodes greedily: prompts [B, length] and a number n of new tokens give ids [B, length + n]. All ways but those
of specdec take a step a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache

import specdec
from bench.backend import Loop, compiled_forward
from bench.clock import Compilations
from specdec.cli import measure
from specdec.engine.stats import Stats
from specdec.hf import names

DEPTH = 5
"""Tokens of a drafted chain."""


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        label: for tables. call: see above. read_bytes: of the weights that a step reads.
        model: specdec's, or None.
    """

    label: str
    call: Callable[[Tensor, int], Tensor]
    read_bytes: int
    model: PreTrainedModel | None = None

    @property
    def stats(self) -> Stats | None:
        """What specdec counts."""
        return None if self.model is None else self.model.specdec.stats


@dataclass(frozen=True)
class Call:
    """What one call took: seconds; decoding steps, and tokens a step and sample; whether something compiled in it."""

    text: Tensor
    seconds: float
    steps: int
    tokens_per_step: float
    compiled: bool


@torch.no_grad()
def timed(way: Way, prompts: Tensor, new_tokens: int, compilations: Compilations) -> Call:
    """One call, timed until the device is done.

    Raises:
        NotMeasured: specdec did not decode as it claims to.
    """
    before, stats = compilations.n, way.stats
    if stats is not None:
        stats.reset()
    measure.synchronize()
    start = time.perf_counter()
    text = way.call(prompts, new_tokens)
    measure.synchronize()
    seconds = time.perf_counter() - start
    late = compilations.n > before
    if stats is None:
        return Call(text, seconds, new_tokens, 1.0, late)
    measure.check(way.label, stats)
    late |= stats.seconds["compile"] > 0  # CUDA graphs of specdec's own are recorded without any compiler
    return Call(text, seconds, stats.steps, stats.tokens_per_step, late)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a forward of a few tokens reads: all but the rows of embeddings it has no use for."""
    embeddings = model.get_input_embeddings().weight
    unread = 0 if model.get_output_embeddings().weight is embeddings else embeddings.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - unread


def eager(target: PreTrainedModel) -> Way:
    """transformers, as it is."""
    return Way("transformers", measure.Path("transformers", target), weight_bytes(target))


def static(target: PreTrainedModel, slots: int, inductor: Mapping[str, Any]) -> Way:
    """transformers over one static cache, with a compiled forward.

    Args:
        slots: of the cache. It is kept: transformers makes one a call, at which a recorded forward is recorded anew.
        inductor: options of `torch.compile`.
    """
    config = CompileConfig(**inductor)
    config._compile_all_devices = True  # transformers compiles by itself on GPUs only
    path = measure.Path("transformers, static cache, compiled", target, {"compile_config": config})
    kept = StaticCache(config=target.config, max_cache_len=slots)

    def call(prompts: Tensor, new_tokens: int) -> Tensor:
        kept.reset()
        return path(prompts, new_tokens, **{names.cache_argument(target): kept})

    return Way(path.label, call, weight_bytes(target))


def loop(target: PreTrainedModel, slots: int, inductor: Mapping[str, Any]) -> Way:
    """A loop that does nothing but call a compiled forward, as gpt-fast does."""
    forward = compiled_forward(target, {"backend": "inductor", **inductor}, set())

    @cache
    def loop_of(prompts: Tensor) -> Loop:  # one batch's, which is kept: a recorded forward knows where its cache is
        return Loop(target, forward, prompts, slots)

    def call(prompts: Tensor, new_tokens: int) -> Tensor:
        one = loop_of(prompts)
        one.prefill()
        return torch.cat([prompts, one.first, one(prompts.new_empty(len(prompts), new_tokens - 1), 1)], 1)

    return Way("a loop over a static cache, compiled", call, weight_bytes(target))


def plain(target: PreTrainedModel, **options: Any) -> Way:
    """specdec that drafts nothing."""
    return _specdec("specdec, no draft", target, None, weight_bytes(target), **options)


def ngram(target: PreTrainedModel, **options: Any) -> Way:
    """specdec that looks drafts up in the text."""
    return _specdec("specdec, n-grams", target, "ngram", weight_bytes(target), **options)


def chain(target: PreTrainedModel, draft: PreTrainedModel, label: str = "a draft model", **options: Any) -> Way:
    """specdec with a draft model, which is read once a drafted token."""
    read = weight_bytes(target) + DEPTH * weight_bytes(draft)
    return _specdec(f"specdec, {label}, {DEPTH} tokens", target, draft, read, depth=DEPTH, **options)


def both(target: PreTrainedModel, draft: PreTrainedModel, **options: Any) -> Way:
    """specdec that looks drafts up in the text and, where it finds none, asks a draft model."""
    read = weight_bytes(target) + DEPTH * weight_bytes(draft)
    return _specdec("specdec, a draft model and n-grams", target, [draft, "ngram"], read, depth=DEPTH, **options)


def _specdec(label: str, target: PreTrainedModel, draft: Any, read_bytes: int, **options: Any) -> Way:
    model = specdec.compile(target, draft, adapt=False, **options)
    return Way(label, measure.Path(label, model), read_bytes, model)


def adapting(way: Way) -> Way:
    """The same way, which from now on drafts less where that is faster.

    What is compiled and recorded serves on: a decoder made for it would compile all of it once more.
    """
    assert way.model is not None
    for decoder in way.model.specdec._decoders.kept.values():
        decoder.adapt = None
        decoder.policies.clear()
    return Way(f"{way.label}, adaptive", way.call, way.read_bytes, way.model)
