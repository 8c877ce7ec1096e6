"""Many prompts: one by one, in padded batches, and in rows that are filled again as texts end.

    python -m bench.many --sizes bundled,100m --prompts 48 --batch 8

Held-out prompts of 16 to 96 tokens, greedy, float32, the same number of new tokens everywhere. All ways decode the same
prompts in turn, and medians are compared. Compiling is not timed, but the seconds it takes are stated. Then, in a
process of its own, the memory that generate_many() takes (`bench.many_memory`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
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
from bench import many_report as report
from bench.end_to_end import SIZES, words
from specdec import zoo
from specdec.cli import measure

SHORTEST, LONGEST = 16, 96
DRAFTS = {"specdec_plain": "no draft", "specdec_ngram": "n-grams", "specdec": "draft model"}

Way = Callable[[Sequence[Tensor], int], list[list[int]]]
"""From prompts, [length] int64 each, and a number of new tokens to the whole texts."""


def one_by_one(model: PreTrainedModel, prompts: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
    return in_batches(model, 1, prompts, new_tokens)


def in_batches(model: PreTrainedModel, size: int, prompts: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
    """Batches in the order of the prompts, padded on the left."""
    texts = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        width = max(map(len, batch))
        ids = torch.stack([torch.cat([text.new_zeros(width - len(text)), text]) for text in batch])
        mask = torch.stack([torch.arange(width) >= width - len(text) for text in batch]).long()
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        texts += [row[width - len(text) :] for row, text in zip(out.tolist(), batch, strict=True)]
    return texts


def many(model: PreTrainedModel, size: int, prompts: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
    settings = {"max_batch_size": size, "max_new_tokens": new_tokens, "do_sample": False, "progress": False}
    texts = []
    for result in specdec.generate_many(model, prompts, **settings):
        if result.error is not None:
            raise result.error
        texts.append(result.tokens.tolist())
    return texts


def all_ways(models: dict[str, measure.Path], batch: int) -> dict[str, tuple[str, PreTrainedModel, Way]]:
    """By name: a label, the model, and the way."""
    target, drafted = models["transformers"].model, models["specdec"].model
    ways: dict[str, tuple[str, PreTrainedModel, Way]] = {
        "loop": ("transformers, one by one", target, partial(one_by_one, target)),
        "batches": ("transformers, padded batches", target, partial(in_batches, target, batch)),
        "specdec_loop": ("specdec, draft model, one by one", drafted, partial(one_by_one, drafted)),
        "specdec_batches": ("specdec, draft model, padded batches", drafted, partial(in_batches, drafted, batch)),
    }
    for name, draft in DRAFTS.items():
        ways[f"many_{name}"] = f"generate_many, {draft}", models[name].model, partial(many, models[name].model, batch)
    return ways


def measure_all(
    ways: dict[str, tuple[str, PreTrainedModel, Way]], prompts: Sequence[Tensor], new_tokens: int, batch: int,
    repeats: int, bar: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a way: seconds, speed, ratio, how many texts are transformers' own, and what specdec counted.

    Raises:
        NotMeasured: a way of specdec's did not run as it claims.
    """
    task = bar.add_task("", total=len(ways) * (repeats + 1))
    texts: dict[str, list[list[int]]] = {}
    warmed: dict[PreTrainedModel, float] = {}
    counted: dict[str, float] = {}

    def run(name: str) -> None:
        _, model, way = ways[name]
        if hasattr(model, "specdec"):
            model.specdec.stats.reset()
        texts[name] = way(prompts, new_tokens)
        if hasattr(model, "specdec"):
            measure.check(name, model.specdec.stats)
            counted[name] = model.specdec.stats.tokens_per_step

    for label, model, way in ways.values():
        bar.update(task, description=f"warming up {label}", refresh=True)
        start = time.perf_counter()
        if hasattr(model, "specdec") and model not in warmed:
            model.specdec.warmup(batch_sizes=[1, batch], max_length=LONGEST + new_tokens)
            warmed[model] = time.perf_counter() - start
        way(prompts[: 2 * batch], new_tokens)
        bar.update(task, advance=1, refresh=True)
    step = partial(bar.update, task, advance=1, refresh=True, description="measuring")
    seconds = measure.compare({name: partial(run, name) for name in ways}, repeats, lambda name: step())
    bar.remove_task(task)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "way": name, "label": label, "seconds": seconds[name],
            "tokens_per_second": len(prompts) * new_tokens / median[name],
            "ratio": median["loop"] / median[name],
            "ratio_to_batches": median["batches"] / median[name],
            "identical": sum(a == b for a, b in zip(texts[name], texts["loop"], strict=True)),
            "tokens_per_step": counted.get(name), "warm_up_seconds": warmed.get(model),
        }
        for name, (label, model, _) in ways.items()
    ]  # fmt: skip


