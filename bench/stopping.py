"""Does it pay to end a draft early, where the draft model is not sure? What rules that stop could gain, and do.

    python -m bench.stopping --sizes 25m,100m

The bundled pair decodes held-out prompts with chains of 8, and each step is recorded: how much was accepted, and what
the draft model said at each level. Forwards of both models are timed at batch size 1, compiled: the target's by rows,
the draft's by depth. From these two `bench.stopping_rules` computes tokens a second of every rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

import specdec
from bench import stopping_report as report
from bench.end_to_end import SIZES, words
from bench.stopping_rules import N_BEST, Costs, Records, compare
from specdec import TokenTree, zoo
from specdec.cli import measure
from specdec.drafters.model import ModelDrafter
from specdec.engine.draft import Draft
from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.twin import is_seen
from specdec.hf.view import ModelView
from specdec.tune import choose

DEPTH, BATCH = 8, 16
DRAFT_DEPTHS = 1, 2, 4, 8
"""Depths that are timed; those between are on straight lines."""


class Recorder(ModelDrafter):
    """A draft model that keeps what it says at each level, and what came of it. Always drafts whole chains, eagerly."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(ModelView(model), TokenTree.chain(DEPTH))
        self.steps: list[tuple[int, int, Tensor]] = []
        self.first_prompt = 0
        self._said: Tensor | None = None  # [B, depth, 2 + N_BEST], of the step before
        self._level = 0

    def begin(self, first_prompt: int) -> None:
        """The next texts are those of these prompts."""
        self.first_prompt, self._said = first_prompt, None

    def draft(self, state: BatchState, law: SamplingLaw, live: Tensor, depth: int) -> Draft:
        if self._said is not None:  # steps with which a text ended may have been cut short
            for row in (~state.finished).nonzero()[:, 0].tolist():
                self.steps.append((self.first_prompt + row, int(state.n_new[row]) - 1, self._said[row]))
        self._said, self._level = torch.zeros(len(state.lengths), DEPTH, 2 + N_BEST), 0
        return super().draft(state, law, live, depth)

    def _children(self, logits: Tensor, law: SamplingLaw, state: BatchState, sample: Tensor, *rest: Any) -> Any:
        made = super()._children(logits, law, state, sample, *rest)
        assert self._said is not None
        probs = logits.float().softmax(-1)
        said = [probs.gather(1, made[0]), torch.special.entr(probs).sum(-1, keepdim=True), probs.topk(N_BEST).values]
        for i in reversed(range(len(sample))):  # rows of nobody repeat others, and come last
            self._said[sample[i], self._level] = torch.cat(said, 1)[i]
        self._level += 1
        return made


def record(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: Tensor, new_tokens: int, sampled: bool, bar: Progress
) -> Records:
    """Every step of the prompts' texts, but each text's last.

    Raises:
        NotMeasured: transformers' own loop ran.
    """
    recorder = Recorder(draft)
    model = specdec.compile(target, recorder, adapt=False, compile=False)
    law = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
    task = bar.add_task(f"records at temperature {int(sampled)}", total=len(prompts))
    for first in range(0, len(prompts), BATCH):
        own = prompts[first : first + BATCH]
        recorder.begin(first)
        model.specdec.seeds = range(first, first + len(own))
        model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=new_tokens, **law)
        bar.update(task, advance=len(own), refresh=True)
    measure.check("recording", model.specdec.stats)
    bar.remove_task(task)
    rows, accepted, said = zip(*recorder.steps, strict=True)
    features = torch.stack(said).double().numpy()
    return Records(np.array(rows), np.array(accepted), features[..., 0], features[..., 1], features[..., 2:])


