"""The result of `bench.gpu` as Markdown, JSON and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import report

OUT_OF_TIME = "not run, out of time"
Row = dict[str, Any]


def is_done(row: Row) -> bool:
    """Whether it holds figures, not why there are none."""
    return not {"missing", "error"} & row.keys()


def _table(rows: Sequence[Row], header: Sequence[str], cells: Callable[[Row], Sequence[str]]) -> list[str]:
    """A row's name and its cells; in place of the cells, what kept them from being there."""
    lines = [_line(["", *header]), "| --- |" + " ---: |" * len(header)]
    for row in rows:
        if is_done(row):
            found = cells(row)
        else:
            why = row.get("missing") or f"**failed**: {row['error']}"
            found = [why.replace("|", "/"), *[""] * (len(header) - 1)]
        lines.append(_line([row["name"].replace("|", "/"), *found]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _correctness(rows: Sequence[Row], settings: Row) -> list[str]:
    return ["The bundled pair in float32.", "", *_table(rows, ["result"], lambda row: ["holds"])]


def _roofs(rows: Sequence[Row], settings: Row) -> list[str]:
    def cells(row: Row) -> list[str]:
        copied, multiplied = row["bytes_per_second"] / 1e9, row["flops_per_second"] / 1e12
        return [f"{copied:.0f}", f"{multiplied:.0f}", f"{row['launch_seconds'] * 1e6:.1f}"]

    header = ["copy, GB/s read and written", f"product, {settings['dtype']}, TFLOP/s", "empty kernel, µs"]
    return [*_table(rows, header, cells), *_notes(rows)]


def _decode(rows: Sequence[Row], settings: Row) -> list[str]:
    def cells(row: Row) -> list[str]:
        return [
            f"{row['milliseconds']:.2f}", f"{row['tokens_per_step']:.2f}", f"{row['tokens_per_second']:.1f}",
            f"{row['of_copy_roof']:.0%}", report.same_text(row),
            "" if row["margin"] is None else f"{row['margin']:.3f}", f"{1e3 * row['prefill_seconds']:.1f}",
            f"{row['decode_seconds']:.2f}", str(len(row["seconds_all"])), f"{row['first_call_seconds']:.1f}",
        ]  # fmt: skip

    header = [
        "ms a step", "tokens a step", "tokens/s", "of copy roof", "text", "margin", "prefill ms", "decode s", "rounds",
        "first call s",
    ]  # fmt: skip
    return [
        f"Greedy, {settings['size']} in {settings['dtype']}, prompts of {settings['prompt_tokens']} tokens, "
        f"{settings['new_tokens']} new tokens; medians of rounds in which nothing compiled: the first follows a way's "
        "warm-up, the others are interleaved. A call of one new token is timed beside each, and what it takes is not "
        "decoding. *of copy roof*: the bytes of the weights that a step reads, at the bandwidth of the copy, over the "
        "step's time. *text*: whether all tokens are those that transformers writes, or the share before the first "
        "that differs; *margin*: how far apart the target's logits of the two tokens are there.",
        "", *_table(rows, header, cells),
    ]  # fmt: skip


def _profile(rows: Sequence[Row], settings: Row) -> list[str]:
    numbers = ("kernels", "graphs", "launches", "copies", "waits", "milliseconds", "device_milliseconds")

    def cells(row: Row) -> list[str]:
        return [f"{row[name]:.2f}" for name in numbers]

    header = ["kernels", "graph launches", "kernel launches", "copies", "waits", "ms", "device ms"]
    lines = [
        "Averages a step, the prefill spread over them. *waits*: calls that block the host until the device is done.",
        "", *_table(rows, header, cells),
    ]  # fmt: skip
    for row in rows:
        if "top" in row:
            lines += ["", f"Device time of a step, {row['name']}:", ""]
            lines += [f"- {milliseconds:.3f} ms `{name}`" for name, milliseconds in row["top"]]
    return lines


def _products(rows: Sequence[Row], settings: Row) -> list[str]:
    def cells(row: Row) -> list[str]:
        op, plain = (row["seconds"].get(way) for way in ("op", "pytorch"))
        star = {way: "*" * (way in row["notes"]) for way in ("op", "pytorch")}
        return [
            f"{row['floor_seconds'] * 1e6:.1f}",
            *(("", "") if op is None else (f"{op * 1e6:.1f}{star['op']}", f"{row['floor_seconds'] / op:.0%}")),
            f"{plain * 1e6:.1f}{star['pytorch']}", f"{row['floor_seconds'] / plain:.0%}",
            "" if op is None else f"{plain / op:.2f}×",
        ]  # fmt: skip

    header = ["floor µs", "op µs", "of roof", "PyTorch µs", "of roof", "PyTorch / op"]
    return [
        "*floor*: the fewest bytes or operations, at the roofs of this run. PyTorch's products are not joined. On a "
        "GPU, medians of calls replayed from a CUDA graph, each after a buffer larger than the L2 cache was "
        "overwritten, which is not timed. In brackets: how many children a tree's nodes have, level by level; PyTorch "
        "works on dense laws of the whole vocabulary.",
        "", *_table(rows, header, cells), *_notes(rows), "", "![products](products.png)",
    ]  # fmt: skip


def _notes(rows: Sequence[Row]) -> list[str]:
    """What could not be replayed from a graph, starred in the table."""
    lines = [f"- \\* {row['name']}, {way}: {note}" for row in rows for way, note in row.get("notes", {}).items()]
    return ["", *lines] if lines else []


_SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row], Row], list[str]]]] = {
    "correctness": ("Correctness", _correctness),
    "roofs": ("Roofs", _roofs),
    "decode": ("Decoding", _decode),
    "profile": ("Steps, profiled", _profile),
    "products": ("Products, attention, laws", _products),
    "batches": ("Batches", _decode),
    "draft_1b": ("A larger draft", _decode),
}


