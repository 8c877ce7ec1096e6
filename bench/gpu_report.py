"""The result of `bench.gpu` as Markdown, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import backend_report, padding_report, report


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _kernels(result: dict[str, Any]) -> list[str]:
    roofs = result["roofs"]
    lines = [
        "", "## Kernels", "",
        f"Roofs measured in this run: copy {roofs['bytes_per_second'] / 1e9:.0f} GB/s, bfloat16 product "
        f"{roofs['flops_per_second'] / 1e12:.0f} TFLOP/s; an empty kernel takes {roofs['launch_seconds'] * 1e6:.1f} µs "
        "by the same clock. *floor*: the fewest bytes or operations, at these roofs. Medians of calls replayed from a "
        "CUDA graph, each after a buffer larger than the L2 cache was overwritten, which is not timed. "
        "In brackets: how many children a tree's nodes have, level by level; PyTorch works on dense laws of the whole "
        "vocabulary.", "",
        _row(["op", "shape", "µs", "floor µs", "of roof", "PyTorch µs", "PyTorch / op"]),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for case in result["cases"]:
        if "error" in case:
            lines.append(_row([case["error"].replace("|", "/").replace("\n", " "), *[""] * 6]))
            continue
        op, plain = case["seconds"]["op"], case["seconds"]["pytorch"]
        op_star, plain_star = ("*" if way in case["notes"] else "" for way in ("op", "pytorch"))
        lines.append(
            _row([
                case["op"], case["shape"], f"{op * 1e6:.1f}{op_star}", f"{case['floor_seconds'] * 1e6:.1f}",
                f"{case['of_roof']:.0%}", f"{plain * 1e6:.1f}{plain_star}", f"{plain / op:.2f}×",
            ])
        )  # fmt: skip
    lines += ["", *_notes("roofs", roofs)]
    for case in result["cases"]:
        if "error" not in case:
            lines += _notes(f"{case['op']} {case['shape']}", case)
    return [*lines, "", "![kernels](kernels.png)"]


def _notes(name: str, timed: dict[str, Any]) -> list[str]:
    """What could not be replayed from a graph, starred in the table."""
    return [f"- \\* {name}, {way}: {note}" for way, note in timed["notes"].items()]


def _decode(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    lines = [
        "", "## Decoding", "",
        f"Greedy, {settings['dtype']}, prompts of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new "
        f"tokens each; medians of {settings['repeats']} interleaved rounds. *text*: whether all tokens equal those of "
        "transformers; in half precision two correct ways may part at a near tie, and the share of tokens before that "
        "is given.",
    ]  # fmt: skip
    for entry in result["results"]:
        lines += ["", entry["error"]] if "error" in entry else report.section(entry)
    return lines


def _backend(result: dict[str, Any]) -> list[str]:
    lines = ["", "## torch.compile backend", "", backend_report.method(result["settings"])]
    for entry in result["results"]:
        lines += ["", entry["error"]] if "error" in entry else backend_report.section(entry)
    return lines


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "", "## Steps", "",
        "Averages a step, the prefill spread over them. *waits*: calls that block the host until the device is done.",
        "", _row(["", "batch", "ms", "device ms", "kernel launches", "graph launches", "copies", "waits"]),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        if "error" in row:
            lines.append(_row([row["error"].replace("|", "/").replace("\n", " "), *[""] * 7]))
            continue
        numbers = [row[k] for k in ("milliseconds", "device_milliseconds", "launches", "graphs", "copies", "waits")]
        lines.append(_row([row["path"], str(row["batch"]), *(f"{n:.2f}" for n in numbers)]))
    for row in rows:
        if "kernels" in row and row["batch"] == 1:
            lines += ["", f"Device time of a step, {row['path']}, batch 1:", ""]
            lines += [f"- {ms:.3f} ms `{name}`" for name, ms in row["kernels"]]
    return lines


def _tests(result: dict[str, Any]) -> list[str]:
    return ["", "## Tests", "", result["summary"], *(f"- {line}" for line in result["failed"])]


def _padding(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    lines = [
        "", "## Padding", "",
        f"Padded and ragged batches on traces of n-gram drafts, {settings['dtype']}, {settings['new_tokens']} new "
        "tokens a sample: the target's forwards alone, tokens/s over those of a vanilla batch.", "",
        _row(padding_report.RATIO_HEADER), "| --- |" + " ---: |" * (len(padding_report.RATIO_HEADER) - 1),
    ]  # fmt: skip
    for entry in result["results"]:
        lines.append(entry["error"] if "error" in entry else _row([*padding_report.ratio_cells(entry)]))
    return lines


_SECTIONS = {
    "tests": _tests, "kernels": _kernels, "decode": _decode, "steps": _steps, "backend": _backend, "padding": _padding,
}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Everything, with the command, the machine and the versions it came from."""
    lines = report.heading("On a GPU", result)[:-1]
    for name, section in _SECTIONS.items():
        if name in result:
            part = result[name]
            failed = isinstance(part, dict) and "error" in part
            lines += ["", f"## {name.capitalize()}", "", part["error"]] if failed else section(part)
    return "\n".join([*lines, ""])


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Share of the roof each op reaches, and PyTorch's share beside it."""
    from matplotlib.figure import Figure

    cases = [case for case in cases if "error" not in case][::-1]
    figure = Figure(figsize=(8, 1 + 0.26 * len(cases)), layout="constrained")
    axes = figure.subplots()
    places = range(len(cases))
    axes.barh(places, [100 * c["of_roof"] for c in cases], 0.72, color="#08519c", label="specdec")
    theirs = [100 * c["floor_seconds"] / c["seconds"]["pytorch"] for c in cases]
    axes.barh(places, theirs, 0.3, color="0.7", label="PyTorch")
    axes.set_yticks(places, [f"{c['op']}  {c['shape']}" for c in cases], fontsize=7)
    axes.set(xlabel="% of the roof measured in the same run", xlim=(0, 100), ylim=(-0.7, len(cases) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def write(result: dict[str, Any], folder: Path) -> None:
    """`gpu.json`, `gpu.md` and `kernels.png` in `folder`."""
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(result), encoding="utf-8")
    if "cases" in result.get("kernels", {}):
        plot(result["kernels"]["cases"], folder / "kernels.png")
