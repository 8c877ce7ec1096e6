"""A world in which policies can be judged without a clock: what steps truly take, and what texts truly accept.

Letters: n unfinished texts, T tokens of the target's forward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from specdec.engine.control import Plan, Policy, Track
from specdec.engine.tree import TokenTree

SPIKES = 0.02
"""Share of the measurements in which something else took three times as long."""


@dataclass(frozen=True)
class Machine:
    """Seconds that a step's parts truly take: a forward of T tokens, a draft at all, each of its levels, and each token
    that was added without the drafter's seeing it."""

    forward: Callable[[int], float]
    level: float = 0.0
    search: float = 0.0
    read: float = 0.0

    def draft(self, depth: int, n: int) -> float:
        return (self.search + self.level * depth) * (1 + 0.02 * n) if depth else 0.0


@dataclass(eq=False)
class Source:
    """A text: with what probability a path that came so far goes on, by level, and a step finds a draft at all."""

    accept: Sequence[float]
    found: float = 1.0
    track: Track = field(default_factory=Track)
    unread: int = 0


class World:
    """Texts decoded on a machine.

    Args:
        noise: of the times that are measured, relative. lag: steps under way when the next is planned.

    Attributes:
        tokens, seconds: what the steps so far brought and took: expected tokens of what was judged, true seconds.
        plans: all of them.
    """

    def __init__(
        self,
        tree: TokenTree,
        machine: Machine,
        texts: Sequence[Source],
        noise: float = 0.05,
        lag: int = 0,
        seed: int = 0,
    ) -> None:
        self.tree, self.machine, self.texts, self.noise, self.lag = tree, machine, list(texts), noise, lag
        self.tokens = self.seconds = 0.0
        self._finds = self._expected_finds = 1.0
        self.plans: list[Plan] = []
        self._nodes_to = [sum(0 < d <= level for d in tree.depths) for level in range(tree.depth + 1)]
        self._random = random.Random(seed)
        self._reports: list[Callable[[], None]] = []

    def run(self, control: Policy, n_steps: int) -> float:
        """The tokens per second of so many steps."""
        self.tokens = self.seconds = self._finds = self._expected_finds = 0.0
        for _ in range(n_steps):
            self.step(control)
        return self.tokens / self.seconds

    def step(self, control: Policy) -> None:
        texts = list(self.texts)
        plan = control.plan([text.track for text in texts])
        self.plans.append(plan)
        n = len(texts)
        finds = [self._random.random() < text.found for text in texts]
        self._finds += sum(finds)
        self._expected_finds += sum(text.found for text in texts)
        found = [self._nodes_to[plan.depth] * has_found for has_found in finds]
        judged, room = [], plan.n_tokens - n
        for nodes, allowed in zip(found, plan.allowed, strict=True):
            judged.append(min(nodes, allowed, room))  # first come, first served
            room -= judged[-1]
        accepted = []
        for text, nodes in zip(texts, judged, strict=True):
            chances = self._chances(text, nodes)
            self.tokens += 1 + sum(accumulate(chances, mul))
            hits = [self._random.random() < chance for chance in chances]
            accepted.append([*hits, False].index(False))
        unread = 0
        for text, allowed, more in zip(texts, plan.allowed, accepted, strict=True):
            unread += text.unread if allowed else 0
            knows = plan.depth and (allowed or not text.unread)
            text.unread = 0 if knows else text.unread + 1 + more
        times = self.machine.read * unread, self.machine.draft(plan.depth, n), self.machine.forward(plan.n_tokens)
        self.seconds += sum(times)
        reading, draft, forward = map(self._measured, times)

        def report() -> None:
            if plan.depth:
                for text, *counts in zip(texts, plan.allowed, found, judged, accepted, strict=True):
                    control.count(text.track, *counts)
            control.learn(plan, (reading, draft, forward))

        self._reports.append(report)
        while len(self._reports) > self.lag:
            self._reports.pop(0)()

    def rate(self, levels: int) -> float:
        """The tokens per second of always drafting so many levels for every text, and judging all, with the luck that
        the last run had in finding drafts."""
        n, nodes, luck = len(self.texts), self._nodes_to[levels], self._finds / self._expected_finds
        tokens = sum(1 + luck * text.found * sum(accumulate(self._chances(text, nodes), mul)) for text in self.texts)
        return tokens / (self.machine.draft(levels, n) + self.machine.forward(n * (nodes + 1)))

    def best_rate(self, depths: Sequence[int]) -> float:
        """Of the best of these, or of nothing drafted."""
        return max(map(self.rate, (0, *depths)))

    def _chances(self, text: Source, judged: int) -> list[float]:
        """With what probability a path goes on to each level; where a part of a level is judged, to that."""
        shares = []
        for level in range(1, self.tree.depth + 1):
            above, until = self._nodes_to[level - 1], self._nodes_to[level]
            shares.append(min(max(judged - above, 0) / (until - above), 1.0))
        return [share * chance for share, chance in zip(shares, text.accept, strict=False)]

    def _measured(self, seconds: float) -> float:
        spike = 3 if self._random.random() < SPIKES else 1
        return seconds * self._random.lognormvariate(0, self.noise) * spike
