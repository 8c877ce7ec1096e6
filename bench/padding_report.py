"""The results of `bench.padding` as a terminal table, Markdown, JSON and plots."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.padding_simulator import SIMULATED, expected_tokens

PAPER = {2: 1.09, 4: 1.25, 8: 1.59, 16: 1.97, 24: 2.14}
"""Throughput of both ragged over vanilla by batch size: OPT-6.7B, fp16, on a GPU."""
SPEEDS = ("undrafted", "vanilla, finished kept", "KV only, finished kept", "vanilla", "KV only", "inputs only", "both")
RATIOS = {
    "KV only": ("KV only", "vanilla"), "inputs only": ("inputs only", "vanilla"), "both": ("both", "vanilla"),
    "both, finished kept": ("both", "vanilla, finished kept"),
}  # fmt: skip
"""By what is called which: a cell over another."""
COLORS = {"both": "#08519c", "inputs only": "#4292c6", "KV only": "#9ecae1", "both, finished kept": "0.45"}
SPEED_HEADER, RATIO_HEADER = ("", *SPEEDS), ("", *RATIOS, "paper: both", "load average")
COUNTED = ("both", "vanilla", "vanilla, finished kept")
COUNT_HEADER = ("", "steps", *(f"{what}: {name}" for what in ("rows", "slots") for name in COUNTED))
EXECUTION_HEADER = ("", "ragged", "vanilla, simulated", "vanilla, executed")
SIMULATED_COLORS = ("#08519c", "#6baed6", "0.45")


def entries_of(result: dict[str, Any], size: str) -> list[dict[str, Any]]:
    return [entry for entry in result["results"] if entry["size"] == size]


def ratio(entry: dict[str, Any], cell: str, other: str) -> float:
    """A cell's throughput over another's: the median of the rounds' ratios."""
    seconds = {row["cell"]: row["seconds"] for row in entry["cells"]}
    return statistics.median(b / a for a, b in zip(seconds[cell], seconds[other], strict=True))


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """Throughput over vanilla's, by the names of `RATIOS`."""
    return {name: ratio(entry, *cells) for name, cells in RATIOS.items()}


def speed_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    speed = {row["cell"]: row["tokens_per_second"] for row in entry["cells"]}
    speeds = (f"{speed[name]:.1f} ({ratio(entry, name, 'undrafted'):.2f})" for name in SPEEDS)
    return (f"B = {entry['batch']}", *speeds)


def ratio_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    paper = PAPER.get(entry["batch"])
    found = (f"{ratio:.2f}" for ratio in ratios(entry).values())
    return (f"B = {entry['batch']}", *found, f"{paper:.2f}" if paper else "", f"{entry['load']:.1f}")


