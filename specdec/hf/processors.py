"""Laws that depend on the text: logits processors, asked on the host for one new token after the other.

A step's forward gives the target's logits after every drafted node. Which of them count is found by walking: the
processors see the text up to a node, as in transformers' loop, and the target's choice after it is made; where a child
of the node is that very token, it is accepted and the walk goes on. So processors are called for the texts that
transformers calls them for, in the same order, once each: even those that keep a state serve one text at a time.

Sampled choices are drawn with noise that depends on nothing but seed and position: a seed's text is the same with any
draft, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec.engine.laws import SamplingLaw
from specdec.errors import Unsupported
from specdec.hf import names
from specdec.hf.laws import is_of_a_row
from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS

if TYPE_CHECKING:
    from specdec.engine.slots import Text
    from specdec.engine.state import BatchState
    from specdec.engine.tree import TokenTree

Process = Callable[[Tensor, Tensor], Tensor]
"""From a text [1, length] int64, without padding, and its next token's logits [1, V] float32 to scores [1, V]."""

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


@dataclass
class Record:
    """What `output_logits` and `output_scores` ask for, by new token: [1, V] float32 each, before and after the
    processors."""

    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def cut(self, n_tokens: int) -> None:
        """Forget what came after so many tokens."""
        del self.logits[n_tokens:], self.scores[n_tokens:]


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


class Chosen(NamedTuple):
    """What the target chose along the drafts: path [B, D + 1], n_accepted [B], bonus [B] int64, on the device (see
    `specdec.kernels.verify.verify_greedy`); and broken [B] bool, where a processor or a criterion failed: the text's
    error."""

    path: Tensor
    n_accepted: Tensor
    bonus: Tensor
    broken: Tensor


def walk(
    live: Iterable[tuple[int, Text]], state: BatchState, tree: TokenTree, logits: Tensor, n_nodes: Tensor,
    starts: Tensor, greedy: bool,
) -> Chosen:  # fmt: skip
    """Each unfinished text's path, chosen token by token.

    Args:
        live: the texts, by row. logits: [T, V], the rows from `starts[b]` on after the nodes of sample b.
        n_nodes: [B] int64, how many nodes of each were judged. starts: [B + 1] int64.
    """
    # The one place where a step waits for the host: a processor is Python that looks at the text.
    drafted, counts, first = state.draft.tokens.tolist(), n_nodes.tolist(), starts.tolist()
    ends, n_rows = set(state.eos_ids.tolist()), len(counts)
    path = [[0] * (tree.depth + 1) for _ in counts]
    accepted, bonus, broken = [0] * n_rows, [0] * n_rows, [False] * n_rows
    for row, text in live:
        ids, node, depth, room = text.ids[None], 0, 0, text.max_new_tokens - len(text.tokens)
        while True:
            try:
                token = bonus[row] = _choose(text, ids, logits[first[row] + node], greedy)
            except Exception as error:
                text.error, broken[row] = error, True
                break
            is_over = text.ends is not None and text.asks([*ids[0, len(text.prompt) :].tolist(), token])
            broken[row] = text.error is not None
            child = next((n for n in tree.children(node) if n < counts[row] and drafted[row][n - 1] == token), None)
            if child is None or token in ends or is_over or depth + 1 == room:  # no more is asked
                break
            node, depth = child, depth + 1
            path[row][depth:] = [child] * (tree.depth + 1 - depth)
            ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
        accepted[row] = depth
    made = zip((path, accepted, bonus, broken), 3 * (torch.int64,) + (torch.bool,), strict=True)
    return Chosen(*(torch.tensor(x, dtype=dtype, device=logits.device) for x, dtype in made))


def _choose(text: Text, ids: Tensor, logits: Tensor, greedy: bool) -> int:
    raw = logits[None].to(torch.float32, copy=True)
    scores = raw if text.process is None else text.process(ids, raw)
    if text.record is not None:
        text.record.logits.append(raw)
        text.record.scores.append(scores)
    if greedy:
        return int(scores.argmax(-1))
    law = SamplingLaw(False).rows(scores)
    if not law.log_total.isfinite().all():
        raise RuntimeError("the scores after the logits processors leave no law to sample from")
    seed, place = (ids.new_tensor([x]) for x in (text.seed, ids.shape[1]))
    none = place[:, None][:, :0]
    return int(draw_row(*law, 0 * place, none, none.float(), seed, place, 0 * place, BONUS, True))
