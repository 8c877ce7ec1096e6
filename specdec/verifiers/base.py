"""What a verifier is: how children are drawn, and the rule that accepts them. Every one keeps the output law.

Letters: B samples, N nodes of the tree (node 0 is the pending token), D its depth, T rows of logits, V vocabulary,
M inner nodes, C support size, R rows of draft laws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class RowLaw(NamedTuple):
    """The law of each of T rows of logits, without a copy of the rows (see `specdec.kernels.sampling.row_law`).

    p_i = exp(logits_i * knobs[0] - log_total) where logits_i > threshold, or equal and i >= first; else 0.
    logits [T, V]; knobs [3] float32; log_total, threshold [T] float32; first [T] int64.
    """

    logits: Tensor
    knobs: Tensor
    log_total: Tensor
    threshold: Tensor
    first: Tensor


@dataclass
class DraftLaw:
    """How the drafted tokens were drawn.

    Attributes:
        places: [B, N - 1] int64, each drafted node's place in the support of its parent; -1 where there was nothing
            to draw, and then no node.
        support_ids, support_probs: [B, M, C] int64 and float32, the law the children of each inner node, in the order
            of `TokenTree.inner`, were drawn from. Each sums to one. Ids of positive probability are distinct; the
            others are any of the vocabulary.
        n_hubs: [B, M] int64, how many of them are hubs, or WITH_REPLACEMENT (see `specdec.kernels.verify.tree_rules`).
    """

    places: Tensor
    support_ids: Tensor
    support_probs: Tensor
    n_hubs: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, by name: torch 2.11 does not compile `vars()`."""
        return self.places, self.support_ids, self.support_probs, self.n_hubs


@dataclass(frozen=True)
class Candidates:
    """The nodes that the target judges, and where its logits after them are.

    Attributes:
        tokens: [B, N - 1] int64, drafted ones. n_nodes: [B] int64, how many nodes of each sample are judged.
        topology, bits, depths: the tree's (see `TokenTree.topology` and `TokenTree.tensors`). depth: D.
        starts: [B + 1] int64: rows `starts[b] .. starts[b] + n_nodes[b] - 1` are sample b's.
        sample, node: [T] int64, whose each row is, and of which node; anybody's for rows of nobody.
        seeds: [B] int64. position: [B] int64, of the first token after the root.
    """

    tokens: Tensor
    n_nodes: Tensor
    topology: Tensor
    bits: Tensor
    depths: Tensor
    depth: int
    starts: Tensor
    sample: Tensor
    node: Tensor
    seeds: Tensor
    position: Tensor


class Verdict(NamedTuple):
    """The path of each sample that is accepted.

    path: [B, D + 1] int64, nodes from the root on, the last one repeated. n_accepted: [B] int64, drafted ones among
    them. bonus: [B] int64, the target's own token after the last.
    """

    path: Tensor
    n_accepted: Tensor
    bonus: Tensor


class Verifier(Protocol):
    """A way to draw drafted tokens and to verify them.

    Attributes:
        name: as given to `specdec.compile`.
        coupled: whether target and draft share the noise of a position: for equal seeds a text is the same with any
            draft or none.
    """

    @property
    def name(self) -> str: ...

    @property
    def coupled(self) -> bool: ...

    def hubs(self, probs: Tensor, counts: Tensor) -> Tensor:
        """[R] int64: how many of a node's children are hubs (see `specdec.kernels.verify.tree_rules`).

        Args:
            probs: [R, C] float32, draft laws, the best tokens first. counts: [R] int64, numbers of children.
        """

    def judge(self, laws: RowLaw, candidates: Candidates, drawn: DraftLaw) -> Verdict:
        """What the target accepts, by its law after each node.

        Args:
            laws: of T rows. drawn: what the drafted tokens were drawn from.
        """
