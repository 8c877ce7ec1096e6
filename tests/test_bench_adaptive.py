"""`bench.adaptive`: the arithmetic of its table, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import specdec
from bench import adaptive


def test_ratios_by_hand() -> None:
    rows = [
        {"way": way, "label": way, "tokens_per_second": speed, "tokens_per_step": 2.5, "acceptance_by_position": places}
        for way, speed, places in (("no draft", 10, []), ("one, 2", 15, [0.5, 0.25]), ("two, 1", 20, [1.0, 0.5]))
    ]
    assert adaptive.lines(rows) == [
        ("no draft", "10.0", "1.00×", "2.50", "", ""),
        ("one, 2", "15.0", "1.50×", "2.50", "2.50", "0.50, 0.50"),
        ("two, 1", "20.0", "2.00×", "2.50", "1.25", "1.00, 0.50"),
    ]


def test_a_run_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = specdec.compile
    monkeypatch.setattr(specdec, "compile", lambda *given, **more: own(*given, **more, compile=False))
    monkeypatch.setattr(adaptive.measure, "check", lambda label, stats: None)  # it runs eagerly
    torch.manual_seed(0)
    adaptive.main("bundled", prompts=1, new_tokens=6, repeats=1, out=tmp_path)
    found = json.loads((tmp_path / "adaptive.json").read_text())["results"]
    assert [entry["temperature"] for entry in found] == [0, 1]
    assert all(row["same"] for row in found[0]["rows"])
    assert "temperature 1" in (tmp_path / "adaptive.md").read_text()
