"""No drafter: plain decoding through the same step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState
from specdec.engine.tree import TokenTree


class NoDrafter:
    """Drafts nothing; each step yields the target's own next token."""

    tree = TokenTree.chain(0)
    depths: tuple[int, ...] = (0,)
    support_size = 0

    @property
    def is_current(self) -> bool:
        return True

    @property
    def generation(self) -> int:
        return 0

    def allocate(self, n_batch: int, n_slots: int) -> None:
        pass

    def read(self, texts: Mapping[int, tuple[int, Tensor]]) -> None:
        pass

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        return Draft(state.tokens[:, :0], torch.zeros_like(state.lengths))

    def commit(self, lengths: Tensor, path: Tensor, n_path: Tensor) -> None:
        pass

    def grow(self, n_slots: int) -> None:
        pass
