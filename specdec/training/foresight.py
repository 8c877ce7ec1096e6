"""How far adaptive tokens see: which of their first choices a text goes on with, and what that makes of decoding.

Counted on texts the target wrote itself, greedily: there, a draft is accepted where it is what the text goes on with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.training.loop import autocast
from specdec.training.slots import SlotModel

TEXTS, ANCHORS = 8, 48
"""Of one forward: each anchor has L rows of logits, twice."""


@torch.no_grad()
def _of_anchors(slots: SlotModel, texts: Tensor, first: int, judge: Callable[..., Tensor]) -> Tensor:
    """[B, P, L]: what `judge` makes of two sets of logits [B, P, L, V], the texts' own and the slots', and the tokens
    that they are of, for all anchors from place `first` on."""
    n_slots, found = slots.tokens.n_slots, []
    anchors = torch.arange(first, texts.shape[1] - 1 - n_slots, device=texts.device, dtype=torch.int64)
    for part in anchors.split(ANCHORS):
        place = part[:, None] + torch.arange(2, n_slots + 2, device=texts.device, dtype=torch.int64)
        rows = []
        for ids in texts.split(TEXTS):
            with autocast(ids.device):
                text, ahead = slots.forward(ids, part)
            rows.append(judge(text.float(), ahead.float(), ids[:, place]))
        found.append(torch.cat(rows))
    return torch.cat(found, 1)


def hits(slots: SlotModel, texts: Tensor, first: int) -> Tensor:
    """[B, P, L] bool: whether the first choice of slot m, of every anchor from place `first` on, is what comes m + 1
    places after the anchor. Texts: [B, N] int64, greedy."""
    return _of_anchors(slots, texts, first, lambda text, ahead, ids: ahead.argmax(-1) == ids)


def overlaps(slots: SlotModel, texts: Tensor, first: int) -> list[float]:
    """By slot, the mean of sum(min(p, q)): how often a sampled draft of its own is accepted, where all before it were.
    Texts: [B, N] int64, sampled."""

    def judge(text: Tensor, ahead: Tensor, ids: Tensor) -> Tensor:
        return torch.minimum(text.softmax(-1), ahead.softmax(-1)).sum(-1)

    return _of_anchors(slots, texts, first, judge).mean((0, 1)).tolist()


def tokens_a_forward(found: Tensor, n_drafts: int, *, in_one: bool) -> float:
    """Of greedy decoding that follows the texts with the first `n_drafts` slots.

    In two forwards, one drafts behind the pending token and gives the next token itself, and one verifies both, and
    adds a token: accepted + 2. In one, the tokens that are verified have slots of their own: accepted + 1.
    """
    accepted = found[..., :n_drafts].long().cumprod(-1).sum(-1).tolist()
    tokens = forwards = 0
    for text in accepted:
        place = 0
        while place < len(text):
            new = text[place] + (1 if in_one else 2)
            place, tokens, forwards = place + new, tokens + new, forwards + (1 if in_one else 2)
    return tokens / forwards


def skip_bigrams(tokens: Tensor, size: int) -> Tensor:
    """[size] int64: what most often stands two places after each of `size` tokens, in [B, N] or [N] int64 texts."""
    pairs, counts = (tokens[..., :-2] * size + tokens[..., 2:]).unique(return_counts=True)
    most = counts.new_zeros(size).scatter_reduce(0, pairs // size, counts, "amax")
    pairs = pairs[counts == most[pairs // size]]
    return pairs.new_zeros(size).scatter_reduce(0, pairs // size, pairs % size, "amax")


def accepted(slots: SlotModel, texts: Tensor, first: int) -> float:
    """How many drafts behind an anchor are accepted, on average."""
    return hits(slots, texts, first).long().cumprod(-1).sum(-1).float().mean().item()


def figures(slots: SlotModel, texts: Tensor, first: int, guesses: Tensor) -> dict[str, Any]:
    """What a card says: by slot, how often it is right by itself and where all before it were; `guesses` of
    `skip_bigrams`; and what that makes of decoding."""
    found = hits(slots, texts, first)
    n_anchors, n_slots = found.shape[1:]
    chain = found.long().cumprod(-1).float().mean((0, 1))
    before = torch.cat([torch.ones_like(chain[:1]), chain[:-1]])
    guessed = guesses[texts[:, first : first + n_anchors]] == texts[:, first + 2 : first + 2 + n_anchors]
    return {
        "alone": found.float().mean((0, 1)).tolist(),
        "chain": chain.tolist(),
        "accepted": (chain / before).nan_to_num().tolist(),
        "skip_bigram": guessed.float().mean().item(),
        "two_step": [tokens_a_forward(found, n, in_one=False) for n in range(1, n_slots + 1)],
        "one_forward": [tokens_a_forward(found, n, in_one=True) for n in range(1, n_slots + 1)],
    }
