"""The handle at `model.specdec`: one `generate()` call at a time, decoded or handed to transformers' own loop."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from specdec.arguments import whole
from specdec.config import Config
from specdec.drafters.registry import DraftSource, check_draft, draft_model, make_drafter
from specdec.drafters.vocabulary import ForeignDraft
from specdec.engine.decide import agreed_memory, is_past
from specdec.engine.laws import SamplingLaw
from specdec.engine.loop import Decoder
from specdec.engine.seeds import Seeds
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported, warn
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.call import Request
from specdec.hf.names import LoopCall
from specdec.hf.prefix import is_users
from specdec.hf.support import check_model
from specdec.hf.twin import is_seen
from specdec.hf.view import ModelView
from specdec.tune.choose import Choice, choose
from specdec.verifiers import VERIFIERS

N_NAMED = 4
"""Decoders kept of those that calls have named the draft of, `assistant_model=` or a number of words to look up: each
holds a model, and the memory of its last batch."""


@dataclass(frozen=True)
class Call:
    """What a `generate()` call comes to.

    Attributes:
        draft: what drafts for it, with these options. limits_whole_text: its limit is of prompt and new tokens
            together.
    """

    request: Request
    draft: DraftSource
    config: Config
    limits_whole_text: bool


class _Here(threading.local):
    """What this thread's calls of `generate()` are for, if not for decoding."""

    is_warming_up = False
    asks = False  # for the call as it would be decoded
    knows_model = False  # and of this model, which has been looked at
    is_called = False  # one is running
    has_come = False  # and has come to a decoding loop