@torch.no_grad()
def time_forwards(target: PreTrainedModel, draft: PreTrainedModel, repeats: int, bar: Progress) -> Costs:
    """Seconds of both models' forwards, which take turns. Of each the lower quartile counts, and less where a longer
    one took less: other programs only ever add."""
    steps, views = CompiledSteps(True, is_seen=is_seen), (ModelView(target), ModelView(draft))
    for view in views:
        view.allocate(1, choose.COMMITTED + DEPTH + 2)  # the last slot is scratch

    def forward(view: ModelView, n_rows: int, times: int) -> Callable[[], Tensor]:
        run = choose.TimedForward(view, n_rows, times).run
        return partial(steps.get(run, (view, n_rows, times), 0), torch.arange(n_rows, dtype=torch.int64))

    calls = {f"target {n}": forward(views[0], n, 1) for n in range(1, DEPTH + 2)}
    calls |= {f"draft {depth}": forward(views[1], 1, depth) for depth in DRAFT_DEPTHS}
    task = bar.add_task("compiling forwards", total=(2 + repeats) * len(calls))

    def step(name: str) -> None:
        bar.update(task, advance=1, refresh=True)

    measure.compare(calls, 2, step)
    bar.update(task, description="timing forwards")
    seconds = {name: quantiles(times, n=4)[0] for name, times in measure.compare(calls, repeats, step).items()}
    bar.remove_task(task)
    if steps.eager:
        raise measure.NotMeasured(f"forwards ran eagerly: {', '.join(steps.eager)}")
    by_rows = np.array([seconds[f"target {n}"] for n in range(1, DEPTH + 2)])
    by_depth = np.interp(range(DEPTH + 1), (0, *DRAFT_DEPTHS), (0.0, *(seconds[f"draft {d}"] for d in DRAFT_DEPTHS)))
    return Costs(*(np.minimum.accumulate(curve[::-1])[::-1] for curve in (by_rows, by_depth)))


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "25m,100m",
    prompts: Annotated[int, Option(help="Held-out prompts.", min=4)] = 128,
    prompt_tokens: Annotated[int, Option(min=1)] = 64,
    new_tokens: Annotated[int, Option(min=4)] = 64,
    repeats: Annotated[int, Option(help="Timed rounds.", min=2)] = 101,
    out: Annotated[Path, Option(help="Folder of stopping.json and .md.")] = Path("bench/results"),
) -> None:
    """Record, measure, compute, print, and write tables and figures. Exits with 1 if a part was left out."""
    chosen = words(sizes, SIZES)
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    result: dict[str, Any] = {
        **measure.run_facts("bench.stopping"),
        "settings": {
            "prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats,
            "depth": DEPTH,
        },
        "faults": faults,
        "results": [],
    }  # fmt: skip
    for size, records, costs in _measured(chosen, prompts, prompt_tokens, new_tokens, repeats, console, faults):
        for saves_levels in (False, True):
            for temperature, steps in records.items():
                rows = compare(steps, costs, saves_levels)
                result["results"].append({
                    "size": size, "temperature": temperature, "saves_levels": saves_levels,
                    "steps": len(steps.accepted), "tokens_per_step": float(1 + steps.accepted.mean()), "rules": rows,
                    "target_seconds": costs.target.tolist(), "draft_seconds": costs.draft.tolist(),
                    "load": os.getloadavg()[0],
                })  # fmt: skip
                console.print(report.table(result["results"][-1]))
        report.write(result, out)  # after each: a long run that is stopped leaves what it has
    faults.exit()


def _measured(
    sizes: Sequence[str], n: int, prompt_tokens: int, new_tokens: int, repeats: int, console: Console,
    faults: measure.Faults,
) -> Any:  # fmt: skip
    """Of each size the steps, by temperature, and what forwards take. The steps are the bundled pair's, whose function
    every size computes."""
    records: dict[int, Records] = {}
    for size in sizes:
        with faults.of(size), measure.progress(console) as bar:
            if not records:
                target, draft, tokenizer = zoo.load_pair()
                for model in (target, draft):
                    model.generation_config.eos_token_id = None
                ids = zoo.held_out_prompts(tokenizer, n, prompt_tokens)
                records = {t: record(target, draft, ids, new_tokens, bool(t), bar) for t in (0, 1)}
            target, draft, _ = measure.load_pair(size)
            costs = time_forwards(target, draft, repeats, bar)
            yield size, records, costs


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
