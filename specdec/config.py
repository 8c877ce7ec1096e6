"""Every knob of specdec, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a wrapped model decodes.

    Args:
        depth: tokens drafted a step; None takes 5 for a draft model and 8 for n-grams.
        max_ngram: longest suffix the n-gram drafter looks up.
        compile: False runs every step eagerly, for debugging.

    Raises:
        ValueError: naming the value that cannot be.
    """

    depth: int | None = None
    max_ngram: int = 3
    compile: bool = True

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}; draft=None decodes without drafting")
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {self.max_ngram}")
