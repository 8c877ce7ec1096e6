"""`specdec train draft`: distil a draft from a target, on text files and on the target's own texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PreTrainedTokenizerBase
from typer import Option

from specdec.cli import inputs
from specdec.training import export, loop
from specdec.training.distil import SAMPLE, Recipe, distil, measure, new_draft
from specdec.training.evaluate import WINDOW
from specdec.training.objectives import Objective

HELD_OUT = 0.05  # of the data, without --held-out


def train_draft(
    data: Annotated[list[Path], Option(help="Text file, UTF-8; again for more.", exists=True, dir_okay=False)],
    out: Annotated[Path, Option(help="Folder of the draft and its card; out/work is for what is unfinished.")],
    model: Annotated[str | None, Option(help="Target: folder or hub id.  [default: the bundled one]")] = None,
    draft: Annotated[str | None, Option(help="Folder or hub id to start from.  [default: a new, small Llama]")] = None,
    held_out: Annotated[
        Path | None, Option(help="Text file to score.  [default: the end of the data]", exists=True, dir_okay=False)
    ] = None,
    objective: Annotated[
        Objective, Option(help="To minimise: KL(target, draft), KL(draft, target) or total variation.")
    ] = Recipe.objective,
    steps: Annotated[int, Option(min=1, help="Optimisation steps.")] = Recipe.steps,
    batch: Annotated[int, Option(min=1, help="Tokens of a step.")] = Recipe.batch,
    accumulate: Annotated[int, Option(min=1, help="Parts that a step is computed in: more take less memory.")] = (
        Recipe.accumulate
    ),
    forward_share: Annotated[
        float,
        Option(min=0, max=1, help="Of the steps: the first, which minimise KL(target, draft) whatever --objective."),
    ] = Recipe.forward_share,
    samples: Annotated[int, Option(min=1, help="Texts that the target writes to learn from.")] = Recipe.samples,
    learning_rate: Annotated[float, Option(min=0, help="The highest.")] = Recipe.peak,
    device: Annotated[str | None, Option(help="Of both.  [default: cuda where there is one, else cpu]")] = None,
    threads: Annotated[int, Option(min=1, help="CPU threads; results repeat for the same number.")] = 2,
    seed: Annotated[int, Option(help="Of weights, batches and samples.")] = 0,
) -> dict[str, Any]:
    """Distil a draft from a target: it learns the target's probabilities in your text and in the target's own.

    A run that was stopped goes on when it is started again with the same options. Returns what metrics.json holds.
    """
    recipe = Recipe(objective, steps, batch, accumulate, samples, learning_rate, seed, forward_share)
    sources = inputs.Sources(model, draft, device=device or inputs.default_device())
    train, rest = read(sources, data, held_out)
    torch.set_num_threads(threads)
    loop.keep_freed_memory()
    pair = sources.load()
    torch.manual_seed(seed)
    small = new_draft(pair.target) if draft is None or pair.draft is None else pair.draft.float()
    small = small.to(sources.device)
    train, rest = train.to(sources.device), rest.to(sources.device)
    first = first_token(sources.tokenizer)

    fit = distil(pair.target, small, train, rest, recipe, out / "work", first=first)
    small = small.to(pair.target.dtype).eval()
    figures = {
        "target": model or "the bundled target",
        "start": draft or "a new model",
        "parameters": small.num_parameters(),
        "device": sources.device,
        "minutes": round(fit.seconds / 60, 1),
        "train_tokens": len(train),
        "held_out_tokens": len(rest),
        "sample_length": SAMPLE,
        **asdict(recipe) | {"objective": objective.value, "minimised": recipe.minimised},
        **measure(pair.target, small, rest, seed, first),
        "curve": fit.curve,
        "command": export.command(
            "draft",
            model=model,
            data=data,
            out=out,
            draft=draft,
            held_out=held_out,
            objective=objective.value,
            steps=steps,
            batch=batch,
            forward_share=forward_share,
            accumulate=accumulate,
            samples=samples,
            learning_rate=learning_rate,
            device=sources.device,
            threads=threads,
            seed=seed,
        ),
    }
    small.generation_config = pair.target.generation_config
    small.save_pretrained(out)
    sources.tokenizer.save_pretrained(out)
    export.save_card(out, export.CARD_OF_DRAFT, figures, out / "work" / "draft.png")
    return figures


def read(sources: inputs.Sources, data: list[Path], held_out: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of files, to learn from and to score.

    Raises:
        ValueError: a file cannot be learned from, or what else is named is not there.
    """
    texts = {f"--data {path}": inputs.read_text("--data", path) for path in data}
    scored = {} if held_out is None else {f"--held-out {held_out}": inputs.read_text("--held-out", held_out)}
    sources.check()
    return tokens_of(sources.tokenizer, texts, scored)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], scored: dict[str, str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to learn from and to score, each text closed by the end token; without texts to score, the last ones.

    Raises:
        ValueError: a text is empty, or all together are too short.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for part, least in ((texts, WINDOW if scored else 2 * WINDOW), (scored, WINDOW if scored else 0)):
        ids: list[int] = []
        for where, text in part.items():
            if not text.strip():
                raise ValueError(f"{where}: there is no text in it")
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) < least:
            raise ValueError(f"{', '.join(part)}: it takes {least} tokens at least, there are {len(ids)}")
        found.append(torch.tensor(ids, dtype=torch.int64, device="cpu"))
    train, rest = found
    if not scored:
        train, rest = train.tensor_split([-max(WINDOW, round(HELD_OUT * len(train)))])
    return train, rest


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts in front of every text, if it does."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids[0] == tokenizer.bos_token_id else None
