"""The result of `bench.end_to_end` as a terminal table, Markdown, JSON and a plot, and what other reports share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

HEADER = ("", "tokens/s", "vs transformers", "tokens/step", "text", "first call")
LEFT = ("", "text")  # columns of words; the others hold numbers
COLORS = {
    "transformers_compiled": "0.45",
    "transformers_lookup": "0.62",
    "transformers_assisted": "0.78",
    "specdec_plain": "#9ecae1",
    "specdec_ngram": "#4292c6",
    "specdec": "#08519c",
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
    return "\n".join([*lines, "", "![ratios](end_to_end.png)", ""])


def section(entry: dict[str, Any]) -> list[str]:
    """One size and batch, in Markdown."""
    return markdown_table(title(entry), HEADER, [cells(row) for row in entry["paths"]])


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed relative to transformers' `generate()`: a panel a batch size, a group of bars a model size."""
    from matplotlib.figure import Figure

    entries = result["results"]
    batches = sorted({entry["batch"] for entry in entries})
    sizes = list(dict.fromkeys(entry["size"] for entry in entries))
    labels = {row["path"]: row["label"] for entry in entries for row in entry["paths"]}
    names = [name for name in COLORS if name in labels]
    figure = Figure(figsize=(max(7.0, 2.0 + 1.8 * len(sizes) * len(batches)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    width = 0.85 / max(len(names), 1)
    for axes, batch in zip(panels, batches, strict=True):
        for entry in (e for e in entries if e["batch"] == batch):
            rows = {row["path"]: row for row in entry["paths"]}
            present = [name for name in names if name in rows]
            for i, name in enumerate(present):
                x = sizes.index(entry["size"]) + (i - (len(present) - 1) / 2) * width
                bars = axes.bar(x, rows[name]["ratio"], width * 0.92, color=COLORS[name])
                axes.bar_label(bars, [f"{rows[name]['ratio']:.1f}"], fontsize=7, padding=1)
        axes.axhline(1, color="0.2", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set(xlabel="target", xlim=(-0.6, len(sizes) - 0.4))
        axes.set_title(f"batch {batch}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("speed relative to transformers (dashed: 1)")
    handles = [panels[0].bar(0, 0, color=COLORS[name]) for name in names]
    figure.legend(handles, [labels[n] for n in names], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def write(result: dict[str, Any], folder: Path) -> None:
    """`end_to_end.json`, `.md` and `.png` in `folder`."""
    (folder / "end_to_end.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "end_to_end.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "end_to_end.png")
