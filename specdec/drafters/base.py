"""What a drafter does unless it says otherwise: nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState
from specdec.engine.tree import TokenTree


class Drafter:
    """A drafter of one's own gives `tree`, the shape of what it proposes, and `draft`, which proposes it.

    `draft` is compiled into the step: PyTorch on the device of `state`, with no question to the host. Whatever it
    proposes, the output law is the target's. A drafter with caches, or whose tokens are drawn by chance, says so in the
    other members, as `ModelDrafter` does.
    """

    tree: TokenTree
    """The shape of what is drafted a step."""
    support_size = 0
    """Ids kept of a draft law; 0 where tokens follow from the text without chance."""

    depths: cached_property[tuple[int, ...]] = cached_property(lambda self: (self.tree.depth,))
    """How many levels it can be asked for, ascending, the whole tree last: depths worth a compiled function each."""

    @property
    def is_current(self) -> bool:
        """Whether what this drafter was made from is still what the user's objects hold."""
        return True

    @property
    def generation(self) -> int:
        """Changes when memory that `draft` reads or writes has moved."""
        return 0

    def allocate(self, n_batch: int, n_slots: int) -> None:
        """A new batch of `n_batch` samples; caches need `n_slots` slots a sample."""

    def read(self, texts: Mapping[int, tuple[int, Tensor]]) -> None:
        """Take in some rows' texts: how many leading tokens are known, and the whole text, the last token pending."""

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        """Candidates for what follows each sample's pending token.

        Args:
            state: B texts. `state.tokens[b, :state.lengths[b] + 1]` is one, `state.pending[b]` its last token.
            law: what the target samples by. live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished. What
                is drafted for finished ones is ignored. depth: how many levels, one of `depths`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no draft")

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        """The target has accepted a path, [B, depth + 1] int64 nodes of which `n_path` [B] count, after `lengths` [B]
        tokens; not called where the tree is a chain."""

    def grow(self, n_slots: int) -> None:
        """Texts are about to pass the capacity: make room."""
