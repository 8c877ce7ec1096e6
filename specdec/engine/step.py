"""The step: draft, pack, forward, judge, commit. Read this file first.

A step drafts a tree from every sample's pending token, lets the target judge all of it in one forward, and commits the
path it accepts plus one token of its own. Drafting and judging are one compiled function each, and neither asks the
host anything. Which texts are in the batch and how much is drafted is decided between steps (see
`specdec.engine.loop`).

Letters: B samples, N nodes of the tree (node 0 is the pending token), D its depth, T tokens of the target's forward,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.engine.draft import without_chance
from specdec.engine.laws import SamplingLaw
from specdec.engine.packing import Nodes
from specdec.engine.roles import Drafter, Target
from specdec.engine.state import BatchState
from specdec.verifiers.base import Candidates, Verdict, Verifier
from specdec.verifiers.greedy import follow


class TreeStep:
    """A step of trees, one shape for all samples.

    Args:
        target: the model whose law is kept.
        drafter: where candidates come from.
        verifier: the rule that accepts candidates when sampling.
    """

    def __init__(self, target: Target, drafter: Drafter, verifier: Verifier) -> None:
        self.target, self.drafter, self.verifier = target, drafter, verifier
        self.tree = drafter.tree
        self.bits, self.depths = self.tree.tensors(target.device)
        self.topology = self.tree.topology(target.device)

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> None:
        """Draft `depth` levels of the tree, on the device.

        Args:
            live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished.
        """
        state.check_rows()
        state.propose(self.drafter.draft(state, law, live, depth))

    def judge(self, state: BatchState, law: SamplingLaw, token: Tensor) -> Tensor:
        """Verify what was drafted, accept and commit, on the device.

        Args:
            token: [T] int64, 0, 1, ..., T - 1: of what was drafted as much is judged as is allowed and there is room
                for; every unfinished sample's root is.

        Returns:
            The state's report (see `specdec.engine.state.Report`).
        """
        nodes, n_nodes, logits = self._forward(state, token)
        verdict, lawless = self._verify(state, law, nodes, n_nodes, logits)
        n_accepted = self._commit(state, n_nodes, verdict)
        note_lawless(state, lawless)
        return state.report(n_accepted)

    def rides(self, law: SamplingLaw, depth: int) -> bool:
        """Whether a draft of so many levels is made while the one before it is judged, and takes no step of its own."""
        return False

    def judgement(self, law: SamplingLaw, depth: int) -> tuple[Callable[..., Any], int, tuple[Any, ...]]:
        """What judges in a step that drafts so many levels: the function, and beside a token [T], if it takes another
        tensor of rows, how many times as many of these, or else 0, and the rest of what it is given."""
        return (self.look if law.by_text else self.judge), 0, ()

    def look(self, state: BatchState, law: SamplingLaw, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half of `judge`, where the host decides (see `specdec.engine.walk`): logits [T, V], how many nodes
        of each sample they come after, [B], and where each sample's begin, [B + 1] int64."""
        nodes, n_nodes, logits = self._forward(state, token)
        return logits, n_nodes, nodes.starts

    def settle(self, state: BatchState, n_nodes: Tensor, verdict: Verdict, broken: Tensor) -> Tensor:
        """The other half: commit what was chosen; `broken` [B] bool, where the user's code failed. The report."""
        n_accepted = self._commit(state, n_nodes, verdict)
        state.broken |= broken
        return state.report(n_accepted)

    def _forward(self, state: BatchState, token: Tensor) -> tuple[Nodes, Tensor, Tensor]:
        """What the target judges, how many nodes of each sample, [B] int64, and its logits after them, [T, V]."""
        state.check_rows()
        n_nodes, n_slots = state.n_nodes(token.shape[0]), self.target.cache.n_slots
        nodes = Nodes.packed(state.lengths, n_nodes, token, len(self.tree), n_slots, self.bits, self.depths)
        out = self.target.forward(state.tree_tokens[nodes.sample, nodes.node], nodes)
        return nodes, n_nodes, out.logits

    def _verify(
        self, state: BatchState, law: SamplingLaw, nodes: Nodes, n_nodes: Tensor, logits: Tensor
    ) -> tuple[Verdict, Tensor | None]:
        """What the target accepts; and when sampling [B, D + 1] int64, 1 where there was no law on the path."""
        candidates = Candidates(
            state.draft.tokens, n_nodes, self.topology, self.bits, self.depths, self.tree.depth, nodes.starts,
            nodes.sample, nodes.node, state.seeds, state.lengths + 1,
        )  # fmt: skip
        if law.greedy:
            return follow(law.choose(logits), candidates), None
        laws = law.rows(logits)
        drawn = state.draft.law or without_chance(state.draft.tokens, self.tree)
        verdict = self.verifier.judge(laws, candidates, drawn)
        return verdict, nodes.to_grid(~laws.log_total.isfinite()).long().gather(1, verdict.path)

    def _commit(self, state: BatchState, n_nodes: Tensor, verdict: Verdict) -> Tensor:
        if not self.tree.is_chain:  # a chain's accepted entries are already in place
            n_path = torch.where(state.finished, 0, verdict.n_accepted + 1)
            self.target.cache.commit(state.lengths, verdict.path, n_path)
            self.drafter.commit(state.lengths, verdict.path, n_path)
        return state.commit(state.tree_tokens, n_nodes, *verdict)


def note_lawless(state: BatchState, lawless: Tensor | None) -> None:
    """Texts are broken that took a token from where there was no law; `lawless` as of `TreeStep._verify`."""
    if lawless is not None:
        place = torch.arange(lawless.shape[1], device=lawless.device, dtype=torch.int64)
        state.broken |= torch.where(place < state.n_new[:, None], lawless, 0).sum(1) > 0
