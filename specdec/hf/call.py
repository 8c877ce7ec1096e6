"""One `generate()` call as the decoder sees it, or the reason it cannot be: the one place where calls are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from specdec.arguments import share, whole
from specdec.config import Config
from specdec.engine.laws import SamplingLaw
from specdec.engine.text import Process, Record, Text
from specdec.errors import Unsupported
from specdec.hf import ambient, names
from specdec.hf.laws import is_of_a_row, law_of
from specdec.hf.prefix import Past, is_users
from specdec.hf.processors import asks_user, is_pure, process_row
from specdec.hf.processors import check as check_processors
from specdec.hf.support import check_context, check_mode, check_model
from specdec.hf.wrap import unwrapped

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
        """[B, length] int64, the prompts followed by the new texts, padded on the right as transformers pads finished
        rows.

        Args:
            input_ids: [B, width]. texts: decoded, of all rows.
        """
        new = [text.tokens for text in texts]
        out = torch.full((len(new), max(map(len, new))), self.pad, dtype=torch.int64, device=input_ids.device)
        for row, tokens in enumerate(new):
            out[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        return torch.cat([input_ids, out], 1)

    def output(self, sequences: Tensor, texts: list[Text]) -> Any:
        """What `generate()` returns: the sequences, and what else is wanted of the texts."""
        if self.outputs is None:
            return sequences
        kept = {
            name: tuple(torch.cat(rows) for rows in zip(*(getattr(t.record, name) for t in texts), strict=True))
            for name in self.outputs
        }
        past = None if self.past is None else self.past.cache
        return names.output(sequences, past, **kept)

    @property
    def longest(self) -> int:
        """No text gets longer, prompt and new tokens."""
        return max(len(prompt) for prompt in self.prompts) + self.max_new_tokens

    @classmethod
    def parse(cls, call: names.LoopCall) -> Request:
        """What a call of transformers' decoding loop asks for.

        Raises:
            Unsupported: with the reason.
        """
        check_model(call.self)
        if call.synced_gpus:
            raise Unsupported("synced_gpus")
        if call.streamer is not None and len(call.input_ids) > 1:
            raise Unsupported("a streamer with a batch of several samples")
        return cls._read(call)

    @classmethod
    def parse_one_of_many(cls, call: names.LoopCall, knows_model: bool) -> Request:
        """The same of a call whose text is to be decoded together with those of others.

        Args:
            knows_model: whether the model has been looked at.

        Raises:
            Unsupported: with the reason.
        """
        if not knows_model:
            check_model(call.self)
        request = cls._read(call)
        if len(request.prompts) > 1:
            raise Unsupported("num_return_sequences in generate_many()")
        if request.outputs or (request.past and is_users(request.past.cache)):
            raise Unsupported("scores, logits and past_key_values in generate_many()")
        if request.has_own_processors:  # texts would take turns
            raise Unsupported("logits processors of one's own in generate_many()")
        return request

    @classmethod
    def _read(cls, call: names.LoopCall) -> Request:
        model, input_ids, processors = call.self, call.input_ids, call.logits_processor
        n_batch, width = input_ids.shape[:2]
        outputs = wanted_outputs(call.generation_config)
        check_arguments(call.model_kwargs)
        check_mode(model)
        ambient.check(input_ids.device)
        if n_batch == 0:
            raise Unsupported("an empty batch")
        prompts = strip_padding(input_ids, call.model_kwargs.get("attention_mask"))
        if min(len(p) for p in prompts) == 0:
            raise Unsupported("an empty prompt")
        check_positions(prompts, width, call.model_kwargs.get("position_ids"))
        check_processors(processors, n_batch)
        law = law_of(processors, call.generation_config.do_sample, model.device, bool(outputs))
        n_rows = getattr(model.get_input_embeddings(), "num_embeddings", 0)
        n_tokens = max(model.config.get_text_config().vocab_size, n_rows)
        max_length, eos_ids, deadline, others = read_criteria(call.stopping_criteria, n_tokens)
        if n_batch > 1:
            _check_batch(call, others)
        if outputs and others:
            raise Unsupported(f"output_{min(outputs)} with stopping criterion {type(others[0]).__name__}")
        if outputs and len(eos_ids) and n_batch > 1:
            raise Unsupported(f"output_{min(outputs)} of a batch whose texts may end before others")
        if max_length <= width:
            raise Unsupported("no room for a new token")
        check_context(model, max(len(p) for p in prompts) + max_length - width)
        rows, cache = range(n_batch), names.cache_in(call.model_kwargs)
        past = None
        if cache is not None and (outputs is not None or is_users(cache)):
            past = Past.of(cache, width, [width - len(prompt) for prompt in prompts])
        ends = [partial(_end, others, input_ids[row : row + 1]) for row in rows] if others else None
        processes = None
        if not all(map(is_of_a_row, processors)) or outputs:
            padding = [input_ids[row, : width - len(prompt)] for row, prompt in enumerate(prompts)]
            processes = [process_row(processors, row, padding[row]) for row in rows]
        return cls(
            prompts, law, min(max_length - width, _UNLIMITED), eos_ids, deadline, ends, processes, outputs, past,
            has_own_processors=not all(map(is_pure, processors)), pad=names.pad_token(call.generation_config),
        )  # fmt: skip


@dataclass(frozen=True)
class Assistance:
    """What a call of transformers' assisted generation names to draft with.

    Attributes:
        model: the assistant; None to look the text's last words up in the text. tokenizers: of the call's model and of
            the assistant, where these differ. early_exit: how many of the call's model's first layers draft instead.
        config: the options. ignored: settings that are not followed, where that changes nothing but speed.
    """

    model: PreTrainedModel | None
    tokenizers: tuple[Any, Any] | None
    config: Config
    ignored: tuple[str, ...] = ()
    early_exit: int | None = None

    @classmethod
    def parse(cls, call: names.LoopCall, config: Config) -> Assistance:
        """What a call says; the rest of the options is as in `config`.

        Raises:
            Unsupported: with the reason. TypeError, ValueError: a number is none, or cannot be.
        """
        generation_config = call.generation_config
        for name in ("use_mtp", "speculation_type", "assistant_ensemble_weight"):
            if getattr(generation_config, name, None):
                raise Unsupported(f"assisted generation with {name}")
        if generation_config.assistant_early_exit is not None:
            early_exit = whole("assistant_early_exit", generation_config.assistant_early_exit)
            return cls(None, None, *_assistants_options(generation_config, call.self, config), early_exit)
        if (assistant := unwrapped(call.assistant_model)) is not None:
            tokenizers = None if call.assistant_tokenizer is None else (call.tokenizer, call.assistant_tokenizer)
            return cls(assistant, tokenizers, *_assistants_options(generation_config, assistant, config))
        if generation_config.prompt_lookup_num_tokens is not None:
            depth = whole("prompt_lookup_num_tokens", generation_config.prompt_lookup_num_tokens)
            longest = whole("max_matching_ngram_size", generation_config.max_matching_ngram_size or 2)
            return cls(None, None, replace(config, depth=depth, max_ngram=longest, tree=None))
        raise Unsupported("assisted generation without an assistant model or prompt lookup")


def _assistants_options(
    generation_config: GenerationConfig, assistant: PreTrainedModel, options: Config
) -> tuple[Config, tuple[str, ...]]:
    """The options, with what a call says of how much is drafted, or else the assistant's own configuration, where
    transformers looks for it; and what is ignored of it. What transformers fills in by itself is nobody's wish."""
    own, ignored = getattr(assistant, "generation_config", None), []

    def asked(name: str) -> Any:
        of_call = names.asked(generation_config, name)
        return getattr(own, name, None) if of_call is None else of_call

    if (depth := asked("num_assistant_tokens")) is not None:
        options = replace(options, depth=whole("num_assistant_tokens", depth), tree=None)
    schedule = asked("num_assistant_tokens_schedule")
    if schedule == "constant":
        options = replace(options, adapt=False)
    elif schedule in ("heuristic", "heuristic_transient"):
        options = replace(options, adapt=options.adapt or None)
    elif schedule is not None:
        ignored.append(f"num_assistant_tokens_schedule={schedule!r}")
    if (threshold := asked("assistant_confidence_threshold")) is not None:
        if options.tree is not None and not options.tree.is_chain:
            ignored.append("assistant_confidence_threshold")
        else:  # with 0 nothing is below it
            stop_below = share("assistant_confidence_threshold", threshold) if threshold else None
            options = replace(options, stop_below=stop_below)
    return options, tuple(ignored)


