"""Train adaptive tokens: rows behind a text that say what comes after its next token.

After SDSAT (arXiv 2403.18647), with a mask that keeps every block of slots to its own text (see
`specdec.training.slots`), and the model's own laws, rather than single tokens, to learn from. They cost nothing: slot m
of an anchor is asked for what the text's own row, m places after the anchor, says anyway. `adapters` leaves the model
as it is; `joint` fine-tunes all of it, as the paper does, and holds it to what it said before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.hf.adaptive import NAME, AdaptiveTokens, Base
from specdec.training import adaptive_card, foresight, loop
from specdec.training.distil import fingerprint, positions, windows
from specdec.training.evaluate import GLANCE, mean_loss
from specdec.training.slots import SlotModel
from specdec.training.texts import kept, sample

PROMPT, LENGTH = 32, 256  # the model's own texts: tokens given, tokens in all
N_TEXTS, N_GLANCE = 64, 16  # greedy texts that figures are counted on, and those that the curve is
WRITTEN = 64  # texts that the model writes at once
DATA_IN, SAMPLED_IN = 4, 4  # one of so many batches is of the data; of the model's own texts, so many are sampled
KEEP = 1.0
"""What a joint model's own rows weigh, beside the slots."""


class Method(str, Enum):
    """What learns: slots, with matrices of their own, or the whole model with them."""

    adapters = "adapters"
    joint = "joint"


PEAK = {Method.adapters: 4e-3, Method.joint: 5e-4}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        slots: L. rank: of the adapters. batch: texts of a forward; accumulate: forwards of a step. anchors: of a text,
            each with L slots behind it. samples: texts that the model writes itself. peak: the highest learning rate,
            by default the method's.
    """

    method: Method = Method.adapters
    slots: int = 6
    rank: int = 32
    steps: int = 2000
    batch: int = 4
    accumulate: int = 1
    anchors: int = 32
    samples: int = 2560
    peak: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", Method(self.method))  # a string will do
        for name, value in asdict(self).items():
            if name not in ("method", "seed") and value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, and must be more than 0")


def _check(model: PreTrainedModel, train: Tensor, held_out: Tensor, recipe: Recipe) -> None:
    """Whether there are enough tokens, texts fit in a model's positions, and anchors in the texts.

    Raises:
        ValueError: something does not.
    """
    for tokens, what, least in ((train, "to learn from", LENGTH), (held_out, "held out", PROMPT)):
        if len(tokens) < least:
            raise ValueError(f"there are {len(tokens)} tokens {what}, and must be {least} at least")
    if positions(model) < LENGTH:
        raise ValueError(f"the model has {positions(model)} positions, and it is trained on texts of {LENGTH} tokens")
    if (places := LENGTH - 1 - recipe.slots) < recipe.anchors:
        raise ValueError(f"texts of {LENGTH} tokens have {max(0, places)} places for {recipe.anchors} anchors")


@dataclass(frozen=True)
class Texts:
    """What is learned from.

    Attributes:
        data: [n] int64, tokens of the data. own: [samples, LENGTH] int64, what the model wrote. first: the token that
            the model expects at the beginning of every text, if any.
    """

    data: Tensor
    own: Tensor
    first: int | None

    def batch(self, step: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Texts [batch, LENGTH] and anchors [P] of a forward."""
        seed = recipe.seed * 1_000_003 + step
        generator = torch.Generator("cpu").manual_seed(seed)
        if step % DATA_IN:
            rows = torch.randint(
                0, len(self.own), (recipe.batch,), generator=generator, dtype=torch.int64, device="cpu"
            )
            ids = self.own[rows.to(self.own.device)]
        else:
            ids = windows(self.data, recipe.batch, LENGTH, seed, self.first)
        places = torch.randperm(LENGTH - 1 - recipe.slots, generator=generator, dtype=torch.int64, device="cpu")
        return ids, places[: recipe.anchors].to(ids.device)


def _cross_entropy(theirs: Tensor, ours: Tensor) -> Tensor:
    """Of two sets of logits [..., V], in nats a row: KL, but for what nobody learns from."""
    return F.cross_entropy(ours.float().flatten(0, -2), theirs.float().softmax(-1).flatten(0, -2))


def loss_of(slots: SlotModel, teacher: SlotModel, ids: Tensor, anchors: Tensor) -> Tensor:
    """How far the slots are from what the teacher says of the same tokens; the same of a joint model's own rows."""
    with loop.autocast(ids.device):
        text, ahead = slots.forward(ids, anchors)
        if not slots.trains:
            return _cross_entropy(text, ahead)
        with torch.no_grad():
            law = teacher.text(ids, anchors)
    return _cross_entropy(law, ahead) + KEEP * _cross_entropy(law, text)


