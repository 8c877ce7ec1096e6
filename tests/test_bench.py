"""The GPU benchmark without a GPU: every section runs, small and on a CPU, and its results are written and readable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from rich.console import Console

from bench import cases, device_time, gpu, gpu_report
from bench.device_time import Timing
from specdec import measure


def _time_call(call: Callable[[], object]) -> Timing:
    call()
    start = time.perf_counter()
    call()
    return Timing(time.perf_counter() - start)


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
        "ROOF_ELEMENTS": 2**12, "ROOF_SIDE": 32, "time_call": _time_call, "gpu_cases": _small_cases,
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


@pytest.mark.parametrize(
    ("test", "minutes", "code", "summary"),
    [
        ("pass", 2, 0, "1 passed"),
        ("assert False", 2, 1, "1 failed"),
        ("time.sleep(30)", 0.2, None, "stopped after 6 s"),
    ],
)
def test_tests_run_for_half_of_the_time(
    test: str, minutes: float, code: int | None, summary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a test hangs in the middle of a line, with a child that holds its output open."""
    file = tmp_path / "test_it.py"
    child = "subprocess.Popen(['sleep', '30'])" if code is None else "None"
    file.write_text(f"import subprocess, time\nCHILD = {child}\ndef test_it():\n    {test}\n")
    monkeypatch.setattr(gpu, "TESTS", (str(file),))
    clock = gpu.Clock(minutes)
    result = gpu.run_tests(clock, Console(quiet=True))
    assert clock.left > 0
    assert result["exit_code"] == code
    assert summary in result["summary"]
    assert len(result["failed"]) == (code == 1)
    assert gpu_report._tests(result)[3] == result["summary"]


def test_what_was_not_replayed_is_starred(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "time_call", lambda call: Timing(0.001, "started by the host each time: it reads"))
    text = "\n".join(gpu_report._kernels(gpu.run_kernels(gpu.Clock(9), Console(quiet=True))))
    assert text.count("1000.0*") == 2 * len(_small_cases())
    assert "- \\* roofs, copy: started by the host each time: it reads" in text
    assert "- \\* ancestor_words B 2 N 5, pytorch: started by the host each time: it reads" in text


class _Device:
    """What `device_time` asks of CUDA: work is done at once, or kept for replays while a graph records it.

    A call costs one of `milliseconds` in turn, and nothing if its inputs are in the cache.
    """

    def __init__(self, milliseconds: list[float]) -> None:
        self.milliseconds = cycle(milliseconds)
        self.now, self.is_cold, self.is_compiled = 0.0, False, False
        self.recorded: list[Callable[[], None]] | None = None

    def do(self, work: Callable[[], None]) -> None:
        work() if self.recorded is None else self.recorded.append(work)

    def call(self) -> None:
        if self.recorded is not None and not self.is_compiled:
            raise RuntimeError("not permitted when stream is capturing\nand more")
        self.is_compiled = True
        self.do(self._run)

    def _run(self) -> None:
        self.now, self.is_cold = self.now + next(self.milliseconds) * self.is_cold, False

    def get_empty_cache_for_benchmark(self) -> str:
        return "buffer"

    def clear_cache(self, buffer: str) -> None:
        self.do(self._clear)

    def _clear(self) -> None:
        self.now, self.is_cold = self.now + 100, True

    @contextmanager
    def graph(self, graph: _Graph, **_: object) -> Iterator[None]:
        self.recorded = graph.work
        yield
        self.recorded = None


class _Graph:
    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.work:
            work()


class _Event:
    def __init__(self, device: _Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.device.do(self._note)

    def _note(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], _Device]:
    """A device whose calls take so many milliseconds, in place of CUDA; started call by call they take 5."""

    def make(milliseconds: list[float]) -> _Device:
        device = _Device(milliseconds)
        stand_ins = {
            "CUDAGraph": _Graph, "Event": lambda **_: _Event(device), "graph": device.graph, "stream": nullcontext,
            "current_stream": lambda: None, "synchronize": lambda: None,
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=device))
        monkeypatch.setattr(triton.testing, "do_bench", lambda *_, **__: 5.0)
        return device

    return make


def test_calls_are_timed_in_a_graph_with_a_cold_cache(device_of: Callable[[list[float]], _Device]) -> None:
    assert device_time.time_call(device_of([3, 7, 3]).call) == Timing(pytest.approx(0.003), "")


def test_calls_that_no_graph_can_record_are_timed_one_by_one(device_of: Callable[[list[float]], _Device]) -> None:
    device = device_of([3])

    def reads() -> None:
        device.is_compiled = False
        device.call()

    note = "started by the host each time: not permitted when stream is capturing"
    assert device_time.time_call(reads) == Timing(0.005, note)