def markdown(result: Row) -> str:
    """Everything so far, with the command, the machine and the versions it came from."""
    lines = report.heading("On a GPU", result)[:-1]
    for name, (title, section) in _SECTIONS.items():
        if name in result["sections"]:
            seconds = f", {result['seconds'][name]:.0f} s" if name in result["seconds"] else ""
            lines += ["", f"## {title}{seconds}", "", *section(result["sections"][name], result["settings"])]
    return "\n".join([*lines, ""])


def write(result: Row, folder: Path) -> None:
    """`gpu.json` and `gpu.md` in `folder`: whole ones, whenever a run is stopped."""
    for name, text in ("gpu.json", json.dumps(result, indent=1) + "\n"), ("gpu.md", markdown(result)):
        new = folder / f".{name}"
        new.write_text(text, encoding="utf-8")
        os.replace(new, folder / name)


def plot(result: Row, folder: Path) -> None:
    """`products.png`, the share of the roof each op reaches; `decode.png`, tokens a second and sample of each way."""
    sections = {name: [row for row in rows if is_done(row)][::-1] for name, rows in result["sections"].items()}
    if rows := sections.get("products"):
        shares = {
            way: [100 * r["floor_seconds"] / r["seconds"][way] if way in r["seconds"] else 0 for r in rows]
            for way in ("op", "pytorch")
        }
        _bars([r["name"] for r in rows], shares, "% of the roof measured in the same run", folder / "products.png")
    if rows := [row for name in ("draft_1b", "batches", "decode") for row in sections.get(name, [])]:
        speeds = {"": [r["tokens_per_second"] / r["batch"] for r in rows]}
        _bars([r["name"] for r in rows], speeds, "tokens a second and sample", folder / "decode.png")


def _bars(names: Sequence[str], values: dict[str, list[float]], label: str, path: Path) -> None:
    """Bars side by side, one under the other; of several kinds the second is thinner, in front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    looks = ({"height": 0.72, "color": "#08519c"}, {"height": 0.3, "color": "0.7"})
    for (kind, widths), look in zip(values.items(), looks, strict=False):
        axes.barh(range(len(names)), widths, label=kind, **look)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel=label, ylim=(-0.7, len(names) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) > 1:
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130, format="png")
