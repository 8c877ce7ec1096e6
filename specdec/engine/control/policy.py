"""How much to draft: the policies that keep speculation from costing more than it brings.

A policy decides before each step how deep to draft, how many nodes of each sample are judged, and when to stop
drafting. `Fixed` always takes the whole draft. `Adaptive` takes what brings the most tokens a second, by what steps
cost and bring (`estimate.py`), and now and then something else, to know that (`explore.py`).

A policy adapts only where a text does not depend on its drafts: greedily, and with coupled sampling. Otherwise a text's
noise would be read differently from run to run.

Source: goodput of speculation, SmartSpec, arXiv 2406.14066; per sample and with measured times here.
Letters: n unfinished samples, d levels, T tokens of the target's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import is_not
from typing import Any, Protocol

from specdec.engine.control.best import best_plan
from specdec.engine.control.estimate import Curve, Estimate, Track
from specdec.engine.control.explore import Explorer
from specdec.engine.control.plan import EXPLORE, Plan, Shape
from specdec.engine.decide import decide
from specdec.engine.tree import TokenTree

REPLAN = 8
"""Steps after which the next plan is made, if the same samples go on."""


@dataclass(frozen=True)
class Decisions:
    """What a policy has decided, and by what.

    Attributes:
        n_levels: of a whole draft. adapts: whether less may be drafted. depth: levels that are drafted now. changes: of
            the depth, so far.
        acceptance: [n_levels], the acceptance rate of each level: with what probability a path reaches it.
        draft_seconds: as measured, by depth, then by samples. forward_seconds: by samples, or up to twice as many, then
            by tokens.
        looked_up: acceptance rates of what the text says itself, where that drafts, too.
    """

    n_levels: int
    adapts: bool
    depth: int
    changes: int = 0
    acceptance: list[float] = field(default_factory=list)
    draft_seconds: dict[int, dict[int, float]] = field(default_factory=dict)
    forward_seconds: dict[int, dict[int, float]] = field(default_factory=dict)
    looked_up: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        seconds = {"draft_seconds": self.draft_seconds, "forward_seconds": self.forward_seconds}
        return vars(self) | {
            name: {str(key): {str(size): x for size, x in curve.items()} for key, curve in curves.items()}
            for name, curves in seconds.items()
        }

    def __str__(self) -> str:
        if not self.n_levels:
            return "there is no draft"
        if not self.adapts:
            return f"always {self.n_levels} tokens deep, the whole draft"
        parts = [(f"a draft {d} deep, by batch size", curve) for d, curve in self.draft_seconds.items()]
        parts += [(f"the target from batch size {n} on, by tokens", curve) for n, curve in self.forward_seconds.items()]
        seconds = [
            f"ms of {name}: {', '.join(f'{size} takes {1000 * x:.1f}' for size, x in curve.items())}"
            for name, curve in parts
        ]
        now = f"now {self.depth} of up to {self.n_levels} tokens deep, after {self.changes} changes"
        rates = [
            f"chances {of}to be accepted: {', '.join(f'{rate:.2f}' for rate in chances)}"
            for of, chances in (("", self.acceptance), ("of what was looked up ", self.looked_up)) if chances
        ]  # fmt: skip
        return "; ".join([now, *rates, *seconds])


class Policy(Protocol):
    """Decides what every step drafts, for calls of one law.

    Attributes:
        shape: what there is to choose from. ready: depths that are chosen from: what would have to be compiled in the
            middle of a text is not.
    """

    shape: Shape
    ready: Sequence[int]

    @property
    def levels(self) -> tuple[int, ...]:
        """How many levels a step may draft; what needs compiling."""

    @property
    def decisions(self) -> Decisions:
        """What is drafted now, and why."""

    def plan(self, samples: Sequence[Track]) -> Plan:
        """What the next step does for these unfinished samples, [n]."""

    def calibrates(self, n: int) -> bool:
        """Whether plans for about `n` samples are trials still, made to learn what steps cost."""

    def count(self, track: Track, n_allowed: int, n_found: int, n_judged: int, n_accepted: int) -> None:
        """A sample's step, allowed so many nodes, found a draft of so many; of those judged, a path of `n_accepted` was
        accepted."""

    def learn(self, plan: Plan, seconds: tuple[float, float, float] | None) -> None:
        """A step with this plan, whose samples have been counted, took so many seconds, for the drafter's reading, its
        draft and the target's forward; None if it compiled."""

    def uniform(self, n: int, levels: int, depth: int | None = None, trial: str = "") -> Plan:
        """The first `levels` levels for each of `n` samples, of a draft of that depth or more."""
        return self.shape.uniform(n, levels, depth, trial)


