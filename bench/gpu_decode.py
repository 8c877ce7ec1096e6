"""Ways to decode one batch, side by side: warmed up one by one, then timed in turns in which nothing may compile."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.clock import Clock
from bench.gpu_run import Run
from bench.ways import Call, Way, timed
from specdec.cli import measure

WARM_UPS = 6
"""Calls of which one must compile nothing: the first compiles, the second records, others meet further shapes."""

SPARE = 1.5
"""What rounds take with all that is between them, over the calls alone."""


@dataclass
class Timed:
    """A way that is warm, and its rounds: a call of one new token, which is the prefill and a step, and one of all."""

    way: Way
    first_seconds: float
    ones: list[Call] = field(default_factory=list)
    alls: list[Call] = field(default_factory=list)

    @property
    def round_seconds(self) -> float:
        """Of the last round."""
        return self.ones[-1].seconds + self.alls[-1].seconds


def measure_ways(run: Run, section: str, ways: Iterable[Way], n_samples: int, clock: Clock) -> None:
    """A row of a section for each way.

    A way's first figures come from right after its warm-up, and what warming up others takes leaves time for the rounds
    of those that are warm.
    """
    prompts = run.prompts[:n_samples]
    warm: dict[str, Timed] = {}

    def start(name: str, way: Way) -> dict[str, Any]:
        one = warm_up(run, way, prompts)
        found = go_on(one)
        warm[name] = one
        return found

    def go_on(one: Timed) -> dict[str, Any]:
        play(run, one, prompts)
        return row(run, one, prompts)

    for way in ways:
        name = f"{way.label}, batch {n_samples}"
        kept = SPARE * run.setup.rounds * sum(one.round_seconds for one in warm.values())
        run.row(section, name, partial(start, name, way), clock.part(clock.left - kept))
    for turn in range(run.setup.rounds):
        names = list(warm)
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:  # every round another one goes first
            if clock.left > warm[name].round_seconds and not run.row(section, name, partial(go_on, warm[name]), clock):
                del warm[name]


def warm_up(run: Run, way: Way, prompts: Tensor) -> Timed:
    """Call until a call compiles nothing, but twice at least.

    Raises:
        NotMeasured: all calls did.
    """
    calls = []
    for _ in range(WARM_UPS):
        calls.append(timed(way, prompts, run.setup.new_tokens, run.compilations))
        one = timed(way, prompts, 1, run.compilations)
        if len(calls) > 1 and not (calls[-1].compiled or one.compiled):
            return Timed(way, calls[0].seconds)
    raise measure.NotMeasured(f"still compiling at call {WARM_UPS}")


def play(run: Run, one: Timed, prompts: Tensor) -> None:
    """One timed round.

    Raises:
        NotMeasured: something compiled in it.
    """
    one.ones.append(timed(one.way, prompts, 1, run.compilations))
    one.alls.append(timed(one.way, prompts, run.setup.new_tokens, run.compilations))
    if one.ones[-1].compiled or one.alls[-1].compiled:
        raise measure.NotMeasured(f"it compiled in timed round {len(one.alls)}")


def row(run: Run, one: Timed, prompts: Tensor) -> dict[str, Any]:
    """Medians of the rounds: the prefill, and the steps after the first token."""
    seconds_one = statistics.median(call.seconds for call in one.ones)
    seconds_all = statistics.median(call.seconds for call in one.alls)
    whole, seconds = one.alls[-1], seconds_all - seconds_one
    a_step = seconds / max(whole.steps - one.ones[-1].steps, 1)
    step_of_one = 0 if one.way.stats is None else a_step  # transformers' first token is the prefill's
    new_tokens = run.setup.new_tokens
    return {
        "batch": len(prompts), "steps": whole.steps, "milliseconds": 1e3 * a_step,
        "tokens_per_step": whole.tokens_per_step, "tokens_per_second": len(prompts) * (new_tokens - 1) / seconds,
        "of_copy_roof": one.way.read_bytes / run.roofs["bytes_per_second"] / a_step,
        "prefill_seconds": seconds_one - step_of_one, "decode_seconds": seconds,
        "first_call_seconds": one.first_seconds,
        "seconds_one": [call.seconds for call in one.ones], "seconds_all": [call.seconds for call in one.alls],
        **compare(run.pair[0], whole.text, run.text(len(prompts)), new_tokens),
    }  # fmt: skip


@torch.no_grad()
def compare(target: PreTrainedModel, found: Tensor, expected: Tensor, new_tokens: int) -> dict[str, Any]:
    """Whether texts [B, length + new_tokens] are equal; the share of new tokens before the first that differs; and how
    far the target's logit of the expected token is above the other's there, the most of all samples, or None."""
    same = found == expected
    margins = []
    for sample in (~same.all(1)).nonzero()[:, 0].tolist():
        place = int(same[sample].long().argmin())
        logits = target(expected[sample : sample + 1, :place]).logits[0, -1].float()
        margins.append((logits[expected[sample, place]] - logits[found[sample, place]]).item())
    common = same[:, -new_tokens:].long().cumprod(1).float().mean().item()
    return {"identical": not margins, "common": common, "margin": max(margins, default=None)}
