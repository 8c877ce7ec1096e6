"""The product of few rows on a CPU, beside the library's: every weight of a target, by rows and threads.

    python -m bench.skinny --sizes bundled,100m --threads 1,2

A run multiplies x with copies of one weight that no cache holds together, so each comes from memory, as in a forward.
Kernel and library take turns, and a ratio is the median of the rounds' ratios. Up to 256 rows, whatever number of them
`max_rows` gives to the kernel: the table is what that choice rests on.

Where other programs use the cores too, set OMP_WAIT_POLICY=passive: threads that wait for each other actively are timed
by the scheduler's slices, 8 ms a product, on either side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor
from typer import Option

from bench import skinny_report as report
from bench.end_to_end import SIZES, numbers, words
from specdec import zoo
from specdec.cli import measure
from specdec.kernels.cpu import compiler_error
from specdec.kernels.linear import skinny_linear
from specdec.kernels.linear.skinny_linear import MIN_WEIGHTS

ROWS = 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256
OUT_OF_CACHE = 2**26
"""Bytes of the copies of a weight, which no cache holds."""


class Weight(NamedTuple):
    """Weights [n_out, n_in] of a target, and how many of them a forward reads."""

    name: str
    n_out: int
    n_in: int
    count: int


def weights_of(size: str) -> list[Weight]:
    """The weights of a target that the kernel is for, one a shape."""
    target, _, _ = zoo.load_pair()
    config = target.config.to_dict() | (zoo.SIZES[size] if size != "bundled" else {})
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    found: dict[tuple[int, int], Weight] = {}
    for new in (
        Weight("q", queries, hidden, layers), Weight("o", hidden, queries, layers),
        Weight("k, v", keys, hidden, 2 * layers), Weight("gate, up", inner, hidden, 2 * layers),
        Weight("down", hidden, inner, layers), Weight("head", config["vocab_size"], hidden, 1),
    ):  # fmt: skip
        shape = new.n_out, new.n_in
        if shape in found:
            new = Weight(f"{found[shape].name}, {new.name}", *shape, found[shape].count + new.count)
        found[shape] = new
    return [weight for weight in found.values() if weight.n_out * weight.n_in >= MIN_WEIGHTS]


def by_kernel(x: Tensor, copies: list[Tensor], out: Tensor) -> None:
    """x [T, K] times each of some weights [N, K], into out [T, N]."""
    kernel, n_threads = skinny_linear._kernel(), torch.get_num_threads()
    assert kernel is not None
    for weight in copies:
        kernel(x, weight, out, len(x), *weight.shape, n_threads)


def by_library(x: Tensor, copies: list[Tensor], out: Tensor) -> None:
    """The same by PyTorch."""
    for weight in copies:
        torch.mm(x, weight.t(), out=out)


def measured(weight: Weight, rows: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of one product by each way, round by round, for each number of rows.

    Raises:
        NotMeasured: the two ways do not compute the same.
    """
    n_copies = max(1, OUT_OF_CACHE // (4 * weight.n_out * weight.n_in))
    copies = [torch.randn(weight.n_out, weight.n_in) for _ in range(n_copies)]
    for n_rows in rows:
        x, out, expected = torch.randn(n_rows, weight.n_in), *torch.empty(2, n_rows, weight.n_out)
        by_kernel(x, copies, out)
        by_library(x, copies, expected)
        if not torch.allclose(out, expected, atol=1e-4 * weight.n_in**0.5):
            raise measure.NotMeasured(f"{n_rows} rows: the kernel and the library differ")
        ways = {"kernel": partial(by_kernel, x, copies, out), "library": partial(by_library, x, copies, out)}
        seconds = measure.compare(ways, repeats)
        yield {"rows": n_rows, **{way: [1e3 * s / n_copies for s in times] for way, times in seconds.items()}}


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "bundled,100m",
    threads: Annotated[str, Option(help="Threads of torch.")] = "1,2",
    rows: Annotated[str, Option(help="Rows of x.")] = ",".join(map(str, ROWS)),
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 11,
    out: Annotated[Path, Option(help="Folder of skinny.json, .md and .png.")] = Path("bench/results"),
) -> None:
    """Measure, print, and write a table, a plot and the raw times. Exits with 1 if a part was left out."""
    chosen, n_rows, n_threads = words(sizes, SIZES), tuple(numbers(rows)), numbers(threads)
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    if reason := compiler_error():
        raise typer.BadParameter(f"there is no kernel to measure: {reason}")
    console, faults = Console(), measure.Faults()
    result: dict[str, Any] = {
        **measure.run_facts("bench.skinny"),
        "settings": {"repeats": repeats, "wait_policy": os.environ.get("OMP_WAIT_POLICY", "OpenMP's default")},
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "max_rows": skinny_linear.max_rows(),
        "faults": faults,
        "results": [],
    }
    for size in chosen:
        weights = weights_of(size)
        for n in n_threads:
            torch.set_num_threads(n)
            with faults.of(f"{size}, {n} threads"), measure.progress(console) as bar:
                task = bar.add_task(f"{size}, {n} threads", total=len(weights) * len(n_rows))
                entry: dict[str, Any] = {"size": size, "threads": n, "weights": []}
                for weight in weights:
                    times = []
                    for row in measured(weight, n_rows, repeats):
                        times.append(row)
                        bar.update(task, advance=1, refresh=True)
                    entry["weights"].append({**weight._asdict(), "times": times})
                entry["load"] = os.getloadavg()[0]
                result["results"].append(entry)
            if result["results"]:
                report.write(result, out)  # after each: a long run that is stopped leaves what it has
                console.print(report.table(result["results"][-1]))
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
