"""A draft that is the target's own first layers, as users name it."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.arguments import DRAFTS, whole
from specdec.hf.early_exit import first_layers
from specdec.hf.names import PreTrainedModel

NAME = "early-exit"


@dataclass(frozen=True)
class EarlyExit:
    """The target's first `n_layers` layers draft, with its own norm and head; nothing is trained."""

    n_layers: int

    @classmethod
    def named(cls, name: str) -> EarlyExit:
        """Of "early-exit:4".

        Raises:
            ValueError: it says no number of layers.
        """
        _, _, number = name.partition(":")
        if not number.isdecimal():
            raise ValueError(f'draft must be {DRAFTS}, got {name!r}: "{NAME}:4" drafts with the first 4 layers')
        return cls(whole("the layers of an early exit", int(number)))

    def check(self, target: PreTrainedModel) -> None:
        """Raises: ValueError: the target does not have more layers than that."""
        n_layers = target.config.get_text_config(decoder=True).num_hidden_layers
        if not self.n_layers < n_layers:
            raise ValueError(f"an early exit after {self.n_layers} layers, and the model has {n_layers}")

    def model(self, target: PreTrainedModel) -> PreTrainedModel:
        """The draft model."""
        return first_layers(target, self.n_layers)
