"""Logits processors: which of them can be asked text by text, and how one row of a batch asks them.

How they are asked along a draft, see `specdec.engine.walk`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec.engine.text import Process
from specdec.errors import Unsupported
from specdec.hf import names
from specdec.hf.laws import is_of_a_row

# Functions of one text and its scores.
_PURE: tuple[type, ...] = tuple(
    names.processor(name)
    for name in (
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TopHLogitsWarper",
    )
)
_PREFIX_CONSTRAINED = names.processor("PrefixConstrainedLogitsProcessor")
# What some of these hold has a row a sample.
_OF_A_BATCH: dict[type, str] = {
    names.processor("EncoderNoRepeatNGramLogitsProcessor"): "generated_ngrams",
    names.processor("EncoderRepetitionPenaltyLogitsProcessor"): "encoder_input_ids",
    names.processor("RepetitionPenaltyLogitsProcessor"): "prompt_ignore_length",
}


def is_pure(processor: Any) -> bool:
    """Whether the processor keeps nothing from one call to the next."""
    return type(processor) in _PURE or is_of_a_row(processor)


def asks_user(processor: Any) -> bool:
    """Whether the processor runs code of the user's, which may keep a state: what it says of a text can depend on the
    texts it was shown before, and a batch shows them in another order than transformers' loop."""
    return not is_pure(processor) or type(processor) is _PREFIX_CONSTRAINED


def check(processors: LogitsProcessorList, n_rows: int) -> None:
    """Whether these can be asked text by text, of so many rows.

    Raises:
        Unsupported: naming those of transformers' own that cannot: they run the model, mark whole batches, are for
            models that speak, or were made for another number of rows.
    """
    own = [p for p in processors if type(p).__module__ == names.PROCESSORS_MODULE]
    if refused := sorted({type(p).__name__ for p in own if not is_pure(p) or len(_held(p) or [0] * n_rows) != n_rows}):
        raise Unsupported(f"logits processors {', '.join(refused)}")


def _held(processor: Any) -> list[Any] | None:
    """What a processor holds by row."""
    held = getattr(processor, _OF_A_BATCH.get(type(processor), ""), None)
    return list(held) if isinstance(held, list | Tensor) else None


def process_row(processors: LogitsProcessorList, row: int, padding: Tensor) -> Process:
    """The processors of a batch, for one of its rows.

    Args:
        padding: [n] int64, what stands before the text in its row.
    """
    own = LogitsProcessorList([_for_row(p, row) for p in processors])
    return lambda ids, scores: own(torch.cat([padding[None], ids], 1), scores)


def _for_row(processor: Any, row: int) -> Any:
    if (held := _held(processor)) is None:
        return processor
    one = copy.copy(processor)
    setattr(one, _OF_A_BATCH[type(one)], torch.stack([held[row]]) if isinstance(held[row], Tensor) else [held[row]])
    if hasattr(one, "batch_size"):
        one.batch_size = 1
    return one
