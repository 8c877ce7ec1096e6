"""Tokens per step of every verifier on the bundled pair, sampling: chains and trees of one number of nodes.

    python -m bench.verifiers --temperatures 0.6,1.0

All verifiers continue the same held-out prompts. A step of each drafts the same number of nodes, and nothing is timed:
what is counted depends on the models alone. The intervals are 95% of the mean over batches of prompts.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

import specdec
from bench.end_to_end import numbers
from bench.report import heading, markdown_table, terminal_table
from specdec import zoo
from specdec.cli import measure
from specdec.engine.tree import TokenTree
from specdec.verifiers import VERIFIERS

HEADER = ("drafts", "verifier", "tokens/step", "95%")
PUBLISHED = "SpecHub (arXiv 2411.05289) reports +0.05 to +0.27 tokens per step over RRS and +0.02 to +0.16 over RRSw."


def tokens_per_step(model: PreTrainedModel, batches: list[Tensor], new_tokens: int, temperature: float) -> list[float]:
    """One mean for each batch of prompts [B, length].

    Raises:
        NotMeasured: a batch ran transformers' own loop.
    """
    means = []
    for prompts in batches:
        model.specdec.stats.reset()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=temperature, top_k=0,
            max_new_tokens=new_tokens,
        )  # fmt: skip
        measure.check("specdec", model.specdec.stats)
        means.append(model.specdec.stats.tokens_per_step)
    return means


def interval(means: list[float]) -> float:
    """Half the width of the 95% interval of their mean."""
    spread = statistics.stdev(means) / len(means) ** 0.5
    return float(stats.t.ppf(0.975, len(means) - 1)) * spread


def ways(widths: list[int]) -> dict[tuple[str, str], TokenTree]:
    """What is compared, by drafts and verifier: chains as long as the tree is large, and trees."""
    tree = TokenTree.from_widths(*widths)
    chain = TokenTree.chain(len(tree) - 1)
    shape = f"tree ({', '.join(map(str, widths))})"
    trees = [name for name in VERIFIERS if name != "block"]
    return {
        **{("chain", name): chain for name in ("rrsw", "block")},
        **{(shape, name): tree for name in trees},
    }


def main(
    temperatures: Annotated[str, Option(help="With commas between.")] = "0.6,1.0",
    widths: Annotated[str, Option(help="Of the tree.")] = "2,2,2",
    batches: Annotated[int, Option(help="Batches of prompts.", min=2)] = 8,
    batch: Annotated[int, Option(help="Prompts of a batch.", min=1)] = 32,
    new_tokens: Annotated[int, Option(min=1)] = 64,
    out: Annotated[Path, Option(help="Folder of verifiers.json and .md.")] = Path("bench/results"),
) -> None:
    """Count, print, and write a table and the means. Exits with 1 if a verifier was left out because it did not run."""
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    target, draft, tokenizer = measure.load_pair("bundled")
    for model in (target, draft):
        model.generation_config.eos_token_id = None
    prompts = zoo.held_out_prompts(tokenizer, batches * batch, 64).split(batch)
    compared = ways(numbers(widths))
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    chosen = [float(t) for t in temperatures.split(",")]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(compared) * len(chosen))
        for temperature in chosen:
            for (drafts, name), tree in compared.items():
                bar.update(task, description=f"{temperature}: {drafts}, {name}")
                model = specdec.compile(target, draft, tree=tree, verifier=name, compile=False)
                torch.manual_seed(0)
                with faults.of(f"temperature {temperature}, {drafts}, {name}"):
                    means = tokens_per_step(model, list(prompts), new_tokens, temperature)
                    row = {"temperature": temperature, "drafts": drafts, "verifier": name, "nodes": len(tree) - 1}
                    rows.append(row | {"means": means, "mean": statistics.mean(means), "interval": interval(means)})
                bar.advance(task)
    settings = {"widths": widths, "batches": batches, "batch": batch, "new_tokens": new_tokens}
    result = {**measure.run_facts("bench.verifiers"), "settings": settings, "faults": faults, "results": rows}
    if rows:
        (out / "verifiers.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (out / "verifiers.md").write_text("\n".join(_markdown(result)) + "\n", encoding="utf-8")
    for temperature in chosen:
        cells = {_cells(row): True for row in rows if row["temperature"] == temperature}
        console.print(terminal_table(_title(temperature), HEADER, cells))
    console.print("\n".join(_gains(rows)), highlight=False)
    faults.exit()


def _title(temperature: float) -> str:
    return f"bundled pair, temperature {temperature}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    drafts = f"{row['drafts']}, {row['nodes']} drafted"
    return drafts, row["verifier"], f"{row['mean']:.3f}", f"±{row['interval']:.3f}"


def _gains(rows: list[dict[str, Any]]) -> list[str]:
    """What the hub and what is best gain over RRS and RRSw, batch by batch of the same prompts."""
    lines = []
    for temperature in sorted({row["temperature"] for row in rows}):
        trees = {r["verifier"]: r for r in rows if r["temperature"] == temperature and r["drafts"] != "chain"}
        for ours in ("spechub", "seqhub", "auto"):
            for theirs in ("rrs", "rrsw", "traversal"):
                if not {ours, theirs} <= trees.keys():
                    continue
                gains = [a - b for a, b in zip(trees[ours]["means"], trees[theirs]["means"], strict=True)]
                mean, half = statistics.mean(gains), interval(gains)
                lines.append(
                    f"- temperature {temperature}: {ours} over {theirs} {mean:+.3f} ±{half:.3f} tokens per step"
                )
    return [*lines, f"- {PUBLISHED}"]


def _markdown(result: dict[str, Any]) -> list[str]:
    rows = result["results"]
    lines = heading("Verifiers on the bundled pair", result)
    for temperature in sorted({row["temperature"] for row in rows}):
        cells = [_cells(row) for row in rows if row["temperature"] == temperature]
        lines += markdown_table(_title(temperature), HEADER, cells)
    return [*lines, "", "## Gains", "", *_gains(rows)]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
