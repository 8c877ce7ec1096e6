"""The result of `bench.end_to_end` as a terminal table, Markdown, JSON and a plot, and what other reports share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

HEADER = ("", "tokens/s", "vs transformers", "tokens/step", "text", "first call")
LEFT = ("", "text")  # columns of words; the others hold numbers
COLORS = {
    "transformers": "0.3",
    "transformers_compiled": "0.45",
    "transformers_lookup": "0.62",
    "transformers_assisted": "0.78",
    "specdec_plain": "#9ecae1",
    "specdec_ngram": "#4292c6",
    "specdec": "#08519c",
    "specdec_both": "#08306b",
}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One way's line of the table."""
    per_step = f"{row['tokens_per_step']:.2f}" if "tokens_per_step" in row else ""
    return (
        row["label"], f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}×", per_step, same_text(row),
        f"{row['first_call_seconds']:.1f} s",
    )  # fmt: skip


def same_text(row: dict[str, Any]) -> str:
    """Whether a way wrote the expected tokens, or the share of them before the first that differs."""
    return "identical" if row["identical"] else f"first {row['common']:.0%}"


def title(entry: dict[str, Any]) -> str:
    """What one table is about."""
    size = "bundled target" if entry["size"] == "bundled" else f"{entry['size']} target"
    return f"{size} ({entry['parameters'] / 1e6:.0f}M parameters), batch {entry['batch']}"


def table(entry: dict[str, Any]) -> Table:
    """One size and batch, for a terminal."""
    return terminal_table(title(entry), HEADER, {cells(row): row["identical"] for row in entry["paths"]})


def terminal_table(title: str, header: tuple[str, ...], rows: dict[tuple[str, ...], bool]) -> Table:
    """A table for a terminal; rows of which something is wrong, marked False, are red."""
    out = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    out.header_style = "dim"
    for column in header:
        out.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
    for row, is_right in rows.items():
        out.add_row(*row, style="" if is_right else "red")
    return out


def markdown_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A table under a title of its own, in Markdown."""
    marks = ["---" if column in LEFT else "---:" for column in header]
    return ["", f"## {title}", "", *("| " + " | ".join(row) + " |" for row in (header, marks, *rows))]


def heading(name: str, result: dict[str, Any]) -> list[str]:
    """A report's title; the command, the machine and the versions it came from; and what failed."""
    machine = result["machine"]
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    hardware += f", {machine['gpu']}" if "gpu" in machine else ""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    failed = [line for fault in result.get("faults", ()) for line in (f"**Failed:** {fault}.", "")]
    return [f"# {name}", "", f"    {result['command']}", "", f"{result['date']}; {hardware}; {versions}.", "", *failed]


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    settings = result["settings"]
    lines = [
        *heading("End to end", result),
        f"Greedy, float32, {settings['prompts']} held-out prompts of {settings['prompt_tokens']} tokens, "
        f"{settings['new_tokens']} new tokens each, end of text switched off. Medians of {settings['repeats']} "
        "interleaved rounds; the first call of each way, which compiles where there is something to compile, is "
        "stated and not timed. *text*: whether all tokens equal those of transformers' `generate()`. Targets larger "
        "than the bundled one compute the same function at the cost of their size (`specdec.zoo.enlarge`), so "
        "acceptance is that of the bundled pair; the draft is the bundled one throughout.",
    ]
    lines += [] if settings["compiled"] else ["", "specdec ran eagerly (`--no-compile`)."]
    for entry in result["results"]:
        lines += section(entry)
    return "\n".join([*lines, "", "![tokens per second](end_to_end.png)", ""])


def section(entry: dict[str, Any]) -> list[str]:
    """One size and batch, in Markdown."""
    return markdown_table(title(entry), HEADER, [cells(row) for row in entry["paths"]])


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens a second of every way: a panel a model size and batch size."""
    from matplotlib.figure import Figure

    entries = result["results"]
    rows = max(len(entry["paths"]) for entry in entries)
    figure = Figure(figsize=(1.5 + 4.2 * len(entries), 1.0 + 0.36 * rows), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
        paths = entry["paths"][::-1]
        bars = axes.barh(
            [row["label"] for row in paths],
            [row["tokens_per_second"] for row in paths],
            color=[COLORS[row["path"]] for row in paths],
        )
        axes.bar_label(bars, [f"{row['tokens_per_second']:.0f}  ({row['ratio']:.2f}x)" for row in paths], padding=3)
        axes.set_title(f"{entry['parameters'] / 1e6:.0f}M target, batch {entry['batch']}", loc="left", fontsize=10)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("tokens per second", fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def write(result: dict[str, Any], folder: Path) -> None:
    """`end_to_end.json`, `.md` and `.png` in `folder`."""
    (folder / "end_to_end.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "end_to_end.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "end_to_end.png")
