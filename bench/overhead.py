"""Where the time of a decoding step goes on a CPU: matrix products, attention, and everything else.

    python -m bench.overhead --sizes bundled,100m

A step's time is measured without the profiler, its parts with it. What neither of them explains is the compiled
function around them: small fused kernels, the calls between kernels, looking the compiled step up.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from typer import Option

from specdec import zoo
from specdec.cli import measure

PARTS = {
    "products": {"aten::mm", "aten::addmm", "aten::bmm", "specdec::skinny_linear", "mkldnn::_linear_pointwise"},
    "attention": {"specdec::ragged_attention"},
    "lookup": {"TorchDynamo Cache Lookup"},
}
NEW_TOKENS, REPEATS = 96, 9


def step_times(path: measure.Path, prompts: object) -> dict[str, float]:
    """Milliseconds a step: in all, and by part.

    Raises:
        NotMeasured: the path did not run as it claims.
    """
    stats = path.model.specdec.stats

    def milliseconds() -> float:
        stats.reset()
        path(prompts, NEW_TOKENS)
        measure.check(path.label, stats)
        return 1e3 * stats.seconds["decode"] / stats.steps

    for _ in range(2):
        milliseconds()
    times = {"step": statistics.median(milliseconds() for _ in range(REPEATS))}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        milliseconds()
    for part, names in PARTS.items():
        total = sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key in names)
        times[part] = total / 1e3 / stats.steps
    return {**times, "other": times["step"] - sum(times[part] for part in PARTS)}


def main(sizes: Annotated[str, Option(help="Of bundled, 25m, 100m, 300m.")] = "bundled,100m") -> None:
    """Measure and print a table. Exits with 1 if a path did not run as it claims."""
    measure.quiet()
    console, table, faults = Console(), None, measure.Faults()
    for size in sizes.split(","):
        target, draft, tokenizer = measure.load_pair(size)
        prompts = zoo.held_out_prompts(tokenizer, 1, 64)
        ways = measure.all_paths(target, draft)
        for name in ("specdec_plain", "specdec_ngram", "specdec"):
            with faults.of(size):
                with console.status(f"{size}, {ways[name].label}"):
                    times = step_times(ways[name], prompts)
                table = table or Table("size", "", *(f"{part} (ms)" for part in times))
                table.add_row(size, ways[name].label, *(f"{x:.3f}" for x in times.values()))
    if table is not None:
        console.print(table)
    console.print(measure.today(), measure.machine(), measure.versions())
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
