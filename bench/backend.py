"""`torch.compile(backend="specdec")` on a decoding loop of one's own: a plain model, a static cache, nothing else.

    python -m bench.backend --sizes bundled,100m --batches 1 --capacities 1024
    python -m bench.backend --sizes 8b --batches 1,8 --device cuda --dtype bfloat16

The loop feeds the model its own greedy token, one a call; or, as a loop that verifies drafts does, that token and the
next few of the known text. All ways run the same loop in turn, and medians are compared. Prefill is eager and not
timed. Compiling is not timed either, but the seconds of each way's first call are stated, caches on disk empty.
"""

from __future__ import annotations

import os
import statistics
import time
import types
from collections.abc import Callable
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, fx
from torch._inductor.utils import fresh_cache
from transformers import PreTrainedModel, StaticCache
from typer import Option

from bench import backend_report
from bench.end_to_end import SIZES, numbers, words
from specdec import zoo
from specdec.cli import measure
from specdec.graphs.backend import specdec
from specdec.graphs.passes import PASSES
from specdec.hf import names

FED = (1, 4, 8)
"""Tokens fed a call."""
PROMPT_TOKENS = 64


def all_ways(device: str) -> dict[str, dict[str, Any] | None]:
    """Every way to run the forward: what `torch.compile` is told, or None for an eager one."""
    ways: dict[str, dict[str, Any] | None] = {
        "transformers": None,
        "inductor": {"backend": "inductor"},
        "specdec": {"backend": specdec},  # not by name, which is only known where specdec is installed
    }
    if device == "cuda":
        recorded = {"mode": "reduce-overhead"}
        ways |= {f"{name}, reduce-overhead": how | recorded for name, how in ways.items() if how is not None}
    alone = {f"only {name}": {"backend": specdec, "options": {"passes": [name]}} for name in PASSES}
    return ways | alone


_numbers = count()


