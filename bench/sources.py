"""Two sources in one draft: a model and n-grams together, beside each alone and beside no draft.

    python -m bench.sources --sizes bundled,25m --batches 1,4,8

On prompts of new text, and on prompts that end with the beginning of a text that they hold: to edit a file is mostly to
copy it. Greedy, float32, the same number of tokens everywhere; the ways take turns, and medians are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer import Option

from bench import report
from bench.end_to_end import SIZES, measure_all, numbers, words
from specdec import zoo
from specdec.cli import measure

WAYS = "specdec_plain", "specdec_ngram", "specdec", "specdec_both"
KINDS = "new", "copying"
HEADER = ("", "tokens/s", "vs no draft", "vs the better source", "tokens/step", "text")


def prompts_of(kind: str, tokenizer: PreTrainedTokenizerFast, n: int) -> Tensor:
    """[n, length] ids of held-out text; copying ones repeat their first 24 tokens at the end."""
    texts = zoo.held_out_prompts(tokenizer, n, 64 if kind == "new" else 160)
    return texts if kind == "new" else torch.cat([texts, texts[:, :24]], 1)


def rows(entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of one table."""
    speeds = {row["path"]: row["tokens_per_second"] for row in entry["paths"]}
    plain, better = speeds["specdec_plain"], max(speeds["specdec_ngram"], speeds["specdec"])
    lines = []
    for row in entry["paths"]:
        if row["path"] in WAYS:
            speed = row["tokens_per_second"]
            beside = f"{speed / better:.2f}×" if row["path"] == "specdec_both" else ""
            per_step, text = f"{row['tokens_per_step']:.2f}", report.same_text(row)
            lines.append((row["label"], f"{speed:.1f}", f"{speed / plain:.2f}×", beside, per_step, text))
    return lines


def title(entry: dict[str, Any]) -> str:
    """What one table is about."""
    return f"{report.title(entry)}, {entry['kind']} text"


def write(result: dict[str, Any], folder: Path) -> None:
    """`sources.json` and `sources.md` in `folder`."""
    (folder / "sources.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    settings = result["settings"]
    lines = [
        *report.heading("A model and n-grams together", result),
        f"Greedy, float32, {settings['prompts']} held-out prompts, {settings['new_tokens']} new tokens each. New text: "
        "prompts of 64 tokens. Copying: 160 tokens of a file, and its first 24 again. Medians of "
        f"{settings['repeats']} interleaved rounds. *text*: whether it is that of transformers' `generate()`.",
    ]
    for entry in result["results"]:
        lines += report.markdown_table(title(entry), HEADER, rows(entry))
    (folder / "sources.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "bundled,25m",
    batches: Annotated[str, Option(help="Samples decoded at once.")] = "1,4,8",
    prompts: Annotated[int, Option(help="Prompts of each batch size, decoded batch by batch.", min=1)] = 8,
    new_tokens: Annotated[int, Option(min=1)] = 128,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 5,
    compile: Annotated[bool, Option(help="Without it specdec runs eagerly.")] = True,
    out: Annotated[Path, Option(help="Folder of sources.json and .md.")] = Path("bench/results"),
) -> None:
    """Measure, print and write tables. Exits with 1 if a text differs, or a part was left out."""
    chosen, batch_sizes = words(sizes, SIZES), numbers(batches)
    if any(prompts % n for n in batch_sizes):
        raise typer.BadParameter(f"--batches {batches}: numbers that divide --prompts {prompts}")
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    settings = {"prompts": prompts, "new_tokens": new_tokens, "repeats": repeats, "compiled": compile}
    result: dict[str, Any] = {
        **measure.run_facts("bench.sources"), "settings": settings, "faults": faults, "results": []
    }  # fmt: skip
    for size in chosen:
        target, draft, tokenizer = measure.load_pair(size)
        paths = measure.all_paths(target, draft, compiled=compile)
        for kind in KINDS:
            for batch in batch_sizes:
                pieces = list(prompts_of(kind, tokenizer, prompts).split(batch))
                entry = {
                    "size": size, "kind": kind, "batch": batch,
                    "parameters": sum(p.numel() for p in target.parameters()),
                }  # fmt: skip
                with faults.of(f"{size}, {kind}, batch {batch}"), measure.progress(console) as bar:
                    entry["paths"] = measure_all(
                        {name: paths[name] for name in ("transformers", *WAYS)}, pieces, new_tokens, repeats, bar
                    )
                    result["results"].append(entry)
                    console.print(
                        report.terminal_table(title(entry), HEADER, {row: "identical" in row for row in rows(entry)})
                    )
                    for row in entry["paths"]:
                        faults.same(f"{title(entry)}: {row['label']}", row["identical"])
                    write(result, out)  # after each part: a long run that is stopped leaves what it has
        del target, draft, paths
    faults.exit()


if __name__ == "__main__":
    typer.run(main)
