"""A draft model and n-grams together: what the text repeats is looked up, and the model drafts the rest."""

from __future__ import annotations

from specdec.drafters.lookup import LookUp
from specdec.drafters.model import ModelDrafter
from specdec.drafters.vocabulary import Overlap
from specdec.engine.tree import TokenTree
from specdec.hf.view import ModelView
from specdec.verifiers import AUTO
from specdec.verifiers.base import Verifier

READS_AT_ONCE = 16
"""Last tokens of a text that the draft model reads within a step: what a step or two of n-grams added."""


class MixedDrafter(ModelDrafter):
    """Drafts a chain for each sample, by one of two sources: the text, where at least two of its last tokens stand in
    it earlier, or else the draft model, which is not run for samples that the text serves.

    Which of them drafts follows from the text alone, so the output law is the target's, and a seed's text does not
    depend on its neighbours.

    Args:
        view, verifier, overlap, stop_below, shares_cache: as of `ModelDrafter`. depth: tokens that the model drafts.
        look_up: finds those that the text says.
    """

    source_names = "draft model", "n-grams"

    def __init__(
        self, view: ModelView, depth: int, look_up: LookUp, verifier: Verifier = AUTO, overlap: Overlap | None = None,
        stop_below: float | None = None, shares_cache: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(view, TokenTree.chain(depth), verifier, overlap, READS_AT_ONCE, stop_below, shares_cache)
        self.tree = TokenTree.chain(max(depth, look_up.n_tokens))
        self.depths = (*self.depths[:-1], self.tree.depth)  # the whole tree: all that the model drafts
        self.source_levels, self.look_up = (depth, look_up.n_tokens), look_up
