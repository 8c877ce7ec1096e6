"""Rules that end drafts early, and what they come to: tokens a second, from recorded steps and timed forwards.

A rule looks at a level's signal and stops after the first level at which that is too low: this level is still verified,
and none after it. Its threshold and the depth of the whole draft are fitted on one half of the prompts and reported on
the other, and the other way round.

Letters: S steps, D levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
N_BEST, N_HIDDEN = 10, 44
N_THRESHOLDS, N_RESAMPLED = 48, 400


@dataclass(frozen=True)
class Records:
    """Steps of whole chains.

    Attributes:
        prompt, accepted: [S] int, whose step it is, and how many of its D levels were accepted.
        prob, entropy: [S, D], of each drafted token, and of the law it was drawn from. best: [S, D, N_BEST], that law's
            largest probabilities.
    """

    prompt: Array
    accepted: Array
    prob: Array
    entropy: Array
    best: Array


@dataclass(frozen=True)
class Costs:
    """Seconds. target: [D + 1], of a forward of 1, 2, ... rows. draft: [D + 1], of so many levels, 0 first."""

    target: Array
    draft: Array


@dataclass(frozen=True)
class Outcome:
    """What a rule comes to in some steps, [S] each. n_verified: drafted tokens that the target judges."""

    tokens: Array
    seconds: Array
    n_verified: Array

    @property
    def rate(self) -> float:
        return float(self.tokens.sum() / self.seconds.sum())


def outcome(steps: Records, costs: Costs, n_verified: Array, depth: int, saves_levels: bool) -> Outcome:
    """Of verifying so many levels of each step's draft of `depth`.

    Args:
        saves_levels: whether levels that are not verified are not drafted either.
    """
    drafting = costs.draft[n_verified] if saves_levels else np.full(len(n_verified), costs.draft[depth])
    tokens = 1 + np.minimum(steps.accepted, n_verified)
    return Outcome(tokens, drafting + costs.target[n_verified], n_verified)


def stopped(signal: Array, threshold: float, depth: int) -> Array:
    """[S] int: levels up to the first whose signal [S, D] is below the threshold, it included."""
    return 1 + (signal[:, : depth - 1] >= threshold).cumprod(1).sum(1)


def decision_model(steps: Records, train: Array) -> Array:
    """[S, D]: with what probability each drafted token is accepted, if those before it are, by a small network that is
    fitted on the steps `train` [S] bool (improved MCSD, arXiv 2409.10644)."""
    features = torch.tensor(np.concatenate([steps.entropy[..., None], steps.best], -1), dtype=torch.float32)
    level = np.arange(steps.prob.shape[1])
    was_reached = torch.tensor((steps.accepted[:, None] >= level) & train[:, None])
    label = torch.tensor(steps.accepted[:, None] > level).float()
    x, y = features[was_reached], label[was_reached]
    balance = (1 - y).sum() / y.sum()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1 + N_BEST, N_HIDDEN), torch.nn.ReLU(), torch.nn.Linear(N_HIDDEN, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(1500):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(net(x)[:, 0], y, pos_weight=balance).backward()
            optimizer.step()
    with torch.no_grad():
        return net(features)[..., 0].sigmoid().double().numpy()


SIGNALS: dict[str, Callable[[Records, Array], Array]] = {
    "token probability": lambda steps, train: steps.prob,
    "cumulative probability": lambda steps, train: steps.prob.cumprod(1),
    "entropy": lambda steps, train: -steps.entropy,
    "decision model": decision_model,
}
FIXED, ORACLE = "best fixed depth", "oracle"


def compare(steps: Records, costs: Costs, saves_levels: bool) -> list[dict[str, Any]]:
    """A row a rule: the best fixed depth first, then the oracle, which knows what will be accepted."""
    n_levels = steps.prob.shape[1]
    halves = [steps.prompt % 2 == 0, steps.prompt % 2 == 1]

    def judged(rule: str, train: Array) -> tuple[Outcome, int, float]:
        """Fitted on one half: of all steps, the depth, and the threshold."""
        if rule in SIGNALS:
            signal = SIGNALS[rule](steps, train)
            few = np.quantile(signal[train], np.linspace(0, 1, N_THRESHOLDS))
            options = [(depth, float(at)) for depth in range(1, n_levels + 1) for at in (-np.inf, *few)]
        else:
            options = [(depth, np.nan) for depth in range(n_levels + 1)]
        best: tuple[float, Outcome, int, float] | None = None
        for depth, at in options:
            if rule in SIGNALS:
                n_verified = stopped(signal, at, depth)
            else:
                n_verified = (
                    np.minimum(steps.accepted, depth) if rule == ORACLE else np.full(len(steps.accepted), depth)
                )
            found = outcome(steps, costs, n_verified, depth, saves_levels)
            rate = _part(found, train).rate
            if best is None or rate > best[0]:
                best = rate, found, depth, at
        assert best is not None
        return best[1:]

    rows, fixed = [], None
    for rule in (FIXED, ORACLE, *SIGNALS):
        fitted = [judged(rule, train) for train in halves]
        parts = [_part(found, test) for (found, *_), test in zip(fitted, reversed(halves), strict=True)]
        joined = Outcome(*(np.concatenate(each) for each in zip(*(vars(p).values() for p in parts), strict=True)))
        fixed = fixed or joined
        prompt = np.concatenate([steps.prompt[test] for test in reversed(halves)])
        rows.append({
            "rule": rule, "tokens_per_second": joined.rate, "gain": joined.rate / fixed.rate - 1,
            "interval": _interval(joined, fixed, prompt), "tokens_per_step": float(joined.tokens.mean()),
            "verified": float(joined.n_verified.mean()), "depths": [depth for _, depth, _ in fitted],
            "thresholds": [abs(at) for *_, at in fitted] if rule in SIGNALS else [],
        })  # fmt: skip
    return rows


def _part(found: Outcome, which: Array) -> Outcome:
    return Outcome(found.tokens[which], found.seconds[which], found.n_verified[which])


def _interval(found: Outcome, fixed: Outcome, prompt: Array) -> list[float]:
    """In which the gain lies in nine of ten draws of the prompts, with replacement."""
    sums = np.stack([np.bincount(prompt, x) for each in (found, fixed) for x in (each.tokens, each.seconds)])
    drawn = np.random.default_rng(0).integers(sums.shape[1], size=(N_RESAMPLED, sums.shape[1]))
    tokens, seconds, fixed_tokens, fixed_seconds = sums[:, drawn].sum(-1)
    return [float(x) for x in np.quantile(tokens / seconds * fixed_seconds / fixed_tokens - 1, [0.05, 0.95])]
