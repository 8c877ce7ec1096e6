"""The handle at `model.specdec`: one `generate()` call at a time, decoded or handed to transformers' own loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from specdec.config import Config
from specdec.decoder import Decoder
from specdec.drafters.make import DraftSource, check_draft, draft_model, make_drafter
from specdec.drafters.vocabulary import ForeignDraft
from specdec.errors import Unsupported, warn
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.names import LoopCall
from specdec.past import is_users
from specdec.request import Request
from specdec.rows import Text
from specdec.sampling import SamplingLaw
from specdec.seeds import Seeds
from specdec.stats import Stats
from specdec.suited import check_model
from specdec.tree import TokenTree
from specdec.tuning import Choice, choose
from specdec.verifiers import VERIFIERS
from specdec.view import ModelView


@dataclass(frozen=True)
class Call:
    """What a `generate()` call comes to.

    Attributes:
        draft: what drafts for it. limits_whole_text: its limit is of prompt and new tokens together.
    """

    request: Request
    draft: DraftSource
    limits_whole_text: bool


class _Here(threading.local):
    """What this thread's calls of `generate()` are for, if not for decoding."""

    is_warming_up = False
    asks = False  # for the call as it would be decoded
    knows_model = False  # and of this model, which has been looked at


class Handle:
    """What hangs at `model.specdec`.

    Attributes:
        stats: what happened so far (`specdec.stats.Stats`).
        config: the options given to `compile`, with the tree that `tune()` chose.
    """

    def __init__(self, model: PreTrainedModel, draft: DraftSource, config: Config) -> None:
        self.config, self.stats = config, Stats()
        self._seeds = Seeds()
        self._model, self._draft = model, draft
        self._target: ModelView | None = None
        self._decoders: dict[object, Decoder] = {}
        self._running = threading.Lock()
        self._here = _Here()
        check_draft(draft, model, config)
        if config.tree is not None and draft is not None and draft_model(draft) is None:
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
        return self._seeds.last

    @seeds.setter
    def seeds(self, value: Any) -> None:
        self._seeds.fix(value)

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
        if (draft := draft_model(self._draft)) is None:
            raise ValueError(f"tune() chooses a draft model's tree, and the draft is {self._draft!r}")
        if max_nodes < 2 or max_depth < 1:
            raise ValueError(f"a draft has 2 nodes and 1 level at least, got max_nodes={max_nodes}, {max_depth=}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        probe = partial(self._probe, input_ids, mask, settings)
        try:
            views = ModelView(self._model), ModelView(draft)
        except Unsupported as reason:
            raise ValueError(f"these calls run transformers' own loop: {reason}") from None
        with self._running, torch.random.fork_rng(devices=[]):
            choice = choose(probe, *views, max_nodes, max_depth, self.config)
            self.config = replace(self.config, tree=choice.tree, depth=None)
            self.stats.tree, self._decoders = str(choice), {}
        return choice

    def _probe(self, ids: Tensor, mask: Tensor, settings: dict[str, Any], tree: TokenTree, timed: bool) -> Stats:
        """What happens when prompts are decoded with this tree; or, timed, the first of them twice, compiled."""
        ids, mask = (ids[:1], mask[:1]) if timed else (ids, mask)
        config = replace(self.config, tree=tree, depth=None, compile=timed and self.config.compile, adapt=False)
        model = Handle(self._model, self._draft, config).attach(self._wrapper)
        for _ in range(1 + timed):
            model.specdec.stats.reset()
            model.generate(ids, attention_mask=mask, **settings)
        if model.specdec.stats.fallbacks:
            raise ValueError(f"these calls run transformers' own loop: {', '.join(model.specdec.stats.fallbacks)}")
        return model.specdec.stats

    def generate(
        self,
        parents_loop: Callable[[], Any],
        call: LoopCall,
        draft: DraftSource = None,
    ) -> Any:
        """Decode one `generate()` call, or run the parent's loop and say why."""
        model, input_ids, streamer = call.self, call.input_ids, call.streamer
        draft = self._draft if draft is None else draft
        if self._here.asks:
            try:
                if not self._here.knows_model:
                    self._check(model)
                request = Request.parse(call)
                if len(request.prompts) > 1:
                    raise Unsupported("num_return_sequences in generate_many()")
                if request.outputs or (request.past and is_users(request.past.cache)):
                    raise Unsupported("scores, logits and past_key_values in generate_many()")
                if request.has_own_processors:  # texts would take turns
                    raise Unsupported("logits processors of one's own in generate_many()")
                if not self._here.knows_model:
                    self.decoder(draft, request.law)
            except Unsupported as error:
                return self._fall_back(error, parents_loop)
            return Call(request, draft, call.generation_config.max_new_tokens is None)
        if not self._running.acquire(blocking=self._here.is_warming_up):
            return self._fall_back(Unsupported("another generate() of this model is running"), parents_loop)
        decoder = None
        tokens_before = self.stats.tokens
        try:
            self._check(model)
            if call.synced_gpus:
                raise Unsupported("synced_gpus")
            if streamer is not None and input_ids.shape[0] > 1:
                raise Unsupported("a streamer with a batch of several samples")
            request = Request.parse(call)
            decoder = self.decoder(draft, request.law)
            if request.past is not None:
                request.past.check(decoder.target.layer_shapes, decoder.target.module.dtype)
            with decoding(model):
                if self._here.is_warming_up:
                    decoder.warm_up(request.prompts, request.law, request.longest, request.eos_ids)
                    return input_ids
                texts = self._run(decoder, request, streamer)
                self.stats.decoded += 1
                return request.result(input_ids, texts, decoder)
        except Unsupported as error:
            why = Unsupported(error.reason, error.detail)  # an exception caught holds on to buffers
        except torch.OutOfMemoryError:
            if streamer is not None and self.stats.tokens > tokens_before:  # another loop would hand them out again
                raise
            decoder = None
            self.free()
            why = Unsupported("out of memory", f"a batch of {len(input_ids)}")
        finally:
            self._running.release()
        return self._fall_back(why, parents_loop)

    def _check(self, model: PreTrainedModel) -> None:
        """Whether a wrapped model is as it was wrapped, and one to decode with; raises Unsupported."""
        if model.config is not self._model.config:
            raise Unsupported("a model given another config than the one it shares with the model it was made from")
        check_model(model)

    def _run(self, decoder: Decoder, request: Request, streamer: Any) -> list[Text]:
        n_batch = len(request.prompts)
        seeds = self._seeds.take(n_batch, request.law.greedy)
        texts = [request.text(row, next(seeds)) for row in range(n_batch)]
        room = max(len(prompt) for prompt in request.prompts)
        for emitted in decoder.run(texts, n_batch, request.longest, room, request.law, request.eos_ids):
            for piece in emitted:
                if streamer is not None:
                    for token in piece.tokens:
                        streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))
                if piece.text.error is not None:
                    raise piece.text.error
            if request.deadline is not None and time.time() > request.deadline:
                shortest = min((len(t.tokens) for t in texts if not t.finished), default=None)
                self.stats.tokens -= sum(text.cut(shortest) for text in texts)
                break
        if streamer is not None:
            streamer.end()
        return texts

    def next_seeds(self, n_texts: int | None) -> Iterator[int]:
        """A seed for each of so many texts, or of any number."""
        return self._seeds.take(n_texts)

    def ask(self, model: PreTrainedModel, ids: Tensor, settings: dict[str, Any], knows_model: bool) -> Any:
        """The `Call` that `generate()` would decode for a prompt, [length] int64, after all of transformers' own
        checks; or what transformers' own loop makes of it, where that has to run. Raises what `generate()` raises.

        Args:
            knows_model: whether a prompt of this run has been asked for: looking at all modules takes milliseconds.
        """
        self._here.asks, self._here.knows_model = True, knows_model
        try:
            return model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **settings)
        finally:
            self._here.asks = False

    @contextmanager
    def running(self) -> Generator[None]:
        """No other call is decoded meanwhile.

        Raises:
            RuntimeError: another one is.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("another generate() of this model is running")
        try:
            yield
        finally:
            self._running.release()

    def free(self) -> None:
        """Give back the memory of all batches."""
        self._decoders, self._target = {}, None

    def memory(self, batch_size: int, max_length: int) -> int:
        """Bytes that decoding takes beside the weights, for texts of up to `max_length` tokens, prompt and new ones."""
        return self.decoder(self._draft).buffers.memory(batch_size, max_length)

    def _fall_back(self, why: Unsupported, parents_loop: Callable[[], Any]) -> Any:
        if why.reason not in self.stats.fallbacks:
            warn(f"specdec runs transformers' own loop: {why}")
        self.stats.fallbacks[why.reason] += 1
        return None if self._here.is_warming_up else parents_loop()

    def decoder(self, draft: DraftSource, law: SamplingLaw | None = None) -> Decoder:
        """The decoder for this draft, and for laws like this one; made anew when the user's model has been given other
        weights."""
        with decoding(self._model):  # models are run to prove that they can be
            if self._target is None or not self._target.is_current:
                self._target, self._decoders = ModelView(self._model), {}
            config = self.config
            if law is not None and law.by_text and not law.greedy:  # drafts are drawn with the target's noise
                config = replace(config, verifier="coupled")
            key = draft if isinstance(draft, str | ForeignDraft) else id(draft), config.verifier
            decoder = self._decoders.get(key)
            if decoder is None or not decoder.drafter.is_current:
                try:
                    check_draft(draft, self._model, config)
                except (TypeError, ValueError) as error:  # it did, when it was given: something has changed since
                    raise Unsupported(f"the draft: {error}") from None
                compiled = CompiledSteps(config.compile, self.stats)
                records = config.compile and self._target.device.type == "cuda"
                steps = CapturedSteps(compiled) if records else compiled
                decoder = self._decoders[key] = Decoder(
                    self._target, make_drafter(draft, self._model, config), steps, self.stats,
                    VERIFIERS[config.verifier], config.adapt,
                )  # fmt: skip
        return decoder


@contextmanager
def decoding(model: PreTrainedModel) -> Generator[None]:
    """Where to decode: without gradients, and with a model's GPU the current one, on which kernels are started and
    graphs recorded."""
    current = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    with current, torch.inference_mode(False), torch.no_grad():
        yield
