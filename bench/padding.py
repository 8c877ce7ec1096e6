"""Padded and ragged batches, on one recorded trace: what not padding the cache, the forwards, or both is worth.

    python -m bench.padding --sizes 25m,100m --batches 2,4,8,16
    python -m bench.padding --sizes 8b --device cuda --dtype bfloat16

First the padding of simulated batches (`bench.padding_simulator`). Then vanilla batches of held-out prompts are decoded
by transformers with n-gram drafts (`bench.padded`), on the bundled target; targets that compute the same function
would leave the same traces. A trace is replayed in every cell of the comparison by the same compiled forward and the
same attention: only how many rows a sample feeds and by how many slots its cache grows differ. Decisions come from the
trace, so it does not matter what the slots hold: prompts are not written, and padding is read like text. Cells take
turns, and a ratio is the median of the rounds' ratios: what else the machine does falls on both of its sides. Drafting,
the prompts' forward and compiling are in no cell.

Source: EMS-SD, arXiv 2405.07542, which has these cells.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

from bench import padded
from bench import padding_report as report
from bench.end_to_end import SIZES, numbers, words
from bench.padding_simulator import SIMULATED, Trace, asymptote, draw, limit
from specdec import zoo
from specdec.cli import measure
from specdec.engine.packing import Nodes
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.view import ModelView

SIMULATED_TOKENS = 128
BATCHES = 1, 2, 4, 8, 16, 24


class Cell(NamedTuple):
    """What is padded to the batch's most, and whether finished samples leave the batch."""

    pads_cache: bool
    pads_rows: bool
    drops: bool = True

    def plan(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Rows fed and slots taken by each sample in each step, [S, B] int64 each."""
        return trace.rows(self.pads_rows, self.drops), trace.slots(self.pads_cache, self.drops)


CELLS = {
    "vanilla, finished kept": Cell(True, True, False),
    "KV only, finished kept": Cell(False, True, False),
    "vanilla": Cell(True, True),
    "KV only": Cell(False, True),
    "inputs only": Cell(True, False),
    "both": Cell(False, False),
}
"""By the paper's names, which say what is not padded. Ragged inputs drop the finished by themselves."""


class Replay:
    """One forward a step, of as many flat tokens as the step is told.

    Args:
        view: whose cache holds the samples. n_rows: the most tokens of one sample in a step.
    """

    def __init__(self, view: ModelView, n_rows: int, compiled: bool) -> None:
        self.view, self.n_rows = view, n_rows
        self.bits, self.depths = TokenTree.chain(n_rows - 1).tensors(view.device)
        self.stats = Stats()
        self.steps = CompiledSteps(compiled, self.stats.eager)
        self.tokens: dict[int, Tensor] = {}

    def step(self, lengths: Tensor, counts: Tensor, slots: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The best token after each of T, [T], and the lengths after the step, [B]; all int64.

        Args:
            lengths, counts, slots: [B] int64, slots taken before, rows fed, and slots taken by the step. token: [T]
                int64, 0, 1, ..., the tokens' ids too: which they are makes no difference.
        """
        n_slots = self.view.cache.n_slots
        nodes = Nodes.packed(lengths, counts, token, self.n_rows, n_slots, self.bits, self.depths)
        return self.view.forward(token, nodes).logits.argmax(-1), lengths + slots

    def token(self, n: int) -> Tensor:
        """[n] int64: 0, 1, ...; compiled functions take them for any number from 2 on."""
        n = max(n, 2)  # one would be compiled on its own: the second is nobody's
        if n not in self.tokens:
            self.tokens[n] = torch.arange(n, device=self.view.device)
            torch._dynamo.maybe_mark_dynamic(self.tokens[n], 0)
        return self.tokens[n]

    @torch.no_grad()
    def __call__(self, plans: Sequence[tuple[Tensor, Tensor]], prompt_tokens: int) -> list[Tensor]:
        """Run all steps of some traces, one after the other; the lengths [B] after each."""
        lasts = []
        for rows, slots in plans:
            lengths = torch.full_like(rows[0], prompt_tokens, device=self.view.device)
            sizes = rows.sum(1).tolist()
            rows, slots = (x.to(self.view.device).contiguous() for x in (rows, slots))  # strides are compiled in
            for size, counts, taken in zip(sizes, rows, slots, strict=True):
                run = self.steps.get(self.step, None, size)
                _, lengths = run(lengths, counts, taken, self.token(size))
            lasts.append(lengths)
        return lasts


def padding_cells(
    target: PreTrainedModel,
    traces: Sequence[Trace],
    prompt_tokens: int,
    repeats: int,
    compiled: bool = True,
    after_each: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """One row a cell, and one of the undrafted batch: seconds, tokens/s, rows, slots.

    Args:
        target: a model on any device, of any dtype that a step takes. traces: of batches [S, B] of one size.
        prompt_tokens: slots that are taken before the first step. repeats: timed rounds, after one that compiles.
        after_each: as in `measure.compare`; rounds are `repeats + 1`.

    Raises:
        NotMeasured: there is no ragged forward of the target, or it ran eagerly though it was to be compiled.
    """
    plans = {name: [cell.plan(trace) for trace in traces] for name, cell in CELLS.items()}
    plans["undrafted"] = [CELLS["both"].plan(trace.undrafted()) for trace in traces]
    n_rows = max(int(rows.max()) for rows, _ in plans["vanilla"])
    longest = max(int(slots.sum(0).max()) for plan in plans.values() for _, slots in plan)
    try:
        view = ModelView(target)
    except Unsupported as why:
        raise measure.NotMeasured(f"the target has no ragged forward: {why}") from None
    view.allocate(traces[0].fed.shape[1], prompt_tokens + longest + n_rows + 1)  # the last slot is scratch
    replay = Replay(view, n_rows, compiled)
    runs = {name: partial(replay, plan, prompt_tokens) for name, plan in plans.items()}
    measure.compare(runs, 1, after_each)
    with torch.compiler.set_stance("fail_on_recompile"):  # nothing that is timed compiles
        seconds = measure.compare(runs, repeats, after_each)
    measure.check("the forward", replay.stats)
    n_tokens = sum(int(trace.added.sum()) for trace in traces)
    return [
        {
            "cell": name, "seconds": seconds[name], "tokens_per_second": n_tokens / statistics.median(seconds[name]),
            "steps": sum(len(fed) for fed, _ in plan),
            "rows": sum(int(fed.sum()) for fed, _ in plan), "slots": sum(int(slots.sum()) for _, slots in plan),
        }
        for name, plan in plans.items()
    ]  # fmt: skip


def timed(
    label: str, target: PreTrainedModel, runs: Sequence[padded.Decoded], settings: dict[str, Any], console: Console
) -> list[dict[str, Any]]:
    """The cells of some vanilla batches, with a progress bar."""
    with measure.progress(console) as bar:
        task = bar.add_task(label, total=(len(CELLS) + 1) * (settings["repeats"] + 1))
        return padding_cells(
            target, [run.trace for run in runs], settings["prompt_tokens"], settings["repeats"], settings["compiled"],
            lambda name: bar.update(task, advance=1, refresh=True),
        )  # fmt: skip


def record(target: PreTrainedModel, prompts: Tensor, n_batch: int, new_tokens: int) -> list[padded.Decoded]:
    """Vanilla batches of prompts [n, length], as many as there are."""
    return [padded.decode(target, batch.tolist(), new_tokens) for batch in prompts.split(n_batch)]


def execution(n_batch: int, runs: Sequence[padded.Decoded]) -> dict[str, Any]:
    """Slots of the vanilla batches that were run, beside those of the simulator on their traces; means a sample."""
    counted = {
        "executed": torch.cat([run.columns for run in runs]),
        "simulated": torch.cat([run.trace.slots(True).sum(0) for run in runs]),
        "ragged": torch.cat([run.trace.added.sum(0) for run in runs]),
    }
    return {"batch": n_batch, **{name: slots.double().mean().item() for name, slots in counted.items()}}


def simulate(n_runs: int) -> list[dict[str, Any]]:
    """Padding ratios with their standard errors, slots a sample, and closed forms, by depth, acceptance and batch."""
    entries = []
    for (depth, acceptance), expected in SIMULATED.items():
        for n_batch in BATCHES:
            noise = torch.Generator().manual_seed(n_batch)
            trace = draw(depth, acceptance, n_batch, SIMULATED_TOKENS, n_runs, noise)
            ratio = trace.padding_ratio()
            kept = trace.slots(True, drop_finished=False).sum(-2).double().mean().item()
            entries.append({
                "depth": depth, "acceptance": acceptance, "batch": n_batch, "expected": expected.get(n_batch),
                "ratio": ratio.mean().item(), "standard_error": (ratio.std() / n_runs**0.5).item(),
                "asymptote": asymptote(depth, acceptance, n_batch), "limit": limit(depth, acceptance),
                "slots_until_finished": SIMULATED_TOKENS * (1 + ratio.mean().item()), "slots": kept,
            })  # fmt: skip
    return entries


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "25m,100m",
    batches: Annotated[str, Option(help="Samples decoded at once, from 2 on.")] = "2,4,8,16",
    prompts: Annotated[int, Option(help="Prompts of each batch size, decoded batch by batch.", min=2)] = 16,
    prompt_tokens: Annotated[int, Option(min=1)] = 64,
    new_tokens: Annotated[int, Option(min=2)] = 128,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 3,
    device: Annotated[str, Option(help="Where the cells run; traces are recorded on the CPU.")] = "cpu",
    dtype: Annotated[str, Option(help="Of the cells' weights.")] = "float32",
    compile: Annotated[bool, Option(help="Without it the forwards run eagerly.")] = True,
    runs: Annotated[int, Option(help="Simulated batches of each kind.", min=2)] = 1000,
    out: Annotated[Path, Option(help="Folder of padding.json, .md and .png, padding_simulated.md and .png.")] = Path(
        "bench/results"
    ),
) -> None:
    """Simulate, record, measure, print, and write tables and plots. Exits with 1 if a part was left out because it did
    not run."""
    chosen, batch_sizes = words(sizes, SIZES), numbers(batches)
    if any(n < 2 or prompts % n for n in batch_sizes):
        raise typer.BadParameter(f"--batches {batches}: numbers from 2 on that divide --prompts {prompts}")
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    facts = measure.run_facts("bench.padding")
    report.write_simulated({**facts, "tokens": SIMULATED_TOKENS, "runs": runs, "entries": simulate(runs)}, out)
    bundled, _, tokenizer = zoo.load_pair()
    ids = zoo.held_out_prompts(tokenizer, prompts, prompt_tokens)
    recorded = {n: record(bundled, ids, n, new_tokens) for n in batch_sizes}
    result: dict[str, Any] = {
        **facts,
        "settings": {
            "prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats,
            "dtype": dtype, "depth": padded.DEPTH, "compiled": compile,
        },
        "executions": [execution(n, decoded) for n, decoded in recorded.items()],
        "faults": faults,
        "results": [],
    }  # fmt: skip
    for size in chosen:
        target, _, _ = measure.load_pair(size, getattr(torch, dtype), device)
        for n in batch_sizes:
            with faults.of(f"{size}, batch {n}"):
                rows = timed(f"{size}, batch {n}", target, recorded[n], result["settings"], console)
                result["results"].append({"size": size, "batch": n, "load": os.getloadavg()[0], "cells": rows})
            if result["results"]:
                report.write(result, out)  # after each: a long run that is stopped leaves what it has
        console.print(report.table(result, size))
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
