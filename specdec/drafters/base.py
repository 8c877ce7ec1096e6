"""What a drafter is: where the candidates of a step come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from specdec.sampling import SamplingLaw
    from specdec.state import BatchState


@dataclass
class Draft:
    """The candidates of one step: a chain of at most K tokens a sample.

    Attributes:
        tokens: [B, K] int64.
        counts: [B] int64, how many of the K each sample drafted.
        support_ids, support_probs: [B, K, C] int64 and float32, the law each token was drawn from. A deterministic
            proposal is one-hot (C = 1). Not looked at when decoding greedily.
    """

    tokens: Tensor
    counts: Tensor
    support_ids: Tensor
    support_probs: Tensor


class Drafter(Protocol):
    """Proposes tokens. Everything in `draft` runs on the device inside the compiled step."""

    depth: int
    """K: the most tokens drafted a step."""

    @property
    def is_current(self) -> bool:
        """Whether what this drafter was made from is still what the user's objects hold."""

    @property
    def generation(self) -> int:
        """Changes when memory that `draft` reads or writes has moved."""

    def begin(self, prompts: list[Tensor], n_slots: int) -> None:
        """A new batch of prompts, [length] int64 each; caches need `n_slots` slots a sample."""

    def admit(self, row: int, prompt: Tensor) -> None:
        """Another prompt, [length] int64, in a row whose text has ended."""

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor) -> Draft:
        """Candidates for what follows each sample's pending token.

        Args:
            live: [n] int64, 0, 1, ..., n - 1: at most n samples are unfinished. What is drafted for finished ones is
                ignored.
        """

    def grow(self, n_slots: int) -> None:
        """Texts are about to pass the capacity: make room."""
