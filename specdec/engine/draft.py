"""What a drafter is: where the candidates of a step come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from specdec.engine.tree import TokenTree

if TYPE_CHECKING:
    from specdec.engine.laws import SamplingLaw
    from specdec.engine.state import BatchState


@dataclass
class DraftLaw:
    """How the drafted tokens were drawn.

    Letters: N nodes, M inner nodes, C support size.

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

    @classmethod
    def deterministic(cls, tokens: Tensor, tree: TokenTree) -> DraftLaw:
        """That of `tokens` [B, N - 1] which follow from the text without chance."""
        children = [tree.children(node) for node in tree.inner]
        widest = max(tree.n_children)
        # Where a node has no k-th child its first stands again, and whoever repeats a sibling proposes nothing.
        grid = [tokens[:, (own[k] if k < len(own) else own[0]) - 1] for own in children for k in range(widest)]
        ids = torch.stack(grid, 1).unflatten(1, (-1, widest)) if grid else tokens.new_zeros(len(tokens), 0, 1)
        is_first = [(ids[..., :k] != ids[..., k : k + 1]).all(-1) for k in range(ids.shape[-1])]
        ordinals = [torch.full_like(tokens[:, 0], k) for own in children for k in range(len(own))]
        places = torch.stack(ordinals, 1) if ordinals else tokens
        return cls(places, ids, torch.stack(is_first, -1).float(), torch.full_like(ids[..., 0], widest))


@dataclass
class Draft:
    """The candidates of one step: a tree of tokens a sample.

    Attributes:
        tokens: [B, N - 1] int64, of the drafter's tree without its root, or of its first levels.
        counts: [B] int64, how many of the N - 1 each sample drafted, the leading ones. Whether a node is there may
            depend on the text and on the draft laws of its ancestors, but never on its own token, its siblings' or
            anything below: a draft that stops because of what was drawn changes the output law.
        law: what tokens were drawn from, or None for tokens that follow from the text without chance. Not looked at
            when decoding greedily.
    """

    tokens: Tensor
    counts: Tensor
    law: DraftLaw | None = None


class Drafter(Protocol):
    """Proposes tokens. Everything in `draft` and `commit` runs on the device inside the compiled step."""

    tree: TokenTree
    """The shape of what is drafted a step."""
    depths: tuple[int, ...]
    """How many levels it can be asked for, ascending, the whole tree last: depths worth a compiled function each."""
    support_size: int
    """C, the ids kept of a draft law; 0 where tokens follow from the text without chance."""

    @property
    def is_current(self) -> bool:
        """Whether what this drafter was made from is still what the user's objects hold."""

    @property
    def generation(self) -> int:
        """Changes when memory that `draft` reads or writes has moved."""

    def allocate(self, n_batch: int, n_slots: int) -> None:
        """A new batch of `n_batch` samples; caches need `n_slots` slots a sample."""

    def read(self, texts: Mapping[int, tuple[int, Tensor]]) -> None:
        """Take in what `draft` has not seen of some rows' texts, the last token pending.

        Args:
            texts: by row, how many leading tokens are known, and the whole text, [length] int64. With none known it
                is another text than before.
        """

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        """Candidates for what follows each sample's pending token.

        Args:
            live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished. What is drafted for finished ones is
                ignored. depth: how many levels, one of `depths`.
        """

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        """The target has accepted a path, not called where the tree is a chain.

        Args:
            lengths: [B] int64, before this step. path: [B, depth + 1] int64, nodes from the root on. n_path: [B]
                int64, how many of them count.
        """

    def grow(self, n_slots: int) -> None:
        """Texts are about to pass the capacity: make room."""
