"""A smaller model of the same vocabulary as drafter."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import Draft
from specdec.kernels.draw import draw, top_support
from specdec.kernels.noise import DRAFT
from specdec.nodes import Nodes
from specdec.sampling import SamplingLaw
from specdec.state import BatchState
from specdec.tree import TokenTree
from specdec.view import ModelView

SUPPORT_SIZE = 64
"""Ids kept of a draft law. Tokens are drawn from exactly the kept, renormalised law, so any size is lossless."""


class ModelDrafter:
    """Drafts a chain with a causal language model that shares the target's vocabulary.

    Args:
        model: the draft model, on the target's device.
        depth: K, tokens drafted a step.

    The draft's cache trails the target's by one token: its root is the token before the pending one. After a fully
    accepted draft that token's entry is missing, otherwise writing it again changes nothing; feeding both every time
    keeps the step's shape fixed.
    """

    def __init__(self, model: PreTrainedModel, depth: int = 5) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.view, self.depth = ModelView(model), depth
        self._bits, self._depths = TokenTree.chain(depth).tensors(self.view.device)

    @property
    def is_current(self) -> bool:
        return self.view.is_current

    def begin(self, prompts: list[Tensor], n_slots: int) -> None:
        self.view.allocate(len(prompts), n_slots)
        self.view.prefill([prompt[:-2] for prompt in prompts])

    def draft(self, state: BatchState, law: SamplingLaw) -> Draft:
        n_batch = len(state.lengths)
        root = state.lengths - 1
        pending = state.pending
        before = state.tokens.gather(1, root.clamp(min=0)[:, None])[:, 0]
        # A one-token text has no token before the pending one: that place is left to scratch.
        valid = torch.stack([root >= 0, torch.ones_like(state.finished)], 1)
        nodes = self._nodes(root, 0, valid)
        rows = 1 + 2 * torch.arange(n_batch, device=root.device)
        logits = self.view.forward(torch.stack([before, pending], 1).flatten(), nodes, rows)
        tokens, ids, probs = [], [], []
        for level in range(1, self.depth + 1):
            chosen, support_ids, support_probs = self._choose(logits, law, state, level)
            tokens.append(chosen)
            ids.append(support_ids)
            probs.append(support_probs)
            if level < self.depth:
                logits = self.view.forward(chosen, self._nodes(root, level + 1, valid[:, 1:]))
        counts = torch.full_like(state.lengths, self.depth)
        return Draft(torch.stack(tokens, 1), counts, torch.stack(ids, 1), torch.stack(probs, 1))

    def _nodes(self, root: Tensor, first: int, valid: Tensor) -> Nodes:
        n_slots = self.view.cache.n_slots
        return Nodes.of_tree(root, self._bits, self._depths, first, valid.shape[1], valid, n_slots)

    def _choose(self, logits: Tensor, law: SamplingLaw, state: BatchState, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """One token a sample and the law it came from: [B], [B, C], [B, C]."""
        if law.greedy:
            chosen = logits.argmax(-1)
            return chosen, chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.float32)
        probs = law.probs(logits)
        ids, support = top_support(probs, min(SUPPORT_SIZE, probs.shape[-1]))
        node = torch.full_like(state.lengths, level)
        pick = draw(support, state.seeds, state.lengths + level, node, DRAFT)
        return ids.gather(1, pick[:, None])[:, 0], ids, support

    def keep(self, rows: Tensor) -> None:
        self.view.cache.keep(rows)

    def grow(self, n_slots: int) -> None:
        self.view.cache.grow(n_slots)
