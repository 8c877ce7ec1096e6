"""How much to draft: the controller that keeps speculation from costing more than it brings.

A step takes the seconds of drafting, by depth, and of the target's forward, by its numbers of texts and of tokens T;
both are measured as the steps run, in turns at first. What a drafted level brings is the probability that a path
reaches it, counted over all texts, times what each text made of its drafts so far. Levels of all texts compete for the
T tokens: those of most expected tokens come first, for as long as tokens per second grow; where none pays, nothing is
drafted.

Only where a text does not depend on its drafts: greedily, and with coupled sampling. Otherwise a text's noise would be
read differently from run to run, and the whole tree is drafted always.

Source: goodput of speculation, SmartSpec, arXiv 2406.14066; per sample and with measured times here.
Letters: n unfinished texts, d levels, T tokens of the target's forward.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import is_not
from typing import NamedTuple

from specdec.engine.tree import TokenTree

KEEP = 1.015
"""A plan is dropped for one that promises this many times its tokens per second; not drafting counts as so much faster
than it is, because what drafts bring is only estimated."""
REPLAN = 8
"""Steps after which the next plan is made, if the same texts go on."""
LEVELS = 1, 2, 3, 5, 8, 13
"""Levels that are timed at first, beside none and all: some machines' forwards take time by steps of T."""
REGAINED = 200
"""Steps in which drafts should bring in again what reading the texts took."""
FEW = 4
"""Texts that a look drafts for, where nothing is drafted otherwise."""
PATIENCE = 100, 3200
"""The other ways are looked at again after so many times the seconds that a look takes: at first, and at most, after
doubling for every look in vain."""


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
        n_tokens: T. trial: what it is tried for, "turn" or "look", if not for being the best.
    """

    depth: int
    allowed: tuple[int, ...]
    n_tokens: int
    trial: str = ""


def _scale(n: int) -> int:
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


class StepTimes:
    """Seconds of a step's two parts, as last measured: drafting, by depth and texts, and the target's forward, by
    texts, in powers of two, and T: the same tokens of more texts have more caches to read."""

    def __init__(self) -> None:
        self.drafts: dict[int, Curve] = {}
        self.forwards: dict[int, Curve] = {}

    def learn(self, plan: Plan, draft: float, forward: float) -> None:
        n = len(plan.allowed)
        if plan.depth:
            self.drafts.setdefault(plan.depth, Curve()).learn(n, draft)
        self.forwards.setdefault(_scale(n), Curve()).learn(plan.n_tokens, forward)

    def forward(self, n: int, n_tokens: int) -> float:
        """Seconds of a forward of so many tokens of about `n` texts, of which some must have been measured."""
        return self.forwards[_scale(n)].at(n_tokens)

    def draft(self, depth: int, n: int) -> float:
        """Seconds to draft `depth` levels for `n` texts; of a depth not tried yet, from those that were."""
        return Curve({0: 0.0} | {d: curve.at(n) for d, curve in self.drafts.items()}).at(depth)

    def __str__(self) -> str:
        curves = [(f"draft of {d} by texts", curve) for d, curve in sorted(self.drafts.items())]
        curves += [(f"forward of {n} texts or more by tokens", curve) for n, curve in sorted(self.forwards.items())]
        return "; ".join(
            f"{name} {', '.join(f'{size}: {1000 * x:.1f}' for size, x in zip(*curve.points, strict=True))} ms"
            for name, curve in curves
        )


class Controller:
    """Chooses what every step drafts, for calls of one law.

    Args:
        tree: what a whole draft is. depths: levels that can be drafted, ascending (see `Drafter`).
        adapts: False always drafts the whole tree.

    Attributes:
        ready: those of the depths that are chosen from: what would have to be compiled in the middle of a text is not.
    """

    def __init__(self, tree: TokenTree, depths: Sequence[int], adapts: bool) -> None:
        self.depths, self.adapts = depths, adapts and tree.depth > 0
        self.ready = depths
        self.times = StepTimes()
        self.switches = 0
        self._levels = tree.depth
        self._some = [level for level in LEVELS if level < tree.depth]
        self._nodes_to = [bisect_right(tree.depths, d) - 1 for d in range(tree.depth + 1)]  # drafted, down to a level
        self._tried, self._hits = [0.0] * tree.depth, [0.0] * tree.depth
        self._looked, self._found, self._memory = 0.0, 0.0, 0.99
        self._expected = [0.0, *accumulate(self.survival)]  # levels accepted of so many judged
        self._turns: dict[int, list[int]] = {}
        self._looks: list[int] = []
        self._n_looks, self._retries, self._glimpse = 0, 0, (0, 0)
        self._texts: tuple[Habit, ...] = ()
        self._plan = Plan(0, (), 0)
        self._age, self._steady, self._reading, self._patience = 0, 0.0, 0.0, PATIENCE[0]

    def plan(self, texts: Sequence[Habit]) -> Plan:
        """What the next step does for these unfinished texts."""
        if not self.adapts:
            return self.uniform(len(texts), self._levels)
        if turns := self.turns(len(texts)):  # the whole draft serves all: no other is compiled for it
            return self.uniform(len(texts), turns[-1], self.depths[-1], "turn")
        if self._looks:
            return self._glance(len(texts), self._looks.pop())
        self._memory = 1 - 1 / (20 + 20 * len(texts))  # counts are of about the last twenty steps
        self._age += 1
        if self._age >= REPLAN or len(texts) != len(self._texts) or any(map(is_not, texts, self._texts)):
            before, self._plan = self._plan.depth, self._best(texts)
            if before != self._plan.depth:
                self.switches, self._steady, self._patience = self.switches + 1, 0.0, PATIENCE[0]
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
        now = f"{self._plan.depth} levels now, after {self.switches} changes"
        return f"{now}; survival by level {survival}; {self.times}"

    def turns(self, n: int) -> list[int]:
        """Levels to try, the next one last, before steps of about `n` texts are chosen by what they take."""
        some = [level for level in self._some for _ in range(3)]
        whole = [self._levels] * max(3, 24 // n)  # what is accepted must be known too
        return self._turns.setdefault(_scale(n), [0] * 3 + some + whole)

    def learn(self, plan: Plan, seconds: tuple[float, float, float] | None) -> None:
        """A step with this plan took so many seconds, for the drafter's reading, its draft and the target's forward;
        None if it compiled."""
        if seconds is None or not self.adapts:
            return
        reading, draft, forward = seconds
        self.times.learn(plan, draft, forward)
        if plan.depth:
            self._expected = [0.0, *accumulate(self.survival)]
        if plan.trial != "look":
            self._glimpse = 0, 0
        if plan.trial == "turn":
            if turns := self.turns(len(plan.allowed)):
                turns.pop()
        elif plan.trial == "look":
            self._reading = max(reading, 0.5 * self._reading)
            self._texts = ()  # plan anew
            judged, accepted = self._glimpse
            surprising = accepted > 1.5 * self.survival[0] * judged  # it may be luck
            if plan.depth and not self._looks and (surprising or (not judged and self._retries)):
                self._looks, self._retries = [min(2, self._levels)], self._retries - (not judged)  # again at once
            self._glimpse = 0, 0
        else:
            self._steady += reading + draft + forward
            if self._age == 0:
                self._look(len(plan.allowed))

    def _look(self, n: int) -> None:
        """Try the other ways for a step each, if that is not too dear: times and texts change, and what is not done is
        not measured."""
        some = [self._some[self._n_looks % len(self._some)]] if self._some else []
        levels = [*([0] if self._plan.depth else []), *some, self._levels]
        ways = [self._glance(n, level) for level in levels]
        cost = self._reading + sum(self.times.draft(w.depth, n) + self.times.forward(n, w.n_tokens) for w in ways)
        if self._steady < self._patience * cost:
            return
        self._steady, self._patience = 0.0, min(2 * self._patience, PATIENCE[1])
        self._looks, self._n_looks, self._retries = levels, self._n_looks + 1, 3
        if not self._plan.depth:  # what was long ago says less
            for level, tried in enumerate(self._tried):
                less = max(0.5, min(1, 8 / max(tried, 1)))
                self._tried[level], self._hits[level] = less * tried, less * self._hits[level]

    def _glance(self, n: int, levels: int) -> Plan:
        """A step that tries a number of levels; where nothing is drafted otherwise for a few texts, in turns: what the
        drafter has not read of them, it has to read."""
        # No draft is compiled for a look.
        depth = min((d for d in (*self.times.drafts, *self.depths[-1:]) if d >= levels), default=None)
        whole = self.uniform(n, levels, depth, "look")
        if self._plan.depth or not levels:
            return whole
        chosen = {(self._n_looks + i) % n for i in range(min(n, FEW))}
        allowed = tuple(nodes if i in chosen else 0 for i, nodes in enumerate(whole.allowed))
        return Plan(whole.depth, allowed, n + sum(allowed), "look")

    def count(self, habit: Habit, n_found: int, n_judged: int, n_accepted: int) -> None:
        """A text's step found a draft of so many nodes; of those judged, a path of `n_accepted` was accepted."""
        if not self.adapts:
            return
        judged = bisect_right(self._nodes_to, n_judged) - 1
        self._glimpse = self._glimpse[0] + (judged > 0), self._glimpse[1] + (n_accepted > 0)
        habit.expected = 0.95 * habit.expected + self._expected[judged]
        habit.accepted = 0.95 * habit.accepted + n_accepted
        habit.steps, habit.found = 0.9 * habit.steps + 1, 0.9 * habit.found + (n_found > 0)
        self._looked, self._found = 0.99 * self._looked + 1, 0.99 * self._found + (n_found > 0)
        for level in range(min(n_accepted + 1, judged)):
            self._tried[level] = self._memory * self._tried[level] + 1
            self._hits[level] = self._memory * self._hits[level] + (level < n_accepted)

    @property
    def survival(self) -> list[float]:
        """With what probability a path reaches each level, counted over all texts."""
        share, shares = 0.7, []
        for hits, tried in zip(self._hits, self._tried, strict=True):
            share = (hits + 2 * share) / (tried + 2)  # where little was seen, as one level up
            shares.append(share)
        return list(accumulate(shares, lambda a, b: a * b))

    def uniform(self, n: int, levels: int, depth: int | None = None, trial: str = "") -> Plan:
        """The first `levels` levels for each of `n` texts, of a draft of that depth or more."""
        if not levels:
            return Plan(0, (0,) * n, n, trial)
        nodes = self._nodes_to[levels]
        depth = depth or next(d for d in self.depths if d >= levels)
        return Plan(depth, (nodes,) * n, n * (nodes + 1), trial)

    def _best(self, texts: Sequence[Habit]) -> Plan:
        """The plan of most tokens a second; the depth of the last one, unless another promises KEEP times as much."""
        n = len(texts)
        offers = self._offers(texts)
        rates, plans = {0: KEEP * n / self.times.forward(n, n)}, {0: self.uniform(n, 0)}
        for depth in self.ready:
            able = [offer for offer in offers if offer.level <= depth]
            rates[depth], plans[depth] = self._cut(able, n, depth)
        depth = max(rates, key=lambda depth: rates[depth])
        return plans[depth if rates[depth] >= KEEP * rates[self._plan.depth] else self._plan.depth]

    def _offers(self, texts: Sequence[Habit]) -> list[_Offer]:
        """All levels of all texts, those of the most expected tokens a row first."""
        survival, offers = self.survival, []
        overall = (self._found + 2) / (self._looked + 2)
        for i, text in enumerate(texts):
            chance = (text.found + 2 * overall) / (text.steps + 2)
            worth, scale = 1.0, (text.accepted + 4) / (text.expected + 4)
            for level in range(1, self._levels + 1):
                rows = self._nodes_to[level] - self._nodes_to[level - 1]
                worth = min(worth, scale * survival[level - 1] / rows)  # no level comes before the one above it
                offers.append(_Offer(worth, chance, rows, i, level))
        return sorted(offers, key=lambda offer: (-offer.worth, offer.level, offer.text))

    def _cut(self, offers: Sequence[_Offer], n: int, depth: int) -> tuple[float, Plan]:
        """The most tokens a second that the first so many offers make, tried for about sixteen numbers, with a draft of
        `depth` levels; and the plan.

        Where drafts come by chance there is room for most of them, and who comes last may lose a few.
        """
        drafting = self.times.draft(depth, n)
        if not self._plan.depth:  # what the drafter would have to read first, spread over the steps that follow
            drafting += self._reading * max(n / FEW, 1) / REGAINED
        allowed = [0] * n
        tokens, mean, variance = float(n), 0.0, 0.0
        best, stride = (0.0, Plan(depth, (), 0)), max(1, len(offers) // 16)
        for k, (worth, chance, rows, i, _) in enumerate(offers, 1):
            tokens, mean = tokens + worth * chance * rows, mean + chance * rows
            variance += chance * (1 - chance) * ((allowed[i] + rows) ** 2 - allowed[i] ** 2)
            allowed[i] += rows
            if k % stride == 0 or k == len(offers):
                deviation = math.sqrt(variance)
                enough = min(math.ceil(mean + deviation), sum(allowed))
                lost = 0.083 * deviation * worth  # of a normal law what is above its mean and deviation
                for room, brought in (sum(allowed), tokens), (enough, tokens - lost):
                    rate = brought / (drafting + self.times.forward(n, n + room))
                    if rate > best[0]:
                        best = rate, Plan(depth, tuple(allowed), n + room)
        return best


class _Offer(NamedTuple):
    """A level of a text's draft.

    Attributes:
        worth: tokens to be expected of each row, if there is a draft. chance: that there is one. rows: of the level.
    """

    worth: float
    chance: float
    rows: int
    text: int
    level: int