class Fixed(Policy):
    """Always the whole draft."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.ready = shape, shape.depths

    @property
    def levels(self) -> tuple[int, ...]:
        return (self.shape.n_levels,)

    @property
    def decisions(self) -> Decisions:
        return Decisions(self.shape.n_levels, adapts=False, depth=self.shape.n_levels)

    def plan(self, samples: Sequence[Track]) -> Plan:
        return self.uniform(len(samples), self.shape.n_levels)

    def calibrates(self, n: int) -> bool:
        return False

    def count(self, track: Track, n_allowed: int, n_found: int, n_judged: int, n_accepted: int) -> None:
        """Nothing depends on it."""

    def learn(self, plan: Plan, seconds: tuple[float, float, float] | None) -> None:
        """Nothing depends on it."""


class Adaptive(Policy):
    """What brings the most tokens a second, nothing where no draft pays.

    Args:
        shape: of one level at least.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.ready = shape, shape.depths
        self.estimate = Estimate(shape)
        self.changes = 0
        self._explorer = Explorer(shape, self.estimate)
        self._best, self._age = Plan(0, (), 0), 0
        self._samples: tuple[Track, ...] = ()  # of the best plans
        self._plans: dict[tuple[int, ...], Plan] = {}  # by the samples' sources

    @property
    def levels(self) -> tuple[int, ...]:
        return (*reversed(self.shape.depths), 0)

    @property
    def decisions(self) -> Decisions:
        def points(curves: dict[int, Curve]) -> dict[int, dict[int, float]]:
            return {key: dict(zip(*curve.points, strict=True)) for key, curve in sorted(curves.items())}

        costs, (rates, *others) = self.estimate.costs, [source.rates for source in self.estimate.sources]
        measured = points(costs.drafts), points(costs.forwards)
        looked_up = others[0] if others else []
        return Decisions(self.shape.n_levels, True, self._best.depth, self.changes, rates, *measured, looked_up)

    def plan(self, samples: Sequence[Track]) -> Plan:
        if trial := self._explorer.trial(len(samples), self._best):
            return trial
        for acceptance in self.estimate.sources:
            acceptance.remember(len(samples))
        self._age += 1
        is_same = len(samples) == len(self._samples) and not any(map(is_not, samples, self._samples))
        if self._age >= REPLAN or not is_same:
            self._samples, self._age, self._plans = tuple(samples), 0, {}
        sources, before = tuple(track.source for track in samples), self._best.depth
        if sources not in self._plans:
            self._plans[sources] = best_plan(samples, self.shape, self.estimate, self.ready, before)
            if before != self._plans[sources].depth and not all(sources):
                self.changes += 1
                self._explorer.restart()
        plan = self._plans[sources]
        self._best = replace(plan, depth=before) if all(sources) else plan  # where the drafter is asked
        return plan

    def calibrates(self, n: int) -> bool:
        return bool(self._explorer.calibration(n))

    def count(self, track: Track, n_allowed: int, n_found: int, n_judged: int, n_accepted: int) -> None:
        allowed, found, judged = map(self.shape.whole_levels, (n_allowed, n_found, n_judged))
        if not track.source:
            self._explorer.count(judged > 0, n_accepted > 0)
        self.estimate.sources[track.source].count(track, allowed, found, judged, n_accepted)

    def learn(self, plan: Plan, seconds: tuple[float, float, float] | None) -> None:
        seconds = decide("seconds of a step", seconds)
        if seconds is None:
            return
        reading, draft, forward = seconds
        self.estimate.learn(plan, reading, draft, forward)
        self._explorer.learn(plan, reading + draft + forward, self._best, is_new=self._age == 0)
        if plan.trial == EXPLORE:
            self._samples = ()  # plan anew


def policy_of(
    tree: TokenTree, depths: Sequence[int], adapts: bool, source_levels: Sequence[int] | None = None,
    rides: bool = False,
) -> Policy:  # fmt: skip
    """The policy for a whole draft of this tree, of which so many levels can be drafted, ascending, by sources of so
    many levels, the drafter first; see `Shape`."""
    shape = Shape(tree, depths, source_levels, rides)
    return Adaptive(shape) if adapts and shape.n_levels else Fixed(shape)
