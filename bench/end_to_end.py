"""End to end: every way to decode a model, side by side, as ratios to transformers' own `generate()`.

    python -m bench.end_to_end --sizes bundled,100m --batches 1,4

Held-out prompts, greedy, float32, the same number of tokens everywhere. In one size and batch all ways decode the same
prompts in turn, and medians are compared. Compiling is not timed, but the seconds of each way's first call are stated.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer import Option

from bench import report
from specdec import zoo
from specdec.cli import measure

SIZES = ("bundled", *zoo.SIZES)


def decode(path: measure.Path, batches: list[Tensor], new_tokens: int) -> Tensor:
    """[prompts, length] ids of all batches, one after the other."""
    return torch.cat([path(prompts, new_tokens) for prompts in batches])


def measure_all(
    paths: dict[str, measure.Path], batches: list[Tensor], new_tokens: int, repeats: int, bar: Progress
) -> list[dict[str, Any]]:
    """One row a way: seconds, speed, ratio, identity of the texts, and what specdec counted.

    Raises:
        NotMeasured: a way of specdec's did not run as it claims.
    """
    task = bar.add_task("", total=len(paths) * (repeats + 1))
    first_call, texts = {}, {}
    for name, path in paths.items():
        bar.update(task, description=f"warming up {path.label}", refresh=True)
        start = time.perf_counter()
        path(batches[0], new_tokens)
        first_call[name] = time.perf_counter() - start
        texts[name] = decode(path, batches, new_tokens)
        if hasattr(path.model, "specdec"):
            path.model.specdec.stats.reset()
        bar.update(task, advance=1, refresh=True)
    runs = {name: partial(decode, path, batches, new_tokens) for name, path in paths.items()}
    step = partial(bar.update, task, advance=1, refresh=True, description="measuring")
    seconds = measure.compare(runs, repeats, lambda name: step())
    bar.remove_task(task)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, path in paths.items():
        row = {
            "path": name,
            "label": path.label,
            "seconds": seconds[name],
            "tokens_per_second": sum(map(len, batches)) * new_tokens / median[name],
            "ratio": median["transformers"] / median[name],
            "identical": torch.equal(texts[name], texts["transformers"]),
            "common": (texts[name] == texts["transformers"])[:, -new_tokens:].long().cumprod(1).float().mean().item(),
            "first_call_seconds": first_call[name],
        }
        if hasattr(path.model, "specdec"):
            stats = path.model.specdec.stats
            measure.check(path.label, stats)
            row |= {"tokens_per_step": stats.tokens_per_step, "acceptance_by_position": stats.acceptance_by_position}
        rows.append(row)
    return rows


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "bundled,100m",
    batches: Annotated[str, Option(help="Samples decoded at once.")] = "1,4",
    paths: Annotated[str, Option(help="Which ways to decode, by name; all if empty.")] = "",
    prompts: Annotated[int, Option(help="Prompts of each batch size, decoded batch by batch.", min=1)] = 4,
    prompt_tokens: Annotated[int, Option(min=1)] = 64,
    new_tokens: Annotated[int, Option(min=1)] = 128,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 3,
    compile: Annotated[bool, Option(help="Without it specdec runs eagerly.")] = True,
    out: Annotated[Path, Option(help="Folder of end_to_end.json, .md and .png.")] = Path("bench/results"),
) -> None:
    """Measure, print, and write a table, a plot and the raw seconds. Exits with 1 if any specdec text differs, or a
    part was left out because it did not run."""
    chosen, batch_sizes = words(sizes, SIZES), numbers(batches)
    if any(prompts % n and n <= prompts for n in batch_sizes):
        raise typer.BadParameter(f"--batches {batches}: numbers that divide --prompts {prompts}, or exceed it")
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    result: dict[str, Any] = {
        **measure.run_facts("bench.end_to_end"),
        "settings": {
            "prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats,
            "dtype": "float32", "greedy": True, "compiled": compile,
        },
        "faults": faults,
        "results": [],
    }  # fmt: skip
    for size in chosen:
        target, draft, tokenizer = measure.load_pair(size)
        ids = zoo.held_out_prompts(tokenizer, max(prompts, *batch_sizes), prompt_tokens)
        ways = measure.all_paths(target, draft, compiled=compile)
        wanted = ["transformers", *(words(paths, list(ways)) if paths else ways)]
        for batch in batch_sizes:
            able = {n: p for n, p in ways.items() if n in wanted and (p.max_batch is None or batch <= p.max_batch)}
            pieces = list(ids[: max(prompts, batch)].split(batch))
            where = f"{size}, batch {batch}"
            with faults.of(where):
                with measure.progress(console) as bar:
                    rows = measure_all(able, pieces, new_tokens, repeats, bar)
                entry = {"size": size, "parameters": sum(p.numel() for p in target.parameters()), "batch": batch}
                result["results"].append(entry | {"paths": rows})
                console.print(report.table(result["results"][-1]))
                for row in rows:
                    if row["path"].startswith("specdec"):
                        faults.same(f"{where}: {row['label']}", row["identical"])
            if result["results"]:
                report.write(result, out)  # after each part: a long run that is stopped leaves what it has
        # Ways keep the model alive; the next size needs the memory.
        del target, draft, ways, able
    if result["results"]:
        console.print(f"[dim]written to {out}/end_to_end.md, .json and .png[/]", highlight=False)
    faults.exit()


def words(text: str, allowed: list[str] | tuple[str, ...]) -> list[str]:
    """An option's words, all of them allowed ones."""
    found = text.split(",")
    if unknown := [word for word in found if word not in allowed]:
        raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(allowed)}")
    return found


def numbers(text: str) -> list[int]:
    """An option's numbers, from 1 on."""
    found = [int(word) if word.isdigit() else 0 for word in text.split(",")]
    if min(found) < 1:
        raise typer.BadParameter(f"{text}: numbers from 1 on, with commas between")
    return found


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
