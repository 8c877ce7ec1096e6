"""The target drafts for itself, by adaptive tokens: slots behind a text, each of which says what comes a place later.

Source: SDSAT, arXiv 2403.18647. The paper's two forwards a step, one that drafts and one that verifies, and one forward
that does both: there the slots ride on the tokens that are verified (see `specdec.engine.ride`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.config import Config
from specdec.drafters.lookup import LookUp
from specdec.drafters.model import ModelDrafter
from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.packing import Nodes
from specdec.engine.state import BatchState
from specdec.engine.tree import TokenTree
from specdec.hf.adaptive import WEIGHTS, AdaptiveTokens
from specdec.hf.names import PreTrainedModel
from specdec.hf.view import ModelView
from specdec.verifiers import AUTO
from specdec.verifiers.base import Verifier

NAME = "adaptive"
DEPTH = {"cuda": 5, "cpu": 1}
"""Slots behind each token, unless the user says how many, or there are fewer: rows cost on a CPU."""


@dataclass(frozen=True, eq=False)
class Adaptive:
    """Adaptive tokens as a draft.

    Attributes:
        tokens: of the target. in_one: whether a step is one forward, and not two.
    """

    tokens: AdaptiveTokens
    in_one: bool = True

    @classmethod
    def named(cls, name: str, target: PreTrainedModel) -> Adaptive | None:
        """Those of "adaptive", in the folder that the target was loaded from, or of another folder; None where that has
        none.

        Raises:
            ValueError: the target's has none, or they are another model's.
        """
        folder = Path(target.config._name_or_path if name == NAME else name)
        if name != NAME and not (folder / WEIGHTS).is_file():
            return None
        return cls(AdaptiveTokens.load(folder, target))

    @classmethod
    def beside(cls, target: PreTrainedModel) -> Adaptive | None:
        """Those in the folder that the target was loaded from, or None.

        Raises:
            ValueError: they are another model's.
        """
        name = target.config._name_or_path  # nothing, where the model was made and not loaded
        return cls.named(NAME, target) if name and (Path(name) / WEIGHTS).is_file() else None

    def check(self, config: Config) -> None:
        """Raises: ValueError: there are fewer slots than the options ask for."""
        n_slots = self.tokens.n_slots
        most = n_slots if self.in_one and config.tree is None else n_slots + 1
        depth = config.depth if config.tree is None else config.tree.depth
        if depth is not None and depth > most:
            raise ValueError(f"a draft of {depth} tokens, and {n_slots} adaptive tokens draft {most}")
        if config.stop_below is not None:
            raise ValueError(f"stop_below={config.stop_below} ends a draft model's chain, and adaptive tokens draft")

    def drafter(
        self, target: ModelView, config: Config, verifier: Verifier, look_up: LookUp | None = None
    ) -> AdaptiveDrafter:  # fmt: skip
        """What drafts for a target; what the text says by itself, if `look_up` finds something."""
        if target.adaptive is None:
            target.insert(self.tokens)
        in_one = self.in_one and config.tree is None
        depth = config.depth or min(DEPTH.get(target.device.type, 1), self.tokens.n_slots) + (not in_one)
        return AdaptiveDrafter(target, config.tree or TokenTree.chain(depth), verifier, in_one, look_up)


class AdaptiveDrafter(ModelDrafter):
    """Drafts with the target and its adaptive tokens, over its own cache.

    Args:
        view: the target, with its adaptive tokens. tree: what is drafted. In two forwards the first level is the
            target's own next token, and those below are of slots 1, 2, ...; in one all levels are.
        verifier: as of `ModelDrafter`.
        in_one: whether slots ride with what is verified, as many behind each token as the step drafts; a chain.
        look_up: finds what the text says by itself, which comes first: as in `MixedDrafter`.
    """

    source_names = "adaptive tokens", "n-grams"

    def __init__(
        self, view: ModelView, tree: TokenTree, verifier: Verifier = AUTO, in_one: bool = False,
        look_up: LookUp | None = None,
    ) -> None:  # fmt: skip
        super().__init__(view, tree, verifier, shares_cache=True)
        if tree.depth > 1 and not in_one:
            self.depths = tuple(depth for depth in self.depths if depth > 1)  # with one level, nothing is gained
        self._chain = TokenTree.chain(tree.depth - 1).tensors(view.device)
        self.n_slots, self.look_up = tree.depth, look_up
        if look_up is not None:
            self.tree = TokenTree.chain(max(tree.depth, look_up.n_tokens))
            self.depths = (*self.depths[:-1], self.tree.depth)  # the whole tree: all that the slots draft
            self.source_levels = tree.depth, look_up.n_tokens
        self.rides = in_one
        self.n_riders = len(self.tree) * self.n_slots if in_one else 0

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        n_slots, n, depth = self.view.cache.n_slots, len(live), min(depth, self.n_slots)
        counts = torch.where(state.finished, 0, state.unread.clamp(max=1))  # none of texts that are looked up
        pending = Nodes.packed(state.lengths, counts, live, 1, n_slots, *self._chain)
        slot = torch.arange(depth, dtype=torch.int64, device=live.device)  # 0 is the pending token itself
        tokens = state.pending[pending.sample][:, None].expand(-1, depth).flatten()
        out = self.view.forward(tokens, pending.spread(slot, n_slots), slots=slot.repeat(n))
        levels = self._levels_of(out.logits.unflatten(0, (n, depth)), law, state, pending.sample)
        return self._drafted(levels, [], pending.starts[:-1].clamp(max=n - 1), state)

    def ride(self, logits: Tensor, law: SamplingLaw, state: BatchState) -> Draft:
        """What the slots behind each text's last accepted token say, logits [B, D, V], of what follows the pending
        token."""
        row = torch.arange(len(logits), dtype=torch.int64, device=logits.device)
        return self._drafted(self._levels_of(logits, law, state, row), [], row, state)

    def _levels_of(
        self, logits: Tensor, law: SamplingLaw, state: BatchState, sample: Tensor
    ) -> list[tuple[Tensor, ...]]:  # fmt: skip
        """Each level by its slot's law, logits [n, d, V]; all nodes of a level have children of one law, drawn for
        each of them anew."""
        levels = []
        for above in range(logits.shape[1]):
            level = self._levels[above]
            own = logits[:, above, None].expand(-1, len(level.nodes), -1).flatten(0, 1)
            levels.append(self._children(own, law, state, sample, above, level))
        return levels
