"""The micro-benchmarks' JSON as a Markdown table: `python -m bench.ops_report ops.json > bench/results/ops.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from specdec.cli import measure

COMMAND = "python -m pytest bench/test_ops.py --benchmark-only --benchmark-json ops.json"
HEADER = ("op", "shape", "op µs", "GB/s", "GFLOP/s", "reference µs", "PyTorch µs", "PyTorch / op")


def rows(benchmarks: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line a case: medians of every way to compute it; the rates are those of the op."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for one in benchmarks:
        cases.setdefault(one["group"], {})[one["params"]["way"]] = one
    lines = []
    for case, ways in cases.items():
        op, _, shape = case.partition(" ")
        micro = {way: 1e6 * one["stats"]["median"] for way, one in ways.items()}
        rate = ways["op"]["extra_info"]
        lines.append(
            (
                op, shape, f"{micro['op']:.1f}", f"{rate['gigabytes_per_second']:.1f}", f"{rate['gigaflops']:.1f}",
                *(f"{micro[way]:.1f}" if way in micro else "" for way in ("reference", "pytorch")),
                f"{micro['pytorch'] / micro['op']:.2f}×",
            )
        )  # fmt: skip
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table, with the command, the machine and the versions it came from."""
    machine = measure.machine()
    hardware = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if "gpu" in machine else "")
    lines = [
        "# Ops", "", f"    {COMMAND}", "",
        f"{result['datetime'][:10]}; {hardware}; " + ", ".join(f"{k} {v}" for k, v in measure.versions().items()) + ".",
        "",
        "Medians of 50 rounds. On a CPU an op made of PyTorch operations runs compiled, as inside a step. *PyTorch*: "
        "the same work as one would write it; with trees, whose children level by level are in brackets, on dense laws "
        "of the whole vocabulary. Rates count the fewest bytes and operations the work can do with.", "",
        "| " + " | ".join(HEADER) + " |", "| --- | --- |" + " ---: |" * (len(HEADER) - 2),
    ]  # fmt: skip
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(result["benchmarks"])), ""])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