def compiled_forward(model: PreTrainedModel, how: dict[str, Any] | None, ops: set[str]) -> Callable[..., Any]:
    """The model's forward, with compiled code of its own; specdec's ops in it are added to `ops`.

    Dynamo keeps it on the code object, which copies of a model share, and remembers sizes by the function's name: one
    way would wade through the others' entries, or find a size varying that is constant in its own loop.
    """
    if how is None:
        return model.forward
    f = model.forward.__func__
    code = f.__code__.replace(co_name=f"{f.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    if how["backend"] is specdec:
        how = how | {"backend": partial(_watched, ops)}
    return torch.compile(types.MethodType(own, model), fullgraph=True, **how)


def _watched(ops: set[str], gm: fx.GraphModule, example_inputs: list[Any], **given: Any) -> Callable[..., Any]:
    """The backend `specdec`, which rewrites a graph in place; the ops it put there are noted."""
    compiled = specdec(gm, example_inputs, **given)
    ops |= {name for node in gm.graph.nodes if (name := str(node.target)).startswith("specdec.")}
    return compiled


class Loop:
    """Greedy decoding of one batch by one forward, over a static cache that stays where it is.

    Args:
        model: prefills. forward: what is measured.
        prompts: [B, length] int64. capacity: slots of the cache.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], prompts: Tensor, capacity: int) -> None:
        self.model, self.forward, self.prompts = model, forward, prompts
        self.past = names.cache_argument(model)
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self.prefill()

    def prefill(self) -> None:
        """Write the prompts to the cache, eagerly."""
        self._rewind(0)
        self.first = self.model(self.prompts, **{self.past: self.cache}).logits[:, -1:].argmax(-1)

    def _rewind(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def __call__(self, text: Tensor, fed: int) -> Tensor:
        """[B, n] ids that follow the prompt's first token. With fed > 1, those of `text` [B, n] are the drafts."""
        self._rewind(self.prompts.shape[1])
        pending, found = self.first, [text[:, :0]]
        for i in range(0, text.shape[1], fed):
            tokens = torch.cat([pending, text[:, i : i + fed - 1]], 1) if fed > 1 else pending
            found.append(self.forward(input_ids=tokens, **{self.past: self.cache}).logits.argmax(-1))
            pending = found[-1][:, -1:]
        return torch.cat(found, 1)


@torch.no_grad()
def measure_all(
    model: PreTrainedModel, prompts: Tensor, capacity: int, fed: int, new_tokens: int, repeats: int,
    note: Callable[[str], object],
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a way: milliseconds a call, ratio, identity of the tokens, seconds of the first call.

    Args:
        note: told what is going on, never while the clock runs.

    Raises:
        NotMeasured: specdec's backend left everything to Inductor.
    """
    empty = torch.empty(len(prompts), new_tokens, dtype=torch.long, device=prompts.device)
    text = Loop(model, model.forward, prompts, capacity)(empty, 1)  # the law: eager, one token a call
    ways = all_ways(prompts.device.type)
    first_call, texts, runs = {}, {}, {}
    for name, how in ways.items():
        note(f"warming up {name}")
        ops: set[str] = set()
        loop = Loop(model, compiled_forward(model, how, ops), prompts, capacity)
        with fresh_cache():
            start = time.perf_counter()
            loop(text[:, :fed], fed)
            measure.synchronize()
            first_call[name] = time.perf_counter() - start
            texts[name] = loop(text, fed)
        if how is not None and how["backend"] is specdec and not ops and not name.startswith("only"):
            raise measure.NotMeasured("the backend replaced nothing: it ran Inductor's code")
        runs[name] = partial(loop, text, fed)
    note("measuring")
    milliseconds = {
        name: [1e3 * s * fed / new_tokens for s in seconds] for name, seconds in measure.compare(runs, repeats).items()
    }
    base = statistics.median(milliseconds["inductor"])
    return [
        {
            "way": name,
            "milliseconds": milliseconds[name],
            "ratio": base / statistics.median(milliseconds[name]),
            "identical": torch.equal(texts[name], text),
            "common": (texts[name] == text).long().cumprod(1).float().mean().item(),
            "first_call_seconds": first_call[name],
        }
        for name in ways
    ]


def measure_shape(
    size: str, model: PreTrainedModel, prompts: Tensor, capacity: int, fed: int, settings: dict[str, Any],
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """One table. A line says what is going on; it is drawn only when told to, never while something is measured."""
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task, where = bar.add_task(""), f"{size}, batch {len(prompts)}, {fed} a call: "

        def note(text: str) -> None:
            bar.update(task, description=where + text, refresh=True)

        rows = measure_all(model, prompts, capacity, fed, settings["new_tokens"], settings["repeats"], note)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "size": size, "parameters": parameters, "batch": len(prompts), "capacity": capacity, "fed": fed, "ways": rows
    }  # fmt: skip


def main(
    sizes: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.")] = "bundled,100m",
    batches: Annotated[str, Option(help="Samples decoded at once.")] = "1",
    capacities: Annotated[str, Option(help="Slots of the cache.")] = "1024",
    new_tokens: Annotated[int, Option(help=f"Rounded up to a multiple of {max(FED)}.", min=1)] = 64,
    repeats: Annotated[int, Option(help="Timed rounds.", min=1)] = 7,
    device: Annotated[str, Option(help="Where it runs.")] = "cpu",
    dtype: Annotated[str, Option(help="Of the weights.")] = "float32",
    out: Annotated[Path, Option(help="Folder of backend.md and .json.")] = Path("bench/results"),
) -> None:
    """Measure, print, and write a table and the raw times. Exits with 1 if any token differs, or a part was left out
    because it did not run."""
    chosen, batch_sizes, slots = words(sizes, SIZES), numbers(batches), numbers(capacities)
    new_tokens = -(-new_tokens // max(FED)) * max(FED)
    if min(slots) < PROMPT_TOKENS + new_tokens:
        raise typer.BadParameter(f"--capacities {capacities}: {PROMPT_TOKENS + new_tokens} tokens do not fit")
    out.mkdir(parents=True, exist_ok=True)
    measure.quiet()
    console, faults = Console(), measure.Faults()
    result: dict[str, Any] = {
        **measure.run_facts("bench.backend"),
        "load": os.getloadavg()[0],
        "settings": {
            "prompt_tokens": PROMPT_TOKENS, "new_tokens": new_tokens, "repeats": repeats, "dtype": dtype,
        },
        "faults": faults,
        "results": [],
    }  # fmt: skip
    for size in chosen:
        model, _, tokenizer = measure.load_pair(size, getattr(torch, dtype), device)
        for batch, capacity, fed in product(batch_sizes, slots, FED):
            prompts = zoo.held_out_prompts(tokenizer, batch, PROMPT_TOKENS).to(device)
            where = f"{size}, batch {batch}, {fed} a call"
            with faults.of(where):
                shape = measure_shape(size, model, prompts, capacity, fed, result["settings"], console)
                result["results"].append(shape)
                console.print(backend_report.table(shape))
                for row in shape["ways"]:
                    faults.same(f"{where}: {row['way']}", row["identical"])
            if result["results"]:
                backend_report.write(result, out)  # after each part: a long run that is stopped leaves what it has
            torch.compiler.reset()  # lets go of the recorded graphs' memory
    if result["results"]:
        console.print(f"[dim]written to {out}/backend.md and .json[/]", highlight=False)
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