def _write(model: PreTrainedModel, prompts: Tensor, work: Path, seed: int) -> Tensor:
    """[n, LENGTH] texts that the model writes after prompts [n, PROMPT], most of them greedily.

    Greedy text repeats itself far more than samples do: a slot that never saw it fails where most users decode. Batches
    are kept as they come.
    """

    def write(batch: Tensor, index: int) -> Tensor:
        return sample(model, batch, LENGTH, seed + index, greedy=index % SAMPLED_IN != 0)

    return torch.cat(kept(work, "own", prompts.split(WRITTEN), write))


def train_adaptive_tokens(
    model: PreTrainedModel,
    train: Tensor,
    held_out: Tensor,
    out: Path,
    recipe: Recipe,
    work: Path,
    *,
    first: int | None = None,
) -> dict[str, Any]:
    """Train adaptive tokens of a model, and write them with their figures, curves and card.

    Args:
        model: on the device to train on; it stays as it is. train: [n] int64, tokens of text like what is to be
            decoded. held_out: [n] int64, tokens that nothing is learned from. out: where the side files go, and with
            `joint` the fine-tuned model. work: folder of what is unfinished: a run that was stopped goes on from
            there, and ends with the same weights as one that was not. first: the token that the model expects at the
            beginning of every text, if any.

    Returns:
        The figures in `adaptive_tokens.json`.

    Raises:
        ValueError: too few tokens, a model that does not run with slots, or another run in `work`.
        KeyboardInterrupt: Ctrl-C; what is done is saved.
    """
    settings = asdict(recipe) | {"method": recipe.method.value}
    joint, device = recipe.method is Method.joint, model.device
    train, held_out = train.to(device), held_out.to(device)
    _check(model, train, held_out, recipe)
    teacher = SlotModel.of(model, AdaptiveTokens.new(model, recipe.slots, rank=0))
    teacher.check()
    made_of = {"text": fingerprint([train]), "model": fingerprint(model.parameters()), "first": first}
    loop.settle(work / f"{NAME}.json", settings | made_of)

    learner = copy.deepcopy(model).float().requires_grad_(True) if joint else model
    tokens = AdaptiveTokens.new(learner, recipe.slots, 0 if joint else recipe.rank, recipe.seed)
    slots = SlotModel.of(learner, tokens, trains=joint)
    own = _write(model, windows(train, recipe.samples, PROMPT, recipe.seed, first), work, recipe.seed)
    texts = Texts(train, own, first)
    prompts = windows(held_out, N_TEXTS, PROMPT, recipe.seed, first)
    greedy = sample(model, prompts, LENGTH, recipe.seed, greedy=True)

    def losses(step: int) -> Iterator[Tensor]:
        for part in range(recipe.accumulate):
            ids, anchors = texts.batch(step * recipe.accumulate + part, recipe)
            yield loss_of(slots, teacher, ids, anchors) / recipe.accumulate

    fit = loop.fit(
        nn.ModuleList([tokens, learner]) if joint else tokens,
        losses,
        label="adaptive tokens",
        steps=recipe.steps,
        peak=recipe.peak or PEAK[recipe.method],
        checkpoint=work / f"{NAME}.pt",
        validate=lambda: {"accepted": foresight.accepted(slots, greedy[:N_GLANCE], PROMPT - 1)},
        warmup=max(1, min(100, recipe.steps // 10)),
        save_every=max(1, recipe.steps // 20),
    )

    if joint:
        greedy = sample(learner, prompts, LENGTH, recipe.seed, greedy=True)
        learner.to(model.dtype).save_pretrained(out)
    tokens.save(out, learner)
    # As they are read again: in float16.
    saved = SlotModel.of(learner, AdaptiveTokens.load(out, learner))
    rows = held_out[:GLANCE].split(LENGTH)
    guesses = foresight.skip_bigrams(train, learner.get_input_embeddings().weight.shape[0])
    figures = {
        "recipe": settings,
        "parameters": sum(weight.numel() for weight in tokens.parameters()),
        "tokens": len(train),
        "texts": N_TEXTS,
        "length": LENGTH,
        "minutes": fit.seconds / 60,
        "device": str(device),
        "foresight": foresight.figures(saved, greedy, PROMPT - 1, guesses),
        "overlap": foresight.overlaps(saved, sample(learner, prompts, LENGTH, recipe.seed), PROMPT - 1),
        "loss_before": mean_loss(model, rows),
        "loss_after": mean_loss(learner, rows),
        "curve": fit.curve,
    }
    tokens.save(out, learner, figures)
    shares = {"data_in": DATA_IN, "greedy": 1 - 1 / SAMPLED_IN}
    adaptive_card.save(out, figures | shares | {"base": str(Base.of(model))}, work / f"{NAME}.png")
    return figures
