"""Everything a CUDA machine can tell, in one command: `make gpu OUT=folder`, or `python -m bench.gpu --out folder`.

Sections, each of which can run alone (`--sections kernels,decode`); a later run adds to what the folder holds:

    tests    the GPU tests and the kernels' tests
    kernels  every op against PyTorch, and against what this GPU copies and multiplies in the same run
    decode   whole `generate()` calls at Llama-3.1-8B shape in bfloat16
    steps    launches, synchronisations and device time of one decoding step, and a profiler trace
    backend  torch.compile's backends on a static-cache loop of one's own, as `bench.backend` measures them
    padding  padded and ragged batches on one trace, as `bench.padding` measures them

Writes gpu.json, gpu.md, kernels.png and trace.json.gz. Large weights are made on the GPU. Exits with 1 if a test fails,
the tests take more than half of the time, or a part of a section failed, with 2 where there is no CUDA device. Where
texts differ, as in half precision they do, the tables say so.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer import Option

from bench import backend, end_to_end, gpu_report, padding, profile
from bench.case import Case
from bench.cases import gpu_cases
from bench.device_time import time_call
from specdec import zoo
from specdec.cli import measure

SECTIONS = ("tests", "kernels", "decode", "steps", "backend", "padding")
WAYS = ("transformers", "transformers_assisted", "specdec_plain", "specdec")
SIZE, BATCHES, PROMPT_TOKENS, NEW_TOKENS, REPEATS = "8b", (1, 8, 32), 64, 96, 2
DEVICE, ROOF_ELEMENTS, ROOF_SIDE = "cuda", 2**30, 8192
CAPACITY, BACKEND_BATCHES, BACKEND_FED = 2048, (1, 8), (1, 8)
PADDING_BATCHES = (2, 4, 8, 16, 24)
_OUT_OF_TIME = "not run, out of time"
TESTS = ("-m", "(kernels or gpu) and not aot", "tests")


class Clock:
    """Time that is left: work that would not fit is left out, and said to be."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def has(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._end

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def run_tests(clock: Clock, console: Console) -> dict[str, Any]:
    """pytest in a process of its own, for half of the time that is left: a test that hangs leaves time for the rest."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *TESTS]
    seconds, exit_code = clock.left / 2, None
    with tempfile.TemporaryFile("w+") as log:  # no pipe: what a test started may outlive pytest and keep a pipe open
        try:
            exit_code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            log.write(f"\nstopped after {seconds:.0f} s")
        log.seek(0)
        lines = log.read().splitlines()
    console.print("\n".join(lines), markup=False, highlight=False)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": exit_code, "summary": lines[-1] if lines else "", "failed": failed, "tail": lines[-60:]}


def time_roofs() -> dict[str, Any]:
    """What this GPU does now: bytes a second copied, bfloat16 operations a second, seconds of an empty kernel."""
    source = torch.randn(ROOF_ELEMENTS, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(ROOF_SIDE, ROOF_SIDE, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")
    one = torch.zeros(1, device=DEVICE)
    seconds, notes = _timed({"copy": lambda: target.copy_(source), "product": lambda: a @ b, "empty": one.zero_})
    return {
        "bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "flops_per_second": 2 * ROOF_SIDE**3 / seconds["product"],
        "launch_seconds": seconds["empty"], "notes": notes,
    }  # fmt: skip


def time_case(case: Case, roofs: dict[str, Any]) -> dict[str, Any]:
    """One line of the kernels' table."""
    torch.manual_seed(0)
    ways = case.ways(torch.device(DEVICE))
    seconds, notes = _timed({name: ways[name] for name in ("op", "pytorch")})
    floor = max(case.bytes / roofs["bytes_per_second"], case.flops / roofs["flops_per_second"])
    return {
        "op": case.op, "shape": case.shape, "bytes": case.bytes, "flops": case.flops, "seconds": seconds,
        "floor_seconds": floor, "of_roof": floor / seconds["op"], "notes": notes,
    }  # fmt: skip


