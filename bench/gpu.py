"""What a GPU does with specdec, in one command and 7 minutes: `make gpu OUT=folder`, or `python -m bench.gpu`.

Sections, in this order; `--sections decode,profile` runs some of them:

    correctness  texts are right and no step waits for the device; if not, nothing else runs
    roofs        what the device copies and multiplies
    decode       Llama-3.1-8B shape in bfloat16, one sample, every way, each warm and nothing compiling
    profile      kernels, launches and waits of a step
    products     the products alone, joined and not, then attention and the other ops
    batches      several samples, with a fixed draft and an adaptive one
    draft_1b     a draft of the shape of a 1B model

One process makes the large weights once, on the device. gpu.json, gpu.md and plots are written as rows come: a run that
is stopped leaves what it has. What does not fit into the time is left out, and said to be. Exits with 1 if something
failed, with 2 where there is no CUDA device. Where texts differ, as in half precision they may, the tables say by how
little.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from bench import gpu_report
from bench.clock import Clock
from bench.end_to_end import words
from bench.gpu_run import Run, Setup
from bench.gpu_sections import SECTIONS
from specdec.cli import measure

MINUTES = 6.5
"""Python's start and the last plots take the rest of the 7."""


def run_sections(run: Run, chosen: Sequence[str]) -> None:
    """Run some sections, in the order they have; none after a correctness that failed."""
    with run.compilations:
        for section, (work, seconds) in SECTIONS.items():
            if section not in chosen:
                continue
            if run.clock.left <= 0:
                run.put(section, {"name": section, "missing": gpu_report.OUT_OF_TIME})
                continue
            start = time.monotonic()
            try:
                work(run, run.clock.part(seconds))
            except Exception as error:  # outside its rows: models that do not fit, say
                traceback.print_exc()
                run.put(section, {"name": section, "error": f"{type(error).__name__}: {error}"[:500]})
            run.took(section, time.monotonic() - start)
            run.free()
            if section == "correctness" and run.faults:
                break


def main(
    out: Annotated[Path, Option(help="Folder for the results.")] = Path("bench/results/gpu"),
    sections: Annotated[str, Option(help=f"Of {', '.join(SECTIONS)}.")] = ",".join(SECTIONS),
    minutes: Annotated[float, Option(help="What does not fit into this time is left out.")] = MINUTES,
) -> None:
    """Run the sections, print and write."""
    chosen = words(sections, list(SECTIONS))
    if not torch.cuda.is_available():
        print("make gpu: this PyTorch sees no CUDA device", file=sys.stderr)
        raise typer.Exit(2)
    measure_gpu(Setup(), out, chosen, minutes)


def measure_gpu(setup: Setup, out: Path, chosen: Sequence[str], minutes: float) -> None:
    """Measure, print and write; raises `typer.Exit(1)` if something failed."""
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, clock = Console(), Clock(60 * minutes)
    run = Run(setup, out, clock, measure.run_facts("bench.gpu"), console)
    run_sections(run, chosen)
    console.print(gpu_report.markdown(run.result), markup=False, highlight=False)
    run.faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
