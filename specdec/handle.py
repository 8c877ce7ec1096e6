"""The handle at `model.specdec`: one `generate()` call at a time, decoded or handed to transformers' own loop."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec import progress
from specdec.arguments import whole
from specdec.config import Config
from specdec.decoders import Decoders, decoding
from specdec.drafters.registry import DraftSource, draft_model
from specdec.engine.decide import agreed_memory, is_past
from specdec.engine.loop import Decoder
from specdec.engine.seeds import Seeds
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported, warn
from specdec.hf.call import Request, alone, out_of_memory
from specdec.hf.names import LoopCall, PreTrainedModel
from specdec.hf.support import check_model
from specdec.hf.view import ModelView
from specdec.hf.wrap import wrapping
from specdec.tune.choose import Choice, choose

T = TypeVar("T")


class Purpose(Enum):
    """What a thread's calls of `generate()` are for."""

    DECODE = auto()
    WARM_UP = auto()
    ASK = auto()
    """For the call as it would be decoded."""


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
    """This thread's calls of `generate()`.

    Attributes:
        purpose: what they are for. knows_model: whether the model has been looked at already.
        is_called: whether one is running. has_come: whether it has come to a decoding loop.
    """

    purpose = Purpose.DECODE
    knows_model = False
    is_called = False
    has_come = False


