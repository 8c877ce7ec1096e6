"""Texts to distil from, and what the target says at each of their positions: computed once, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from specdec.hf import names
from specdec.training import loop

KEPT = 64  # the target's likeliest tokens, kept one by one at each position
ROWS, TOKENS = 128, 4096  # rows of a file; tokens of one forward


@dataclass(frozen=True)
class Texts:
    """Rows of text with the target's law at every position.

    Attributes:
        ids: [rows, length].
        log_p: [rows, length, kept + 1], log-probabilities of the kept tokens and, last, of all others together.
        tokens: [rows, length, kept], which tokens those are.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


def forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits ``[batch, length, vocabulary]`` by bfloat16 matrix products."""
    with loop.autocast(ids.device):
        return model(input_ids=ids, use_cache=False).logits.float()


def coarse(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``tokens`` [..., k] and, last, of all other tokens as one outcome: [..., k + 1].

    Merging outcomes can only lower a distance between two laws, and leaves those that agree at 0.
    """
    kept = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    rest = torch.log1p(-kept.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([kept, rest], -1)


@torch.no_grad()
def law(target: PreTrainedModel, ids: torch.Tensor) -> Texts:
    """The target's law on rows ``[rows, length]``."""
    parts = []
    for rows in ids.split(max(1, TOKENS // ids.shape[1])):
        logits = forward(target, rows)
        tokens = logits.topk(min(KEPT, logits.shape[-1])).indices
        parts.append((coarse(logits, tokens).half(), tokens.int()))
    log_p, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
    return Texts(ids, log_p, tokens)


@torch.no_grad()
def sample(
    target: PreTrainedModel, prompts: torch.Tensor, length: int, seed: int, *, greedy: bool = False
) -> torch.Tensor:
    """The target's own continuations, at temperature 1 or greedy: ``[batch, length]`` ids, the prompts first."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    cache = DynamicCache(config=target.config)
    ids = new = prompts
    while ids.shape[1] < length:
        with loop.autocast(ids.device):
            logits = target(input_ids=new, logits_to_keep=1, **{names.cache_argument(target): cache}).logits[:, -1]
        if greedy:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], 1)
    return ids


def kept(
    folder: Path, label: str, parts: Sequence[torch.Tensor], make: Callable[[torch.Tensor, int], Any]
) -> list[Any]:
    """What ``make(part, index)`` makes of every part, each in a file: those of a run that was stopped are kept."""
    files = [folder / f"{label}-{index:05}.pt" for index in range(len(parts))]
    with loop.progress_bar(label) as bar:
        for index, part in enumerate(bar.track(parts, task_id=bar.add_task(label, loss=""))):
            if not files[index].exists():
                loop.save(make(part, index), files[index])
    return [torch.load(file, map_location=parts[0].device) for file in files]


def collect(
    target: PreTrainedModel,
    folder: Path,
    label: str,
    rows: torch.Tensor,
    write: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> Texts:
    """The law on ``rows``, or on what ``write(rows, index)`` makes of every ``ROWS`` of them."""

    def make(part: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
        return vars(law(target, part if write is None else write(part, index)))

    parts = kept(folder, label, rows.split(ROWS), make)
    return Texts(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
