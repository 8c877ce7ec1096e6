"""Beam search: transformers' own loop runs, with all of its rules, and asks for logits; a forest answers.

So sequences, scores and beam indices are transformers' by construction, and with equal states of torch's generator
those of beam sampling, too. What is speculated changes only how often the target runs: where the beams that the loop
has chosen are nodes that the target has read, it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from specdec.errors import Unsupported
from specdec.hf import ambient, names
from specdec.hf.call import check_arguments, check_positions, read_criteria, strip_padding, wanted_outputs
from specdec.hf.names import PreTrainedModel
from specdec.hf.prefix import is_users
from specdec.hf.processors import check as check_processors
from specdec.hf.support import check_context, check_mode, check_model


@dataclass(frozen=True)
class BeamRequest:
    """A call of transformers' beam loop.

    Attributes:
        prompts: one [length] int64 tensor a sample, padding stripped. width: columns of the padded prompts.
        n_beams: W. longest: no text gets longer. ends: ids that end a text.
    """

    prompts: list[Tensor]
    width: int
    n_beams: int
    longest: int
    ends: frozenset[int]

    @classmethod
    def parse(cls, call: names.LoopCall) -> BeamRequest:
        """What is asked for.

        Raises:
            Unsupported: with the reason.
        """
        model, ids, n_beams = call.self, call.input_ids, call.generation_config.num_beams
        check_model(model)
        if call.synced_gpus:
            raise Unsupported("synced_gpus")
        wanted_outputs(call.generation_config)
        check_arguments(call.model_kwargs)
        check_mode(model)
        ambient.check(ids.device)
        if len(ids) == 0:
            raise Unsupported("an empty batch")
        rows = strip_padding(ids, call.model_kwargs.get("attention_mask"))
        if min(map(len, rows)) == 0:
            raise Unsupported("an empty prompt")
        check_positions(rows, ids.shape[1], call.model_kwargs.get("position_ids"))
        check_processors(call.logits_processor, len(ids))
        past = names.cache_in(call.model_kwargs)
        if past is not None and (is_users(past) or past.get_seq_length() > 0):
            raise Unsupported("past_key_values with beams")
        max_length, ends, _, _ = read_criteria(call.stopping_criteria, model.config.get_text_config().vocab_size)
        prompts = rows[::n_beams]
        longest = max(map(len, prompts)) + max_length - ids.shape[1]
        check_context(model, longest)
        return cls(prompts, ids.shape[1], n_beams, longest, frozenset(ends.tolist()))

    def after(self, ids: Tensor, committed: Callable[[int], int]) -> list[list[list[int]]]:
        """By sample and beam, the tokens of its text after the first `committed(sample) + 1`; `ids` [B * W, length]."""
        skipped = [self.width - len(prompt) + committed(b) + 1 for b, prompt in enumerate(self.prompts)]
        rows = ids[:, min(skipped) :].tolist()  # the loop, too, asks the host in each layer whether to go on
        own = [rows[b * self.n_beams : (b + 1) * self.n_beams] for b in range(len(skipped))]
        return [[row[skip - min(skipped) :] for row in rows] for skip, rows in zip(skipped, own, strict=True)]


class Answers(SimpleNamespace):
    """What stands in for a forward's output."""


def run(call: names.LoopCall, answer: Callable[[Tensor], Tensor]) -> Any:
    """What transformers' beam loop returns, whose forwards are answered.

    Args:
        answer: from the texts of all beams, [B * W, length], to the logits after them, [B * W, V].
    """
    kind: Any = type(call.self)
    model = object.__new__(_answering(kind))
    model.__dict__ = call.self.__dict__
    object.__setattr__(model, "_specdec_answer", answer)
    out = model._beam_search(
        call.input_ids, logits_processor=call.logits_processor, stopping_criteria=call.stopping_criteria,
        generation_config=call.generation_config, **call.model_kwargs,
    )  # fmt: skip
    name = names.output_name()
    if name is not None and not isinstance(out, Tensor) and getattr(out, name, None) is not None:
        setattr(out, name, None)  # nobody has filled the cache that the loop was given
    return out


@cache
def _answering(wrapped: type[PreTrainedModel]) -> Any:
    """The class of a wrapped model, whose forwards in the beam loop are answered."""
    parent: Any = wrapped.__mro__[1]

    def answers(self: Any, ids: Tensor) -> Answers:
        return Answers(logits=self._specdec_answer(ids)[:, None])

    methods = {
        "_prefill": lambda self, input_ids, *args, **kwargs: answers(self, input_ids),
        "prepare_inputs_for_generation": lambda self, input_ids, *args, **kwargs: {"input_ids": input_ids},
        "__call__": lambda self, input_ids, **kwargs: answers(self, input_ids),
        "_update_model_kwargs_for_generation": lambda self, outputs, model_kwargs, **kwargs: model_kwargs,
        "_reorder_cache": lambda self, past, beam_idx: past,
    }
    return type(parent.__name__, (parent,), {"__slots__": ("_specdec_answer",), **methods})
