"""A smaller model of the same vocabulary as drafter."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import Draft
from specdec.kernels.draw import draw
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

    @property
    def generation(self) -> int:
        return self.view.cache.generation

    def begin(self, prompts: list[Tensor], n_slots: int) -> None:
        self.view.allocate(len(prompts), n_slots)
        self.view.prefill([prompt[:-2] for prompt in prompts])

    def admit(self, row: int, prompt: Tensor) -> None:
        self.view.admit(row, prompt[:-2])

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor) -> Draft:
        root, alive = state.lengths - 1, (~state.finished).long()
        # Node 0 is the token before the pending one; a one-token text has none, and its entry goes to scratch.
        before = state.tokens.gather(1, root.clamp(min=0)[:, None])[:, 0]
        pairs = self._nodes(root, 2 * alive, torch.arange(2 * len(live), device=live.device), 2, 0)
        fed = torch.where(pairs.node == 0, before[pairs.sample], state.pending[pairs.sample])
        logits = self.view.forward(fed, pairs, 1 + 2 * live)
        nodes = self._nodes(root, alive, live, 1, 1)  # the pending tokens
        tokens, ids, probs = [], [], []
        for level in range(1, self.depth + 1):
            chosen, support_ids, support_probs = self._choose(logits, law, state, nodes.sample, level)
            tokens.append(chosen)
            ids.append(support_ids)
            probs.append(support_probs)
            if level < self.depth:
                nodes = nodes.next_level()
                logits = self.view.forward(chosen, nodes)
        row = nodes.starts[:-1].clamp(max=len(live) - 1)  # of each sample in what was drafted
        drafted, support_ids, support_probs = (torch.stack(x, 1)[row] for x in (tokens, ids, probs))
        return Draft(drafted, torch.full_like(root, self.depth), support_ids, support_probs)

    def _nodes(self, root: Tensor, counts: Tensor, token: Tensor, rows: int, first: int) -> Nodes:
        n_slots = self.view.cache.n_slots
        return Nodes.packed(root, counts, token, rows, n_slots, self._bits, self._depths, first)

    def _choose(
        self, logits: Tensor, law: SamplingLaw, state: BatchState, sample: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token a row of logits and the law it came from: [n], [n, C], [n, C]; `sample` [n] says whose row."""
        if law.greedy:
            chosen = logits.argmax(-1)
            return chosen, chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.float32)
        ids, support = law.support(logits, SUPPORT_SIZE)
        node = torch.full_like(sample, level)
        pick = draw(support, state.seeds[sample], state.lengths[sample] + level, node, DRAFT)
        return ids.gather(1, pick[:, None])[:, 0], ids, support

    def grow(self, n_slots: int) -> None:
        self.view.cache.grow(n_slots)
