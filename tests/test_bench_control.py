"""The controller's benchmark, small and eager: every draft and way runs, and its results are written and readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from bench import control, control_report
from specdec import zoo


@pytest.mark.slow
def test_everything_is_written(tmp_path: Path) -> None:
    control.main("bundled", "ngram,perfect", "1,3", 16, 8, 1, compile=False, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"control.json", "control.md", "control.png"}
    entries = json.loads((tmp_path / "control.json").read_text())["results"]
    assert [(e["draft"], e["batch"]) for e in entries] == [("ngram", 1), ("ngram", 3), ("perfect", 1), ("perfect", 3)]
    names = [[row["path"] for row in entry["paths"]] for entry in entries]
    assert names[0] == names[1] == ["undrafted", "depth 2", "depth 4", "depth 8", "controller"]
    assert names[2] == ["undrafted", "depth 1", "depth 2", "depth 3", "depth 5", "controller"]
    for entry in entries:
        assert {row["identical"] for row in entry["paths"]} == ({True} if entry["batch"] == 1 else {None})
        undrafted, *fixed, _ = entry["paths"]
        assert (undrafted["ratio"], undrafted["undrafted_steps"]) == (1, undrafted["steps"])
        assert all(row["undrafted_steps"] == 0 for row in fixed)
        assert all(row["allowed_a_step"] == int(row["path"].removeprefix("depth ")) for row in fixed)
    steps = {row["path"]: row["steps"] for row in entries[2]["paths"]}  # 8 tokens, of a draft that is always right
    assert [steps[name] for name in names[2][:-1]] == [8, 4, 3, 2, 2]
    text = (tmp_path / "control.md").read_text()
    undrafted, best, beside = control_report.verdict(entries[3])
    assert f"| perfect | 3 | {undrafted:.2f}× | {best} | {beside:.2f}× |" in text


def _row(path: str, speed: float) -> dict[str, object]:
    return {
        "path": path, "tokens_per_second": speed, "ratio": speed / 50, "identical": None, "tokens_per_step": 1.5,
        "steps": 10, "undrafted_steps": 4, "allowed_a_step": 1.25,
    }  # fmt: skip


@pytest.mark.parametrize(("speed", "style"), [(100.0, ""), (94.0, "red")])
def test_verdicts(speed: float, style: str) -> None:
    speeds = {"undrafted": 50.0, "depth 1": 80.0, "depth 2": 100.0, "depth 3": 90.0, "controller": speed}
    entry = {"size": "100m", "draft": "bundled", "batch": 4, "paths": [_row(*item) for item in speeds.items()]}
    assert control_report.verdict(entry) == (speed / 50, "depth 2", speed / 100)
    assert [row.style for row in control_report.table(entry).rows] == ["", "", "", "", style]
    assert control_report.cells(entry["paths"][1]) == ("depth 1", "80.0", "1.60×", "1.50", "40%", "1.25", "")


def test_drafts_are_as_good_as_they_say() -> None:
    target, bundled, tokenizer = zoo.load_pair()
    ids = zoo.held_out_prompts(tokenizer, 8, 64)
    best = target(ids).logits[:, 20:].argmax(-1)
    agrees = {}
    for name in control.DRAFTS[:-1]:
        draft = control.draft_of(name, bundled, target)
        assert isinstance(draft, torch.nn.Module)
        agrees[name] = (draft(ids).logits[:, 20:].argmax(-1) == best).float().mean().item()
    assert agrees["useless"] < 0.01
    assert 0.35 < agrees["noisy"] / agrees["bundled"] < 0.65
    assert agrees["perfect"] == 1


def test_unknown_drafts_are_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="good is none of useless"):
        control.main(drafts="good", out=tmp_path)
