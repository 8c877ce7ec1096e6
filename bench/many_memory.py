"""The memory that generate_many() takes beside the weights, against what `model.specdec.memory()` says before.

    python -m bench.many_memory --size 100m --rows 8

Held-out prompts of 64 to 512 tokens, more of them than rows. On a CPU memory is what the process holds at most while it
decodes, over what it held before, after a warm-up that compiled everything: run it in a process of its own. On a GPU it
is what torch has allocated. Caches that the warm-up left behind count as taken by the run, which puts its own in their
place.
"""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel
from typer import Option

import specdec
from specdec import zoo
from specdec.cli import measure

SHORTEST, LONGEST = 64, 512


def main(
    size: Annotated[str, Option(help="bundled, 25m, 100m or 300m.")] = "100m",
    rows: Annotated[int, Option(help="Texts decoded at once.", min=1)] = 8,
    new_tokens: Annotated[int, Option(min=1)] = 64,
    compile: Annotated[bool, Option(help="Without it specdec runs eagerly.")] = True,
) -> None:
    """Print bytes as JSON: `predicted`, `caches` of it, and `taken`. Exits with 1 if this is not what was measured."""
    measure.quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, draft, tokenizer = measure.load_pair(size, device=device)
    for each in (target, draft):
        each.generation_config.eos_token_id = None
    model = specdec.compile(target, draft, compile=compile)
    ids = zoo.held_out_prompts(tokenizer, 2 * rows, LONGEST)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (len(ids),), generator=torch.Generator().manual_seed(0))
    lengths[1] = LONGEST
    prompts = [text[:n] for text, n in zip(ids, lengths.tolist(), strict=True)]
    faults = measure.Faults()
    with faults.of(size):
        print(json.dumps(taken(model, prompts, rows, new_tokens)))
    faults.exit()


def taken(model: PreTrainedModel, prompts: list[Tensor], rows: int, new_tokens: int) -> dict[str, Any]:
    """Decode; the facts in bytes, with the `rows` and the tokens of the `longest` text.

    Raises:
        NotMeasured: something else ran, or compiled.
    """
    if rows > 1:
        model.specdec.warmup(batch_sizes=(rows,), max_length=2 * SHORTEST)
    for n_rows in (rows, 1):  # the last one leaves the smallest caches
        decode(model, [prompt[:8] for prompt in prompts[:n_rows]], n_rows, 32)
    decoder = model.specdec._decoders.get(model.specdec.draft)
    views = [decoder.target, decoder.drafter.view]
    held = sum(view.cache_bytes(view.cache.n_batch, view.cache.n_slots) for view in views)
    longest = max(map(len, prompts)) + new_tokens
    begin = reset_peak()
    model.specdec.stats.reset()
    decode(model, prompts, rows, new_tokens)
    most = peak() - begin + held
    if model.specdec.stats.seconds["compile"]:
        raise measure.NotMeasured("something compiled while memory was measured")
    return {
        "rows": rows, "longest": longest, "predicted": model.specdec.memory(rows, longest), "taken": most,
        "caches": sum(view.cache_bytes(view.cache.n_batch, view.cache.n_slots) for view in views),
    }  # fmt: skip


def decode(model: PreTrainedModel, prompts: list[Tensor], rows: int, new_tokens: int) -> None:
    for result in specdec.generate_many(model, prompts, max_batch_size=rows, max_new_tokens=new_tokens, progress=False):
        if result.error is not None:
            raise result.error
    measure.check("generate_many", model.specdec.stats)


def reset_peak() -> int:
    """Bytes held now; `peak` counts from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would not show as growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
    return _status("VmRSS")


def peak() -> int:
    """The most bytes held since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
