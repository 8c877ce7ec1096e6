"""`specdec train adaptive-tokens`: a model learns to draft for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option

from specdec.cli import inputs
from specdec.cli.train import first_token, read
from specdec.training import loop
from specdec.training.adaptive import Method, Recipe, train_adaptive_tokens


def train_adaptive(
    data: Annotated[list[Path], Option(help="Text file, UTF-8; again for more.", exists=True, dir_okay=False)],
    out: Annotated[Path, Option(help="Folder to write to, with adapters also the model's; out/work: unfinished.")],
    model: Annotated[str | None, Option(help="Folder or hub id.  [default: the bundled target]")] = None,
    held_out: Annotated[
        Path | None, Option(help="Text file to score.  [default: the end of the data]", exists=True, dir_okay=False)
    ] = None,
    method: Annotated[Method, Option(help="Adapters leave the model as it is; joint fine-tunes it.")] = Recipe.method,
    slots: Annotated[int, Option(min=1, help="Adaptive tokens: as many drafts as can be made.")] = Recipe.slots,
    rank: Annotated[int, Option(min=1, help="Of the adapters.")] = Recipe.rank,
    steps: Annotated[int, Option(min=1, help="Optimisation steps.")] = Recipe.steps,
    batch: Annotated[int, Option(min=1, help="Texts of 256 tokens that are computed at once.")] = Recipe.batch,
    accumulate: Annotated[int, Option(min=1, help="Batches of a step.")] = Recipe.accumulate,
    anchors: Annotated[int, Option(min=1, help="Places of a text that slots stand behind.")] = Recipe.anchors,
    samples: Annotated[int, Option(min=1, help="Texts that the model writes to learn from.")] = Recipe.samples,
    learning_rate: Annotated[float | None, Option(help="The highest.  [default: the method's]")] = Recipe.peak,
    dtype: Annotated[str, Option(help="Of the model: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, Option(help="Of the model.  [default: cuda where there is one, else cpu]")] = None,
    threads: Annotated[int, Option(min=1, help="CPU threads; results repeat for the same number.")] = 2,
    seed: Annotated[int, Option(help="Of weights, batches and samples.")] = 0,
) -> dict[str, Any]:
    """Train adaptive tokens, by which a model drafts for itself, on your text and on the model's own.

    A run that was stopped goes on when it is started again with the same options. Returns the figures of the card.
    """
    recipe = Recipe(method, slots, rank, steps, batch, accumulate, anchors, samples, learning_rate, seed)
    sources = inputs.Sources(model, "ngram", dtype=dtype, device=device or inputs.default_device())
    train, rest = read(sources, data, held_out)
    torch.set_num_threads(threads)
    loop.keep_freed_memory()
    first = first_token(sources.tokenizer)
    figures = train_adaptive_tokens(sources.load().target, train, rest, out, recipe, out / "work", first=first)
    if method is Method.joint:
        sources.tokenizer.save_pretrained(out)
    seen = figures["foresight"]
    best = max(range(slots), key=seen["one_forward"].__getitem__)
    loop.console.print(
        f"{out}: slot 1 is right {seen['alone'][0]:.1%} of the time (a skip-bigram model {seen['skip_bigram']:.1%}); "
        f"{best + 1} drafts make {seen['two_step'][best]:.2f} tokens a forward in two forwards a step, "
        f"{seen['one_forward'][best]:.2f} in one"
    )
    return figures
