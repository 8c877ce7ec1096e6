"""The handle at `model.specdec`: what a user sees and sets of how a model decodes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.arguments import whole
from specdec.calls import Calls, Purpose
from specdec.config import Config
from specdec.decoders import Decoders, decoding
from specdec.drafters.adaptive import Adaptive
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.registry import MODEL_DEPTH, NGRAM_DEPTH, DraftSource, ModelSource, draft_model
from specdec.drafters.vocabulary import ForeignDraft
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported
from specdec.hf.names import PreTrainedModel
from specdec.hf.view import ModelView
from specdec.hf.wrap import wrap
from specdec.progress import spinner
from specdec.tune.choose import Choice, choose


class Handle:
    """What hangs at `model.specdec`; its `repr` says what decodes, and how.

    Attributes:
        stats: what happened so far (`specdec.engine.stats.Stats`).
        model: the user's own, as given to `compile`.
    """

    def __init__(self, model: PreTrainedModel, draft: DraftSource, config: Config) -> None:
        self.model, self.stats = model, Stats()
        self._decoders = Decoders(model, draft, config, self.stats)
        self._calls = Calls(model, self._decoders, self.stats)

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self.model, self.draft, self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        model = copy.deepcopy(self.model, memo)
        # A copy of the model alone may come here, under way and empty, by something it holds that knows its wrapping.
        draft = copy.deepcopy(self.draft, memo) if vars(model) else self.draft
        return Handle(model, draft, self.config)

    def __repr__(self) -> str:
        return "\n".join(
            [f"specdec for {_named(self.model)}", *(f"  {name:<9} {said}" for name, said in self._lines())]
        )

    def _lines(self) -> Iterator[tuple[str, str]]:
        """What decodes, by its part."""
        config, target, stats = self.config, self._decoders.target, self.stats
        for source in self.draft if isinstance(self.draft, tuple) else (self.draft,):
            if isinstance(source, ModelSource):
                tree = config.tree or TokenTree.chain(config.depth or MODEL_DEPTH)
                stops = "" if config.stop_below is None else f", up to a token below {config.stop_below:g}"
                yield "draft", f"{_named(source)}; {tree.summary} a step{stops}"
            elif isinstance(source, Adaptive):
                forwards = "one forward" if source.in_one and config.tree is None else "two forwards"
                yield "draft", f"its own adaptive tokens, {source.tokens.n_slots} slots; {forwards} a step"
            elif isinstance(source, str):
                earlier = f" and of the last {config.remember} tokens before it" if config.remember else ""
                yield "draft", f"n-grams of the text{earlier}, up to {config.depth or NGRAM_DEPTH} tokens a step"
            else:
                yield "draft", "none" if source is None else type(source).__name__
        yield "verifier", f"{config.verifier} when sampling; greedy text is the target's own"
        way = "" if target is None else f"logits are the model's own; attention: {target.cache.way.name.lower()}"
        yield "proof", way or "on first use"
        how = "compiled, replayed as CUDA graphs" if self.model.device.type == "cuda" else "compiled"
        yield "steps", "; ".join(stats.eager) + ", so eager" if stats.eager else how if config.compile else "eager"
        yield "calls", stats.verdict or f"{stats.decoded} decoded by specdec"

    @property
    def draft(self) -> DraftSource:
        """What drafts, as given to `compile`."""
        return self._decoders.draft

    @property
    def config(self) -> Config:
        """The options given to `compile`, with the tree that `tune()` chose."""
        return self._decoders.config

    @property
    def seeds(self) -> Tensor | None:
        """[B] int64. After a call: the seeds it used. Set them to make the next call use these; one per sample,
        counting `num_return_sequences`. Equal seeds, prompts and settings give equal texts, in any batch."""
        return self._calls.seeds.last

    @seeds.setter
    def seeds(self, value: Any) -> None:
        self._calls.seeds.fix(value)

    def warmup(self, batch_sizes: Sequence[int] = (1,), max_length: int = 512, **settings: Any) -> None:
        """Compile and record the steps that calls of `generate()` will take, with a progress bar.

        Args:
            batch_sizes: prompts of the calls.
            max_length: the longest text, prompt and new tokens; on a GPU buffers are made for it, and longer texts
                record their steps again. No more than the model has positions.
            settings: of the calls, as for `generate()`: `do_sample=True, top_p=0.9`. Values that are numbers of a law
                (temperature, top_p, min_p) may change later; `top_k` and which of them there are may not.

        Raises:
            TypeError, ValueError: a size or length that cannot be, or settings `generate()` does not take.
        """
        if not isinstance(batch_sizes, Iterable):
            raise TypeError(f"batch_sizes must be a sequence of whole numbers, such as (1, 8), got {batch_sizes!r}")
        sizes, max_length = {whole("batch_sizes", size) for size in batch_sizes}, whole("max_length", max_length, 2)
        if not sizes:
            raise ValueError(f"batch_sizes must be at least one size, got {batch_sizes!r}")
        if lengths := {"max_length", "max_new_tokens", "min_length", "min_new_tokens"} & set(settings):
            raise ValueError(f"warmup() takes max_length for the longest text, and no {lengths.pop()}")
        model = wrap(self)
        max_length = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", max_length))
        # The largest first: buffers that the smaller ones' recordings know then stay where they are.
        for size in sorted(sizes, reverse=True):
            ids = torch.zeros(size, min(64, max_length // 2), dtype=torch.int64, device=model.device)
            length = {"max_new_tokens": max_length - ids.shape[1]}
            bar = spinner(f"warm-up, batch size {size}", self.config.progress)
            with bar, self._calls.serving(Purpose.WARM_UP):
                model.generate(ids, attention_mask=torch.ones_like(ids), **length, **settings)

    def tune(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_nodes: int = 16, max_depth: int = 8,
        **settings: Any,
    ) -> Choice:  # fmt: skip
        """Choose what the draft model drafts, a tree or a chain, by what gets accepted and what this machine takes.

        Decodes the prompts with a few trees, uncompiled, and times both models' forwards and one step, compiled for
        it: minutes, where compilers' caches are cold. Later calls use the tree that promises the most tokens a second;
        which, and by how much over the best chain, `stats.tree` says. Torch's generator is left as it was.

        Args:
            input_ids: prompts like those to come, [B, length].
            attention_mask: of these prompts.
            max_nodes: the most nodes, the root included.
            max_depth: the most levels.
            settings: of the calls, as for `generate()`.

        Raises:
            TypeError, ValueError: there is no draft model, no prompts, too few nodes or levels for a draft, or chains
                end early.
        """
        if (draft := draft_model(self.draft, self.model)) is None:
            raise ValueError(f"tune() chooses a draft model's tree, and the draft is {self.draft!r}")
        if self.config.stop_below is not None:
            raise ValueError(f"tune() chooses whole trees, and stop_below={self.config.stop_below} ends chains early")
        max_nodes, max_depth = whole("max_nodes", max_nodes, least=2), whole("max_depth", max_depth)
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            given = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else repr(input_ids)
            raise TypeError(f"input_ids must be a tensor [B, length] of token ids, got {given}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        probe = partial(self._probe, input_ids, mask, settings)
        try:
            with decoding(self.model):
                views = ModelView(self.model), ModelView(draft)
        except Unsupported as reason:
            raise ValueError(f"these calls run transformers' own loop: {reason}") from None
        with self._calls.alone(waits=True), torch.random.fork_rng(devices=[]):
            choice = choose(probe, *views, max_nodes, max_depth, self.config)
            self._decoders.config = replace(self.config, tree=choice.tree, depth=None)
            self.stats.tree = str(choice)
            self.free()
        return choice

    def _probe(self, ids: Tensor, mask: Tensor, settings: dict[str, Any], tree: TokenTree, timed: bool) -> Stats:
        """What happens when prompts are decoded with this tree; or, timed, the first of them twice, compiled."""
        ids, mask = (ids[:1], mask[:1]) if timed else (ids, mask)
        config = replace(self.config, tree=tree, depth=None, compile=timed and self.config.compile, adapt=False)
        model = wrap(Handle(self.model, self.draft, config))
        for _ in range(1 + timed):
            model.specdec.stats.reset()
            model.generate(ids, attention_mask=mask, **settings)
        if model.specdec.stats.fallbacks:
            raise ValueError(f"these calls run transformers' own loop: {', '.join(model.specdec.stats.fallbacks)}")
        if model.specdec.stats.beam_forwards:
            raise ValueError("tune() chooses trees, and searches with beams take none: leave num_beams out")
        return model.specdec.stats

    def memory(self, batch_size: int, max_length: int) -> int:
        """Bytes that decoding takes beside the weights, for texts of up to `max_length` tokens, prompt and new ones.

        Raises:
            TypeError, ValueError: a size that cannot be, or calls of this model run transformers' own loop.
        """
        batch_size, max_length = whole("batch_size", batch_size), whole("max_length", max_length)
        try:
            return self._decoders.get(self.draft).buffers.memory(batch_size, max_length)
        except Unsupported as reason:
            raise ValueError(f"calls of this model run transformers' own loop: {reason}") from None

    def free(self) -> None:
        """Give back the memory of all batches."""
        self._decoders.free()


def _named(model: ModelSource) -> str:
    """A model in a few words."""
    if isinstance(model, EarlyExit):
        return f"its own first {model.n_layers} layers"
    model = model.model if isinstance(model, ForeignDraft) else model
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {n_parameters / 1e6:,.1f}M parameters, {dtype} on {model.device}"
