"""How much to draft: the controller that keeps speculation from costing more than it brings.

A step takes the seconds of drafting, by depth, and of the target's forward, by its number of tokens T; both are
measured as the steps run, in turns at first. What a drafted level brings is the probability that a path reaches it,
counted over all texts, times what each text made of its drafts so far. Levels of all texts compete for the T tokens:
those of most expected tokens come first, for as long as tokens per second grow; where none pays, nothing is drafted.

Only where a text does not depend on its drafts: greedily, and with coupled sampling. Otherwise a text's noise would be
read differently from run to run, and the whole tree is drafted always.

Source: goodput of speculation, SmartSpec, arXiv 2406.14066, section 4; per sample and with measured times here.
Letters: n unfinished texts, d levels, T tokens of the target's forward.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from specdec.tree import TokenTree

KEEP = 1.03
"""A plan is dropped for one that promises this many times its tokens per second."""
REPLAN = 8
"""Steps after which the next plan is made, if the same texts go on."""
TURNS = 3
"""Steps that every way to draft is tried for, at first."""
PATIENCE = 128, 4096
"""Undrafted steps until drafting is tried again, and until then at most, after failing again and again."""


@dataclass
class Habit:
    """What one text made of its drafts, lately.

    Attributes:
        expected, accepted: levels, as all texts would have had them accepted, and as they were.
        steps, found: steps that looked for a draft, and found one.
    """

    expected: float = 0.0
    accepted: float = 0.0
    steps: float = 0.0
    found: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the next step does.

    Attributes:
        depth: levels to draft, 0 for none. allowed: drafted nodes of each text that the target judges, at most.
        n_tokens: T.
    """

    depth: int
    allowed: tuple[int, ...]
    n_tokens: int


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


class StepTimes:
    """Seconds of a step's two parts, as last measured: drafting, by depth and texts, and the target's forward, by T."""

    def __init__(self) -> None:
        self.drafts: dict[int, Curve] = {}
        self.forwards = Curve()

    def learn(self, plan: Plan, draft: float, forward: float) -> None:
        if plan.depth:
            self.drafts.setdefault(plan.depth, Curve()).learn(len(plan.allowed), draft)
        self.forwards.learn(plan.n_tokens, forward)

    def draft(self, depth: int, n: int) -> float:
        """Seconds to draft `depth` levels for `n` texts; of a depth not tried yet, from those that were."""
        return Curve({0: 0.0} | {d: curve.at(n) for d, curve in self.drafts.items()}).at(depth)

    def __str__(self) -> str:
        curves = [(f"draft of {d} by texts", curve) for d, curve in sorted(self.drafts.items())]
        return "; ".join(
            f"{name} {', '.join(f'{size}: {1000 * x:.1f}' for size, x in zip(*curve.points, strict=True))} ms"
            for name, curve in [*curves, ("forward by tokens", self.forwards)]
        )


