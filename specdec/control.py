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
import statistics
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class StepTimes:
    """Seconds of a step's two parts, as last measured: medians of a few, since other programs disturb."""

    drafts: dict[int, dict[int, deque[float]]] = field(default_factory=dict)
    forwards: dict[int, deque[float]] = field(default_factory=dict)

    def learn(self, plan: Plan, draft: float, forward: float) -> None:
        n = len(plan.allowed)
        if plan.depth:
            self.drafts.setdefault(plan.depth, {}).setdefault(n, deque(maxlen=5)).append(draft)
        self.forwards.setdefault(plan.n_tokens, deque(maxlen=5)).append(forward)

    def draft(self, depth: int, n: int) -> float:
        """Seconds to draft `depth` levels for `n` texts; of a depth not tried yet, from those that were."""
        if not depth:
            return 0.0
        known = {d: self._of_texts(times, n) for d, times in self.drafts.items()}
        return _between({0: 0.0, **known}, depth)

    @staticmethod
    def _of_texts(times: dict[int, deque[float]], n: int) -> float:
        return _between({m: statistics.median(x) for m, x in times.items()}, n)

    def forward(self, n_tokens: float) -> float:
        """Seconds of a forward of `n_tokens` tokens."""
        return _between({t: statistics.median(x) for t, x in self.forwards.items()}, n_tokens)

    def table(self) -> dict[str, dict[int, float]]:
        """Median seconds of drafts by depth, for as many texts as were seen last, and of forwards by tokens."""
        drafts = {d: statistics.median(next(reversed(x.values()))) for d, x in sorted(self.drafts.items())}
        return {"draft": drafts, "forward": {t: statistics.median(x) for t, x in sorted(self.forwards.items())}}


def _between(points: dict[int, float], x: float) -> float:
    """On the line through the two points around `x`, or the two nearest; never less than half the nearest."""
    places = sorted(points)
    if len(places) == 1:
        return points[places[0]]
    i = min(max(bisect_left(places, x), 1), len(places) - 1)
    below, above = places[i - 1], places[i]
    way = (x - below) / (above - below)
    value = points[below] + way * (points[above] - points[below])
    nearest = points[below] if way < 0.5 else points[above]
    return max(value, 0.5 * nearest) if not 0 <= way <= 1 else value


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
        parts = "; ".join(
            f"{name} {', '.join(f'{n}: {1000 * x:.1f}' for n, x in times.items())} ms"
            for name, times in self.times.table().items()
        )
        return f"{self._plan.depth} levels now; survival by level {survival}; {parts}"

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
        rates = {0: n / self.times.forward(n)}
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
                best = max(best, (tokens / (fixed + self.times.forward(rows)), k))
        return best


def _differ(a: object, b: object) -> bool:
    return a is not b
