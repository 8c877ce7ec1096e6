"""What steps cost and bring, as measured and counted while they run: the one record that plans are made from.

A step takes the seconds of drafting, by depth, and of the target's forward, by its numbers of samples and of tokens T.
What a drafted level brings is its acceptance rate, counted over all samples, times what each sample made of its drafts
so far.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from specdec.engine.control.plan import EXPLORE, Plan, Shape


def scale(n: int) -> int:
    """The power of two that is not above `n`."""
    return 1 << n.bit_length() - 1


class Curve:
    """Seconds against a size, from measurements of a few sizes: straight between them, never falling.

    Of the latest at a size the second shortest counts: other programs only ever add. So does a longer step that took
    less.
    """

    def __init__(self, points: Mapping[int, float] | None = None) -> None:
        self._latest: dict[int, deque[float]] = {}
        self._points: tuple[list[int], list[float]] | None = None
        for size, seconds in (points or {}).items():
            self.learn(size, seconds)

    def learn(self, size: int, seconds: float) -> None:
        self._latest.setdefault(size, deque(maxlen=5)).append(seconds)
        self._points = None

    @property
    def points(self) -> tuple[list[int], list[float]]:
        """Sizes, ascending, and seconds."""
        if self._points is None:
            sizes = sorted(self._latest)
            seconds = [sorted(self._latest[size])[min(1, len(self._latest[size]) - 1)] for size in sizes]
            self._points = sizes, list(accumulate(reversed(seconds), min))[::-1]
        return self._points

    def at(self, size: float) -> float:
        """Seconds at any size; outside of what was measured on the line through the nearest two, and half of what the
        nearest takes at least."""
        sizes, seconds = self.points
        if len(sizes) == 1:
            return seconds[0]
        i = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        way = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return max(seconds[i - 1] + way * (seconds[i] - seconds[i - 1]), 0.5 * seconds[i - 1])


class StepCosts:
    """Seconds of a step's parts, as last measured: drafting, by depth and samples, and the target's forward, by
    samples, in powers of two, and rows: the same rows of more samples have more caches to read.

    Attributes:
        reading: what the drafter took to read samples, where drafting was explored after steps without.
    """

    def __init__(self, shape: Shape) -> None:
        self.drafts: dict[int, Curve] = {}
        self.forwards: dict[int, Curve] = {}
        self.reading = 0.0
        self._shape = shape

    def learn(self, plan: Plan, reading: float, draft: float, forward: float) -> None:
        n, n_drafted = len(plan.allowed), len(plan.allowed) if plan.n_drafted is None else plan.n_drafted
        if plan.depth and n_drafted:
            self.drafts.setdefault(plan.depth, Curve()).learn(n_drafted, draft)
        rows = self._shape.rows(plan.n_tokens, plan.depth)
        self.forwards.setdefault(scale(n), Curve()).learn(rows, forward)
        if plan.trial == EXPLORE:
            self.reading = max(reading, 0.5 * self.reading)

    def forward(self, n: int, n_tokens: int, depth: int) -> float:
        """Seconds of a forward that judges so many tokens of about `n` samples, of which some must have been measured,
        in a step that drafts so many levels."""
        return self.forwards[scale(n)].at(self._shape.rows(n_tokens, depth))

    def draft(self, depth: int, n: int) -> float:
        """Seconds to draft `depth` levels for `n` samples; of a depth not tried yet, from those that were."""
        return Curve({0: 0.0} | {d: curve.at(n) for d, curve in self.drafts.items()}).at(depth)

    def step(self, plan: Plan) -> float:
        """Seconds of a step with this plan."""
        n = len(plan.allowed)
        return self.draft(plan.depth, n) + self.forward(n, plan.n_tokens, plan.depth)


@dataclass
class Track:
    """What one sample made of its drafts, lately.

    Attributes:
        expected, accepted: levels, as all samples would have had them accepted, and as they were.
        steps, found: steps that searched for a draft, and found one.
        source: what drafts for it in the next step: 0 is the drafter, 1 what the text says itself.
    """

    expected: float = 0.0
    accepted: float = 0.0
    steps: float = 0.0
    found: float = 0.0
    source: int = 0


class Acceptance:
    """How often drafts are found and their levels accepted, over all samples and lately.

    Args:
        n_levels: of a whole draft.
    """

    def __init__(self, n_levels: int) -> None:
        self._tried, self._accepted = [0.0] * n_levels, [0.0] * n_levels
        self._wanted, self._there = [0.0] * n_levels, [0.0] * n_levels
        self._steps, self._found, self._memory = 0.0, 0.0, 0.99
        self.settle()

    def remember(self, n: int) -> None:
        """From now on counts are of about the last twenty steps of `n` samples."""
        self._memory = 1 - 1 / (20 + 20 * n)

    def count(self, track: Track, allowed: int, found: int, judged: int, accepted: int) -> None:
        """A sample's step, allowed so many levels, found a draft of so many, or none; of those judged, so many were
        accepted. Where a draft that was judged whole ends early, what it lacks counts as tried and not accepted."""
        tried = allowed if 0 < found == judged else judged
        track.expected = 0.95 * track.expected + self._expected[tried]
        track.accepted = 0.95 * track.accepted + accepted
        track.steps, track.found = 0.9 * track.steps + 1, 0.9 * track.found + (found > 0)
        self._steps, self._found = 0.99 * self._steps + 1, 0.99 * self._found + (found > 0)
        for level in range(min(found + 1, allowed) if found else 0):
            self._wanted[level] = self._memory * self._wanted[level] + 1
            self._there[level] = self._memory * self._there[level] + (level < found)
        for level in range(min(accepted + 1, tried)):
            self._tried[level] = self._memory * self._tried[level] + 1
            self._accepted[level] = self._memory * self._accepted[level] + (level < accepted)

    def settle(self) -> None:
        """From now on samples are held against what has been counted up to here."""
        self._expected = [0.0, *accumulate(self.rates)]  # levels accepted of so many judged

    def fade(self) -> None:
        """What was counted long ago says less from now on."""
        for level, tried in enumerate(self._tried):
            less = max(0.5, min(1, 8 / max(tried, 1)))
            self._tried[level], self._accepted[level] = less * tried, less * self._accepted[level]

    @property
    def rates(self) -> list[float]:
        """[n_levels], the acceptance rate of each level: with what probability a path reaches it."""
        share, shares = 0.7, []
        for accepted, tried in zip(self._accepted, self._tried, strict=True):
            share = (accepted + 2 * share) / (tried + 2)  # where little was seen, as one level up
            shares.append(share)
        return list(accumulate(shares, lambda a, b: a * b))

    @property
    def lengths(self) -> list[float]:
        """[n_levels], with what probability a draft that was found has each level: chains may end early."""
        shares = [(there + 2) / (wanted + 2) for there, wanted in zip(self._there, self._wanted, strict=True)]
        return list(accumulate(shares, lambda a, b: a * b))

    def chance(self, track: Track) -> float:
        """With what probability a step finds a draft for this sample."""
        overall = (self._found + 2) / (self._steps + 2)
        return (track.found + 2 * overall) / (track.steps + 2)

    def quality(self, track: Track) -> float:
        """How many times as much is accepted of this sample's drafts as of all."""
        return (track.accepted + 4) / (track.expected + 4)


class Estimate:
    """What steps cost and bring.

    Attributes:
        costs: of steps. sources: acceptance of what each source drafts, the drafter first.
    """

    def __init__(self, shape: Shape) -> None:
        self.costs, self.sources = StepCosts(shape), [Acceptance(n_levels) for n_levels in shape.source_levels]

    @property
    def acceptance(self) -> Acceptance:
        """Of what the drafter drafts."""
        return self.sources[0]

    def learn(self, plan: Plan, reading: float, draft: float, forward: float) -> None:
        """A step with this plan, whose samples have been counted, took so many seconds for its parts."""
        self.costs.learn(plan, reading, draft, forward)
        if any(plan.allowed):
            for acceptance in self.sources:
                acceptance.settle()