def measure_memory(size: str, rows: int, compiled: bool) -> dict[str, Any]:
    """What `bench.many_memory` prints."""
    command = ["-m", "bench.many_memory", "--size", size, "--rows", str(rows)] + ["--no-compile"] * (not compiled)
    return {"size": size, **json.loads(measure.ask_child(command))}


def ragged_prompts(tokenizer: Any, n: int) -> list[Tensor]:
    """The beginnings of held-out texts, [SHORTEST..LONGEST] int64 each; always the same ones."""
    ids = zoo.held_out_prompts(tokenizer, n, LONGEST)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=torch.Generator().manual_seed(0))
    return [text[:length] for text, length in zip(ids, lengths.tolist(), strict=True)]


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "bundled,100m",
    prompts: Annotated[int, Option(min=1)] = 48,
    batch: Annotated[int, Option(help="Texts decoded at once.", min=1)] = 8,
    new_tokens: Annotated[int, Option(min=1)] = 64,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 3,
    memory_sizes: Annotated[str, Option(help="Whose memory is measured; none if empty.")] = "100m",
    compile: Annotated[bool, Option(help="Without it specdec runs eagerly.")] = True,
    out: Annotated[Path, Option(help="Folder of many.json and many.md.")] = Path("bench/results"),
) -> None:
    """Measure, print, and write a table and the raw seconds. Exits with 1 if a text of specdec's differs from
    transformers' own, or a part was left out because it did not run."""
    chosen, weighed = words(sizes, SIZES), words(memory_sizes, SIZES) if memory_sizes else []
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    result: dict[str, Any] = {
        **measure.run_facts("bench.many"),
        "settings": {
            "prompts": prompts, "prompt_tokens": [SHORTEST, LONGEST], "batch": batch, "new_tokens": new_tokens,
            "repeats": repeats, "dtype": "float32", "greedy": True, "compiled": compile,
        },
        "faults": faults,
        "results": [],
        "memory": [],
    }  # fmt: skip
    for size in weighed:
        with faults.of(f"memory, {size}"):
            result["memory"].append(measure_memory(size, batch, compile))
    for size in chosen:
        target, draft, tokenizer = measure.load_pair(size)
        ways = all_ways(measure.all_paths(target, draft, compiled=compile), batch)
        with faults.of(size):
            with measure.progress(console) as bar:
                rows = measure_all(ways, ragged_prompts(tokenizer, prompts), new_tokens, batch, repeats, bar)
            entry = {"size": size, "parameters": sum(p.numel() for p in target.parameters()), "batch": batch}
            result["results"].append(entry | {"ways": rows})
            console.print(report.table(result["results"][-1], prompts))
            for row in rows:
                if hasattr(ways[row["way"]][1], "specdec"):
                    faults.same(f"{size}: {row['label']}", row["identical"] == prompts)
        report.write(result, out)  # after each size: a long run that is stopped leaves what it has
        del target, draft, ways  # the next size needs the memory
    console.print(f"[dim]written to {out}/many.md and .json[/]", highlight=False)
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
