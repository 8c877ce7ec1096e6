"""generate_many(): more prompts than there are rows; rows are filled again as their texts end.

Every prompt is a `generate()` call of its own, with the same settings: its arguments go through transformers' checks,
and what cannot be decoded here runs transformers' own loop.

Source: continuous batching, Orca, OSDI 2022; EMS-SD, arXiv 2405.07542, for texts that draft, accept and end at their
own pace.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from specdec import progress as bars
from specdec.arguments import flag, whole
from specdec.calls import Call, Purpose
from specdec.decoders import decoding
from specdec.engine.decide import agreed_memory, is_past
from specdec.engine.loop import Emitted
from specdec.engine.text import Text
from specdec.handle import Handle
from specdec.hf.names import PreTrainedModel

Prompt = Tensor | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What became of a prompt.

    Attributes:
        index: its place among the prompts.
        tokens: what `generate()` returns for it, [length] int64, prompt and new tokens, without padding; [n, length]
            with `num_return_sequences`. With an error: as far as it came, or None.
        error: what kept it from being decoded to its end, or None.
    """

    index: int
    tokens: Tensor | None
    error: BaseException | None = None


def generate_many(
    model: PreTrainedModel,
    prompts: Iterable[Prompt],
    *,
    max_batch_size: int = 8,
    max_prompt_length: int | None = None,
    in_order: bool = True,
    progress: bool = True,
    **settings: Any,
) -> Iterator[Result]:
    """Decode any number of prompts, `max_batch_size` at once, and hand out results as they come.

        for result in specdec.generate_many(model, prompts, max_new_tokens=256):
            print(tokenizer.decode(result.tokens))

    One prompt's failure is its own result's `error`. When interrupted, what is complete is handed out first, and what
    was under way, with the exception as its error; then the exception is raised. One of `prompts` itself is raised
    when those read are done. Until the iterator has ended or is closed, other calls of this model run transformers'
    own loop.

    Args:
        model: from `specdec.compile`.
        prompts: of token ids: a list, a tensor [length] or [1, length], or what a tokenizer returns for one text.
        max_batch_size: rows. `model.specdec.memory(max_batch_size, length)` says what they take.
        max_prompt_length: with it, prompts are read as rows come free, and longer ones are errors; without, all are
            read at first, because memory is allocated once, for the longest.
        in_order: hand results out in the order of the prompts; False: as they are complete.
        progress: show a bar on stderr, where that is a terminal.
        settings: of every prompt, as for `generate()`. Objects given (criteria, prefix_allowed_tokens_fn) serve all
            prompts in turns: what they say must depend on the text alone.

    Raises:
        TypeError: `prompts` is one mapping, or has texts in place of token ids; a size is no whole number, or a flag no
            bool.
        ValueError: `model` is not from `specdec.compile`, a size is not positive, there is a streamer, or the seeds
            that were set are not one a prompt.
        RuntimeError: there is no memory for the rows, steps fail without any text's ending in between, or another
            call of this model is running.
    """
    if not isinstance(getattr(model, "specdec", None), Handle):
        raise ValueError("generate_many() takes a model from specdec.compile()")
    with model.specdec._calls.seeds.one_call():  # seeds that were set are this one's, also where it goes no further
        max_batch_size = whole("max_batch_size", max_batch_size)
        if max_prompt_length is not None:
            max_prompt_length = whole("max_prompt_length", max_prompt_length)
        flag("in_order", in_order), flag("progress", progress)
        if isinstance(prompts, Mapping | str):
            kind = "one mapping" if isinstance(prompts, Mapping) else repr(prompts)
            raise TypeError(f"prompts must be a sequence of prompts, each of token ids, and got {kind}")
        if settings.get("streamer") is not None:
            raise ValueError("generate_many() decodes several texts at once, and a streamer takes one")
        if max_prompt_length is None:
            prompts = list(prompts)
            for index, prompt in enumerate(prompts):
                _check_ids(prompt, f"prompt {index}")
            max_prompt_length = max((_length(prompt) for prompt in prompts), default=1)
        return _Run(model, prompts, max_batch_size, max_prompt_length, settings).results(in_order, progress)