def wanted_outputs(generation_config: GenerationConfig) -> frozenset[str] | None:
    """See `Request.outputs`."""
    if not generation_config.return_dict_in_generate:  # without it nothing else comes out
        return None
    if inner := [name for name in _INNER_OUTPUTS if getattr(generation_config, name)]:
        raise Unsupported(f"{', '.join(inner)}, which come out of layers")
    wanted = {"scores": generation_config.output_scores, "logits": generation_config.output_logits}
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def check_arguments(model_kwargs: dict[str, Any]) -> None:
    given = {k for k, v in model_kwargs.items() if v is not None and not (isinstance(v, dict) and not v)}
    if extra := sorted(given - names.PLAIN_ARGUMENTS):
        raise Unsupported(f"model arguments {', '.join(extra)}", names.hint())
    if not model_kwargs.get("use_cache", True):
        raise Unsupported("use_cache=False")


def _check_batch(call: names.LoopCall, others: StoppingCriteriaList) -> None:
    """Whether what a call is given serves several texts at once. `others`: the criteria that look at a text."""
    users = [f"logits processor {type(p).__name__}" for p in call.logits_processor if asks_user(p)] + [
        f"stopping criterion {type(c).__name__}" for c in others if type(c) is not names.StopStringCriteria
    ]
    if users:
        raise Unsupported(f"{users[0]} with a batch of several samples")
    pads = any(type(criterion) is names.EosTokenCriteria for criterion in call.stopping_criteria)
    if others and not pads:  # there what has stopped goes on until all have
        raise Unsupported("stop strings with a batch of several samples and no end of text")


def strip_padding(input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
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


def check_positions(prompts: list[Tensor], width: int, positions: Tensor | None) -> None:
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


def read_criteria(
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
