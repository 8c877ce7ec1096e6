"""The result of `bench.control` as terminal tables, Markdown, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.report import heading, markdown_table, terminal_table

UNDRAFTED, BEST = 0.97, 0.95
"""What the controller's speed must at least be of that without drafts, and of that with the best fixed depth."""
HEADER = ("", "tokens/s", "vs undrafted", "tokens/step", "undrafted steps", "nodes judged", "text")
SUMMARY = ("draft", "batch", "controller vs undrafted", "best fixed depth", "controller vs it", "undrafted steps")
COLORS = {"useless": "0.6", "noisy": "#fdae6b", "bundled": "#4292c6", "perfect": "#08306b", "ngram": "#41ab5d"}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One way's line of the table."""
    text = {None: "", True: "identical", False: "differs"}[row["identical"]]
    return (
        row["path"], f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}×", f"{row['tokens_per_step']:.2f}",
        f"{row['undrafted_steps'] / row['steps']:.0%}", f"{row['allowed_a_step']:.2f}", text,
    )  # fmt: skip


def verdict(entry: dict[str, Any]) -> tuple[float, str, float]:
    """The controller's speed relative to undrafted, the best fixed depth, and relative to that."""
    speed = {row["path"]: row["tokens_per_second"] for row in entry["paths"]}
    best = max((name for name in speed if name.startswith("depth")), key=lambda name: speed[name])
    return speed["controller"] / speed["undrafted"], best, speed["controller"] / speed[best]


def title(entry: dict[str, Any]) -> str:
    return f"{entry['draft']} draft, {entry['size']} target, batch {entry['batch']}"


def table(entry: dict[str, Any]) -> Table:
    """One draft and batch, for a terminal; red where a text differs or the controller is too slow."""
    undrafted, _, best = verdict(entry)
    fine = undrafted >= UNDRAFTED and best >= BEST
    rows = {
        cells(row): row["identical"] is not False and (fine or row["path"] != "controller") for row in entry["paths"]
    }
    return terminal_table(title(entry), HEADER, rows)


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    settings = result["settings"]
    lines = [
        *heading("The controller", result),
        f"Greedy, float32, held-out prompts of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new tokens "
        f"each, end of text switched off. Medians of {settings['repeats']} interleaved rounds, after compiling. "
        "*undrafted*: `specdec.compile(target)`; *depth d*: always d tokens drafted; *controller*: the default. "
        "*undrafted steps*: the share of steps that drafted nothing; *nodes judged*: drafted tokens that a step was to "
        "judge of a text at most, on average. The drafts are described in `bench/control.py`. Wanted of the "
        f"controller: {UNDRAFTED} of undrafted and {BEST} of the best fixed depth at least.",
        *([] if settings["compiled"] else ["", "Everything ran eagerly (`--no-compile`)."]),
    ]
    entries = result["results"]
    for size in dict.fromkeys(entry["size"] for entry in entries):
        own = [entry for entry in entries if entry["size"] == size]
        lines += markdown_table(f"{size} target", SUMMARY, list(map(_summary, own)))
    lines += ["", "![speed beside undrafted](control.png)"]
    for entry in entries:
        lines += markdown_table(title(entry), HEADER, [cells(row) for row in entry["paths"]])
        lines += ["", f"Controller: {entry['paths'][-1]['control']}."]
    return "\n".join([*lines, ""])


def _summary(entry: dict[str, Any]) -> tuple[str, ...]:
    undrafted, best, beside = verdict(entry)
    row = entry["paths"][-1]
    ratios = f"{undrafted:.2f}×", best, f"{beside:.2f}×"
    return entry["draft"], str(entry["batch"]), *ratios, f"{row['undrafted_steps'] / row['steps']:.0%}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed relative to undrafted against the batch size: a panel a target, a colour a draft."""
    from matplotlib.figure import Figure

    entries = result["results"]
    sizes = list(dict.fromkeys(entry["size"] for entry in entries))
    figure = Figure(figsize=(1.5 + 5 * len(sizes), 4.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for draft in dict.fromkeys(entry["draft"] for entry in entries):
            own = sorted((e for e in entries if (e["size"], e["draft"]) == (size, draft)), key=lambda e: e["batch"])
            batches, verdicts = [entry["batch"] for entry in own], [verdict(entry) for entry in own]
            controller = [undrafted for undrafted, _, _ in verdicts]
            fixed = [undrafted / beside for undrafted, _, beside in verdicts]
            axes.plot(batches, controller, "o-", color=COLORS[draft], label=draft)
            axes.plot(batches, fixed, "x--", color=COLORS[draft], linewidth=1)
        axes.axhline(1, color="0.2", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set(xlabel="batch size", ylabel="speed relative to undrafted")
        axes.set_title(f"{size} target", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="draft: controller (solid), best depth", frameon=False, fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def write(result: dict[str, Any], folder: Path) -> None:
    """`control.json`, `.md` and `.png` in `folder`."""
    (folder / "control.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "control.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "control.png")
