"""The result of `bench.stopping` as a terminal table, Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.stopping_rules import FIXED

HEADER = ("", "tokens/s", "gain", "90% interval", "tokens/step", "verified/step", "depth", "threshold")
MODELS = {False: "(a) stopping saves rows", True: "(b) stopping saves rows and levels"}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One rule's line of the table."""
    gain, low, high = (f"{round(x, 3) + 0.0:+.1%}" for x in (row["gain"], *row["interval"]))
    compared = ("", "") if row["rule"] == FIXED else (gain, f"{low} to {high}")
    return (
        row["rule"], f"{row['tokens_per_second']:.1f}", *compared,
        f"{row['tokens_per_step']:.2f}", f"{row['verified']:.2f}", ", ".join(map(str, row["depths"])),
        ", ".join("none" if at == float("inf") else f"{at:.2g}" for at in row["thresholds"]),
    )  # fmt: skip


def title(entry: dict[str, Any]) -> str:
    """What one table is about."""
    return f"{entry['size']} target, temperature {entry['temperature']}, {MODELS[entry['saves_levels']]}"


def table(entry: dict[str, Any]) -> Table:
    """One target, temperature and model of costs, for a terminal."""
    return report.terminal_table(title(entry), HEADER, dict.fromkeys(map(cells, entry["rules"]), True))


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    settings = result["settings"]
    lines = [
        *report.heading("Stopping drafts early", result),
        f"{settings['prompts']} held-out prompts of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new "
        f"tokens each, float32, batch size 1, the bundled pair's drafts of {settings['depth']} levels. Tokens a second "
        "are computed, not measured: from what each recorded step would bring, and the seconds of forwards (compiled, "
        f"the lower quartile of {settings['repeats']} interleaved rounds, and less where a longer forward took less); "
        "what the host does between them is left out. A rule "
        "stops after the first level whose signal is too low; that level is verified, too. *oracle* knows beforehand "
        "how much will be accepted. *decision model*: a network of 11, 44 and 1 units, of the entropy and the ten "
        "largest probabilities. Depths and thresholds are fitted on one half of the prompts and reported on the other, "
        "and the other way round: two of each. *gain*: over the best fixed depth; the interval is of drawing the "
        "prompts anew.",
        "",
        "(a): all levels are drafted in one compiled function, and stopping saves rows of the target's forward; (b): "
        "levels that are not verified are not drafted either. In both, how many rows are verified is taken to be "
        "chosen after the draft, at no cost: that the host would decide it late is not modelled, and specdec sets the "
        "rows of a forward before it drafts. So both are upper bounds.",
    ]
    for entry in result["results"]:
        lines += report.markdown_table(title(entry), HEADER, list(map(cells, entry["rules"])))
    for size in dict.fromkeys(entry["size"] for entry in result["results"]):
        entry = next(entry for entry in result["results"] if entry["size"] == size)
        target, draft = ([f"{1e3 * s:.2f}" for s in entry[f"{name}_seconds"]] for name in ("target", "draft"))
        header = ("", *map(str, range(1, len(target) + 1)))
        rows = [("target, by rows", *target), ("draft, by depth", *draft[1:], "")]
        lines += report.markdown_table(f"ms of forwards, {size} target", header, rows)
        lines += ["", f"The machine's load after that: {entry['load']:.1f}."]
    return "\n".join([*lines, ""])


def write(result: dict[str, Any], folder: Path) -> None:
    """`stopping.json` and `.md` in `folder`."""
    (folder / "stopping.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "stopping.md").write_text(markdown(result), encoding="utf-8")
