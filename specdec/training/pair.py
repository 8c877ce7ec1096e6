"""Train the bundled pair: a tokenizer, a target and a draft distilled from it, all from the standard library."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer import Option

from specdec.training import adaptive, data, export, loop
from specdec.training.distil import SAMPLE, Recipe, distil, fingerprint, llama, measure, new_draft
from specdec.training.evaluate import GLANCE, LONG_WINDOW, WINDOW, agreement, figures_of, mean_loss
from specdec.training.objectives import Objective
from specdec.training.texts import forward

TARGET_STEPS = 2400
VOCABULARY = 4096
TARGET_BATCH = 8192  # tokens of one step
LONG_SHARE = 0.15  # the last steps see long windows
ADAPTIVE = adaptive.Recipe(steps=2000, samples=2560)


def new_target(scale: int = 1) -> LlamaForCausalLM:
    """The target: 4.0M parameters at scale 1; the scale multiplies the widths."""
    return llama(VOCABULARY, 256 * scale, 4, 4 * scale, 2 * scale, 704 * scale)


def windows_of_step(tokens: torch.Tensor, batch_tokens: int, step: int, steps: int, seed: int) -> torch.Tensor:
    """``[batch, window + 1]`` tokens of one step: 512-token windows, then 2048-token ones in the last steps."""
    window = LONG_WINDOW if step >= (1 - LONG_SHARE) * steps else WINDOW
    window = min(window, len(tokens) - 1)
    return data.random_windows(tokens, max(1, batch_tokens // window), window + 1, seed * 1_000_003 + step)


def train_target(
    model: LlamaForCausalLM,
    train: torch.Tensor,
    held_out: torch.Tensor,
    *,
    steps: int,
    seed: int,
    work: Path,
    peak: float = 2.5e-3,
) -> loop.Fit:
    """Next-token training on the source text; checkpoint in ``work/target.pt``."""

    def losses(step: int) -> Iterator[torch.Tensor]:
        ids = windows_of_step(train, TARGET_BATCH, step, steps, seed)
        yield F.cross_entropy(forward(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    settings = {"steps": steps, "peak": peak, "seed": seed, "text": fingerprint([train])}
    loop.settle(work / "target.json", settings)
    return loop.fit(
        model,
        losses,
        label="target",
        steps=steps,
        peak=peak,
        checkpoint=work / "target.pt",
        validate=lambda: {"loss": mean_loss(model, held_out[:GLANCE].split(WINDOW))},
    )


def train_pair(
    out: Annotated[Path, Option(help="Folder of the models, tokenizer and card.")] = Path("runs/pair/out"),
    work: Annotated[Path, Option(help="Folder of the checkpoints.")] = Path("runs/pair"),
    keep_target: Annotated[
        bool, Option(help="Train draft and adaptive tokens anew for the target that is in --out.")
    ] = False,
    target_steps: Annotated[int, Option(help="Optimisation steps of 8192 tokens each.")] = TARGET_STEPS,
    draft_steps: Annotated[int, Option(help="Optimisation steps of 2048 tokens each.")] = Recipe.steps,
    objective: Annotated[Objective, Option(help="What the draft minimises.")] = Recipe.objective,
    samples: Annotated[int, Option(help="Sequences the target writes for the draft to learn from.")] = Recipe.samples,
    scale: Annotated[int, Option(help="Multiplies the widths of both models; above 1 for a GPU.")] = 1,
    draft_layers: Annotated[int, Option(help="Layers of the draft; two can copy, one cannot.")] = 2,
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, Option(help="CPU threads; results repeat for the same number.")] = 2,
    seed: Annotated[int, Option(help="Of weights, batches and samples.")] = 0,
    source: Annotated[Path | None, Option(help="Python modules to read instead of the standard library.")] = None,
) -> dict[str, Any]:
    """Train the bundled pair anew: a tokenizer, a target with adaptive tokens and a draft, with figures and a card.

    A run that was stopped goes on from its checkpoints when started again with the same arguments. Returns what
    `metrics.json` holds.
    """
    torch.set_num_threads(threads)
    loop.keep_freed_memory()
    corpus = data.read_corpus(source)
    if keep_target:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
        target_figures = json.loads((out / "metrics.json").read_text())["target"]
    else:
        tokenizer = data.train_tokenizer(list(corpus.train.values()), VOCABULARY)
        export.save_texts(out, tokenizer, corpus.held_out)
    train = data.encode(tokenizer, list(corpus.train.values())).to(device)
    held_out = data.encode(tokenizer, list(corpus.held_out.values())).to(device)

    if keep_target:
        target = LlamaForCausalLM.from_pretrained(out / "target").to(device).eval()
    else:
        torch.manual_seed(seed)
        target = new_target(scale).to(device)
        fit = train_target(target, train, held_out, steps=target_steps, seed=seed, work=work)
        target = export.save_model(target, tokenizer, out / "target").to(device)
        target_figures = figures_of(target, held_out, fit.seconds) | {"steps": target_steps, "batch": TARGET_BATCH}

    torch.manual_seed(seed)
    draft = new_draft(target, draft_layers).to(device)
    recipe = Recipe(objective=objective, steps=draft_steps, samples=samples, seed=seed)
    fit = distil(target, draft, train, held_out, recipe, work)
    draft = export.save_model(draft, tokenizer, out / "draft").to(device)

    own = replace(ADAPTIVE, seed=seed)
    adaptive.train_adaptive_tokens(target, train, held_out, out / "target", own, work / "adaptive-tokens")

    glance = held_out[:GLANCE].split(WINDOW)
    figures = {
        "vocabulary": VOCABULARY,
        "device": device,
        "python": platform.python_version(),
        "train_modules": len(corpus.train),
        "train_bytes": sum(len(text.encode()) for text in corpus.train.values()),
        "train_tokens": len(train),
        "held_out_modules": len(corpus.held_out),
        "held_out_bytes": sum(len(text.encode()) for text in corpus.held_out.values()),
        "held_out_tokens": len(held_out),
        "minimised": recipe.minimised,
        "samples": samples,
        "sample_length": SAMPLE,
        "target": target_figures,
        "draft": figures_of(draft, held_out, fit.seconds) | {"steps": draft_steps, "batch": recipe.batch},
        **measure(target, draft, held_out, seed),
        "glance": {"tokens": GLANCE, "window": WINDOW, "loss": mean_loss(target, glance)}
        | agreement(target, draft, glance),
        "command": export.command(
            "pair",
            out=out,
            keep_target=keep_target,
            target_steps=None if keep_target else target_steps,
            draft_steps=draft_steps,
            objective=objective.value,
            samples=samples,
            scale=scale,
            draft_layers=draft_layers,
            device=device,
            threads=threads,
            seed=seed,
            source=source,
        ),
    }
    export.save_card(out, export.CARD_OF_PAIR, figures, work / "draft.png")
    return figures
