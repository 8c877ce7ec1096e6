"""`specdec train adaptive-tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Option

from specdec import zoo
from specdec.training import data, loop
from specdec.training.adaptive import Method, Recipe, train_adaptive_tokens


def adaptive_tokens(
    out: Annotated[
        Path, Option(help="Folder to write to: with adapters, the model's own may be it. Unfinished: out/work.")
    ],
    model: Annotated[str | None, Option(help="Folder or hub id; by default the bundled target.")] = None,
    text: Annotated[
        list[Path] | None,
        Option("--data", help="A text file, UTF-8; give the option again for more."),
    ] = None,
    held_out: Annotated[
        list[Path] | None, Option(help="A text file to score; by default the last 5% of the text.")
    ] = None,
    method: Annotated[Method, Option(help="Adapters leave the model as it is; joint fine-tunes it.")] = Recipe.method,
    slots: Annotated[int, Option(min=1, help="Adaptive tokens: as many drafts as can be made.")] = Recipe.slots,
    rank: Annotated[int, Option(min=1, help="Of the adapters.")] = Recipe.rank,
    steps: Annotated[int, Option(min=1, help="Optimisation steps.")] = Recipe.steps,
    batch: Annotated[int, Option(min=1, help="Texts of 256 tokens that are computed at once.")] = Recipe.batch,
    accumulate: Annotated[int, Option(min=1, help="Batches that a step's gradient is added up from.")] = (
        Recipe.accumulate
    ),
    anchors: Annotated[int, Option(min=1, help="Places of a text that slots stand behind.")] = Recipe.anchors,
    samples: Annotated[int, Option(min=1, help="Texts the model writes to learn from.")] = Recipe.samples,
    learning_rate: Annotated[float | None, Option(help="The highest; by default 4e-3, and 3e-4 for joint.")] = None,
    dtype: Annotated[str, Option(help="Of the model: auto, bfloat16, ...")] = "auto",
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, Option(min=1, help="CPU threads; results repeat for the same number.")] = 2,
    seed: Annotated[int, Option(help="Of weights, batches and samples.")] = 0,
) -> dict[str, Any]:
    """Train adaptive tokens, by which a model drafts for itself, on your text and on texts that the model writes.

    Without a model and text: for the bundled target, from the text that the bundled pair learned from. A run that was
    stopped goes on when started again with the same options. Returns the figures of the card.
    """
    recipe = Recipe(method, slots, rank, steps, batch, accumulate, anchors, samples, learning_rate, seed)
    if text:
        texts, unseen = data.read_texts(text), data.read_texts(held_out or [])
    elif model is None:
        corpus = data.read_corpus()
        texts, unseen = list(corpus.train.values()), list(corpus.held_out.values())
    else:
        raise ValueError(f"--data: {model} has no text to learn from")
    torch.set_num_threads(threads)
    loop.keep_freed_memory()
    tokenizer = AutoTokenizer.from_pretrained(model or zoo.FOLDER / "tokenizer")
    target = AutoModelForCausalLM.from_pretrained(model or zoo.FOLDER / "target", dtype=dtype).to(device).eval()
    figures = train_adaptive_tokens(target, tokenizer, texts, out, recipe, held_out=unseen)
    seen = figures["foresight"]
    best = max(range(slots), key=seen["one_forward"].__getitem__)
    loop.console.print(
        f"{out}: slot 1 is right {seen['alone'][0]:.1%} of the time (a skip-bigram model {seen['skip_bigram']:.1%}); "
        f"{best + 1} drafts make {seen['two_step'][best]:.2f} tokens a forward in two forwards a step, "
        f"{seen['one_forward'][best]:.2f} in one"
    )
    return figures
