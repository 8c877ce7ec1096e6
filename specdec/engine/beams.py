"""Answers for a beam search: the target's logits after all beams, layer by layer, from a forest that reads ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.engine.forest import Forest, Reader
from specdec.engine.pace import Pace
from specdec.engine.roles import Steps, Target
from specdec.engine.stats import Stats


class BeamDecoder:
    """Beams of one width over the models of a decoder.

    A draft model speculates what the search comes to; another draft, or one with a vocabulary of its own, is not asked.

    Args:
        target: whose logits are asked for. drafter: has a `view` if it is a draft model. steps: compiles or records
            forwards. stats: what happened is added here. n_beams: W.
    """

    def __init__(self, target: Target, drafter: Any, steps: Steps, stats: Stats, n_beams: int) -> None:
        view = getattr(drafter, "view", None)
        if view is not None and (view.cache is target.cache or drafter.overlap is not None):
            view = None
        self._n_beams, self._steps, self._stats = n_beams, steps, stats
        self._target = Reader(target, steps, 2 * n_beams)
        self._draft = None if view is None else Reader(view, steps, 2 * n_beams)
        self._paces: dict[int, Pace] = {}

    def open(self, texts: Sequence[Tensor], longest: int, ends: frozenset[int]) -> None:
        """A new search.

        Args:
            texts: [length] int64, one a sample. longest: no text gets longer. ends: ids that end a text.
        """
        self.forest = Forest(self._target, self._draft, self._n_beams, ends)
        self._pace = self._paces.setdefault(len(texts), Pace())
        self._depth = self._served = 0
        self._seconds: float | None = None  # of the last forward; None where it compiled
        start = time.perf_counter()
        self.forest.open(texts, longest)
        self._stats.seconds["prefill"] += time.perf_counter() - start

    def answer(self, beams: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """The target's logits [B * W, V] after each beam, given the tokens of each after `committed`."""
        start, n_forwards = time.perf_counter(), self.forest.n_forwards
        if self._served and not self.forest.knows(beams):
            if self._seconds is not None:
                self._pace.learn(self._depth, self._seconds, self._served)
            self._served = 0
        if not self._served:
            self._depth = 0 if self._draft is None else self._pace.choose()
            self._seconds = 0.0
        logits = self.forest.answer(beams, self._depth)
        self._served += 1
        spent, has_run = time.perf_counter() - start, self.forest.n_forwards > n_forwards
        compiled = has_run and self.forest.compiled
        self._seconds = None if compiled or self._seconds is None else self._seconds + spent
        self._stats.seconds["compile" if compiled else "decode"] += spent
        self._stats.beam_layers += 1
        self._stats.beam_forwards += has_run
        return logits
