"""When other plans than the best are tried, and which: what is not done is not measured.

At first all numbers of levels are, a few times each: calibration. Later, from time to time, a step of each kind is:
costs and samples change. That is done again after twice as long each time it was in vain.
"""

from __future__ import annotations

from specdec.engine.control.estimate import Estimate, scale
from specdec.engine.control.plan import CALIBRATE, EXPLORE, Plan, Shape

LEVELS = 1, 2, 3, 5, 8, 13
"""Levels that are timed at first, beside none and all: some machines' forwards take time by steps of T."""
FEW = 4
"""Samples that an exploring step drafts for, where nothing is drafted otherwise."""
PATIENCE = 100, 3200
"""Exploring waits for so many times the seconds that it takes: at first, and at most, after doubling each time."""


class Explorer:
    """Chooses what is tried, instead of the best plan."""

    def __init__(self, shape: Shape, estimate: Estimate) -> None:
        self._shape, self._estimate = shape, estimate
        self._some = [level for level in LEVELS if level < shape.n_levels]
        self._deepest = None if shape.rides else shape.depths[-1]  # one compiled step serves all depths that ride
        self._calibrations: dict[int, list[int]] = {}
        self._waiting: list[int] = []  # levels to explore, the next one last
        self._n_rounds, self._retries = 0, 0
        self._judged, self._accepted = 0, 0  # samples of the step that explores
        self._steady, self._patience = 0.0, PATIENCE[0]

    def calibration(self, n: int) -> list[int]:
        """Levels to try, the next one last, before steps of about `n` samples are chosen by what they cost."""
        some = [level for level in self._some for _ in range(3)]
        whole = [self._shape.n_levels] * max(3, 24 // n)  # what is accepted must be known too
        return self._calibrations.setdefault(scale(n), [0] * 3 + some + whole)

    def trial(self, n: int, best: Plan) -> Plan | None:
        """What the next step of `n` samples tries, if anything, while another plan is the best."""
        if levels := self.calibration(n):  # the whole draft serves all: no other is compiled for it
            return self._shape.uniform(n, levels[-1], self._deepest, CALIBRATE)
        return self._exploration(n, self._waiting.pop(), best) if self._waiting else None

    def _exploration(self, n: int, levels: int, best: Plan) -> Plan:
        """A step that tries a number of levels; where nothing is drafted otherwise for a few samples, by rotation: what
        the drafter has not read of them, it has to read."""
        # No draft is compiled for this.
        tried = self._shape.depths if self._shape.rides else (*self._estimate.costs.drafts, *self._shape.depths[-1:])
        whole = self._shape.uniform(n, levels, min((d for d in tried if d >= levels), default=None), EXPLORE)
        if best.depth or not levels:
            return whole
        chosen = {(self._n_rounds + i) % n for i in range(min(n, FEW))}
        allowed = tuple(nodes if i in chosen else 0 for i, nodes in enumerate(whole.allowed))
        return Plan(whole.depth, allowed, n + sum(allowed), EXPLORE)

    def count(self, was_judged: bool, was_accepted: bool) -> None:
        """A draft of one of the step's samples was judged, and a level of it accepted, or not."""
        self._judged += was_judged
        self._accepted += was_accepted

    def learn(self, plan: Plan, seconds: float, best: Plan, is_new: bool) -> None:
        """A step with this plan, whose samples have been counted, took so many seconds, while another plan is the best,
        which may be new."""
        n, judged, accepted = len(plan.allowed), self._judged, self._accepted
        self._judged = self._accepted = 0
        if plan.trial == CALIBRATE:
            if levels := self.calibration(n):
                levels.pop()
        elif plan.trial == EXPLORE:
            is_surprising = accepted > 1.5 * self._estimate.acceptance.rates[0] * judged  # it may be luck
            if plan.depth and not self._waiting and (is_surprising or (not judged and self._retries)):
                self._waiting = [min(2, self._shape.n_levels)]  # again at once
                self._retries -= not judged
        else:
            self._steady += seconds
            if is_new:
                self._consider(n, best)

    def _consider(self, n: int, best: Plan) -> None:
        """Explore the other numbers of levels for a step each, if that is not too dear."""
        some = [self._some[self._n_rounds % len(self._some)]] if self._some else []
        levels = [*([0] if best.depth else []), *some, self._shape.n_levels]
        costs = self._estimate.costs
        seconds = costs.reading + sum(costs.step(self._exploration(n, level, best)) for level in levels)
        if self._steady < self._patience * seconds:
            return
        self._steady, self._patience = 0.0, min(2 * self._patience, PATIENCE[1])
        self._waiting, self._n_rounds, self._retries = levels, self._n_rounds + 1, 3
        if not best.depth:
            self._estimate.acceptance.fade()

    def restart(self) -> None:
        """Another depth is drafted from now on: exploring was not in vain."""
        self._steady, self._patience = 0.0, PATIENCE[0]
