"""`bench.stopping`: what is recorded, rules by hand, and a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from side_by_side import Prompts, Tiny
from test_control_decoding import _close_to

from bench import stopping
from bench.stopping_rules import N_BEST, Costs, Records, compare, outcome, stopped
from specdec.cli import measure

COSTS = Costs(1 + 0.1 * np.arange(9), 0.1 * np.arange(9))


def _records(accepted: list[int]) -> Records:
    """Steps of draft models that know: what is accepted they hold for likely. A prompt a step."""
    n, level = np.array(accepted), np.arange(8)
    prob = np.where(level < n[:, None], 0.9, 0.1)
    best = np.repeat(prob[..., None], N_BEST, -1)
    return Records(np.arange(len(n)), n, prob, -np.log(prob), best)


def test_rules_stop_after_the_first_level_below() -> None:
    signal = np.array([[0.9, 0.1, 0.9], [0.1, 0.9, 0.9], [0.9, 0.9, 0.1]])
    assert stopped(signal, 0.5, 3).tolist() == [2, 1, 3]
    assert stopped(signal, 0.5, 2).tolist() == [2, 1, 2]
    assert stopped(signal, -np.inf, 3).tolist() == [3, 3, 3]


def test_figures_by_hand() -> None:
    steps, n_verified = _records([2, 0]), np.array([3, 1])
    rows, levels = (outcome(steps, COSTS, n_verified, 4, saves) for saves in (False, True))
    assert rows.tokens.tolist() == levels.tokens.tolist() == [3, 1]
    assert rows.seconds == pytest.approx([0.4 + 1.3, 0.4 + 1.1])
    assert levels.seconds == pytest.approx([0.3 + 1.3, 0.1 + 1.1])
    assert rows.rate == pytest.approx(4 / 3.2)


@pytest.mark.parametrize("saves_levels", [False, True])
def test_who_knows_comes_close_to_the_oracle(saves_levels: bool) -> None:
    chance = np.random.default_rng(0)
    rows = {row["rule"]: row for row in compare(_records(chance.choice([0, 1, 8], 400).tolist()), COSTS, saves_levels)}
    fixed, oracle, *others = rows.values()
    assert (fixed["rule"], fixed["gain"], fixed["interval"], fixed["thresholds"]) == ("best fixed depth", 0, [0, 0], [])
    assert list(rows)[2:] == ["token probability", "cumulative probability", "entropy", "decision model"]
    for row in others:
        assert 0.05 < row["gain"] < oracle["gain"]
        assert row["verified"] == pytest.approx(oracle["verified"] + 2 / 3, abs=0.1)  # the weak token, but at the end
        assert row["interval"][0] < row["gain"] < row["interval"][1]


def test_what_is_fitted_on_one_half_is_reported_on_the_other() -> None:
    fixed = compare(_records([0, 8] * 20), COSTS, False)[0]
    assert fixed["depths"] == [0, 8]
    assert (fixed["tokens_per_step"], fixed["verified"]) == (1.0, 4.0)


@pytest.mark.parametrize("sampled", [False, True])
def test_records_are_of_the_steps(sampled: bool, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    ids = prompts([6] * 20)["input_ids"]
    for draft, is_right in ((model, True), (_close_to(model), False)):
        with measure.progress(stopping.Console()) as bar:
            steps = stopping.record(model, draft, ids, 30, sampled, bar)
        assert set(steps.prompt) == set(range(20))  # in batches of 16
        assert (steps.prob <= steps.best[..., 0] + 1e-6).all() and (steps.prob > 0).all()
        assert (steps.entropy > 0).all() and (steps.entropy < np.log(97)).all()
        if not sampled:
            assert steps.prob == pytest.approx(steps.best[..., 0])
        written = np.bincount(steps.prompt, 1 + steps.accepted)
        assert (written < 30).all() and (written >= 30 - 9).all()  # all but the last step
        assert (steps.accepted.min() == 8) == (is_right and not sampled)


def test_what_is_recorded_is_what_the_draft_says(tiny: Tiny, prompts: Prompts) -> None:
    model, ids = tiny("llama"), prompts([6])["input_ids"]
    with measure.progress(stopping.Console()) as bar:
        steps = stopping.record(model, model, ids, 20, False, bar)
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=20)
        probs = model(whole).logits[0, 5:].float().softmax(-1)
    for place, prob, entropy, best in zip((0, 9), steps.prob, steps.entropy, steps.best, strict=True):
        said = probs[place : place + 8]
        assert prob == pytest.approx(said.amax(-1).numpy(), abs=1e-4)
        assert entropy == pytest.approx(torch.special.entr(said).sum(-1).numpy(), abs=1e-3)
        assert best == pytest.approx(said.topk(N_BEST).values.numpy(), abs=1e-4)


def test_a_run_writes_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(*_: Any) -> Costs:
        return COSTS

    monkeypatch.setattr(stopping, "time_forwards", timed)
    stopping.main("bundled", 8, 16, 24, 1, tmp_path)
    result = json.loads((tmp_path / "stopping.json").read_text())
    kinds = [(entry["temperature"], entry["saves_levels"]) for entry in result["results"]]
    assert kinds == [(0, False), (1, False), (0, True), (1, True)]
    text = (tmp_path / "stopping.md").read_text()
    assert "## bundled target, temperature 1, (b) stopping saves rows and levels" in text
    assert "python -m bench.stopping" in text and "| target, by rows | 1000.00 | 1100.00 |" in text
    assert "oracle" in capsys.readouterr().out
