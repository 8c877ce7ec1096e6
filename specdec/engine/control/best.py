"""The plan of most tokens a second.

Levels of all samples compete for the T tokens of the target's forward: those of most expected tokens come first, for as
long as tokens per second grow; where none pays, nothing is drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from specdec.engine.control.estimate import Estimate, Track
from specdec.engine.control.explore import FEW
from specdec.engine.control.plan import Plan, Shape

KEEP = 1.015
"""A plan is dropped for one that promises this many times its tokens per second; not drafting counts as so much faster
than it is, because what drafts bring is only estimated."""
REGAINED = 200
"""Steps in which drafts should bring in again what reading the samples took."""


class _Offer(NamedTuple):
    """A level of a sample's draft.

    Attributes:
        worth: tokens to be expected of each row, if it is there. chance: that it is. rows: of the level.
    """

    worth: float
    chance: float
    rows: int
    sample: int
    level: int


def best_plan(
    samples: Sequence[Track], shape: Shape, estimate: Estimate, depths: Sequence[int], last_depth: int
) -> Plan:
    """The plan of most tokens a second; of the last plan's depth, unless another promises KEEP times as much.

    Args:
        depths: those to choose from, beside 0.
    """
    n, offers = len(samples), _offers(samples, shape, estimate)
    has_draft = [track.source != 0 for track in samples]  # which takes no drafting
    n_drafted = n - sum(has_draft)
    rates, plans = {0: KEEP * n / estimate.costs.forward(n, n, depth=0)}, {0: shape.uniform(n, 0)}
    for depth in (0, *depths) if n_drafted else (0 if shape.rides else last_depth,):
        able = [offer for offer in offers if offer.level <= depth or has_draft[offer.sample]]
        if not able:
            continue
        drafting = 0.0
        if depth and n_drafted:
            drafting = estimate.costs.draft(depth, n_drafted)
            if not last_depth:  # what the drafter would have to read first, spread over the steps that follow
                drafting += estimate.costs.reading * max(n_drafted / FEW, 1) / REGAINED
        rate, plan = _cut(able, n, depth, drafting, estimate)
        if rate > rates.get(depth, 0.0):
            rates[depth], plans[depth] = rate, plan
    if not n_drafted and shape.rides:  # rows for drafts that are not needed cost time
        return plans[0]
    if not n_drafted:  # the drafter's depth is no matter, and stays
        return plans[last_depth] if rates[last_depth] >= rates[0] else replace(plans[0], depth=last_depth)
    depth = max(rates, key=lambda depth: rates[depth])
    return plans[depth if rates[depth] >= KEEP * rates[last_depth] else last_depth]


def _offers(samples: Sequence[Track], shape: Shape, estimate: Estimate) -> list[_Offer]:
    """All levels of all samples, those of the most expected tokens a row first."""
    offers, per_level = [], [(acceptance.rates, acceptance.lengths) for acceptance in estimate.sources]
    for i, track in enumerate(samples):
        acceptance = estimate.sources[track.source]
        chance, quality, worth = acceptance.chance(track), acceptance.quality(track), 1.0
        for level, (rate, length) in enumerate(zip(*per_level[track.source], strict=True), 1):
            rows = shape.nodes_to[level] - shape.nodes_to[level - 1]
            worth = min(worth, quality * rate / (length * rows))  # no level comes before the one above it
            offers.append(_Offer(worth, chance * length, rows, i, level))
    return sorted(offers, key=lambda offer: (-offer.worth, offer.level, offer.sample))


def _cut(offers: Sequence[_Offer], n: int, depth: int, drafting: float, estimate: Estimate) -> tuple[float, Plan]:
    """The most tokens a second that the first so many offers make, tried for about sixteen numbers, with a draft of
    `depth` levels that takes `drafting` seconds; and the plan.

    Where drafts come by chance there is room for most of them, and who comes last may lose a few.
    """
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
                rate = brought / (drafting + estimate.costs.forward(n, n + room, depth))
                if rate > best[0]:
                    best = rate, Plan(depth, tuple(allowed), n + room)
    return best
