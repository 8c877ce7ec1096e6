"""Whether texts are transformers', and if not, whether that is more than rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROUNDING = {torch.float32: 1e-4}
"""What logits of two forwards of one model can differ by, relative to the largest; other types by ROUGH."""
ROUGH = 2e-2

Batch = tuple[Tensor, Tensor]
"""Ids and attention mask, [B, length], padded on the left."""


@dataclass(frozen=True)
class Difference:
    """Where a text is not transformers': the worst place of all texts that are not.

    Attributes:
        texts: how many are not. prompt, token: which prompt's, and which new token, from 1 on.
        margin: how far apart the target's logits of the two tokens are there. is_rounding: whether that is as little
            as two forwards of one model can differ by.
    """

    texts: int
    prompt: int
    token: int
    margin: float
    is_rounding: bool

    def __str__(self) -> str:
        why = "rounding" if self.is_rounding else "more than rounding"
        return (
            f"{self.texts} of its texts differ, that of prompt {self.prompt} from new token {self.token} on, where the "
            f"logits of the two tokens are {self.margin:.2g} apart: {why}"
        )


@torch.no_grad()
def difference(
    target: PreTrainedModel, batches: Sequence[Batch], theirs: Sequence[Tensor], ours: Sequence[Tensor]
) -> Difference | None:
    """Where our texts, [B, length + new tokens] of each batch, are not theirs."""
    found, prompt = [], 0
    for (ids, mask), expected, written in zip(batches, theirs, ours, strict=True):
        for row, same in enumerate(expected == written):
            prompt += 1
            if same.all():
                continue
            place = int(same.long().argmin())
            text = expected[row, :place][int((mask[row] == 0).sum()) :]
            logits = target(text[None]).logits[0, -1].float()
            margin = (logits[expected[row, place]] - logits[written[row, place]]).abs().item()
            rounding = ROUNDING.get(target.dtype, ROUGH) * logits.abs().max().item()
            found.append((margin, prompt, place - ids.shape[1] + 1, margin <= rounding))
    if not found:
        return None
    margin, prompt, token, is_rounding = max(found)
    return Difference(len(found), prompt, token, margin, is_rounding)
