"""The result of `bench.verification` as terminal tables, Markdown, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report

Figures = dict[str, dict[str, Any]]  # of each column: mean, standard_error, expected, off
TITLES = {"acceptance": "Acceptance of one node, two children", "tokens": "Tokens a step, trees of widths 2, 2, 2"}
TOLERANCE = 3  # standard errors
LINES: dict[str, tuple[str, str]] = {
    "single": ("0.65", "-"), "chain": ("0.65", "-"), "block": ("0.65", "--"), "RRS": ("#9ecae1", "-"),
    "RRSw": ("#4292c6", "-"), "traversal": ("#4292c6", "--"), "hub": ("#e6550d", "-"), "seqhub": ("#e6550d", "--"),
    "auto": ("#31a354", "-."), "optimum distinct": ("0.2", ":"),
}  # fmt: skip
"""Colour and dash; with weights handed down, a rule's line is dashed."""


def is_off(figure: dict[str, Any]) -> bool:
    return not abs(figure["off"]) <= TOLERANCE


def cells(entry: dict[str, Any], n: int, newline: str) -> tuple[str, ...]:
    """One line of a table: the laws, of each column mean and standard error over the expected mean, and counts of n."""
    found = [entry["laws"]]
    for figure in entry["figures"].values():
        digits = len(figure["expected"].partition(".")[2])
        mean, error = f"{figure['mean']:.{digits}f}", f"{figure['standard_error']:.{digits}f}"
        off = f"{figure['off']:+.1f}" + (" off" if is_off(figure) else "")
        found.append(f"{mean} ±{error}{newline}{figure['expected']} {off}")
    return (*found, *(f"{count} of {n}" for count in entry.get("never_less", {}).values()))


def header(entry: dict[str, Any]) -> tuple[str, ...]:
    return ("", *entry["figures"], *entry.get("never_less", {}))


def is_right(entry: dict[str, Any], n: int) -> bool:
    """Whether nothing is off, and no rule fell behind one that it must not."""
    return not any(map(is_off, entry["figures"].values())) and min(entry.get("never_less", {"": n}).values()) == n


def tables(result: dict[str, Any]) -> list[Table]:
    """Both tables, for a terminal."""
    n = result["settings"]["processes"]
    return [
        report.terminal_table(title, header(result[part][0]), {cells(e, n, "\n"): is_right(e, n) for e in result[part]})
        for part, title in TITLES.items()
    ]


def verdict(result: dict[str, Any]) -> str:
    """Which figures are not the expected ones."""
    off = [
        f"{entry['laws']}, {name}: {figure['mean']:.4f}, expected {figure['expected']}, {figure['off']:+.1f}"
        for part in TITLES
        for entry in result[part]
        for name, figure in entry["figures"].items()
        if is_off(figure)
    ]
    if off:
        return f"Off by more than {TOLERANCE} standard errors: {'; '.join(off)}."
    return f"Every figure lies within {TOLERANCE} standard errors of the expected one."


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    settings = result["settings"]
    over = settings["expected_over"]
    lines = [
        *report.heading("Verification", result),
        f"Exact sums in float64 over all drafts and decisions; what is random is the laws. A cell: mean ± its standard "
        f"error; below, the expected mean, and how far off it the mean is, in standard errors of the difference. One "
        f"node: {settings['seeds']} laws (expected: {over['seeds']}), V = 1000. *zipf s, σ*: the draft's law falls as "
        "rank^-s, the target's is that times e^N(0, σ²). *gauss s, ρ, T*: softmax of s/T times normal logits with "
        "correlation ρ. *uniform draft*: the target's law is uniform on the simplex. *optimum*: the most that any rule "
        "accepts of two drafts that are independent, or drawn without replacement; the hub's are neither. "
        "Seeds are 0, 1, ... in every row, so rows are not independent of each other. "
        f"Trees: {settings['processes']} processes (expected: {over['processes']}), V = 5, three levels, a law of its "
        "own after every prefix: the draft's logits N(0, c²), the target's those plus N(0, σ²). *chain* and *block* "
        "draft one token a level. *block*, *traversal* and *seqhub* hand weights down, *chain*, *RRSw* and *hub* "
        "verify the same drafts node by node; the last columns count the processes in which that is no better.",
        "",
        verdict(result),
    ]
    for part, title in TITLES.items():
        rows = [cells(entry, settings["processes"], "<br>") for entry in result[part]]
        lines += report.markdown_table(title, header(result[part][0]), rows)
    return "\n".join([*lines, "", "![acceptance and tokens a step](verification.png)", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Acceptance of one node against the draft's sharpness, and beside it tokens a step against that of its logits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    node, tree = figure.subplots(1, 2)
    for name, (color, dash) in LINES.items():
        style: dict[str, Any] = {"color": color, "linestyle": dash, "label": name}
        if name in result["sweep"][0]["means"]:
            node.plot(*zip(*((e["exponent"], e["means"][name]) for e in result["sweep"]), strict=True), **style)
        if name in result["tokens"][0]["figures"]:
            points = ((e["spread"], e["figures"][name]["mean"]) for e in result["tokens"] if e["sigma"] == 1)
            tree.plot(*zip(*points, strict=True), marker="o", ms=3, **style)
    node.set(xlabel="exponent s of the draft's law, rank^-s (σ = 1)", ylabel="acceptance")
    tree.set(xlabel="spread c of the draft's logits (σ = 1)", ylabel="tokens a step")
    for axes, title in zip((node, tree), TITLES.values(), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def write(result: dict[str, Any], folder: Path) -> None:
    """`verification.json`, `.md` and `.png` in `folder`."""
    (folder / "verification.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "verification.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "verification.png")
