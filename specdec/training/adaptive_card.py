"""The card of adaptive tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from specdec.hf.adaptive import NAME, WEIGHTS

CARD = """\
# Adaptive tokens of {base}

{slots} slots, by which the model drafts for itself ({method}, {parameters:,} parameters). They stand outside of the
vocabulary, in `{file}`; {weights}.

On {texts} texts that the model wrote greedily after held-out prompts, the first choice of each slot was what the text
went on with:

| slot | by itself | where all before it were right | all of them right | sampled: mean of sum(min(p, q)) |
| --- | --- | --- | --- | --- |
{rows}

The last column is of as many texts sampled at temperature 1, where it is the chance that a draft of that slot is
accepted behind others that were.

A skip-bigram model, which knows one token and guesses the one two places on, is right {skip_bigram:.1%} of the time: it
guesses what slot 1 does.

Tokens a forward, greedy, on the same texts:

| drafts | two forwards a step | one |
| --- | --- | --- |
{speeds}

Loss of the model's own next tokens on held-out text: {loss_before:.4f} nats before, {loss_after:.4f} after
({loss_change:+.2%}).

## Training

{steps} steps of {forwards} texts of {length} tokens, {anchors} anchors in each: one of {data_in} batches from
{tokens:,} tokens of data, the others from {samples} texts that the model wrote itself, {greedy:.0%} of them greedily.
{minutes:.0f} minutes on {device}. `{name}.json` has all settings and figures, `{name}.png` the loss and the drafts
accepted on held-out texts, by step.

Method: low-rank matrices and vectors after SDSAT (arXiv 2403.18647), trained on the model's own laws.
"""
KEPT = {
    "adapters": "the model's weights are as they were, and so are all its logits, bit for bit",
    "joint": "the model beside it was fine-tuned with them",
}


def save(folder: Path, figures: dict[str, Any], curves: Path) -> None:
    """The card and the curves, beside the side files."""
    recipe, seen = figures["recipe"], figures["foresight"]
    columns = seen["alone"], seen["accepted"], seen["chain"], figures["overlap"]
    rows = [
        f"| {m} | " + " | ".join(f"{share:.1%}" for share in row) + " |"
        for m, row in enumerate(zip(*columns, strict=True), 1)
    ]
    speeds = [
        f"| {n} | {two:.2f} | {one:.2f} |"
        for n, (two, one) in enumerate(zip(seen["two_step"], seen["one_forward"], strict=True), 1)
    ]
    text = CARD.format(
        **recipe | figures | {"weights": KEPT[recipe["method"]], "skip_bigram": seen["skip_bigram"]},
        file=WEIGHTS,
        name=NAME,
        rows="\n".join(rows),
        speeds="\n".join(speeds),
        forwards=recipe["batch"] * recipe["accumulate"],
        loss_change=figures["loss_after"] / figures["loss_before"] - 1,
    )
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    shutil.copy(curves, folder / f"{NAME}.png")
