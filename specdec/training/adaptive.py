"""Train adaptive tokens: rows behind a text that say what comes after its next token.

After SDSAT (arXiv 2403.18647), with a mask that keeps every block of slots to its own text (see
`specdec.training.slots`), and the model's own laws, rather than single tokens, to learn from. They cost nothing: slot m
of an anchor is asked for what the text's own row, m places after the anchor, says anyway. `adapters` leaves the model
as it is; `joint` fine-tunes all of it, as the paper does, and holds it to what it said before.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.hf.adaptive import AdaptiveTokens, Base, sample_of
from specdec.training import adaptive_card, data, foresight, loop
from specdec.training.evaluate import mean_loss
from specdec.training.slots import SlotModel
from specdec.training.texts import sample

PROMPT, LENGTH = 32, 256  # the model's own texts: tokens given, tokens in all
HELD_OUT, SCORED = 0.05, 32_768  # share of the data; tokens that a loss is counted on
N_TEXTS, N_GLANCE = 64, 16  # greedy texts that figures are counted on, and those that the curve is
WRITTEN = 64  # texts that the model writes at once
DATA_IN, SAMPLED_IN = 4, 4  # one of so many batches is of the data; of the model's own texts, so many are sampled
KEEP = 1.0
"""What a joint model's own rows weigh, beside the slots."""


class Method(str, Enum):
    """What learns: slots, with matrices of their own, or the whole model with them."""

    adapters = "adapters"
    joint = "joint"


PEAK = {Method.adapters: 4e-3, Method.joint: 3e-4}


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
    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    anchors: int = 32
    samples: int = 1024
    peak: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", Method(self.method))  # a string will do
        for name, value in asdict(self).items():
            if name not in ("method", "seed") and value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, and must be more than 0")


def _parts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], held_out: Sequence[str]) -> list[Tensor]:
    """Token ids to learn from and token ids held out, [n] each.

    Raises:
        ValueError: there are too few.
    """
    tokens = data.encode(tokenizer, texts)
    n_held_out = 0 if held_out else int(len(tokens) * HELD_OUT)
    kept = len(tokens) - n_held_out
    parts = [tokens[:kept], data.encode(tokenizer, held_out) if held_out else tokens[kept:]]
    for part, what, least in zip(parts, ("to learn from", "held out"), (LENGTH, PROMPT), strict=True):
        if len(part) < least:
            raise ValueError(f"the data has {len(part)} tokens {what}, and must have {least} at least")
    return parts


def _check_room(model: PreTrainedModel, recipe: Recipe) -> None:
    """Whether texts fit in a model's positions, and anchors in the texts.

    Raises:
        ValueError: they do not.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    if room < LENGTH:
        raise ValueError(f"the model has {room} positions, and it is trained on texts of {LENGTH} tokens")
    if (places := LENGTH - 1 - recipe.slots) < recipe.anchors:
        raise ValueError(f"texts of {LENGTH} tokens have {max(0, places)} places for {recipe.anchors} anchors")


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


def _own_texts(model: PreTrainedModel, tokens: Tensor, recipe: Recipe, work: Path, fingerprint: str) -> Tensor:
    """[samples, LENGTH] texts that the model writes after prompts of the data, most of them greedily.

    Greedy text repeats itself far more than samples do: a slot that never saw it fails where most users decode. Batches
    are kept as they come.
    """
    parts = []
    prompts = data.random_windows(tokens, recipe.samples, PROMPT, recipe.seed).split(WRITTEN)
    with loop.progress_bar("the model's own texts") as bar:
        for index, prompt in enumerate(bar.track(prompts, task_id=bar.add_task("own", loss=""))):
            path = work / f"own-{fingerprint}-{recipe.samples}-{recipe.seed}-{index:05}.pt"
            if not path.exists():
                loop.save(sample(model, prompt, LENGTH, recipe.seed + index, greedy=index % SAMPLED_IN != 0), path)
            parts.append(torch.load(path, map_location=tokens.device))
    return torch.cat(parts)


def _batch(step: int, train: Tensor, own: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Texts [batch, N] and anchors [P] of a forward: one of four times the data, else the model's own texts."""
    seed = recipe.seed * 1_000_003 + step
    generator = torch.Generator("cpu").manual_seed(seed)
    if step % DATA_IN:
        rows = torch.randint(0, len(own), (recipe.batch,), generator=generator, dtype=torch.int64, device="cpu")
        ids = own[rows.to(own.device)]
    else:
        ids = data.random_windows(train, recipe.batch, own.shape[1], seed)
    places = torch.randperm(own.shape[1] - 1 - recipe.slots, generator=generator, dtype=torch.int64, device="cpu")
    return ids, places[: recipe.anchors].to(ids.device)