class Handle:
    """What hangs at `model.specdec`.

    Attributes:
        model, draft: given to `compile`.
        stats: what happened so far (`specdec.engine.stats.Stats`).
        decoders: what decodes, by draft and options.
    """

    def __init__(self, model: PreTrainedModel, draft: DraftSource, config: Config) -> None:
        self.model, self.draft, self.stats = model, draft, Stats()
        self.decoders = Decoders(model, draft, config, self.stats)
        self._seeds = Seeds()
        self._running = threading.Lock()
        self._here = _Here()
        self._ignored: set[str] = set()  # what has been warned of

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self.model, self.draft, self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        model = copy.deepcopy(self.model, memo)
        # A copy of the model alone may come here, under way and empty, by something it holds that knows its wrapping.
        draft = copy.deepcopy(self.draft, memo) if vars(model) else self.draft
        return Handle(model, draft, self.config)

    @property
    def config(self) -> Config:
        """The options given to `compile`, with the tree that `tune()` chose."""
        return self.decoders.config

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
        model = wrapping(self)
        max_length = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", max_length))
        # The largest first: buffers that the smaller ones' recordings know then stay where they are.
        for size in sorted(sizes, reverse=True):
            ids = torch.zeros(size, min(64, max_length // 2), dtype=torch.int64, device=model.device)
            length = {"max_new_tokens": max_length - ids.shape[1]}
            with progress.spinner(f"warm-up, batch size {size}"), self._calls_are_for(Purpose.WARM_UP):
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
            input_ids, attention_mask: prompts like those to come, [B, length]. max_nodes: the most nodes, the root
                included. max_depth: the most levels. settings: of the calls, as for `generate()`.

        Raises:
            TypeError, ValueError: there is no draft model, no prompts, or too few nodes or levels for a draft.
        """
        if (draft := draft_model(self.draft)) is None:
            raise ValueError(f"tune() chooses a draft model's tree, and the draft is {self.draft!r}")
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
        with self._running, torch.random.fork_rng(devices=[]):
            choice = choose(probe, *views, max_nodes, max_depth, self.config)
            self.decoders.config = replace(self.config, tree=choice.tree, depth=None)
            self.stats.tree = str(choice)
            self.free()
        return choice

    def _probe(self, ids: Tensor, mask: Tensor, settings: dict[str, Any], tree: TokenTree, timed: bool) -> Stats:
        """What happens when prompts are decoded with this tree; or, timed, the first of them twice, compiled."""
        ids, mask = (ids[:1], mask[:1]) if timed else (ids, mask)
        config = replace(self.config, tree=tree, depth=None, compile=timed and self.config.compile, adapt=False)
        model = wrapping(Handle(self.model, self.draft, config))
        for _ in range(1 + timed):
            model.specdec.stats.reset()
            model.generate(ids, attention_mask=mask, **settings)
        if model.specdec.stats.fallbacks:
            raise ValueError(f"these calls run transformers' own loop: {', '.join(model.specdec.stats.fallbacks)}")
        return model.specdec.stats

    def one_call(self) -> AbstractContextManager[None]:
        """A call, whatever becomes of it: seeds that were set serve it, and none after it."""
        return self._seeds.one_call()

    def count(self, call: Callable[[], Any], otherwise: Unsupported) -> Any:
        """What the user has called, which comes to a decoding loop, or `otherwise` is why not."""
        here = self._here
        if here.is_called:  # one within another
            return call()
        here.is_called, here.has_come = True, False
        is_part = here.purpose is not Purpose.DECODE  # of another call, whose seeds they are
        try:
            with nullcontext() if is_part else self.one_call():
                out = call()
        finally:
            here.is_called = False
        if here.has_come:
            return out
        return self.fall_back(otherwise, lambda: out)

    @contextmanager
    def _calls_are_for(self, purpose: Purpose, knows_model: bool = False) -> Generator[None]:
        here = self._here
        before = here.purpose, here.knows_model
        here.purpose, here.knows_model = purpose, knows_model
        try:
            yield
        finally:
            here.purpose, here.knows_model = before

    def generate(
        self,
        parents_loop: Callable[[], Any],
        call: LoopCall,
        draft: DraftSource = None,
        config: Config | None = None,
    ) -> Any:
        """Serve one `generate()` call, or run the parent's loop and say why.

        Args:
            parents_loop: runs it. draft, config: what drafts for this call, and the options; the handle's own by
                default.

        Returns:
            What `generate()` returns; the `Call` where calls are only asked about.
        """
        self._here.has_come = True
        serve = {Purpose.DECODE: self._decode, Purpose.WARM_UP: self._warm_up, Purpose.ASK: self._describe}
        try:
            return serve[self._here.purpose](call, self.draft if draft is None else draft, config or self.config)
        except Unsupported as error:
            why = copy.copy(error)  # an exception caught holds on to buffers
        return self.fall_back(why, parents_loop)

    def _describe(self, call: LoopCall, draft: DraftSource, config: Config) -> Call:
        """The call as it would be decoded among others."""
        if not self._here.knows_model:
            check_model(call.self)
        request = Request.parse(call)
        request.check_among_others()
        if not self._here.knows_model:
            self.decoders.get(draft, request.law, config)
        return Call(request, draft, config, call.generation_config.max_new_tokens is None)

    def _prepared(self, call: LoopCall, draft: DraftSource, config: Config) -> tuple[Request, Decoder]:
        """A call's request, and who decodes it."""
        check_model(call.self)
        request = Request.parse(call)
        decoder = self.decoders.get(draft, request.law, config)
        if request.past is not None:
            request.past.check(decoder)
        return request, decoder

    def _warm_up(self, call: LoopCall, draft: DraftSource, config: Config) -> Tensor:
        def warm_up() -> Tensor:
            request, decoder = self._prepared(call, draft, config)
            with decoding(call.self), agreed_memory():
                decoder.warm_up(request.prompts, request.law, request.longest, request.eos_ids)
            return call.input_ids

        with self._running:
            return self._within_memory(call, warm_up)

    def _decode(self, call: LoopCall, draft: DraftSource, config: Config) -> Any:
        def decode() -> Any:
            request, decoder = self._prepared(call, draft, config)
            with decoding(call.self), agreed_memory():
                texts = self._run(decoder, request, call.streamer)
                self.stats.decoded += 1
                sequences = request.sequences(call.input_ids, texts)
                if request.past is not None:
                    request.past.extend(decoder, sequences, [len(text.tokens) for text in texts])
                return request.result(sequences, texts)

        with alone(self._running):
            return self._within_memory(call, decode)

    def _within_memory(self, call: LoopCall, serve: Callable[[], T]) -> T:
        """What a call comes to.

        Raises:
            Unsupported: memory was lacking, and was given back.
        """
        tokens_before = self.stats.tokens
        try:
            return serve()
        except torch.OutOfMemoryError:
            if call.streamer is not None and self.stats.tokens > tokens_before:  # another loop would say it all again
                raise
        self.free()  # no longer within the exception, which holds on to buffers
        raise out_of_memory(call)

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
        with self._calls_are_for(Purpose.ASK, knows_model):
            return model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **settings)

    @contextmanager
    def running(self) -> Generator[None]:
        """No other call is decoded meanwhile.

        Raises:
            RuntimeError: another one is.
        """
        try:
            with alone(self._running):
                yield
        except Unsupported as why:
            raise RuntimeError(str(why)) from None

    def free(self) -> None:
        """Give back the memory of all batches."""
        self.decoders.free()

    def memory(self, batch_size: int, max_length: int) -> int:
        """Bytes that decoding takes beside the weights, for texts of up to `max_length` tokens, prompt and new ones.

        Raises:
            TypeError, ValueError: a size that cannot be, or calls of this model run transformers' own loop.
        """
        return self.decoders.memory(batch_size, max_length)

    def ignore(self, setting: str) -> None:
        """Say once that a call's setting is not followed, where that changes nothing but speed."""
        if setting not in self._ignored:
            self._ignored.add(setting)
            warn(f"specdec ignores {setting}: how much is drafted follows what is accepted; the tokens are the same")

    def fall_back(self, why: Unsupported, parents_loop: Callable[[], Any]) -> Any:
        """What the parent's loop makes of a call that is not decoded here, after saying why not; counted."""
        self._here.has_come = True
        if why.reason not in self.stats.fallbacks:
            warn(f"specdec runs transformers' own loop: {why}")
        self.stats.fallbacks[why.reason] += 1
        return None if self._here.purpose is Purpose.WARM_UP else parents_loop()