def _timed(calls: dict[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each call, and the notes of those that have one."""
    timings = {name: time_call(call) for name, call in calls.items()}
    return {n: t.seconds for n, t in timings.items()}, {n: t.note for n, t in timings.items() if t.note}


def run_kernels(clock: Clock, console: Console) -> dict[str, Any]:
    result: dict[str, Any] = {"roofs": time_roofs(), "cases": []}
    for case in _tracked(list(gpu_cases()), "kernels", console):
        if clock.has(10):
            result["cases"].append(_guarded(lambda case=case: time_case(case, result["roofs"]), str(case)))
            torch.cuda.empty_cache()
    return result


def run_decode(clock: Clock, console: Console) -> dict[str, Any]:
    """Whole calls, all ways in turn, a batch size at a time."""
    target, draft, tokenizer = measure.load_pair(SIZE, torch.bfloat16, DEVICE)
    ids = zoo.held_out_prompts(tokenizer, max(BATCHES), PROMPT_TOKENS).to(DEVICE)
    ways = measure.all_paths(target, draft)
    parameters = sum(p.numel() for p in target.parameters())
    result: dict[str, Any] = {
        "settings": {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": REPEATS, "dtype": "bfloat16"},
        "results": [],
    }
    for batch in BATCHES:
        able = {n: ways[n] for n in WAYS if ways[n].max_batch is None or batch <= ways[n].max_batch}
        if not clock.has(60):
            result["results"].append({"error": f"batch {batch}: {_OUT_OF_TIME}"})
            continue

        def rows(batch: int = batch, able: dict[str, measure.Path] = able) -> dict[str, Any]:
            with measure.progress(console) as bar:
                paths = end_to_end.measure_all(able, [ids[:batch]], NEW_TOKENS, REPEATS, bar)
            return {"size": SIZE, "parameters": parameters, "batch": batch, "paths": paths}

        result["results"].append(_guarded(rows, f"batch {batch}"))
    return result


def run_steps(clock: Clock, console: Console, out: Path) -> list[dict[str, Any]]:
    """Profiles of a few steps at batch 1 and 8, of the undrafted and the drafted loop."""
    target, draft, tokenizer = measure.load_pair(SIZE, torch.bfloat16, DEVICE)
    ids = zoo.held_out_prompts(tokenizer, 8, PROMPT_TOKENS).to(DEVICE)
    ways = measure.all_paths(target, draft)
    rows = []
    for name in ("transformers", "specdec_plain", "specdec"):
        for batch in (1, 8):
            if clock.has(20):
                trace = out / "trace.json.gz" if (name, batch) == ("specdec", 1) else None
                rows.append(
                    _guarded(
                        lambda n=name, b=batch, t=trace: profile.steps(ways[n], ids[:b], t), f"{name} batch {batch}"
                    )
                )
    return rows


def run_backend(clock: Clock, console: Console) -> dict[str, Any]:
    """One table a batch size and number of tokens fed; as long as the one before it took is taken to be needed."""
    model, _, tokenizer = measure.load_pair(SIZE, torch.bfloat16, DEVICE)
    ids = zoo.held_out_prompts(tokenizer, max(BACKEND_BATCHES), PROMPT_TOKENS).to(DEVICE)
    settings = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": REPEATS, "dtype": "bfloat16"}
    result: dict[str, Any] = {"settings": settings, "results": []}
    seconds = 120.0
    for batch, fed in product(BACKEND_BATCHES, BACKEND_FED):
        name = f"batch {batch}, {fed} a call"
        if not clock.has(seconds):
            result["results"].append({"error": f"{name}: {_OUT_OF_TIME}"})
            continue
        left = clock.left
        shape = partial(backend.measure_shape, SIZE, model, ids[:batch], CAPACITY, fed, settings, console)
        result["results"].append(_guarded(shape, name))
        seconds = left - clock.left
        torch.compiler.reset()  # lets go of the recorded graphs' memory
    return result


def run_padding(clock: Clock, console: Console) -> dict[str, Any]:
    """One batch's cells a batch size; as long as the one before it took is taken to be needed.

    Traces are recorded on the bundled target, which computes the same function.
    """
    bundled, _, tokenizer = zoo.load_pair()
    target, _, _ = measure.load_pair(SIZE, torch.bfloat16, DEVICE)
    ids = zoo.held_out_prompts(tokenizer, max(PADDING_BATCHES), PROMPT_TOKENS)
    settings = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": REPEATS, "dtype": "bfloat16"}
    result: dict[str, Any] = {"settings": settings, "results": []}
    seconds = 60.0
    for batch in PADDING_BATCHES:
        if not clock.has(seconds):
            result["results"].append({"error": f"batch {batch}: {_OUT_OF_TIME}"})
            continue
        left = clock.left

        def cells(batch: int = batch) -> dict[str, Any]:
            traces = [run.trace for run in padding.record(bundled, ids[:batch], batch, NEW_TOKENS)]
            rows = padding.padding_cells(target, traces, PROMPT_TOKENS, REPEATS)
            return {"size": SIZE, "batch": batch, "load": os.getloadavg()[0], "cells": rows}

        result["results"].append(_guarded(cells, f"batch {batch}"))
        seconds = left - clock.left
    return result


def _guarded(work: Any, name: str) -> dict[str, Any]:
    """What `work` returns; a failure becomes part of the result, and the rest still runs."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{name}: {type(error).__name__}: {error}"[:500]}


def _failed(result: Any) -> list[str]:
    """What `_guarded` caught, anywhere in a result."""
    if isinstance(result, list):
        return [line for item in result for line in _failed(item)]
    if not isinstance(result, dict):
        return []
    own = [result["error"]] if "error" in result and not result["error"].endswith(_OUT_OF_TIME) else []
    return own + _failed(list(result.values()))


def _tracked(items: list[Any], label: str, console: Console) -> Any:
    with Progress(*_COLUMNS, console=console, transient=True) as bar:
        yield from bar.track(items, description=label)


_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def main(
    out: Annotated[Path, Option(help="Folder for the results.")] = Path("bench/results/gpu"),
    sections: Annotated[str, Option(help=f"Of {', '.join(SECTIONS)}.")] = ",".join(SECTIONS),
    minutes: Annotated[float, Option(help="What does not fit into this time is left out.")] = 9.0,
) -> None:
    """Run the sections, print and write."""
    if not torch.cuda.is_available():
        print("make gpu: this PyTorch sees no CUDA device", file=sys.stderr)
        raise typer.Exit(2)
    unknown = [s for s in sections.split(",") if s not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(SECTIONS)}")
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, clock, faults = Console(), Clock(minutes), measure.Faults()
    file = out / "gpu.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    result |= measure.run_facts("bench.gpu")
    runs = {
        "tests": lambda: run_tests(clock, console),
        "kernels": lambda: run_kernels(clock, console),
        "decode": lambda: run_decode(clock, console),
        "steps": lambda: run_steps(clock, console, out),
        "backend": lambda: run_backend(clock, console),
        "padding": lambda: run_padding(clock, console),
    }
    for section in sections.split(","):
        start = time.monotonic()
        result[section] = _guarded(runs[section], section)
        faults += _failed(result[section])
        console.print(f"[dim]{section}: {time.monotonic() - start:.0f} s, {clock.left:.0f} s left[/]", highlight=False)
        gc.collect()  # models and their views know each other
        torch.cuda.empty_cache()
        gpu_report.write(result, out)  # after each: a run that is stopped leaves what it has
    console.print(gpu_report.markdown(result), markup=False, highlight=False)
    if result.get("tests", {}).get("exit_code", 0) != 0:  # None: stopped
        faults.append(f"tests: {result['tests']['summary']}")
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
