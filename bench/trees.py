"""The best tree against the best chain, end to end: does a tree pay on this machine?

    python -m bench.trees --sizes 100m,300m --temperatures 0,1

For each target and sampling temperature (0: greedy) `tune()` chooses a tree and a chain by what the draft gets accepted
and what this machine takes for a step. Both, and the chain that is the default, then decode the same held-out prompts
in turn, one sample at a time; medians are compared with transformers' own loop. Compiling is not timed.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

import specdec
from bench.end_to_end import SIZES, words
from bench.report import heading, markdown_table, terminal_table
from specdec import zoo
from specdec.cli import measure
from specdec.engine.tree import TokenTree
from specdec.tune.best_tree import expected_tokens

HEADER = ("", "drafted nodes", "depth", "tokens/s", "vs transformers", "tokens/step", "expected")


def shapes(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: Tensor, settings: dict[str, Any]
) -> dict[str, Any]:
    """What is compared, by name, with the tokens a step that are expected of it.

    Raises:
        NotMeasured: these calls run transformers' own loop.
    """
    try:
        choice = specdec.compile(target, draft).specdec.tune(prompts, **settings)
    except ValueError as error:
        raise measure.NotMeasured(f"tune(): {error}") from None
    named = {"default chain": TokenTree.chain(5), "best chain": choice.chain, "best tree": choice.tree}
    expected = {name: expected_tokens(tree, choice.acceptance) for name, tree in named.items()}
    return {"trees": named, "expected": expected, "why": str(choice)}


def decode(model: PreTrainedModel, prompts: Tensor, settings: dict[str, Any]) -> Tensor:
    """[prompts, length] ids, decoded one after the other."""
    mask = torch.ones_like(prompts[:1])
    return torch.cat([model.generate(prompt, attention_mask=mask, **settings) for prompt in prompts.split(1)])


def compare(
    size: str, temperature: float, prompts: int, new_tokens: int, repeats: int, bar: Progress
) -> dict[str, Any]:
    """One target and temperature: a row a way.

    Raises:
        NotMeasured: a way of specdec's did not run as it claims.
    """
    target, draft, tokenizer = measure.load_pair(size)
    for model in (target, draft):
        model.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0}
    ids = zoo.held_out_prompts(tokenizer, 2 * prompts, 64)
    task = bar.add_task(f"{size}, temperature {temperature:g}: tuning", total=4 + 4 * repeats)
    found = shapes(target, draft, ids[prompts:], settings)  # not by the prompts that are decoded then
    models = {"transformers": target}
    texts: dict[str, Tensor] = {}
    models |= {name: specdec.compile(target, draft, tree=tree) for name, tree in found["trees"].items()}
    for name, model in models.items():
        bar.update(task, description=f"{size}, temperature {temperature:g}: warming up {name}", advance=1)
        texts[name] = decode(model, ids[:prompts], settings)
        if model is not target:
            model.specdec.stats.reset()
    bar.update(task, description=f"{size}, temperature {temperature:g}")
    runs = {name: partial(decode, model, ids[:prompts], settings) for name, model in models.items()}
    seconds = measure.compare(runs, repeats, lambda name: bar.advance(task))
    bar.remove_task(task)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, model in models.items():
        row = {
            "path": name, "seconds": seconds[name], "ratio": median["transformers"] / median[name],
            "tokens_per_second": prompts * new_tokens / median[name],
            "identical": None if temperature > 0 else torch.equal(texts[name], texts["transformers"]),
        }  # fmt: skip
        if model is not target:
            measure.check(name, model.specdec.stats)
            tree = found["trees"][name]
            row |= {
                "parents": tree.parents, "depth": tree.depth, "expected_tokens_per_step": found["expected"][name],
                "tokens_per_step": model.specdec.stats.tokens_per_step,
            }  # fmt: skip
        rows.append(row)
    return {"size": size, "temperature": temperature, "why": found["why"], "paths": rows}


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "100m,300m",
    temperatures: Annotated[str, Option(help="0 is greedy.")] = "0,0.6,1",
    prompts: Annotated[int, Option(min=1)] = 4,
    new_tokens: Annotated[int, Option(min=1)] = 128,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 3,
    out: Annotated[Path, Option(help="Folder of trees.json and .md.")] = Path("bench/results"),
) -> None:
    """Measure, print, and write tables and the raw seconds. Exits with 1 if a greedy text differs from transformers'
    own, or a part was left out because it did not run."""
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    settings = {"prompts": prompts, "new_tokens": new_tokens, "repeats": repeats}
    facts = measure.run_facts("bench.trees")
    result: dict[str, Any] = {**facts, "settings": settings, "faults": faults, "results": []}
    for size in words(sizes, SIZES):
        for temperature in map(float, temperatures.split(",")):
            where = f"{size}, temperature {temperature:g}"
            with faults.of(where):
                with measure.progress(console) as bar:
                    entry = compare(size, temperature, prompts, new_tokens, repeats, bar)
                result["results"].append(entry)
                cells = {_cells(row): row["identical"] is not False for row in entry["paths"]}
                console.print(terminal_table(_title(entry), HEADER, cells))
                console.print(f"[dim]{entry['why']}[/]", highlight=False)
                for row in entry["paths"]:
                    faults.same(f"{where}: {row['path']}", row["identical"] is not False)
            if result["results"]:
                (out / "trees.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                (out / "trees.md").write_text("\n".join(_markdown(result)) + "\n", encoding="utf-8")
    faults.exit()


def _title(entry: dict[str, Any]) -> str:
    law = f"temperature {entry['temperature']:g}" if entry["temperature"] else "greedy"
    return f"{entry['size']} target, {law}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    speed = f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}×"
    if "parents" not in row:
        return row["path"], "", "", *speed, "", ""
    tokens = f"{row['tokens_per_step']:.2f}", f"{row['expected_tokens_per_step']:.2f}"
    return row["path"], str(len(row["parents"]) - 1), str(row["depth"]), *speed, *tokens


def _markdown(result: dict[str, Any]) -> list[str]:
    lines = heading("Trees and chains, end to end", result)
    for entry in result["results"]:
        lines += markdown_table(_title(entry), HEADER, [_cells(row) for row in entry["paths"]])
        lines += ["", f"By `tune()`, from other prompts: {entry['why']}.", ""]
    return lines


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
