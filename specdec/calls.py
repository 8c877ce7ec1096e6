"""What `generate()` calls of a model come to: decoded here, or handed to transformers' own loop, which is said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.config import Config
from specdec.decoders import Decoders, decoding
from specdec.drafters.registry import DraftSource, check_draft, named_draft
from specdec.engine.decide import agreed_memory, is_past
from specdec.engine.loop import Decoder
from specdec.engine.seeds import Seeds
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.errors import Unsupported, warn
from specdec.fallbacks import remedy
from specdec.hf import beams, names
from specdec.hf.call import Assistance, Request
from specdec.hf.names import LoopCall, PreTrainedModel
from specdec.progress import show_notes


class Purpose(Enum):
    """What a thread calls `generate()` for."""

    DECODE = auto()
    ASK = auto()
    """For the `Call` as it would be decoded, after all of transformers' own checks."""
    WARM_UP = auto()


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


@dataclass(frozen=True)
class Task:
    """A decoding loop that has been called.

    Attributes:
        call: with these arguments. draft: what drafts for it, with these options. loop: runs transformers' own.
    """

    call: LoopCall
    draft: DraftSource
    config: Config
    loop: Callable[[], Any]


class _Here(threading.local):
    """What this thread's calls are for, and how far the one that runs has come."""

    purpose = Purpose.DECODE
    knows_model = False  # which has been looked at
    is_called = False  # one is running
    has_come = False  # and has come to a decoding loop


