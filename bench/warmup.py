"""How long `warmup()` takes, by number of layers: cold, and again with what compilers left on disk.

    python -m bench.warmup --layers 12,32

Each figure is from a process of its own. Widths are small: what compiles does not depend on them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from typer import Option

import specdec
from specdec.cli import measure

BATCH_SIZES = (1, 4)


def _model(n_layers: int) -> LlamaForCausalLM:
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=n_layers, eos_token_id=None, pad_token_id=0, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LlamaForCausalLM(config).to(device).eval()


def warm_up(n_layers: int) -> list[float]:
    """Seconds of `warmup()`, greedy and then sampling, and of a call of `generate()` after it.

    Raises:
        NotMeasured: something else ran.
    """
    model = specdec.compile(_model(n_layers), _model(2))
    seconds = []
    for do_sample in (False, True):
        start = time.perf_counter()
        model.specdec.warmup(batch_sizes=BATCH_SIZES, do_sample=do_sample)
        seconds.append(time.perf_counter() - start)
    prompt = torch.ones(1, 8, dtype=torch.int64, device=model.device)
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=8, do_sample=False)
    seconds.append(time.perf_counter() - start)
    measure.check("specdec", model.specdec.stats)
    return seconds


def main(
    layers: Annotated[str, Option(help="Numbers of layers of the target; the draft has two.")] = "12,32",
    child: Annotated[int, Option(hidden=True)] = 0,
) -> None:
    """Measure and print a table. Exits with 1 if something else ran."""
    measure.quiet()
    faults = measure.Faults()
    if child:
        with faults.of("warmup()"):
            print(json.dumps(warm_up(child)))
        return faults.exit()
    console, table = Console(), Table("layers", "caches", "greedy (s)", "sampling (s)", "first generate() after it (s)")
    for n_layers in layers.split(","):
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
            for state in ("cold", "warm"):
                with faults.of(f"{n_layers} layers, {state}"), console.status(f"{n_layers} layers, {state}"):
                    figures = json.loads(measure.ask_child(["-m", "bench.warmup", "--child", n_layers], env))
                    table.add_row(n_layers, state, *(f"{x:.1f}" for x in figures))
    console.print(table)
    console.print(measure.today(), measure.machine(), measure.versions(), f"batch sizes {BATCH_SIZES}")
    faults.exit()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
