"""`bench.skinny`: a target's weights, the arithmetic of its tables, and a small run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import skinny, skinny_report
from specdec import zoo
from specdec.cli.measure import NotMeasured
from specdec.kernels.linear import skinny_linear
from specdec.kernels.linear.skinny_linear import MIN_WEIGHTS


def test_weights_are_the_models() -> None:
    target, _, _ = zoo.load_pair()
    shapes = Counter(tuple(m.weight.shape) for m in target.modules() if isinstance(m, torch.nn.Linear))
    expected = {shape: n for shape, n in shapes.items() if shape[0] * shape[1] >= MIN_WEIGHTS}
    found = skinny.weights_of("bundled")
    assert {(w.n_out, w.n_in): w.count for w in found} == expected
    assert [w.name for w in found] == ["q, o", "gate, up", "down", "head"]


def test_weights_of_a_larger_target() -> None:
    assert skinny.weights_of("100m")[:2] == [("q, o", 768, 768, 24), ("k, v", 256, 768, 24)]


def test_figures_by_hand() -> None:
    rows = [{"rows": 1, "kernel": [1.0, 2.0, 4.0], "library": [3.0, 4.0, 40.0]}]
    weights = [{"name": name, "n_out": 2, "n_in": 3, "count": n, "times": rows} for name, n in (("a", 1), ("b", 10))]
    entry = {"size": "bundled", "threads": 2, "weights": weights}
    assert skinny_report.ratio(rows[0]) == 3  # the rounds': 3, 2 and 10
    assert skinny_report.totals(entry, "kernel") == [22]
    assert skinny_report.lines(entry) == (
        ("rows", "a 2 × 3", "b 2 × 3", "a forward's"),
        [("1", "2.000 (3.00×)", "2.000 (3.00×)", "22.00 (2.00×)")],
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "OUT_OF_CACHE", 2**10)
    monkeypatch.setattr(skinny, "weights_of", lambda size: [skinny.Weight("all", 20, 9, 3)])


@pytest.mark.usefixtures("small")
def test_a_run_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        skinny.main("bundled", "1,2", "1,3", 2, tmp_path)
    finally:
        torch.set_num_threads(before)
    result = json.loads((tmp_path / "skinny.json").read_text())
    times = {entry["threads"]: entry["weights"][0]["times"] for entry in result["results"]}
    assert {n: [row["rows"] for row in rows] for n, rows in times.items()} == {1: [1, 3], 2: [1, 3]}
    assert all(len(row[way]) == 2 for row in times[1] for way in ("kernel", "library"))
    text = (tmp_path / "skinny.md").read_text()
    assert "## bundled target, 2 threads" in text and "python -m bench.skinny" in text
    assert (tmp_path / "skinny.png").read_bytes().startswith(b"\x89PNG")
    assert "bundled target, 1 thread" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny_linear, "_kernel", lambda: lambda x, w, out, *sizes: out.zero_())
    with pytest.raises(NotMeasured, match="2 rows: the kernel and the library differ"):
        list(skinny.measured(skinny.Weight("all", 20, 9, 1), (2,), 1))