class Controller:
    """Chooses what every step drafts, for calls of one law.

    Args:
        tree: what a whole draft is. depths: levels that can be drafted, ascending (see `Drafter`).
        adapts: False always drafts the whole tree.
    """

    def __init__(self, tree: TokenTree, depths: Sequence[int], adapts: bool) -> None:
        self.depths, self.adapts = depths, adapts and tree.depth > 0
        self.times = StepTimes()
        self.switches = 0
        self._levels = tree.depth
        self._nodes_to = [bisect_right(tree.depths, d) - 1 for d in range(tree.depth + 1)]  # drafted, down to a level
        self._tried, self._hits = [0.0] * tree.depth, [0.0] * tree.depth
        self._looked, self._found = 0.0, 0.0
        self._turns: dict[int, list[int]] = {}
        self._texts: tuple[Habit, ...] = ()
        self._plan = Plan(0, (), 0)
        self._age = self._idle = 0
        self._patience = PATIENCE[0]
        self._trial = 0

    def plan(self, texts: Sequence[Habit]) -> Plan:
        """What the next step does for these unfinished texts."""
        if not self.adapts:
            return self.uniform(texts, self._levels)
        turns = self.turns(len(texts))
        if turns:
            return self.uniform(texts, turns[-1])
        if self._trial:
            return self.uniform(texts, min(2, self._levels))
        self._age += 1
        if self._age >= REPLAN or len(texts) != len(self._texts) or any(map(_differ, texts, self._texts)):
            before, self._plan = self._plan.depth, self._best(texts)
            self.switches += before != self._plan.depth
            self._texts, self._age = tuple(texts), 0
        return self._plan

    @property
    def levels(self) -> tuple[int, ...]:
        """How many levels a step may draft; what needs compiling."""
        return (*reversed(self.depths), 0) if self.adapts else (self._levels,)

    @property
    def why(self) -> str:
        """What is drafted, and why."""
        if not self._levels:
            return "nothing to draft"
        if not self.adapts:
            return f"always the whole draft, of {self._levels} levels"
        survival = ", ".join(f"{share:.2f}" for share in self.survival)
        return f"{self._plan.depth} levels now; survival by level {survival}; {self.times}"

    def turns(self, n: int) -> list[int]:
        """Levels to try, the next one last, before steps of about `n` texts are chosen by what they take."""
        return self._turns.setdefault(n.bit_length(), [0] * TURNS + [self._levels] * TURNS)

    def learn(self, plan: Plan, seconds: tuple[float, float] | None) -> None:
        """A step with this plan took so many seconds, for its draft and its forward; None if it compiled."""
        if seconds is None or not self.adapts:
            return
        self.times.learn(plan, *seconds)
        turns = self.turns(len(plan.allowed))
        if turns:
            turns.pop()
        elif self._trial:
            self._trial -= 1
            self._texts = ()  # plan anew
        elif plan.depth:
            self._idle, self._patience = 0, PATIENCE[0]
        else:
            self._idle += 1
            if self._idle >= self._patience:
                self._trial, self._idle, self._patience = 2, 0, min(2 * self._patience, PATIENCE[1])
                for counts in (self._tried, self._hits):
                    counts[:] = [0.5 * x for x in counts]  # what was long ago says less

    def count(self, habit: Habit, n_found: int, n_judged: int, n_accepted: int) -> None:
        """A text's step found a draft of so many nodes; of those judged, a path of `n_accepted` was accepted."""
        judged = bisect_right(self._nodes_to, n_judged) - 1
        survival = self.survival
        habit.expected = 0.9 * habit.expected + sum(survival[:judged])
        habit.accepted = 0.9 * habit.accepted + n_accepted
        habit.steps, habit.found = 0.9 * habit.steps + 1, 0.9 * habit.found + (n_found > 0)
        self._looked, self._found = 0.99 * self._looked + 1, 0.99 * self._found + (n_found > 0)
        for level in range(min(n_accepted + 1, judged)):
            self._tried[level] = 0.99 * self._tried[level] + 1
            self._hits[level] = 0.99 * self._hits[level] + (level < n_accepted)

    @property
    def survival(self) -> list[float]:
        """With what probability a path reaches each level, counted over all texts."""
        share, shares = 0.7, []
        for hits, tried in zip(self._hits, self._tried, strict=True):
            share = (hits + 2 * share) / (tried + 2)  # where little was seen, as one level up
            shares.append(share)
        return list(accumulate(shares, lambda a, b: a * b))

    def uniform(self, texts: Sequence[Habit], levels: int) -> Plan:
        """The first `levels` levels for every text."""
        depth = next(d for d in self.depths if d >= levels) if levels else 0
        return Plan(depth, (self._nodes_to[levels],) * len(texts), len(texts) * (self._nodes_to[levels] + 1))

    def _best(self, texts: Sequence[Habit]) -> Plan:
        """The plan of most tokens a second; the depth of the last one, unless another promises KEEP times as much."""
        n = len(texts)
        overall = (self._found + 2) / (self._looked + 2)
        chance = [(text.found + 2 * overall) / (text.steps + 2) for text in texts]
        offers = self._offers(texts, chance)
        rates = {0: n / self.times.forwards.at(n)}
        levels = {0: [0] * n}
        for depth in self.depths:
            able = [offer for offer in offers if offer[3] <= depth]
            rates[depth], cut = self._cut(able, n, self.times.draft(depth, n))
            levels[depth] = [0] * n
            for _, _, i, level in able[:cut]:
                levels[depth][i] = max(levels[depth][i], level)
        depth = max(rates, key=lambda depth: rates[depth])
        if rates[depth] < KEEP * rates.get(self._plan.depth, 0.0):
            depth = self._plan.depth
        allowed = tuple(self._nodes_to[level] for level in levels[depth])
        # Where drafts come by chance, room for most of them; who comes last may lose a few.
        mean = sum(c * nodes for c, nodes in zip(chance, allowed, strict=True))
        deviation = math.sqrt(sum(c * (1 - c) * nodes**2 for c, nodes in zip(chance, allowed, strict=True)))
        return Plan(depth, allowed, n + min(math.ceil(mean + deviation), sum(allowed)))

    def _offers(self, texts: Sequence[Habit], chance: Sequence[float]) -> list[tuple[float, float, int, int]]:
        """Tokens to be expected of each row, rows to be expected, text, level; the most tokens a row first."""
        survival, offers = self.survival, []
        for i, text in enumerate(texts):
            worth, scale = 1.0, (text.accepted + 2) / (text.expected + 2)
            for level in range(1, self._levels + 1):
                rows = self._nodes_to[level] - self._nodes_to[level - 1]
                worth = min(worth, scale * survival[level - 1] / rows)  # no level comes before the one above it
                offers.append((worth, chance[i] * rows, i, level))
        return sorted(offers, key=lambda offer: (-offer[0], offer[3], offer[2]))

    def _cut(self, offers: Sequence[tuple[float, float, int, int]], n: int, fixed: float) -> tuple[float, int]:
        """The most tokens a second that the first so many offers make, tried for about sixteen numbers, and how many;
        drafting them takes `fixed` seconds."""
        tokens = rows = float(n)
        best, stride = (0.0, 0), max(1, len(offers) // 16)
        for k, (worth, more, _, _) in enumerate(offers, 1):
            tokens, rows = tokens + worth * more, rows + more
            if k % stride == 0 or k == len(offers):
                best = max(best, (tokens / (fixed + self.times.forwards.at(rows)), k))
        return best


def _differ(a: object, b: object) -> bool:
    return a is not b