class Handle:
    """What hangs at `model.specdec`.

    Attributes:
        stats: what happened so far (`specdec.engine.stats.Stats`).
        config: the options given to `compile`, with the tree that `tune()` chose.
    """

    def __init__(self, model: PreTrainedModel, draft: DraftSource, config: Config) -> None:
        self.config, self.stats = config, Stats()
        self._seeds = Seeds()
        self._model, self._draft = model, draft
        self._target: ModelView | None = None
        self._decoders: dict[tuple[object, Config], Decoder] = {}
        self._running = threading.Lock()
        self._here = _Here()
        self._ignored: set[str] = set()  # what has been warned of

    def attach(self, wrapper: type[PreTrainedModel]) -> PreTrainedModel:
        """The user's model as an object of this class, with this handle. All else it holds is one and the same: what
        is set on one of the two, a mode or a configuration, is set on both."""
        self._wrapper = wrapper
        wrapped = object.__new__(wrapper)
        wrapped.__dict__ = self._model.__dict__
        object.__setattr__(wrapped, "specdec", self)
        return wrapped

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self._model, self._draft, self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        model = copy.deepcopy(self._model, memo)
        # A copy of the model alone may come here, under way and empty, by something it holds that knows its wrapping.
        draft = copy.deepcopy(self._draft, memo) if vars(model) else self._draft
        return Handle(model, draft, self.config)

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
            TypeError, ValueError: a size or length that cannot be, or settings `generate()` does not take.
        """
        if not isinstance(batch_sizes, Iterable):
            raise TypeError(f"batch_sizes must not be a {type(batch_sizes).__name__}, got {batch_sizes!r}")
        sizes, max_length = {whole("batch_sizes", size) for size in batch_sizes}, whole("max_length", max_length, 2)
        if not sizes:
            raise ValueError(f"batch_sizes must be at least one size, got {batch_sizes!r}")
        if lengths := {"max_length", "max_new_tokens", "min_length", "min_new_tokens"} & set(settings):
            raise ValueError(f"warmup() takes max_length for the longest text, and no {lengths.pop()}")
        model = self.attach(self._wrapper)
        max_length = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", max_length))
        columns = (SpinnerColumn(), TextColumn("specdec warm-up, batch size {task.description}"), TimeElapsedColumn())
        # The largest first: buffers that the smaller ones' recordings know then stay where they are.
        for size in sorted(sizes, reverse=True):
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
            TypeError, ValueError: there is no draft model, no prompts, or too few nodes or levels for a draft.
        """
        if (draft := draft_model(self._draft)) is None:
            raise ValueError(f"tune() chooses a draft model's tree, and the draft is {self._draft!r}")
        max_nodes, max_depth = whole("max_nodes", max_nodes, least=2), whole("max_depth", max_depth)
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            given = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else repr(input_ids)
            raise TypeError(f"input_ids must be a tensor [B, length] of token ids, got {given}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        probe = partial(self._probe, input_ids, mask, settings)
        try:
            with decoding(self._model):
                views = ModelView(self._model), ModelView(draft)
        except Unsupported as reason:
            raise ValueError(f"these calls run transformers' own loop: {reason}") from None
        with self._running, torch.random.fork_rng(devices=[]):
            choice = choose(probe, *views, max_nodes, max_depth, self.config)
            self.config = replace(self.config, tree=choice.tree, depth=None)
            self.stats.tree = str(choice)
            self.free()
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

    def one_call(self) -> AbstractContextManager[None]:
        """A call, whatever becomes of it: seeds that were set serve it, and none after it."""
        return self._seeds.one_call()

    def count(self, call: Callable[[], Any]) -> Any:
        """What the user has called, which comes to a decoding loop, or says that it does not."""
        here = self._here
        if here.is_called:  # one within another
            return call()
        here.is_called, here.has_come = True, False
        is_part = here.asks or here.is_warming_up  # of another call, whose seeds they are
        try:
            with nullcontext() if is_part else self.one_call():
                out = call()
        finally:
            here.is_called = False
        if here.has_come:
            return out
        return self._fall_back(Unsupported("a way to decode that is none of transformers' own loops"), lambda: out)

    def generate(
        self,
        parents_loop: Callable[[], Any],
        call: LoopCall,
        draft: DraftSource = None,
        config: Config | None = None,
    ) -> Any:
        """Decode one `generate()` call, or run the parent's loop and say why.

        Args:
            parents_loop: runs it. draft, config: what drafts for this call, and the options; the handle's own by
                default.
        """
        self._here.has_come = True
        model, input_ids, streamer = call.self, call.input_ids, call.streamer
        draft, config = self._draft if draft is None else draft, config or self.config
        if self._here.asks:
            try:
                if not self._here.knows_model:
                    check_model(model)
                request = Request.parse(call)
                if len(request.prompts) > 1:
                    raise Unsupported("num_return_sequences in generate_many()")
                if request.outputs or (request.past and is_users(request.past.cache)):
                    raise Unsupported("scores, logits and past_key_values in generate_many()")
                if request.has_own_processors:  # texts would take turns
                    raise Unsupported("logits processors of one's own in generate_many()")
                if not self._here.knows_model:
                    self.decoder(draft, request.law, config)
            except Unsupported as error:
                return self._fall_back(error, parents_loop)
            return Call(request, draft, config, call.generation_config.max_new_tokens is None)
        if not self._running.acquire(blocking=self._here.is_warming_up):
            return self._fall_back(Unsupported("another generate() of this model is running"), parents_loop)
        decoder = None
        tokens_before = self.stats.tokens
        try:
            check_model(model)
            if call.synced_gpus:
                raise Unsupported("synced_gpus")
            if streamer is not None and input_ids.shape[0] > 1:
                raise Unsupported("a streamer with a batch of several samples")
            request = Request.parse(call)
            decoder = self.decoder(draft, request.law, config)
            view: Any = self._target
            if request.past is not None:
                request.past.check(view.layer_shapes, view.module.dtype)
            with decoding(model), agreed_memory():
                if self._here.is_warming_up:
                    decoder.warm_up(request.prompts, request.law, request.longest, request.eos_ids)
                    return input_ids
                texts = self._run(decoder, request, streamer)
                self.stats.decoded += 1
                return request.result(input_ids, texts, decoder, view)
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
            if is_past(request.deadline):
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
        gc.collect()  # copies of models and compiled steps know themselves

    def memory(self, batch_size: int, max_length: int) -> int:
        """Bytes that decoding takes beside the weights, for texts of up to `max_length` tokens, prompt and new ones.

        Raises:
            TypeError, ValueError: a size that cannot be, or calls of this model run transformers' own loop.
        """
        batch_size, max_length = whole("batch_size", batch_size), whole("max_length", max_length)
        try:
            return self.decoder(self._draft).buffers.memory(batch_size, max_length)
        except Unsupported as reason:
            raise ValueError(f"calls of this model run transformers' own loop: {reason}") from None

    def ignore(self, setting: str) -> None:
        """Say once that a call's setting is not followed, where that changes nothing but speed."""
        if setting not in self._ignored:
            self._ignored.add(setting)
            warn(f"specdec ignores {setting}: how much is drafted follows what is accepted; the tokens are the same")

    def _fall_back(self, why: Unsupported, parents_loop: Callable[[], Any]) -> Any:
        self._here.has_come = True
        if why.reason not in self.stats.fallbacks:
            warn(f"specdec runs transformers' own loop: {why}")
        self.stats.fallbacks[why.reason] += 1
        return None if self._here.is_warming_up else parents_loop()

    @agreed_memory()
    def decoder(
        self, draft: DraftSource, law: SamplingLaw | None = None, config: Config | None = None
    ) -> Decoder:  # fmt: skip
        """The decoder for this draft and these options, and for laws like this one; made anew when the user's model is
        not what it was. A draft that cannot be prepared is said, counted, and done without.

        Raises:
            Unsupported: the model cannot be decoded with.
        """
        with decoding(self._model):  # models are run to prove that they can be
            is_current = self._target is not None and self._target.is_current
            if not (is_current and all(decoder.steps.is_current for decoder in self._decoders.values())):
                if self._target is not None:
                    self.free()
                self._target = ModelView(self._model)
            config = config or self.config
            if law is not None and law.by_text and not law.greedy:  # drafts are drawn with the target's noise
                config = replace(config, verifier="coupled")
            try:
                return self._decoder_with(draft, config)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the law is the same without it
                why = error if isinstance(error, Unsupported) else Unsupported(type(error).__name__, str(error))
            if why.reason not in self.stats.dropped_drafts:
                warn(f"specdec decodes without the draft: {why}")
            self.stats.dropped_drafts[why.reason] += 1
            return self._decoder_with(None, config)

    def _decoder_with(self, draft: DraftSource, config: Config) -> Decoder:
        """The decoder for this draft; raises whatever keeps it from being prepared."""
        assert self._target is not None
        key = _name(draft), config
        decoder = self._decoders.pop(key, None)
        if decoder is None or not decoder.drafter.is_current:
            decoder = None  # its memory may be needed
            try:
                check_draft(draft, self._model, config)
            except (TypeError, ValueError) as error:  # it did, when it was given: something has changed since
                raise Unsupported("it does not fit", str(error)) from None
            compiled = CompiledSteps(config.compile, self.stats.eager, is_seen)
            records = config.compile and self._target.device.type == "cuda"
            steps = CapturedSteps(compiled) if records else compiled
            decoder = Decoder(
                self._target, make_drafter(draft, self._model, config), steps, self.stats,
                VERIFIERS[config.verifier], config.adapt,
            )  # fmt: skip
        self._decoders[key] = decoder  # the last used comes last
        named = [key for key in self._decoders if not self._is_own(key)]
        if len(named) > N_NAMED:
            del self._decoders[named[0]]
            gc.collect()  # its memory is wanted now
        return decoder

    def _is_own(self, key: tuple[object, Config]) -> bool:
        """Whether a decoder is of the draft and the options given to `compile`, or chosen since."""
        draft, config = key
        return draft == _name(self._draft) and replace(config, verifier=self.config.verifier) == self.config


def _name(draft: DraftSource) -> object:
    """What tells a draft from others for as long as it lives: who holds this must hold that."""
    return draft if isinstance(draft, str | ForeignDraft) else id(draft)


@contextmanager
def decoding(model: PreTrainedModel) -> Generator[None]:
    """Where to decode: without gradients and autocast, and with a model's GPU the current one, on which kernels are
    started and graphs recorded."""
    kind = model.device.type
    current = torch.cuda.device(model.device) if kind == "cuda" else nullcontext()
    with current, torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
        yield
