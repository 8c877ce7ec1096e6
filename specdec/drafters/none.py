"""No drafter: plain decoding through the same step."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState
from specdec.engine.tree import TokenTree


class NoDrafter(Drafter):
    """Drafts nothing; each step yields the target's own next token."""

    tree = TokenTree.chain(0)

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        return Draft(state.tokens[:, :0], torch.zeros_like(state.lengths))
