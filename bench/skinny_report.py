"""The result of `bench.skinny` as a terminal table, Markdown, JSON and a plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report

COLORS = {"library": "0.45", "kernel": "#08519c"}


def ratio(row: dict[str, Any]) -> float:
    """The library's time over the kernel's: the median of the rounds'."""
    return statistics.median(b / a for a, b in zip(row["kernel"], row["library"], strict=True))


def totals(entry: dict[str, Any], way: str) -> list[float]:
    """Milliseconds of all products of a forward, by number of rows."""
    medians = [[w["count"] * statistics.median(row[way]) for row in w["times"]] for w in entry["weights"]]
    return [sum(column) for column in zip(*medians, strict=True)]


def title(entry: dict[str, Any]) -> str:
    """What one table is about."""
    return f"{entry['size']} target, {entry['threads']} thread{'s' * (entry['threads'] > 1)}"


def lines(entry: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines of one table: milliseconds of the kernel, and how many times that the library takes."""
    weights = entry["weights"]
    header = ("rows", *(f"{w['name']} {w['n_out']} × {w['n_in']}" for w in weights), "a forward's")
    ours, theirs = totals(entry, "kernel"), totals(entry, "library")
    body = [
        (
            str(rows[0]["rows"]),
            *(f"{statistics.median(row['kernel']):.3f} ({ratio(row):.2f}×)" for row in rows),
            f"{mine:.2f} ({other / mine:.2f}×)",
        )
        for *rows, mine, other in zip(*(w["times"] for w in weights), ours, theirs, strict=True)
    ]
    return header, body


def table(entry: dict[str, Any]) -> Table:
    """One target and number of threads, for a terminal."""
    header, body = lines(entry)
    return report.terminal_table(f"{title(entry)}: ms (library / kernel)", header, dict.fromkeys(body, True))


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    out = [
        *report.heading("Few rows times large weights, on a CPU", result),
        f"Vectors: {result['vectors']}. float32, weights from memory. OMP_WAIT_POLICY: "
        f"{result['settings']['wait_policy']}. Medians of {result['settings']['repeats']} "
        "interleaved rounds: milliseconds of the kernel, and in brackets how many times as long `torch.mm` takes. "
        "*a forward's*: all these products of one forward. A process here gives the kernel up to "
        f"**{result['max_rows']}** rows (`skinny_linear.max_rows`). Where the load is above the number of cores, "
        "threads shared them with other programs: compare with the library then, not with other tables.",
    ]
    for entry in result["results"]:
        out += report.markdown_table(title(entry), *lines(entry))
        out += ["", f"The machine's load when this ended: {entry['load']:.1f}."]
    return "\n".join([*out, "", "![milliseconds of all products of a forward](skinny.png)", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of all products of a forward by rows: a panel a target and number of threads."""
    from matplotlib.figure import Figure

    entries = result["results"]
    figure = Figure(figsize=(3.4 * len(entries), 3.6), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
        rows = [row["rows"] for row in entry["weights"][0]["times"]]
        for way, color in COLORS.items():
            axes.plot(rows, totals(entry, way), color=color, marker="o", markersize=3, label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(rows[::2], [str(n) for n in rows[::2]], fontsize=8)
        axes.minorticks_off()
        axes.set(xlabel="rows", ylabel="ms")
        axes.set_title(title(entry), loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def write(result: dict[str, Any], folder: Path) -> None:
    """`skinny.json`, `.md` and `.png` in `folder`."""
    (folder / "skinny.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "skinny.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "skinny.png")
