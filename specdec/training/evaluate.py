"""Figures of trained models on rows of token ids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

WINDOW, LONG_WINDOW = 512, 2048
GLANCE = 32_768  # held-out tokens scored while training


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Iterable[torch.Tensor]) -> float:
    """Mean negative log-likelihood, in nats per token, of all but the first token of each ``[length]`` row."""
    total, count = 0.0, 0
    for ids in rows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def agreement(
    target: PreTrainedModel, draft: PreTrainedModel, rows: Iterable[torch.Tensor], skip: int = 0
) -> dict[str, float]:
    """Share of positions where both models prefer the same token (``greedy``), and mean sum(min(p, q)) (``overlap``).

    The first ``skip`` positions of each ``[length]`` row are context only.
    """
    same, overlap, count = 0.0, 0.0, 0
    for ids in rows:
        p, q = (m(input_ids=ids[None], use_cache=False).logits[0, skip:].float().softmax(-1) for m in (target, draft))
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        overlap += torch.minimum(p, q).sum().item()
        count += len(p)
    return {"greedy": same / count, "overlap": overlap / count}


def figures_of(model: PreTrainedModel, held_out: torch.Tensor, seconds: float) -> dict[str, Any]:
    """One model's column of the card, on the held-out tokens ``[length]``."""
    loss = mean_loss(model, held_out.split(WINDOW))
    c = model.config
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": f"{c.hidden_size}, {c.num_hidden_layers}, {c.num_attention_heads}, {c.num_key_value_heads}",
        "minutes": round(seconds / 60, 1),
        "loss": loss,
        "perplexity": math.exp(loss),
        "loss_2048": mean_loss(model, held_out.split(LONG_WINDOW)),
    }
