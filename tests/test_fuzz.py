"""Any call of `generate()`: what transformers makes of it, decoded here or counted as a fallback.

    FUZZ=2000 FUZZ_REPORT=fuzz.md pytest tests/test_fuzz.py    # as many random cases, and what became of them

Models compute in float64 where they can: there forwards of different shapes do not round to different tokens.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from fuzz_calls import FAMILIES, Call, Case, Recorder, arguments, cases
from hypothesis import HealthCheck, given, settings
from side_by_side import PAST, Tiny
from torch import Tensor
from transformers import PreTrainedModel

import specdec

EXAMPLES = int(os.environ.get("FUZZ", 0))
ASSISTED = "assistant_model", "prompt_lookup_num_tokens"


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[str]]:
    """How often specdec decoded, fell back (and why) or raised; written to the file FUZZ_REPORT."""
    counts: Counter[str] = Counter()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield counts
    transformers.logging.set_verbosity(verbosity)
    assert (
        min(counts["decoded, greedy"], counts["decoded, sampled"], counts["drafted tokens accepted"]) > EXAMPLES // 10
    )
    if path := os.environ.get("FUZZ_REPORT"):
        rows = [f"| {what} | {n} |" for what, n in counts.most_common()]
        Path(path).write_text("\n".join(["| | |", "|---|---:|", *rows]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def models(fresh: Tiny) -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    """By family, a target and a smaller draft that is often wrong."""

    def make(family: str, **changes: Any) -> PreTrainedModel:
        model = fresh(family, **changes)
        return model if family == "gemma2" else model.double()  # transformers' is NaN beside padding in float64

    layers = {family: "n_layer" if family.startswith("gpt") else "num_hidden_layers" for family in FAMILIES}
    return {family: (make(family), make(family, seed=7, **{layers[family]: 1})) for family in FAMILIES}


class Replay:
    """Stands in for `torch.multinomial`: draws the tokens [B, n] of a text, and remembers how probable they were."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.probs = tokens, torch.ones(tokens.shape)
        self.place = 0

    def __call__(self, probs: Tensor, num_samples: int) -> Tensor:
        if self.place >= self.tokens.shape[1]:
            return torch.zeros(len(probs), 1, dtype=torch.int64)  # the text is too short, as its comparison says
        drawn = self.tokens[:, self.place, None]
        self.probs[:, self.place] = probs.gather(1, drawn)[:, 0]
        self.place += 1
        return drawn


def run(
    model: PreTrainedModel,
    call: Call,
    plain: PreTrainedModel,
    small: PreTrainedModel,
    without: tuple[str, ...] = (),
    seed: int = 3,
) -> tuple[Any, dict[str, Any]]:
    """What a call returns or raises, and its arguments."""
    given: dict[str, Any] = {}
    try:
        given = arguments(call, plain, small, without)
        torch.manual_seed(seed)
        return model.generate(**given), given
    except Exception as error:
        return error, given


def ids_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sequences


def check_outputs(ours: Any, theirs: Any, ends: list[int] | None) -> None:
    """Every number per token; with `ends` those of each sample's first `ends[row]` tokens, up to rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"sequences", PAST}:
            check_outputs(ours[name], theirs[name], ends)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            live = None if ends is None else [row for row, end in enumerate(ends) if place < end]
            check_leaves(a, b, live)
    elif isinstance(theirs, Tensor):  # of beams
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def check_leaves(ours: Any, theirs: Any, rows: list[int] | None) -> None:
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            check_leaves(a, b, rows)
    elif rows is None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    else:  # forwards round in proportion to their largest numbers
        largest = theirs[rows].nan_to_num(0, 0, 0).abs().max().item() if rows else 0
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-4, atol=max(1e-4, 1e-6 * largest))


def _end(tokens: list[int], call: Call) -> int:
    """How many of a sample's new tokens are not padding for certain."""
    ends_early = "eos_token_id" in call.settings or "eos" in call.objects
    n_last = next((n for n, token in enumerate(reversed(tokens)) if token != tokens[-1]), len(tokens))
    return len(tokens) - ends_early * n_last


