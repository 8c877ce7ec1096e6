"""N-gram drafter (prompt lookup): the text's own last words, looked up earlier in the text.

Source: Saxena, "Prompt Lookup Decoding", 2023; LLMA, arXiv 2304.04487.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.arguments import whole
from specdec.drafters.base import Drafter
from specdec.drafters.lookup import LookUp
from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState
from specdec.engine.tree import TokenTree


class NgramDrafter(Drafter):
    """Proposes what followed the latest earlier occurrence of the longest matching suffix.

    Args:
        depth: K, tokens proposed a step.
        max_ngram: longest suffix looked for; at least one token must match.
        remember: tokens of earlier texts in which suffixes of two tokens or more are looked for, too (see `LookUp`).
    """

    source_names = "n-grams of one token", "n-grams"

    def __init__(self, depth: int = 8, max_ngram: int = 3, remember: int = 0) -> None:
        depth, max_ngram = whole("depth", depth), whole("max_ngram", max_ngram)
        self.tree, self.max_ngram = TokenTree.chain(depth), max_ngram
        if remember:  # the host finds what is longer
            self.source_levels = depth, depth
            self.look_up = LookUp(depth, max_ngram, remember)

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        tokens, last = state.tokens, state.lengths[:, None]  # `last` is the pending token's place
        place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int64)
        # matched[b, i]: how many tokens up to and including i equal the suffix that ends at the pending token.
        alive = (place < last).long()
        matched = torch.zeros_like(tokens)
        for back in range(self.max_ngram):
            suffix = tokens.gather(1, (last - back).clamp(min=0))
            shifted = torch.where(place >= back, tokens[:, (place - back).clamp(min=0)], -1)
            alive = alive * ((shifted == suffix) & (last >= back))
            matched = matched + alive
        best = (matched * tokens.shape[1] + place).argmax(1, keepdim=True)
        found = matched.gather(1, best)[:, 0] > 0
        # What followed the match; past the end of the text the period between match and suffix goes on.
        ahead = torch.arange(depth, device=tokens.device, dtype=torch.int64)
        period = (last - best).clamp(min=1)
        drafted = tokens.gather(1, (best + 1 + ahead % period).clamp(max=tokens.shape[1] - 1))
        return Draft(drafted, torch.where(found, depth, 0))
