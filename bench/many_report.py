"""The results of `bench.many` as a terminal table, Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report

HEADER = ("", "tokens/s", "vs one by one", "vs padded batches", "tokens/step", "text", "warm-up")
MEMORY_HEADER = ("", "rows", "longest text", "caches", "predicted", "taken", "taken/predicted")


def cells(row: dict[str, Any], n_prompts: int) -> tuple[str, ...]:
    """One way's line of the table."""
    per_step, warm_up = row["tokens_per_step"], row["warm_up_seconds"]
    return (
        row["label"], f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}×", f"{row['ratio_to_batches']:.2f}×",
        "" if per_step is None else f"{per_step:.2f}",
        "identical" if row["identical"] == n_prompts else f"{row['identical']} of {n_prompts}",
        "" if warm_up is None else f"{warm_up:.1f} s",
    )  # fmt: skip


def memory_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    megabytes = (f"{entry[name] / 2**20:.1f} MiB" for name in ("caches", "predicted", "taken"))
    share = f"{entry['taken'] / entry['predicted']:.2f}"
    return (f"{entry['size']} target", str(entry["rows"]), f"{entry['longest']} tokens", *megabytes, share)


def title(entry: dict[str, Any]) -> str:
    return report.title(entry).replace(", batch ", ", rows or batches of ")


def table(entry: dict[str, Any], n_prompts: int) -> Table:
    """One size, for a terminal."""
    rows = {cells(row, n_prompts): row["identical"] == n_prompts for row in entry["ways"]}
    return report.terminal_table(title(entry), HEADER, rows)


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    settings = result["settings"]
    shortest, longest = settings["prompt_tokens"]
    lines = [
        *report.heading("Many prompts", result),
        f"Greedy, {settings['dtype']}, {settings['prompts']} held-out prompts of {shortest} to {longest} tokens in a "
        f"fixed random order, {settings['new_tokens']} new tokens each, end of text switched off. Medians of "
        f"{settings['repeats']} interleaved rounds. Padded batches are padded on the left and take the prompts as they "
        "come. *text*: of how many prompts all tokens equal those of transformers' `generate()` of that prompt alone; "
        "batches of other shapes round differently, transformers' own too. *warm-up*: `model.specdec.warmup()`, which "
        "compiles, once for all ways of a draft.",
    ]
    lines += [] if settings["compiled"] else ["", "specdec ran eagerly (`--no-compile`)."]
    for entry in result["results"]:
        rows = [cells(row, settings["prompts"]) for row in entry["ways"]]
        lines += report.markdown_table(title(entry), HEADER, rows)
    if result["memory"]:
        rows = [memory_cells(entry) for entry in result["memory"]]
        lines += report.markdown_table("Memory of generate_many(), draft model", MEMORY_HEADER, rows)
        lines += ["", "*predicted*: `model.specdec.memory(rows, longest)`. *taken*: at most, beside the weights."]
    return "\n".join([*lines, ""])


def write(result: dict[str, Any], folder: Path) -> None:
    """`many.json` and `.md` in `folder`."""
    (folder / "many.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "many.md").write_text(markdown(result), encoding="utf-8")
