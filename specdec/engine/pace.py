"""How many layers of beams to speculate: those whose measured time a layer is shortest."""

from __future__ import annotations

DEPTHS = 0, 1, 2, 3, 4
TRIES = 3
"""Forwards of each depth that are timed at first; the fastest counts, since other programs only ever add."""
AGAIN = 24
"""After so many forwards a neighbour of the best depth is tried once more."""


class Pace:
    """What forwards cost and served, by how many layers were speculated before them."""

    def __init__(self) -> None:
        self._seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
        self._served: dict[int, list[int]] = {depth: [] for depth in DEPTHS}
        self._n_forwards = 0

    def choose(self) -> int:
        """How many layers to speculate before the next forward."""
        self._n_forwards += 1
        if untried := [depth for depth in DEPTHS if len(self._seconds[depth]) < TRIES]:
            return untried[-1]
        best = min(DEPTHS, key=self.seconds_a_layer)
        if self._n_forwards % AGAIN:
            return best
        return min(max(best + (1 if self._n_forwards // AGAIN % 2 else -1), 0), DEPTHS[-1])

    def seconds_a_layer(self, depth: int) -> float:
        """As measured last; speculating is estimated, and so must promise some more than it costs."""
        seconds, served = self._seconds[depth], self._served[depth]
        return sorted(seconds)[len(seconds) // 3] / (sum(served) / len(served)) * (1.0 if depth == 0 else 1.03)

    def learn(self, depth: int, seconds: float, served: int) -> None:
        """A forward with so many speculated layers took these seconds and served so many layers."""
        self._seconds[depth] = [*self._seconds[depth][-8:], seconds]
        self._served[depth] = [*self._served[depth][-63:], served]