class Calls:
    """The calls of one model.

    Attributes:
        seeds: of their texts.
    """

    def __init__(self, model: PreTrainedModel, decoders: Decoders, stats: Stats) -> None:
        self.seeds = Seeds()
        self._model, self._decoders, self._stats = model, decoders, stats
        self._running = threading.Lock()
        self._here = _Here()
        self._ignored: set[str] = set()  # what has been warned of

    @contextmanager
    def serving(self, purpose: Purpose, knows_model: bool = False) -> Generator[None]:
        """This thread's calls of `generate()` are for this.

        Args:
            knows_model: whether a call like these has been asked for: looking at all modules takes milliseconds.
        """
        here = self._here
        before = here.purpose, here.knows_model
        here.purpose, here.knows_model = purpose, knows_model
        try:
            yield
        finally:
            here.purpose, here.knows_model = before

    @contextmanager
    def alone(self, waits: bool = False) -> Generator[None]:
        """No call is decoded meanwhile.

        Raises:
            RuntimeError: one is, and this does not wait for its end.
        """
        if not self._running.acquire(blocking=waits):
            raise RuntimeError("another generate() of this model is running")
        try:
            yield
        finally:
            self._running.release()

    def count(self, call: Callable[[], Any]) -> Any:
        """What the user has called, which comes to a decoding loop, or says that it does not."""
        here = self._here
        if here.is_called:  # one within another
            return call()
        here.is_called, here.has_come = True, False
        is_own = here.purpose is Purpose.DECODE  # or else it is part of another, whose seeds they are
        try:
            with self.seeds.one_call() if is_own else nullcontext():
                out = call()
        finally:
            here.is_called = False
        if here.has_come:
            return out
        return self.fall_back(Unsupported("a way to decode that is none of transformers' own loops"), lambda: out)

    def sample(self, loop: partial[Any]) -> Any:
        """What transformers' sampling loop is to return, called like this."""
        return self._answer(loop, lambda _: (self._decoders.draft, self._decoders.config))

    def assisted(self, loop: partial[Any]) -> Any:
        """What transformers' loop that drafts is to return, called like this."""
        return self._answer(loop, self._named)

    def beams(self, loop: partial[Any]) -> Any:
        """What transformers' loop that searches with beams is to return, called like this."""
        if self._here.purpose is not Purpose.DECODE:
            return self.fall_back(Unsupported("beams in generate_many() or warmup()"), loop)
        return self._answer(loop, lambda _: (self._decoders.draft, self._decoders.config), self._with_beams)

    def _answer(
        self,
        loop: partial[Any],
        drafting: Callable[[LoopCall], tuple[DraftSource, Config]],
        decode: Callable[[Task], Any] | None = None,
    ) -> Any:
        self._here.has_come = True
        try:
            names.check()
            call = LoopCall.read(loop.func, *loop.args, **loop.keywords)
            draft, config = drafting(call)
        except (Unsupported, TypeError, ValueError) as error:
            why = error if isinstance(error, Unsupported) else Unsupported("a draft that does not fit", str(error))
            return self.fall_back(why, loop)
        answers = {Purpose.DECODE: decode or self.decode, Purpose.ASK: self.ask, Purpose.WARM_UP: self.warm_up}
        return answers[self._here.purpose](Task(call, draft, config, loop))

    def decode(self, task: Task) -> Any:
        """The texts, as `generate()` returns them: decoded here, or by transformers' own loop where that has to run."""
        return self._attempt(task, self._decoded)

    def _with_beams(self, task: Task) -> Any:
        """The same of a call with beams."""
        return self._attempt(task, self._searched)

    def warm_up(self, task: Task) -> Tensor | None:
        """The prompts, [B, length], once all is compiled and recorded that the call takes; None where nothing is."""
        return self._attempt(task, self._warmed_up, waits=True)

    def ask(self, task: Task) -> Call | Any:
        """The `Call`; or what transformers' own loop makes of it, where that has to run."""
        try:
            request = Request.parse_one_of_many(task.call, self._here.knows_model)
            if not self._here.knows_model:
                self._decoders.get(task.draft, request.law, task.config)
        except Unsupported as error:
            return self.fall_back(error, task.loop)
        limits_whole_text = task.call.generation_config.max_new_tokens is None
        return Call(request, task.draft, task.config, limits_whole_text)

    def fall_back(self, why: Unsupported, loop: Callable[[], Any]) -> Any:
        """What this loop of transformers' returns, and say why it runs; a warm-up runs none."""
        self._here.has_come = True
        if why.reason not in self._stats.fallbacks:
            warn(f"specdec runs transformers' own loop: {why}. {remedy(why.reason)}".rstrip())
        self._stats.fallbacks[why.reason] += 1
        return None if self._here.purpose is Purpose.WARM_UP else loop()

    def _named(self, call: LoopCall) -> tuple[DraftSource, Config]:
        """The drafter that a call's arguments name, and the options that go with it."""
        assistance = Assistance.parse(call, self._decoders.config)
        draft = named_draft(assistance)
        for setting in assistance.ignored:
            if setting not in self._ignored:
                self._ignored.add(setting)
                much = "how much is drafted follows what is accepted; the tokens are the same"
                warn(f"specdec ignores {setting}: {much}")
        check_draft(draft, self._model, assistance.config)
        return draft, assistance.config

    def _attempt(self, task: Task, serve: Callable[[Task], Any], waits: bool = False) -> Any:
        """What a call comes to while no other is decoded; or what transformers' own loop returns, if it has to run."""
        if not self._running.acquire(blocking=waits):
            return self.fall_back(Unsupported("another generate() of this model is running"), task.loop)
        tokens_before, lacks_memory = self._stats.tokens, False
        try:
            return serve(task)
        except Unsupported as error:
            why = Unsupported(error.reason, error.detail)  # an exception caught holds on to buffers
        except torch.OutOfMemoryError:
            if task.call.streamer is not None and self._stats.tokens > tokens_before:  # another would say it all again
                raise
            why, lacks_memory = Unsupported("out of memory", f"a batch of {len(task.call.input_ids)}"), True
        finally:
            if lacks_memory:  # no longer within the exception
                self._decoders.free()
            self._running.release()
        return self.fall_back(why, task.loop)

    def _decoded(self, task: Task) -> Any:
        request, decoder = self._prepared(task)
        with decoding(task.call.self), agreed_memory():
            show_notes(task.config.progress)
            try:
                texts = self._run(decoder, request, task.call.streamer)
            finally:
                show_notes(False)
            self._stats.decoded += 1
            sequences = request.sequences(task.call.input_ids, texts)
            if request.past is not None:  # the caller's cache grows by what was decoded
                n_new = [len(text.tokens) for text in texts]
                request.past.extend(decoder, sequences, n_new)
            return request.output(sequences, texts)

    def _searched(self, task: Task) -> Any:
        request = beams.BeamRequest.parse(task.call)
        search = self._decoders.get(task.draft, None, task.config).beams(request.n_beams)
        before = torch.get_rng_state()
        with decoding(task.call.self), agreed_memory():
            show_notes(task.config.progress)
            try:
                search.open(request.prompts, request.longest, request.ends)
                out = beams.run(task.call, lambda ids: search.answer(request.after(ids, search.forest.committed)))
            except torch.OutOfMemoryError:
                torch.set_rng_state(before)  # transformers' own loop draws the same
                raise
            finally:
                show_notes(False)
        self._stats.decoded += 1
        return out

    def _warmed_up(self, task: Task) -> Tensor:
        request, decoder = self._prepared(task)
        with decoding(task.call.self), agreed_memory():
            decoder.warm_up(request.prompts, request.law, request.longest, request.eos_ids)
        return task.call.input_ids

    def _prepared(self, task: Task) -> tuple[Request, Decoder]:
        """A call's request, and who decodes it."""
        request = Request.parse(task.call)
        decoder = self._decoders.get(task.draft, request.law, task.config)
        if request.past is not None:
            request.past.check(decoder)
        return request, decoder

    def _run(self, decoder: Decoder, request: Request, streamer: Any) -> list[Text]:
        n_batch = len(request.prompts)
        seeds = self.seeds.take(n_batch, request.law.greedy)
        texts = [request.text(row, next(seeds)) for row in range(n_batch)]
        room = max(len(prompt) for prompt in request.prompts)
        for emitted in decoder.run(texts, n_batch, request.longest, room, request.law, request.eos_ids):
            for piece in emitted:
                if streamer is not None:
                    show_notes(False)  # the text may be on the terminal
                    for token in piece.tokens:
                        streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))
                if piece.text.error is not None:
                    raise piece.text.error
            if is_past(request.deadline):
                shortest = min((len(t.tokens) for t in texts if not t.finished), default=None)
                self._stats.tokens -= sum(text.cut(shortest) for text in texts)
                break
        if streamer is not None:
            streamer.end()
        return texts
