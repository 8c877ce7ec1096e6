"""A step in one forward: the tokens that are verified have slots of adaptive tokens behind them, and those behind the
last accepted one have drafted the next step.

    pending  s s s   token 1  s s s   token 2  s s s          s: slots, which see the text up to their token

Where that token ends the path, slot m says what comes m places after the target's own next token. The slots that ride
behind other tokens are fed for nothing, and no keys or values of slots are kept. Drafts are drawn with noise of their
own, from laws that follow from the accepted text, so the output law is the target's.

Source: after SDSAT, arXiv 2403.18647, whose drafts take a forward of their own; slots on all tokens of a draft are
BiTA's (arXiv 2401.12522).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.packing import Nodes
from specdec.engine.roles import Target
from specdec.engine.state import BatchState
from specdec.engine.step import TreeStep, note_lawless
from specdec.kernels.attention.tree_mask import ancestor_words
from specdec.verifiers.base import Verifier


@dataclass(frozen=True)
class Comb:
    """A chain with slots behind each of its nodes, as rows of a forward: a node, its slots, the next node, ...

    All combs of one chain have rows for as many slots as the largest, so that one compiled step serves them.

    Attributes:
        bits, depths: ancestor words [R, W] and depths [R] of the rows. nodes, slots: [R], the node that each is, or is
            behind, and which of its slots, 0 for the node itself. first_rows: [N + 1], where each node's begin.
        n_slots: int64, behind each node.
    """

    bits: Tensor
    depths: Tensor
    nodes: Tensor
    slots: Tensor
    first_rows: Tensor
    n_slots: Tensor

    @classmethod
    def of(cls, n_nodes: int, n_slots: int, most: int, device: torch.device) -> Comb:
        """Of a chain of so many nodes, with so many slots behind each, of `most` that there may be."""
        tooth = n_slots + 1
        rows = torch.arange(n_nodes * (most + 1), dtype=torch.int64, device="cpu")
        nodes, slots = (rows // tooth).clamp(max=n_nodes - 1), rows % tooth
        parents = torch.where(slots > 0, rows - 1, rows - tooth).clamp(min=-1)
        first_rows = torch.arange(n_nodes + 1, dtype=torch.int64, device="cpu") * tooth
        count = torch.tensor(n_slots, dtype=torch.int64, device="cpu")
        own = ancestor_words(parents[None])[0], nodes + slots, nodes, slots, first_rows, count
        return cls(*(tensor.to(device) for tensor in own))

    def tensors(self) -> list[Tensor]:
        """In an order that all combs share."""
        return [self.bits, self.depths, self.nodes, self.slots, self.first_rows, self.n_slots]


class RidingStep(TreeStep):
    """A step whose drafts ride with what is verified.

    Args:
        drafter: drafts chains, with `n_slots` slots at most (see `specdec.drafters.adaptive`).
    """

    def __init__(self, target: Target, drafter: Any, verifier: Verifier) -> None:
        super().__init__(target, drafter, verifier)
        self._drafts: Callable[[Tensor, SamplingLaw, BatchState], Draft] = drafter.ride
        most, device = drafter.n_slots, target.device
        self.combs = {depth: Comb.of(len(self.tree), min(depth, most), most, device) for depth in drafter.depths}
        self._ahead = torch.arange(1, most + 1, dtype=torch.int64, device=device)

    def rides(self, law: SamplingLaw, depth: int) -> bool:
        return depth > 0 and not law.by_text

    def judgement(self, law: SamplingLaw, depth: int) -> tuple[Callable[..., Any], int, tuple[Any, ...]]:
        if not self.rides(law, depth):
            return super().judgement(law, depth)
        return self.judge_and_draft, 1 + min(depth, len(self._ahead)), (self.combs[depth],)

    def judge(self, state: BatchState, law: SamplingLaw, token: Tensor) -> Tensor:
        """Without slots; so nothing is drafted for the next step."""
        report = super().judge(state, law, token)
        state.draft.counts.zero_()
        return report

    def judge_and_draft(self, state: BatchState, law: SamplingLaw, token: Tensor, row: Tensor, comb: Comb) -> Tensor:
        """As `judge`, with slots behind the tokens; what they draft is judged in the next step.

        Args:
            row: [R] int64, 0, 1, ..., R - 1: at least as many as `token` with the slots of `comb` behind them.
        """
        state.check_rows()
        n_slots, n_nodes = self.target.cache.n_slots, state.n_nodes(token.shape[0])
        # What is judged, and that with the slots between.
        nodes = Nodes.packed(state.lengths, n_nodes, token, len(self.tree), n_slots, self.bits, self.depths)
        rows = Nodes.packed(
            state.lengths, comb.first_rows[n_nodes], row, len(comb.nodes), n_slots, comb.bits, comb.depths
        )
        tokens = state.tree_tokens[rows.sample, comb.nodes[rows.node]]
        logits = self.target.forward(tokens, rows, slots=comb.slots[rows.node]).logits
        own = (rows.starts[nodes.sample] + comb.first_rows[nodes.node]).clamp(max=len(row) - 1)
        verdict, lawless = self._verify(state, law, nodes, n_nodes, logits[own])
        n_path = torch.where(state.finished, 0, verdict.n_accepted + 1)
        self.target.cache.commit(state.lengths, comb.first_rows[verdict.path], n_path)  # slots are in between
        n_accepted = self._commit(state, n_nodes, verdict)
        note_lawless(state, lawless)
        report = state.report(n_accepted)
        last = verdict.path.gather(1, verdict.n_accepted[:, None])  # [B, 1]
        behind = rows.starts[:-1, None] + comb.first_rows[last] + self._ahead
        draft = self._drafts(logits[behind.clamp(max=len(row) - 1)], law, state)
        draft.counts = torch.minimum(draft.counts, comb.n_slots)
        state.propose(draft)
        return report
