"""One `generate()` call as the decoder sees it, or the reason it cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from specdec.engine.laws import SamplingLaw
from specdec.engine.text import Process, Record, Text
from specdec.errors import Unsupported
from specdec.hf import ambient, names
from specdec.hf.laws import is_of_a_row, law_of
from specdec.hf.prefix import Past, is_users
from specdec.hf.processors import asks_user, is_pure, process_row
from specdec.hf.processors import check as check_processors
from specdec.hf.support import check_context, check_mode

_UNLIMITED = 2**48  # tokens: more than any text will have, and few enough to count with
_INNER_OUTPUTS = "output_attentions", "output_hidden_states"


@dataclass
class Request:
    """A batch to decode.

    Attributes:
        prompts: one [length] int64 tensor a sample, padding stripped.
        law: the sampling law.
        max_new_tokens: at most this many tokens are added to a text.
        eos_ids: [E] int64, may be empty.
        deadline: `time.time()` after which no further step starts, or None.
        ends: whether the other criteria end a text, given its new tokens; one a sample, or None without any.
        processes: what the logits processors that look at the text make of scores; likewise.
        outputs: None for the texts alone; else what is wanted beside them, of "scores" and "logits".
        past: the cache that the caller handed in or wants back, or None.
        has_own_processors: whether some are the user's own, which may keep a state of one text.
        pad: the token that rows are filled up with.
    """

    prompts: list[Tensor]
    law: SamplingLaw
    max_new_tokens: int
    eos_ids: Tensor
    deadline: float | None
    ends: Sequence[Callable[[list[int]], bool]] | None = None
    processes: list[Process] | None = None
    outputs: frozenset[str] | None = None
    past: Past | None = None
    has_own_processors: bool = False
    pad: int = 0

    def text(self, row: int, seed: int) -> Text:
        """The sample of a row, to be decoded."""
        return Text(
            self.prompts[row].clone(), self.max_new_tokens, seed,
            ends=self.ends[row] if self.ends else None,
            process=self.processes[row] if self.processes else None,
            record=Record() if self.outputs else None,
            prefix=self.past if self.past and self.past.n_known else None,
        )  # fmt: skip

    def sequences(self, input_ids: Tensor, texts: list[Text]) -> Tensor:
        """[B, length]: the prompts [B, width] followed by the new texts, padded on the right as transformers pads
        finished rows."""
        new = [text.tokens for text in texts]
        out = torch.full((len(new), max(map(len, new))), self.pad, dtype=torch.int64, device=input_ids.device)
        for row, tokens in enumerate(new):
            out[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        return torch.cat([input_ids, out], 1)

    def result(self, sequences: Tensor, texts: list[Text]) -> Any:
        """What `generate()` returns: the sequences [B, length], and what else is wanted of the texts, of all rows."""
        if self.outputs is None:
            return sequences
        kept = {
            name: tuple(torch.cat(rows) for rows in zip(*(getattr(t.record, name) for t in texts), strict=True))
            for name in self.outputs
        }
        past = None if self.past is None else self.past.cache
        return names.output(sequences, past, **kept)

    def check_among_others(self) -> None:
        """Whether it can be decoded in a batch of other calls.

        Raises:
            Unsupported: it cannot.
        """
        if len(self.prompts) > 1:
            raise Unsupported("num_return_sequences in generate_many()")
        if self.outputs or (self.past and is_users(self.past.cache)):
            raise Unsupported("scores, logits and past_key_values in generate_many()")
        if self.has_own_processors:  # texts would take turns
            raise Unsupported("logits processors of one's own in generate_many()")

    @property
    def longest(self) -> int:
        """No text gets longer, prompt and new tokens."""
        return max(len(prompt) for prompt in self.prompts) + self.max_new_tokens

    @classmethod
    def parse(cls, call: names.LoopCall) -> Request:
        """Read the arguments of transformers' decoding loop.

        Raises:
            Unsupported: with the reason.
        """
        model, input_ids, model_kwargs = call.self, call.input_ids, call.model_kwargs
        processors, criteria = call.logits_processor, call.stopping_criteria
        generation_config = call.generation_config
        if call.synced_gpus:
            raise Unsupported("synced_gpus")
        if call.streamer is not None and len(input_ids) > 1:
            raise Unsupported("a streamer with a batch of several samples")
        outputs = None
        if generation_config.return_dict_in_generate:  # without it nothing else comes out
            if inner := [name for name in _INNER_OUTPUTS if getattr(generation_config, name)]:
                raise Unsupported(", ".join(inner))
            wanted = {"scores": generation_config.output_scores, "logits": generation_config.output_logits}
            outputs = frozenset(name for name, is_wanted in wanted.items() if is_wanted)
        given = {k for k, v in model_kwargs.items() if v is not None and not (isinstance(v, dict) and not v)}
        extra = sorted(given - names.PLAIN_ARGUMENTS)
        if extra:
            raise Unsupported(f"model arguments {', '.join(extra)}", names.hint())
        if not model_kwargs.get("use_cache", True):
            raise Unsupported("use_cache=False")
        check_mode(model)
        ambient.check(input_ids.device)
        if len(input_ids) == 0:
            raise Unsupported("an empty batch")
        prompts = _strip_padding(input_ids, model_kwargs.get("attention_mask"))
        if min(len(p) for p in prompts) == 0:
            raise Unsupported("an empty prompt")
        _check_positions(prompts, input_ids.shape[1], model_kwargs.get("position_ids"))
        check_processors(processors, len(input_ids))
        law = law_of(processors, generation_config.do_sample, model.device, bool(outputs))
        n_rows = getattr(model.get_input_embeddings(), "num_embeddings", 0)
        n_tokens = max(model.config.get_text_config().vocab_size, n_rows)
        max_length, eos_ids, deadline, others = _read_criteria(criteria, n_tokens)
        own = [p for p in processors if not is_pure(p)]
        users = [f"logits processor {type(p).__name__}" for p in processors if asks_user(p)] + [
            f"stopping criterion {type(c).__name__}" for c in others if type(c) is not names.StopStringCriteria
        ]
        if users and len(input_ids) > 1:
            raise Unsupported(f"{users[0]} with a batch of several samples")
        pads = any(type(criterion) is names.EosTokenCriteria for criterion in criteria)
        if others and len(input_ids) > 1 and not pads:  # there what has stopped goes on until all have
            raise Unsupported("stop strings with a batch of several samples and no end of text")
        if outputs and others:
            raise Unsupported(f"output_{min(outputs)} with stopping criterion {type(others[0]).__name__}")
        if outputs and len(eos_ids) and len(input_ids) > 1:
            raise Unsupported(f"output_{min(outputs)} of a batch whose texts may end before others")
        if max_length <= input_ids.shape[1]:
            raise Unsupported("no room for a new token")
        check_context(model, max(len(p) for p in prompts) + max_length - input_ids.shape[1])
        rows, width, cache = range(len(prompts)), input_ids.shape[1], names.cache_in(model_kwargs)
        past = None
        if cache is not None and (outputs is not None or is_users(cache)):
            past = Past.of(cache, width, [width - len(prompt) for prompt in prompts])
        ends = [partial(_end, others, input_ids[row : row + 1]) for row in rows] if others else None
        processes = None
        if not all(map(is_of_a_row, processors)) or outputs:
            padding = [input_ids[row, : width - len(prompt)] for row, prompt in enumerate(prompts)]
            processes = [process_row(processors, row, padding[row]) for row in rows]
        pad, most = names.pad_token(generation_config), min(max_length - width, _UNLIMITED)
        return cls(prompts, law, most, eos_ids, deadline, ends, processes, outputs, past, bool(own), pad)


@contextmanager
def alone(lock: Lock) -> Generator[None]:
    """No other call of a model is decoded meanwhile: that which holds its lock.

    Raises:
        Unsupported: another one is.
    """
    if not lock.acquire(blocking=False):
        raise Unsupported("another generate() of this model is running")
    try:
        yield
    finally:
        lock.release()


def out_of_memory(call: names.LoopCall) -> Unsupported:
    """Why a call was given up that memory was lacking for."""
    return Unsupported("out of memory", f"a batch of {len(call.input_ids)}")


def _strip_padding(input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    if mask is None:
        return list(input_ids.unbind())
    if mask.shape != input_ids.shape:
        shapes = f"{tuple(mask.shape)} for tokens of shape {tuple(input_ids.shape)}"
        raise Unsupported("an attention mask of another shape than the tokens", shapes)
    counts = mask.long().sum(1).tolist()
    width = input_ids.shape[1]
    tails = torch.arange(width, device=mask.device, dtype=torch.int64) >= width - mask.long().sum(1, keepdim=True)
    if not torch.equal(mask.bool(), tails):
        raise Unsupported("an attention mask with holes or right padding")
    return [row[width - n :] for row, n in zip(input_ids, counts, strict=True)]


def _check_positions(prompts: list[Tensor], width: int, positions: Tensor | None) -> None:
    """[B or 1, width] int64, or several axes of these, of which a text's are all alike."""
    if positions is None:
        return
    for axis in positions.reshape(-1, *positions.shape[-2:]):
        counted = axis.shape[-1] == width and len(axis) in (1, len(prompts))
        for row, prompt in zip(axis.expand(len(prompts), -1) if counted else (), prompts, strict=counted):
            place = torch.arange(len(prompt), device=row.device, dtype=torch.int64)
            counted &= torch.equal(row[width - len(prompt) :], place)
        if not counted:
            raise Unsupported("position_ids that do not count the tokens of the prompt")


