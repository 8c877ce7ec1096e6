"""The GPU benchmark without a GPU: every section runs, small and on a CPU, and its results are written and readable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import cases, gpu, gpu_report
from specdec import measure


def _seconds(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _small_cases() -> list[cases.Case]:
    bf16 = torch.bfloat16
    return [
        cases._attention("25m", 2, 4, 64, torch.float32), cases._append("25m", 2, 4, 64, bf16),
        cases._commit("25m", 2, 3, 64, bf16), cases._top_support(2, 300, bf16), cases._row_law(2, 300, bf16, 50, 0.9),
        cases._row_law(2, 300, bf16), cases._draw(2, 300), cases._verify_chain(2, 3, 300, bf16),
        cases._verify_greedy(2, 3), cases._ancestor_words(2, 5),
    ]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "SIZE": "bundled", "BATCHES": (1, 2), "PROMPT_TOKENS": 8, "NEW_TOKENS": 4, "REPEATS": 1, "DEVICE": "cpu",
        "ROOF_ELEMENTS": 2**12, "ROOF_SIDE": 32, "_seconds": _seconds, "gpu_cases": _small_cases,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(gpu, name, value)
    all_paths = measure.all_paths
    monkeypatch.setattr(measure, "all_paths", lambda target, draft: all_paths(target, draft, compiled=False))


def test_every_section_runs_and_is_reported(small: None, tmp_path: Path) -> None:
    console, clock = Console(quiet=True), gpu.Clock(9)
    result = {
        "command": "x", "date": measure.today(), "versions": measure.versions(), "machine": measure.machine(),
        "tests": {"exit_code": 1, "summary": "1 failed, 2 passed", "failed": ["FAILED tests/a.py::b"], "tail": []},
        "kernels": gpu.run_kernels(clock, console), "decode": gpu.run_decode(clock, console),
        "steps": gpu.run_steps(clock, console, tmp_path),
    }  # fmt: skip
    assert "error" not in json.dumps(result)
    assert [c["op"] for c in result["kernels"]["cases"]] == [c.op for c in _small_cases()]
    assert all(c["of_roof"] > 0 and c["seconds"]["pytorch"] > 0 for c in result["kernels"]["cases"])
    assert [(e["batch"], [r["path"] for r in e["paths"]]) for e in result["decode"]["results"]] == [
        (1, list(gpu.WAYS)), (2, ["transformers", "specdec_plain", "specdec"]),
    ]  # fmt: skip
    assert len(result["steps"]) == 6
    assert all(row["milliseconds"] > 0 for row in result["steps"])
    gpu_report.write(result, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "kernels.png", "trace.json.gz"}
    text = (tmp_path / "gpu.md").read_text()
    for words in ("1 failed, 2 passed", "tree_attention", "batch 2", "transformers, assisted", "graph launches"):
        assert words in text
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(result))


def test_what_fails_or_does_not_fit_is_said(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "time_case", fail)
    kernels = gpu.run_kernels(gpu.Clock(9), Console(quiet=True))
    assert len(kernels["cases"]) == len(_small_cases())
    decode = gpu.run_decode(gpu.Clock(0.1), Console(quiet=True))
    result = {"command": "x", "date": "", "versions": {}, "machine": measure.machine()}
    gpu_report.write(result | {"kernels": kernels, "decode": decode, "steps": {"error": "steps: broken"}}, tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert "tree_attention 25m B 2 S 64 N 4: ValueError: no such kernel" in text
    assert "batch 1: not run, out of time" in text
    assert "steps: broken" in text
