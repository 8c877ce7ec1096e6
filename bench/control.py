"""Does the controller keep speculation from costing more than it brings? Drafts from useless to perfect, batches small
and large.

    python -m bench.control --sizes 100m --batches 1,4,8,16

For each draft and batch size the target decodes the same held-out prompts undrafted, with drafts of fixed depths, and
with the controller; greedily, in float32, in turn, and medians are compared. Compiling is not timed. Drafts:

* useless: the bundled draft's configuration with random weights;
* noisy: the bundled draft with noise in its weights, of which about half as many tokens are accepted;
* bundled: the bundled draft;
* perfect: the bundled target, whose function every larger target computes;
* ngram: the text's own words, which cost next to nothing.
"""

from __future__ import annotations

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
from bench import control_report as report
from bench.end_to_end import SIZES, numbers, words
from specdec import zoo
from specdec.cli import measure

DRAFTS = ("useless", "noisy", "bundled", "perfect", "ngram")
MODEL_DEPTHS, NGRAM_DEPTHS = (1, 2, 3, 5), (2, 4, 8)
NOISE = 0.33
"""Of the noisy draft: standard deviation of what is added to a weight matrix, in the matrix's own."""


def draft_of(name: str, bundled: PreTrainedModel, bundled_target: PreTrainedModel) -> PreTrainedModel | str:
    """A draft of some quality; the same weights every time."""
    if name == "ngram":
        return name
    if name == "perfect":
        return bundled_target
    if name == "bundled":
        return bundled
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(bundled)(bundled.config).eval().requires_grad_(False)
        if name == "noisy":
            for own, given in zip(made.parameters(), bundled.parameters(), strict=True):
                own.copy_(given + NOISE * (given.std() * torch.randn_like(given) if given.dim() > 1 else 0))
    made.generation_config.eos_token_id = None
    return made


def ways_with(target: PreTrainedModel, draft: PreTrainedModel | str, compiled: bool) -> dict[str, measure.Path]:
    """Fixed depths and the controller, by name."""
    make = partial(specdec.compile, target, draft, compile=compiled)
    depths = NGRAM_DEPTHS if draft == "ngram" else MODEL_DEPTHS
    fixed = {f"depth {d}": measure.Path(f"depth {d}", make(depth=d, adapt=False)) for d in depths}
    return fixed | {"controller": measure.Path("controller", make())}


def compare(
    ways: dict[str, measure.Path],
    prompts: Tensor,
    new_tokens: int,
    repeats: int,
    expected: Tensor | None,
    bar: Progress,
) -> list[dict[str, Any]]:
    """One row a way.

    Args:
        prompts: [B, length], decoded at once. expected: [B, length + new_tokens], what every way must write, or None
            not to look.

    Raises:
        NotMeasured: a way did not run as it claims.
    """
    task = bar.add_task("", total=len(ways) * (1 + repeats))
    identical = {}
    for name, path in ways.items():
        bar.update(task, description=f"warming up {name}", refresh=True)
        path.model.specdec.warmup((len(prompts),), prompts.shape[1] + new_tokens)
        if expected is not None:
            identical[name] = torch.equal(path(prompts, new_tokens), expected)
        path.model.specdec.stats.reset()
        bar.advance(task)
    runs = {name: partial(path, prompts, new_tokens) for name, path in ways.items()}
    step = partial(bar.update, task, advance=1, refresh=True, description="measuring")
    seconds = measure.compare(runs, repeats, lambda name: step())
    bar.remove_task(task)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, path in ways.items():
        stats = path.model.specdec.stats
        measure.check(name, stats)
        rows.append({
            "path": name, "seconds": seconds[name], "identical": identical.get(name),
            "tokens_per_second": len(prompts) * new_tokens / median[name],
            "ratio": median["undrafted"] / median[name],
            "tokens_per_step": stats.tokens_per_step, "acceptance_by_position": stats.acceptance_by_position,
            "steps": stats.steps, "undrafted_steps": stats.undrafted,
            "allowed_a_step": stats.allowed / stats.sample_steps, "control": stats.control,
        })  # fmt: skip
    return rows


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "100m",
    drafts: Annotated[str, Option(help=f"Of {', '.join(DRAFTS)}.")] = ",".join(DRAFTS),
    batches: Annotated[str, Option(help="Samples decoded at once.")] = "1,4,8,16",
    prompt_tokens: Annotated[int, Option(min=1)] = 64,
    new_tokens: Annotated[int, Option(min=1)] = 64,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 3,
    compile: Annotated[bool, Option(help="Without it everything runs eagerly.")] = True,
    out: Annotated[Path, Option(help="Folder of control.json, .md and .png.")] = Path("bench/results"),
) -> None:
    """Measure, print, and write tables, a plot and the raw seconds. Exits with 1 if a text differs from transformers'
    own, looked at in the first batch size, or a part was left out because it did not run."""
    chosen, names, batch_sizes = words(sizes, SIZES), words(drafts, DRAFTS), numbers(batches)
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    settings = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "dtype": "float32",
        "greedy": True, "compiled": compile,
    }  # fmt: skip
    facts = measure.run_facts("bench.control")
    result: dict[str, Any] = {**facts, "settings": settings, "faults": faults, "results": []}
    small, *_ = zoo.load_pair()
    for size in chosen:
        target, draft, tokenizer = measure.load_pair(size)
        for model in (target, draft, small):
            model.generation_config.eos_token_id = None
        prompts = zoo.held_out_prompts(tokenizer, max(batch_sizes), prompt_tokens)
        expected = measure.Path("transformers", target)(prompts[: batch_sizes[0]], new_tokens)
        undrafted = {"undrafted": measure.Path("undrafted", specdec.compile(target, draft=None, compile=compile))}
        for name in names:
            ways = undrafted | ways_with(target, draft_of(name, draft, small), compile)
            for batch in batch_sizes:
                where = f"{size}, {name} draft, batch {batch}"
                with faults.of(where):
                    with measure.progress(console) as bar:
                        wanted = expected if batch == batch_sizes[0] else None
                        rows = compare(ways, prompts[:batch], new_tokens, repeats, wanted, bar)
                    result["results"].append({"size": size, "draft": name, "batch": batch, "paths": rows})
                    console.print(report.table(result["results"][-1]))
                    for row in rows:
                        faults.same(f"{where}: {row['path']}", row["identical"] is not False)
                if result["results"]:
                    report.write(result, out)  # after each part: a long run that is stopped leaves what it has
    if result["results"]:
        console.print(f"[dim]written to {out}/control.md, .json and .png[/]", highlight=False)
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