def train_adaptive_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    out: Path,
    recipe: Recipe | None = None,
    *,
    held_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Train adaptive tokens of a model, and write them with their figures, curves and card.

    A run that was stopped goes on from its checkpoint when it is started again with the same arguments.

    Args:
        model: on the device to train on; it stays as it is. texts: of the kind that is to be decoded. out: where the
            side files go, and with `joint` the fine-tuned model; what is unfinished is in `out/work`. held_out: texts
            that nothing is learned from; by default the last part of `texts`.

    Returns:
        The figures in `adaptive_tokens.json`.

    Raises:
        ValueError: too few texts, or a model that does not run with slots.
    """
    recipe, work = recipe or Recipe(), out / "work"
    settings = asdict(recipe) | {"method": recipe.method.value}
    joint, device = recipe.method is Method.joint, model.device
    train, unseen = (part.to(device) for part in _parts(tokenizer, texts, held_out))
    _check_room(model, recipe)
    teacher = SlotModel.of(model, AdaptiveTokens.new(model, recipe.slots, rank=0))
    teacher.check()
    learner = copy.deepcopy(model).float().requires_grad_(True) if joint else model
    tokens = AdaptiveTokens.new(learner, recipe.slots, 0 if joint else recipe.rank, recipe.seed)
    slots = SlotModel.of(learner, tokens, trains=joint)

    read = sample_of(model).numpy().tobytes() + train.cpu().numpy().tobytes()
    fingerprint = hashlib.sha256(read).hexdigest()[:12]
    own = _own_texts(model, train, recipe, work, fingerprint)
    prompts = data.random_windows(unseen, N_TEXTS, PROMPT, recipe.seed)
    greedy = sample(model, prompts, LENGTH, recipe.seed, greedy=True)

    def losses(step: int) -> Iterator[Tensor]:
        for part in range(recipe.accumulate):
            ids, anchors = _batch(step * recipe.accumulate + part, train, own, recipe)
            yield loss_of(slots, teacher, ids, anchors) / recipe.accumulate

    fit = loop.fit(
        nn.ModuleList([tokens, learner]) if joint else tokens,
        losses,
        label="adaptive tokens",
        steps=recipe.steps,
        peak=recipe.peak or PEAK[recipe.method],
        checkpoint=work / f"{recipe.method.value}.pt",
        settings=settings | {"model and data": fingerprint},
        validate=lambda: {"accepted": foresight.accepted(slots, greedy[:N_GLANCE], PROMPT - 1)},
        warmup=max(1, min(100, recipe.steps // 10)),
        save_every=max(1, recipe.steps // 20),
    )

    if joint:
        greedy = sample(learner, prompts, LENGTH, recipe.seed, greedy=True)
        learner.to(model.dtype).save_pretrained(out)
        tokenizer.save_pretrained(out)
    tokens.save(out, learner)
    # As they are read again: in float16.
    saved = SlotModel.of(learner, AdaptiveTokens.load(out, learner))
    rows = unseen[:SCORED].split(LENGTH)
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
    adaptive_card.save(out, figures | shares | {"base": str(Base.of(model))})
    return figures
