"""`bench.verification`: formulas equal sums over drafts, walks and linear programmes; what is off is said."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
import typer
from scipy.optimize import linprog

from bench import verification
from bench.verification import FAMILIES, RULES, TREES
from specdec.kernels.verify.tree_rules import WITH_REPLACEMENT, weigh_children_reference


def _laws(seed: int, vocab: int) -> verification.Laws:
    """Target's and draft's probabilities [1, 1, vocab], the draft's best first."""
    logits = torch.randn(2, 1, 1, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draft, order = (2 * logits[0]).softmax(-1).sort(descending=True)
    return logits[1].softmax(-1).gather(-1, order), draft


@pytest.mark.parametrize(("vocab", "seed"), [(2, 0), (3, 1), (6, 2), (9, 3)])
def test_closed_formulas_are_sums_over_all_drafts(vocab: int, seed: int) -> None:
    laws = _laws(seed, vocab)
    formulas = verification.acceptance(laws[0][0, 0], laws[1][0, 0])
    same = {"chain": "single", "block": "single", "RRS": "RRS", "RRSw": "RRSw", "traversal": "RRSw"}
    for name, column in (same | {"hub": "hub", "seqhub": "hub"}).items():
        tokens = verification.tokens_per_step(RULES[name], [laws]).item()
        assert tokens - 1 == pytest.approx(formulas[column], abs=1e-12), name


@pytest.mark.parametrize("n_hubs", [WITH_REPLACEMENT, 0])
def test_optimum_is_that_of_the_transport(n_hubs: int) -> None:
    """All of the mass that can go from pairs of drafts to their tokens, as a linear programme."""
    for seed in range(5):
        target, draft = (law[0, 0] for law in _laws(seed, 4))
        places, probs = verification.drafts(n_hubs, 2, draft)
        pairs = list(product(range(4), repeat=2) if n_hubs == WITH_REPLACEMENT else permutations(range(4), 2))
        assert [tuple(pair) for pair in places.tolist()] == pairs
        moves = [(pair, token) for pair in pairs for token in set(pair)]
        from_pair = [[float(pair == p) for p, _ in moves] for pair in pairs]
        to_token = [[float(token == t) for _, t in moves] for token in range(4)]
        best = linprog([-1.0] * len(moves), A_ub=from_pair + to_token, b_ub=[*probs.tolist(), *target.tolist()])
        name = "optimum i.i.d." if n_hubs == WITH_REPLACEMENT else "optimum distinct"
        formula = verification.acceptance(target, draft)[name]
        assert formula == pytest.approx(-best.fun, abs=1e-9)


def _walk(rule: verification.Rule, levels: list[verification.Laws], prefix: int, weight: float) -> list[float]:
    """Probability that a subtree ends at each depth below its node, draft by draft; the rest: it fails."""
    if not levels:
        return [weight]
    target, draft = (law[0, prefix] for law in levels[0])
    ends = [0.0] * (len(levels) + 1)
    places, probs = verification.drafts(rule.n_hubs, rule.width, draft)
    for drafted, prob in zip(places, probs.tolist(), strict=True):
        one = torch.tensor(weight, dtype=torch.float64)
        weights, exit_weight, *_ = weigh_children_reference(rule.n_hubs, one, target, 0 * one, draft, drafted)
        for k in [*range(max(rule.n_hubs, 0), rule.width), *range(rule.n_hubs)]:
            child, given = len(draft) * prefix + int(drafted[k]), weights[k].item()
            below = _walk(rule, levels[1:], child, given if rule.hands_down else 1.0)
            coin = 1.0 if rule.hands_down else given
            for depth, share in enumerate(below, 1):
                ends[depth] += prob * coin * share
            prob *= 1 - coin * sum(below)
        ends[0] += prob * exit_weight.item()
    return ends


@pytest.mark.parametrize("name", RULES)
def test_tokens_a_step_are_those_of_a_walk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "TREE_VOCAB", 3)
    levels = verification.processes(1.0, 1.5, [3, 4])
    for i, tokens in enumerate(verification.tokens_per_step(RULES[name], levels).tolist()):
        ends = _walk(RULES[name], [(p[i : i + 1], q[i : i + 1]) for p, q in levels], 0, 1.0)
        assert sum(ends) == pytest.approx(1, abs=1e-12)
        assert tokens == pytest.approx(1 + sum(depth * share for depth, share in enumerate(ends)), abs=1e-12)


def test_differences_are_in_standard_errors() -> None:
    column = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = verification.figures({"a": column, "b": column}, "2.000 2.9", 8)
    expected = (2 * (1 / 2 + 1 / 8) + 0.1**2 / 12) ** 0.5
    assert found["a"] == {"mean": 2, "standard_error": 1, "expected": "2.000", "off": 0}
    assert found["b"]["off"] == pytest.approx(-0.9 / expected)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "FAMILIES", {name: FAMILIES[name] for name in ("zipf 2, σ 1", "uniform draft")})
    monkeypatch.setattr(verification, "TREES", {(0.3, 1.0): TREES[0.3, 1], (1.0, 1.0): TREES[1, 1]})
    monkeypatch.setattr(verification, "EXPONENTS", [0.0, 1.5])


def test_a_run_writes_its_three_files(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verification.main(3, 4, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"verification.{end}" for end in ("json", "md", "png")}
    assert (tmp_path / "verification.png").read_bytes().startswith(b"\x89PNG")
    result, text = json.loads((tmp_path / "verification.json").read_text()), (tmp_path / "verification.md").read_text()
    assert [(entry["laws"], len(entry["figures"])) for entry in result["acceptance"] + result["tokens"]] == [
        ("zipf 2, σ 1", 7), ("uniform draft", 7), ("c 0.3, σ 1", 7), ("c 1, σ 1", 7)
    ]  # fmt: skip
    assert all(entry["never_less"] == {"seqhub ≥ hub": 3, "traversal ≥ RRSw": 3} for entry in result["tokens"])
    hub = result["acceptance"][1]["figures"]["hub"]
    cell = f"{hub['mean']:.4f} ±{hub['standard_error']:.4f}<br>0.6328 {hub['off']:+.1f}"
    for words in (cell, "Every figure lies within 3 standard errors", "| 3 of 3 |"):
        assert words in text
    assert "Every figure lies within" in capsys.readouterr().out


def test_a_wrong_figure_is_reported_as_off(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, expected = FAMILIES["uniform draft"]
    monkeypatch.setitem(verification.FAMILIES, "uniform draft", (family, expected.replace("0.7450", "0.8450")))
    verification.main(3, 4, tmp_path)
    text = (tmp_path / "verification.md").read_text()
    (verdict,) = (line for line in text.splitlines() if line.startswith("Off by more than 3 standard errors"))
    assert "uniform draft, RRS: 0.7" in verdict
    assert verdict.count("expected") == text.count(" off |") == 1


def test_a_rule_that_falls_behind_fails_the_run(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "seqhub", RULES["block"])
    with pytest.raises(typer.Exit) as exit:
        verification.main(2, 2, tmp_path)
    assert exit.value.exit_code == 1
    text = (tmp_path / "verification.md").read_text()
    assert "| 0 of 2 | 2 of 2 |" in text
