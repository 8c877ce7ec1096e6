"""The handle at `model.specdec`: one `generate()` call at a time, decoded or handed to transformers' own loop."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from specdec.config import Config
from specdec.decoder import Decoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import SUPPORT_SIZE, ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.request import Request, Unsupported, check_model, has_own_forward, moving_rope
from specdec.stats import Stats
from specdec.tree import TokenTree
from specdec.tuning import Choice, choose
from specdec.verifiers import VERIFIERS
from specdec.view import SUPPORTED_MODEL_TYPES, ModelView


class Handle:
    """What hangs at `model.specdec`.

    Attributes:
        stats: what happened so far (`specdec.stats.Stats`).
        config: the options given to `compile`, with the tree that `tune()` chose.
    """

    def __init__(self, model: PreTrainedModel, draft: PreTrainedModel | Drafter | str | None, config: Config) -> None:
        self.config, self.stats = config, Stats()
        self._seeds: Tensor | None = None
        self._seeds_are_fixed = False
        self._model, self._draft = model, draft
        self._target: ModelView | None = None
        self._decoders: dict[object, Decoder] = {}
        self._running = threading.Lock()
        self._here = threading.local()  # whether this thread's call of generate() is a warm-up
        self._check_draft(draft)
        if config.tree is not None and not (draft is None or isinstance(draft, PreTrainedModel)):
            raise ValueError("tree is what a draft model drafts; n-grams are chains, and a Drafter brings its own")

    def attach(self, wrapper: type[PreTrainedModel]) -> PreTrainedModel:
        """The user's model as an object of this class, with all it holds and this handle."""
        self._wrapper = wrapper
        wrapped = object.__new__(wrapper)
        wrapped.__dict__ = dict(self._model.__dict__, specdec=self)
        return wrapped

    @property
    def seeds(self) -> Tensor | None:
        """[B] int64. After a call: the seeds it used. Set them to make the next call use these; one per sample,
        counting `num_return_sequences`. Equal seeds, prompts and settings give equal texts, in any batch."""
        return self._seeds

    @seeds.setter
    def seeds(self, value: Any) -> None:
        self._seeds = torch.as_tensor(value, dtype=torch.int64).flatten()
        self._seeds_are_fixed = True

    def warmup(self, batch_sizes: Sequence[int] = (1,), max_length: int = 512, **settings: Any) -> None:
        """Compile and record the steps that calls of `generate()` will take, with a progress bar.

        Args:
            batch_sizes: prompts of the calls. max_length: the longest text, prompt and new tokens; on a GPU buffers are
                made for it, and longer texts record their steps again. No more than the model has positions.
            settings: of the calls, as for `generate()`: `do_sample=True, top_p=0.9`. Values that are numbers of a law
                (temperature, top_p, min_p) may change later; `top_k` and which of them there are may not.

        Raises:
            ValueError: a size or length that cannot be, or settings `generate()` does not take.
        """
        if not batch_sizes or min(batch_sizes) < 1 or max_length < 2:
            raise ValueError(f"batch_sizes {[*batch_sizes]} must be at least 1, and max_length {max_length} at least 2")
        if lengths := {"max_length", "max_new_tokens", "min_length", "min_new_tokens"} & set(settings):
            raise ValueError(f"warmup() takes max_length for the longest text, and no {lengths.pop()}")
        model = self.attach(self._wrapper)
        max_length = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", max_length))
        columns = (SpinnerColumn(), TextColumn("specdec warm-up, batch size {task.description}"), TimeElapsedColumn())
        # The largest first: buffers that the smaller ones' recordings know then stay where they are.
        for size in sorted(set(batch_sizes), reverse=True):
            ids = torch.zeros(size, min(64, max_length // 2), dtype=torch.int64, device=model.device)
            length = {"max_new_tokens": max_length - ids.shape[1]}
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                bar.add_task(str(size), total=None)
                self._here.is_warming_up = True
                try:
                    model.generate(ids, attention_mask=torch.ones_like(ids), **length, **settings)
                finally:
                    self._here.is_warming_up = False

    def tune(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_nodes: int = 16, max_depth: int = 8,
        **settings: Any,
    ) -> Choice:  # fmt: skip
        """Choose what the draft model drafts, a tree or a chain, by what gets accepted and what this machine takes.

        Decodes the prompts with a few trees, uncompiled, and times both models' forwards and one step, compiled for
        it: minutes, where compilers' caches are cold. Later calls use the tree that promises the most tokens a second;
        which, and by how much over the best chain, `stats.tree` says. Torch's generator is left as it was.

        Args:
            input_ids, attention_mask: prompts like those to come, [B, length]. max_nodes: the most nodes, the root
                included. max_depth: the most levels. settings: of the calls, as for `generate()`.

        Raises:
            ValueError: there is no draft model, or too few nodes or levels for a draft.
        """
        if not isinstance(self._draft, PreTrainedModel):
            raise ValueError(f"tune() chooses a draft model's tree, and the draft is {self._draft!r}")
        if max_nodes < 2 or max_depth < 1:
            raise ValueError(f"a draft has 2 nodes and 1 level at least, got max_nodes={max_nodes}, {max_depth=}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        probe = partial(self._probe, input_ids, mask, settings)
        views = ModelView(self._model), ModelView(self._draft)
        with self._running, torch.random.fork_rng(devices=[]):
            choice = choose(probe, *views, max_nodes, max_depth, self.config)
            self.config = replace(self.config, tree=choice.tree, depth=None)
            self.stats.tree, self._decoders = str(choice), {}
        return choice

    def _probe(self, ids: Tensor, mask: Tensor, settings: dict[str, Any], tree: TokenTree, timed: bool) -> Stats:
        """What happens when prompts are decoded with this tree; or, timed, the first of them twice, compiled."""
        ids, mask = (ids[:1], mask[:1]) if timed else (ids, mask)
        config = replace(self.config, tree=tree, depth=None, compile=timed and self.config.compile)
        model = Handle(self._model, self._draft, config).attach(self._wrapper)
        for _ in range(1 + timed):
            model.specdec.stats.reset()
            model.generate(ids, attention_mask=mask, **settings)
        if model.specdec.stats.fallbacks:
            raise ValueError(f"these calls run transformers' own loop: {', '.join(model.specdec.stats.fallbacks)}")
        if not model.specdec.stats.slots:
            raise ValueError(f"nothing was drafted in calls with {settings}; specdec decodes without beams")
        return model.specdec.stats

    @property
    def _is_warming_up(self) -> bool:
        return getattr(self._here, "is_warming_up", False)

    def generate(
        self,
        parents_loop: Callable[[], Any],
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        generation_config: Any,
        synced_gpus: bool,
        streamer: Any,
        model_kwargs: dict[str, Any],
        draft: PreTrainedModel | Drafter | str | None = None,
    ) -> Any:
        """Decode one `generate()` call, or run the parent's loop and say why."""
        if not self._running.acquire(blocking=self._is_warming_up):
            return self._fall_back("another generate() of this model is running", parents_loop)
        decoder = reason = None
        tokens_before = self.stats.tokens
        try:
            check_model(model)
            if synced_gpus:
                raise Unsupported("synced_gpus")
            if streamer is not None and input_ids.shape[0] > 1:
                raise Unsupported("a streamer with a batch of several samples")
            request = Request.parse(model, input_ids, processors, criteria, generation_config, model_kwargs)
            decoder = self._decoder(self._draft if draft is None else draft)
            with _current(model.device), torch.inference_mode(False), torch.no_grad():
                if self._is_warming_up:
                    decoder.warm_up(request.prompts, request.law, request.max_new_tokens, request.eos_ids)
                    return input_ids
                texts = self._run(decoder, request, streamer)
        except Unsupported as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            if streamer is not None and self.stats.tokens > tokens_before:  # another loop would hand them out again
                raise
            self._decoders, self._target, decoder = {}, None, None  # with their buffers
            reason = f"out of memory for a batch of {len(input_ids)}"
        finally:
            self._running.release()
        if reason is not None:  # out here, where no exception holds on to buffers
            return self._fall_back(reason, parents_loop)
        return _assemble(input_ids, texts, generation_config._pad_token_tensor)

    def _run(self, decoder: Decoder, request: Request, streamer: Any) -> list[list[int]]:
        n_batch = len(request.prompts)
        seeds = self._seeds if self._seeds_are_fixed and self._seeds is not None else torch.randint(2**62, (n_batch,))
        self._seeds, self._seeds_are_fixed = seeds, False
        if len(seeds) != n_batch:
            raise ValueError(f"{len(seeds)} seeds were set for a batch of {n_batch} samples")
        texts: list[list[int]] = [[] for _ in range(n_batch)]
        ended = [False] * n_batch
        prompts = [p.clone() for p in request.prompts]
        for emitted in decoder.run(prompts, request.law, request.max_new_tokens, seeds, request.eos_ids):
            for piece in emitted:
                texts[piece.row] += piece.tokens
                ended[piece.row] = piece.finished
                self.stats.tokens += len(piece.tokens)
                if streamer is not None:
                    for token in piece.tokens:
                        streamer.put(torch.tensor([token]))
            if request.deadline is not None and time.time() > request.deadline:
                shortest = min((len(t) for t, e in zip(texts, ended, strict=True) if not e), default=None)
                texts = [t if e else t[:shortest] for t, e in zip(texts, ended, strict=True)]
                break
        if streamer is not None:
            streamer.end()
        return texts

    def _fall_back(self, reason: str, parents_loop: Callable[[], Any]) -> Any:
        if reason not in self.stats.fallbacks:
            warnings.warn(f"specdec runs transformers' own loop: {reason}", stacklevel=5)
        self.stats.fallbacks[reason] += 1
        return None if self._is_warming_up else parents_loop()

    def _check_draft(self, draft: PreTrainedModel | Drafter | str | None) -> None:
        if isinstance(draft, PreTrainedModel):
            ours, theirs = (m.config.get_text_config().vocab_size for m in (self._model, draft))
            if ours != theirs:
                raise ValueError(f"draft vocabulary {theirs} does not match target vocabulary {ours}")
            if draft.device != self._model.device:
                raise ValueError(f"draft is on {draft.device}, target is on {self._model.device}")
            if draft.config.model_type not in SUPPORTED_MODEL_TYPES:
                raise ValueError(f"drafts of type {draft.config.model_type} are not supported yet")
            if self.config.tree is not None and (widest := max(self.config.tree.n_children)) > SUPPORT_SIZE:
                raise ValueError(f"tree has a node with {widest} children; a draft model drafts {SUPPORT_SIZE} at most")
            if has_own_forward(draft):
                raise ValueError("the draft has a forward of its own; give specdec the model as it was loaded")
            if (rope := moving_rope(draft.config)) is not None:
                raise ValueError(f"drafts with {rope} rope are not supported")
        elif isinstance(draft, str) and draft != "ngram":
            raise ValueError(f'draft must be "ngram", a model, a Drafter or None, got {draft!r}')
        elif draft is not None and not isinstance(draft, str) and not callable(getattr(draft, "draft", None)):
            raise TypeError(f'draft must be "ngram", a model, a Drafter or None, got {type(draft).__name__}')

    def _decoder(self, draft: PreTrainedModel | Drafter | str | None) -> Decoder:
        """The decoder for this draft; made anew when the user's model has been given other weights."""
        if self._target is None or not self._target.is_current:
            self._target, self._decoders = ModelView(self._model), {}
        key = draft if isinstance(draft, str) else id(draft)
        decoder = self._decoders.get(key)
        if decoder is None or not decoder.drafter.is_current:
            self._check_draft(draft)
            compiled = CompiledSteps(self.config.compile)
            records = self.config.compile and self._target.device.type == "cuda"
            steps = CapturedSteps(compiled) if records else compiled
            verifier = VERIFIERS[self.config.verifier]
            decoder = self._decoders[key] = Decoder(self._target, self._drafter(draft), steps, self.stats, verifier)
        return decoder

    def _drafter(self, draft: PreTrainedModel | Drafter | str | None) -> Drafter:
        depth = self.config.depth
        if draft is None:
            return NoDrafter()
        if isinstance(draft, PreTrainedModel):
            tree = self.config.tree or TokenTree.chain(depth or 5)
            return ModelDrafter(draft, tree, VERIFIERS[self.config.verifier])
        if isinstance(draft, str):
            return NgramDrafter(depth or 8, self.config.max_ngram)
        return draft


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a model's GPU the current one, which is where kernels are started and graphs recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _assemble(input_ids: Tensor, texts: list[list[int]], pad: Tensor | None) -> Tensor:
    """The prompts followed by the new texts, padded on the right as transformers pads finished rows."""
    filler = 0 if pad is None else int(pad)
    out = input_ids.new_full((len(texts), max(len(t) for t in texts)), filler)
    for row, text in enumerate(texts):
        out[row, : len(text)] = torch.tensor(text, dtype=out.dtype)
    return torch.cat([input_ids, out], 1)