def check_call(wrapped: PreTrainedModel, call: Call, plain: PreTrainedModel, small: PreTrainedModel) -> str:
    """One call of a wrapped model against transformers; how it ended."""
    stats = wrapped.specdec.stats
    known, n_steps, n_layers = Counter(stats.fallbacks), stats.steps, stats.beam_layers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours, given = run(wrapped, call, plain, small)
    reasons = stats.fallbacks - known
    said = [str(w.message) for w in caught if "specdec runs transformers' own loop" in str(w.message)]
    assert len(said) == len(set(reasons) - set(known))
    decoded = stats.steps > n_steps
    searched = stats.beam_layers > n_layers and not reasons
    assert reasons.total() + decoded + searched <= 1
    width = max(map(len, call.prompts))
    is_sampled = decoded and call.settings.get("do_sample", False)

    # Where transformers assists, specdec decodes more than transformers does: at any batch size.
    replay = nullcontext()
    if is_sampled and not isinstance(ours, Exception):
        replayed = Replay(ids_of(ours)[:, width:])
        replay = patch.object(torch, "multinomial", replayed)  # what was drawn has to come out of transformers, too
    with replay:
        theirs, given_theirs = run(plain, call, plain, small, ASSISTED if decoded else ())
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{ours!r} instead of {theirs!r}"
        return f"raised as transformers does: {type(theirs).__name__}"

    assert decoded or searched or reasons
    assert type(ours) is type(theirs)
    assert ids_of(ours).tolist() == ids_of(theirs).tolist()
    new = ids_of(theirs)[:, width:].tolist()
    ends = [_end(row, call) for row in new] if decoded else None
    if searched:  # each layer's numbers of all beams
        ends = [len(new[0])] * (call.settings["num_beams"] * len(call.prompts))
    check_outputs(ours, theirs, ends)
    if isinstance(given.get("streamer"), Recorder):
        assert given["streamer"].puts == given_theirs["streamer"].puts
    if PAST in given:
        assert given[PAST].get_seq_length() == given_theirs[PAST].get_seq_length()
    if searched:
        return "searched with beams"
    if not decoded:
        first, *others = next(iter(reasons)).split(", ")
        return f"fell back: {first}{', ...' if others else ''}"
    if not is_sampled:
        return "decoded, greedy"

    for row, end in enumerate(ends):
        assert (replayed.probs[row, :end] > 0).all(), "transformers never draws this text"
    config = wrapped.specdec.config
    if config.adapt is not True or config.verifier == "coupled":
        wrapped.specdec.seeds = wrapped.specdec.seeds
        again, _ = run(wrapped, call, plain, small, seed=4)
        assert torch.equal(ids_of(again), ids_of(ours))
    return "decoded, sampled"


def check_case(case: Case, models: dict[str, tuple[PreTrainedModel, PreTrainedModel]], outcomes: Counter[str]) -> None:
    plain, small = models[case.family]
    draft = {"self": plain, "small": small}.get(case.draft, case.draft)
    wrapped = specdec.compile(plain, draft, compile=False, **case.options)
    for call in case.calls:
        how = check_call(wrapped, call, plain, small)
        outcomes[how] += 1
    outcomes["cases"] += 1
    outcomes["tokens decoded"] += wrapped.specdec.stats.tokens
    outcomes["drafted tokens accepted"] += sum(wrapped.specdec.stats.accepted)


HOW_MANY = {"max_examples": EXAMPLES} if EXAMPLES else {"max_examples": 80, "derandomize": True}


@settings(deadline=None, suppress_health_check=list(HealthCheck), **HOW_MANY)
@given(case=cases())
def test_any_call_is_transformers(
    case: Case, models: dict[str, tuple[PreTrainedModel, PreTrainedModel]], outcomes: Counter[str]
) -> None:
    check_case(case, models, outcomes)
