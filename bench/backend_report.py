"""The result of `bench.backend` as a terminal table, Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report

HEADER = ("", "ms a call", "quartiles", "vs Inductor", "text", "first call")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One way's line of the table."""
    times = row["milliseconds"]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return (
        row["way"], f"{middle:.2f}", f"{low:.2f}–{high:.2f}", f"{row['ratio']:.2f}×", report.same_text(row),
        f"{row['first_call_seconds']:.1f} s",
    )  # fmt: skip


def _title(entry: dict[str, Any]) -> str:
    tokens = "1 token" if entry["fed"] == 1 else f"{entry['fed']} tokens"
    return f"{report.title(entry)}, capacity {entry['capacity']}, {tokens} a call"


def table(entry: dict[str, Any]) -> Table:
    """One shape, for a terminal."""
    rows = {_cells(row): row["identical"] for row in entry["ways"]}
    return report.terminal_table(_title(entry), HEADER, rows)


def section(entry: dict[str, Any]) -> list[str]:
    """One shape, in Markdown."""
    return report.markdown_table(_title(entry), HEADER, [_cells(row) for row in entry["ways"]])


def method(settings: dict[str, Any]) -> str:
    """How it was measured."""
    return (
        f"A greedy loop over transformers' `StaticCache`, {settings['dtype']}, from a prompt of "
        f"{settings['prompt_tokens']} tokens on, {settings['new_tokens']} new tokens; with several tokens a call all "
        f"but the first are drafts, and all are right. Medians of {settings['repeats']} interleaved rounds. "
        "*transformers*: eager; every other way is one `torch.compile(forward, fullgraph=True)`. *only x*: specdec "
        "with that pass and no other. *text*: whether all tokens equal those of the eager loop with one token a call. "
        "*first call*: compiles, with empty caches on disk, and is not timed."
    )


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    lines = [*report.heading("torch.compile backend", result), method(result["settings"])]
    lines += ["", f"The machine's load when this began: {result['load']:.1f}."]
    for entry in result["results"]:
        lines += section(entry)
    return "\n".join([*lines, ""])


def write(result: dict[str, Any], folder: Path) -> None:
    """`backend.json` and `.md` in `folder`."""
    (folder / "backend.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "backend.md").write_text(markdown(result), encoding="utf-8")