def count_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Steps of all batches, and rows and slots of all samples."""
    rows = {row["cell"]: row for row in entry["cells"]}
    counts = (str(rows[name][what]) for what in ("rows", "slots") for name in COUNTED)
    return (f"B = {entry['batch']}", str(rows["both"]["steps"]), *counts)


def table(result: dict[str, Any], size: str) -> Table:
    """One size's ratios, for a terminal."""
    rows = {ratio_cells(entry): True for entry in entries_of(result, size)}
    return report.terminal_table(f"{size} target, tokens/s over vanilla's", RATIO_HEADER, rows)


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    settings = result["settings"]
    kind = "compiled" if settings["compiled"] else "run eagerly"
    lines = [
        *report.heading("Padding", result),
        f"Greedy, {settings['dtype']}, n-gram drafts of up to {settings['depth']} tokens, {settings['prompts']} "
        f"held-out prompts of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new tokens each, end of "
        "text switched off. Vanilla batches were decoded by transformers on the bundled target, and what each sample "
        "fed and got accepted was written down; every cell replays these decisions with the same forward, "
        f"{kind}, and the same attention over caches of the same size. Tokens/s of the target's forwards alone: "
        "neither drafting nor the prompts' forward is in them. Prompts are not written and padding is read like text: "
        f"what slots hold decides nothing here. Medians of {settings['repeats']} interleaved rounds; a ratio is the "
        "median of the rounds' ratios, and need not be that of two medians. *load average*: of the last minute, this "
        "program's own threads among it; above the number of cores the machine had more to do than it could.",
        "",
        "*vanilla*: cache and forward are padded to the batch's most (EMS-SD, arXiv 2405.07542). *KV only*: the cache "
        "is not. *inputs only*: the forward's rows are not. *both*: neither is, as in this library's steps. Finished "
        "samples leave the batch, except where they are *kept*: then they are padded until the last has finished.",
    ]
    for size in dict.fromkeys(entry["size"] for entry in result["results"]):
        entries = entries_of(result, size)
        title = f"{size} target, tokens/s (speedup over undrafted)"
        lines += report.markdown_table(title, SPEED_HEADER, [speed_cells(entry) for entry in entries])
        title = f"{size} target, tokens/s over vanilla's"
        lines += report.markdown_table(title, RATIO_HEADER, [ratio_cells(entry) for entry in entries])
    lines += [
        "",
        "*both, finished kept*: over the vanilla batch that keeps its finished samples. The paper's ratios are "
        "OPT-6.7B's, in fp16, on a GPU.",
    ]
    first = entries_of(result, result["results"][0]["size"])
    title = "What was replayed: rows of the forwards, slots of the caches"
    lines += report.markdown_table(title, COUNT_HEADER, [count_cells(entry) for entry in first])
    title = "Slots a sample until it finished"
    names = ("ragged", "simulated", "executed")
    rows = [(f"B = {e['batch']}", *(f"{e[name]:.2f}" for name in names)) for e in result["executions"]]
    lines += report.markdown_table(title, EXECUTION_HEADER, rows)
    lines += [
        "",
        "*executed*: columns of transformers' cache, as the vanilla batches left them; *simulated*: counted from their "
        "traces alone. Means, prompts not counted.",
    ]
    return "\n".join([*lines, "", "![throughput over vanilla's](padding.png)", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput over vanilla's against the batch size: a panel a model size."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(entry["size"] for entry in result["results"]))
    figure = Figure(figsize=(1.5 + 4.2 * len(sizes), 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        entries = entries_of(result, size)
        batches = [entry["batch"] for entry in entries]
        for name, color in COLORS.items():
            axes.plot(batches, [ratios(e)[name] for e in entries], marker="o", ms=4, color=color, label=name)
        known = [n for n in batches if n in PAPER]
        paper = "the paper's: both, OPT-6.7B on a GPU"
        axes.plot(known, [PAPER[n] for n in known], color="0.2", linestyle=":", label=paper)
        _finish(axes, f"{size} target", "tokens/s over vanilla's" if axes is panels[0] else "", batches)
        axes.axhline(1, color="0.2", linewidth=0.8, linestyle="--")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _finish(axes: Any, title: str, ylabel: str, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(n) for n in batches])
    axes.minorticks_off()
    axes.set(xlabel="batch size B", ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def write(result: dict[str, Any], folder: Path) -> None:
    """`padding.json`, `.md` and `.png` in `folder`."""
    (folder / "padding.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "padding.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "padding.png")


def simulated_markdown(result: dict[str, Any]) -> str:
    """The simulated ratios beside the expected and the closed ones."""
    largest = max(entry["standard_error"] for entry in result["entries"])
    lines = [
        *report.heading("Padding, simulated", result),
        f"Padding a token in the caches of vanilla batches, {result['tokens']} tokens a sample, counted until each "
        "sample finishes; i.i.d. drafts of γ tokens, each accepted with probability a if those before it are; what "
        f"goes past the last token is cut off. Means of {result['runs']} batches, standard errors of at most "
        f"{largest:.4f}. *expected*: figures of another program, whose number of batches and treatment of the last "
        "step are not known. *asymptote*: E[max of B] / E[A] - 1, what the ratio of longer and longer texts tends to; "
        "in short ones the last samples are padded less, for want of neighbours.",
    ]
    rows = []
    for depth, acceptance in SIMULATED:
        entries = _law(result, depth, acceptance)
        name = f"γ = {depth}, a = {acceptance:g}, E[A] = {expected_tokens(depth, acceptance):.2f}"
        rows += [
            (f"{name}: simulated", *(f"{e['ratio']:.3f}" for e in entries), ""),
            ("expected", *("" if e["expected"] is None else f"{e['expected']:.2f}" for e in entries), ""),
            ("asymptote", *(f"{e['asymptote']:.3f}" for e in entries), f"{entries[0]['limit']:.3f}"),
        ]
    batches = [e["batch"] for e in _law(result, *next(iter(SIMULATED)))]
    header = ("", *(f"B = {n}" for n in batches), "B → ∞")
    lines += report.markdown_table("Padding ratio", header, rows)
    return "\n".join([*lines, "", "![padding ratio and slots a sample](padding_simulated.png)", ""])


def _law(result: dict[str, Any], depth: int, acceptance: float) -> list[dict[str, Any]]:
    return [e for e in result["entries"] if (e["depth"], e["acceptance"]) == (depth, acceptance)]


def plot_simulated(result: dict[str, Any], path: Path) -> None:
    """Padding ratio and its asymptote, and slots a sample, against the batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (depth, acceptance), color in zip(SIMULATED, SIMULATED_COLORS, strict=True):
        entries = _law(result, depth, acceptance)
        batches, name = [e["batch"] for e in entries], f"γ = {depth}, a = {acceptance:g}"
        left.plot(batches, [e["ratio"] for e in entries], "o", ms=5, color=color, label=f"{name}, simulated")
        left.plot(batches, [e["asymptote"] for e in entries], color=color, lw=1, label=f"{name}, asymptote")
        right.plot(batches, [e["slots_until_finished"] for e in entries], "o-", ms=5, color=color, label=name)
        right.plot(batches, [e["slots"] for e in entries], "--", color=color, label=f"{name}, finished kept")
    right.axhline(result["tokens"], color="0.2", linestyle=":", label="ragged")
    _finish(left, "padding of a vanilla batch", "slots of padding a token", batches)
    _finish(right, f"cache for {result['tokens']} tokens of a vanilla batch", "slots a sample", batches)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def write_simulated(result: dict[str, Any], folder: Path) -> None:
    """`padding_simulated.md` and `.png` in `folder`."""
    (folder / "padding_simulated.md").write_text(simulated_markdown(result), encoding="utf-8")
    plot_simulated(result, folder / "padding_simulated.png")