class _Run:
    """One call of `generate_many`."""

    def __init__(
        self, model: PreTrainedModel, prompts: Iterable[Prompt], n_rows: int, longest: int, settings: dict[str, Any]
    ) -> None:
        self._model, self._settings = model, settings
        self._handle: Handle = model.specdec
        self._total = len(prompts) if isinstance(prompts, Sized) else None
        self._n_rows, self._longest = n_rows if self._total is None else min(n_rows, max(self._total, 1)), longest
        self._prompts = prompts
        self._seeds = self._handle._calls.seeds.take(self._total)
        self._done: list[Result] = []
        self._under_way: dict[Text, tuple[int, float | None]] = {}  # which prompt's, and its deadline
        self._call: Call | None = None  # the first prompt's, which all others resemble
        self._interruption: BaseException | None = None  # raised in the end

    def results(self, in_order: bool, progress: bool) -> Generator[Result]:
        """All results; see `generate_many`."""
        waiting: dict[int, Result] = {}
        following, work = 0, self._work()
        with bars.counter(self._total, shown=progress) as bar:
            has_ended = False
            while not has_ended:
                try:
                    has_ended = next(work, None) is None
                except BaseException as error:
                    has_ended, self._interruption = True, error
                    self._done += [Result(i, text.ids.cpu(), error) for text, (i, _) in self._under_way.items()]
                bar.advance(len(self._done))
                waiting |= {result.index: result for result in self._done}
                self._done = []
                while following in waiting or (waiting and (has_ended or not in_order)):
                    following = following if following in waiting else min(waiting)
                    yield waiting.pop(following)
                    following += 1
        if self._interruption is not None:
            raise self._interruption

    def _work(self) -> Generator[bool]:
        """Decode, filling `_done`; stops now and then, that it may be emptied."""
        texts = self._texts()
        first = next(texts, None)  # its call says how all are decoded
        if first is None or self._call is None:
            return
        request, queue = self._call.request, chain([first], texts)
        longest = self._longest + request.max_new_tokens
        if self._call.limits_whole_text:
            longest = len(first.prompt) + request.max_new_tokens
        # Memory for all of it at once, where texts may come to that: limits can be beyond any model's positions.
        config = self._model.config.get_text_config()
        room = max(self._longest, min(longest, getattr(config, "max_position_embeddings", longest)))
        with self._handle._calls.alone():
            n_ended = -1
            while n_ended:
                n_ended = 0
                decoder = self._handle._decoders.get(self._call.draft, request.law, self._call.config)
                run = decoder.run(queue, self._n_rows, longest, room, request.law, request.eos_ids)
                while isinstance(emitted := self._next(run), list):
                    n_ended += self._collect([piece.text for piece in emitted])
                    yield True
                if emitted is None:
                    return
                for text in self._under_way:
                    text.fail(emitted)
                self._collect(list(self._under_way))
                clear_frames(emitted.__traceback__)  # or results would hold the buffers, for which memory may lack
                self._handle.free()
                if not n_ended:
                    size = self._handle.memory(self._n_rows, room) / 2**30
                    rows = f"{self._n_rows} rows of {room} tokens, {size:.1f} GiB"
                    raise RuntimeError(f"decoding stopped, with {rows}: {emitted}") from emitted
                yield True

    def _next(self, run: Iterator[list[Emitted]]) -> list[Emitted] | Exception | None:
        """What happened in a step, None after the last one, or its error: one of all texts under way."""
        try:
            with decoding(self._model), agreed_memory():  # not while the caller has its turn
                return next(run, None)
        except Exception as error:
            return error

    def _collect(self, texts: Iterable[Text]) -> int:
        """Results of those texts that have ended, also for lack of time; how many."""
        n_ended = 0
        for text in texts:
            index, deadline = self._under_way[text]
            if is_past(deadline):
                text.finished = True
            if text.finished:
                del self._under_way[text]
                self._done.append(Result(index, text.ids.cpu(), text.error))
                n_ended += 1
        return n_ended

    def _texts(self) -> Generator[Text]:
        """The prompts that can be decoded together, each checked by transformers when a row is free for it; the others
        are dealt with."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        for index, prompt, seed in self._read():
            try:
                ids = _ids(prompt, self._model.device)
                if len(ids) > self._longest:
                    raise ValueError(f"a prompt of {len(ids)} tokens is longer than {self._longest}, the most allowed")
                if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:  # others would fail with it, in a step
                    raise ValueError(f"tokens {ids.min()} to {ids.max()}, of a model that has {vocabulary}")
                with self._handle._calls.serving(Purpose.ASK, knows_model=self._call is not None):
                    call = self._model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **self._settings)
                if not isinstance(call, Call):  # transformers' own result
                    out = getattr(call, "sequences", call)  # with return_dict_in_generate
                    self._done.append(Result(index, out[0].cpu() if len(out) == 1 else out.cpu()))
                    continue
                self._call = self._call or call
            except Exception as error:
                self._done.append(Result(index, None, error))
                continue
            request = call.request
            text = request.text(0, seed)
            self._under_way[text] = index, request.deadline
            yield text

    def _read(self) -> Generator[tuple[int, Prompt, int]]:
        """Prompts, by their places, with their seeds. An error of theirs ends them, and waits for those read."""
        try:
            for index, prompt in enumerate(self._prompts):
                seed = next(self._seeds, None)
                if seed is None:
                    raise ValueError(f"{index} seeds were set for more prompts")
                yield index, prompt, seed
        except Exception as error:
            self._interruption = error


def _length(prompt: Prompt) -> int:
    """Tokens of a prompt, or 0 where it is none: it fails when its turn comes."""
    ids = prompt["input_ids"] if isinstance(prompt, Mapping) and "input_ids" in prompt else prompt
    if isinstance(ids, Sequence) and len(ids) == 1 and (isinstance(ids[0], Sequence) or hasattr(ids[0], "shape")):
        ids = ids[0]
    if hasattr(ids, "shape"):  # torch's, NumPy's
        return math.prod(ids.shape)
    return len(ids) if isinstance(ids, Sequence) else 0


def _check_ids(prompt: Any, name: str = "a prompt") -> None:
    """Whether this may be token ids.

    Raises:
        TypeError: it is text.
    """
    if isinstance(prompt, str | bytes) or (isinstance(prompt, list) and any(isinstance(x, str) for x in prompt[:1])):
        raise TypeError(f"{name} must be token ids, as in tokenizer(text).input_ids, and is text: {prompt!r:.60}")


def _ids(prompt: Prompt, device: torch.device) -> Tensor:
    """[length] int64, without padding.

    Raises:
        ValueError, TypeError: it is not one text's token ids.
    """
    _check_ids(prompt)
    mask = prompt.get("attention_mask") if isinstance(prompt, Mapping) else None
    ids = torch.as_tensor(prompt["input_ids"] if isinstance(prompt, Mapping) else prompt, device="cpu")
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"a prompt is one text's token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    if mask is not None:
        ids = ids[torch.as_tensor(mask, device="cpu").flatten().bool()]
    return ids.to(device, torch.int64)