def _end(criteria: StoppingCriteriaList, input_ids: Tensor, tokens: list[int]) -> bool:
    """What transformers' loop asks after each token, of one text."""
    new = torch.tensor([tokens], dtype=input_ids.dtype, device=input_ids.device)
    return bool(criteria(torch.cat([input_ids, new], 1), None).all())


def _read_criteria(
    criteria: StoppingCriteriaList, n_tokens: int
) -> tuple[int, Tensor, float | None, StoppingCriteriaList]:
    """The longest text, the ends of text among a model's `n_tokens`, the deadline, and the criteria that are none of
    these."""
    max_length, eos_ids, deadline = None, torch.empty(0, dtype=torch.int64, device="cpu"), None
    others = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is names.MaxLengthCriteria:
            longest = criterion.max_length
            longest = math.ceil(longest) if isinstance(longest, float) else longest
            max_length = min(longest, max_length or longest)
        elif type(criterion) is names.EosTokenCriteria:
            eos_ids = torch.cat([eos_ids, criterion.eos_token_id.flatten().long().cpu()])
        elif type(criterion) is names.MaxTimeCriteria:
            ends = criterion.initial_timestamp + criterion.max_time
            deadline = min(ends, deadline or ends)
        else:
            others.append(criterion)
    if max_length is None:
        raise Unsupported("no length limit")
    eos_ids = eos_ids[(eos_ids >= 0) & (eos_ids < n_tokens)]  # no text ends with another, as with -1 for "never"
    return max_length, eos_ids, deadline, others
