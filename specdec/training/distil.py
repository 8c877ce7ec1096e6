"""Distil a small draft from a target (DistillSpec, Zhou et al., arXiv 2310.08461).

The draft learns the target's law at every position of given text and of texts that the target wrote itself. What the
target says is computed once and kept (``specdec.training.texts``): a step costs the same whatever the target's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec.training import data, loop, texts
from specdec.training.evaluate import GLANCE, LONG_WINDOW, WINDOW, agreement
from specdec.training.objectives import Objective
from specdec.training.texts import Texts

PROMPT, SAMPLE = 32, 256  # the target's own samples: tokens given, tokens in all
LONG_SHARE = 6  # one in so many long windows of the text is kept
MIX = ("text", "own", "text", "text", "own", "text", "long")  # what steps see, in turns


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained.

    Attributes:
        batch: tokens of a step, at least one row of each part.
        accumulate: parts that a step's gradient is added up from.
        samples: texts that the target writes.
        peak: the highest learning rate.
        forward_share: of the steps, those first ones that minimise the forward KL, whatever the objective: a new draft
            puts almost nothing on the target's tokens, and other objectives then have almost no gradient.
    """

    objective: Objective = Objective.tv
    steps: int = 6500
    batch: int = 2048
    accumulate: int = 1
    samples: int = 1024
    peak: float = 4e-3
    seed: int = 0
    forward_share: float = 0.5

    @property
    def minimised(self) -> str:
        """In words, for a card."""
        begins = f"{Objective.forward.formula} in the first {self.forward_share:.0%} of the steps, then "
        return (begins if self.forward_share and self.objective != Objective.forward else "") + self.objective.formula


def new_draft(target: PreTrainedModel, layers: int = 2) -> LlamaForCausalLM:
    """A small Llama for a target, 3/8 as wide, its embeddings begun from the target's; 1.0M parameters for the bundled.

    Its embeddings are not tied: a table to look rows up in costs no time, and what a token foretells is better known.
    """
    config = target.config.get_text_config()
    scale = max(1, round(config.hidden_size / 256))
    draft = llama(
        config.vocab_size, 96 * scale, layers, 3 * scale, scale, 256 * scale, positions=positions(target), tied=False
    )
    share_embeddings(target, draft)
    return draft


def llama(
    vocabulary: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    *,
    positions: int = LONG_WINDOW,
    tied: bool = True,
) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).float()


@torch.no_grad()
def share_embeddings(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Start the draft's embeddings, input and output, from the target's in their main directions."""
    for of in (PreTrainedModel.get_input_embeddings, PreTrainedModel.get_output_embeddings):
        rows = of(target).weight.float()
        directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(-1)[:, : draft.config.hidden_size]
        of(draft).weight[:, : directions.shape[1]] = (rows @ directions).to(draft.device)


def rows_of_text(tokens: torch.Tensor, length: int, first: int | None) -> torch.Tensor:
    """A text ``[tokens]``, but for its end, as ``[rows, length]``; each row begins with ``first``, if given."""
    own = length - (first is not None)
    rows = tokens[: len(tokens) // own * own].view(-1, own)
    return rows if first is None else torch.cat([rows.new_full((len(rows), 1), first), rows], 1)


def windows(tokens: torch.Tensor, count: int, length: int, seed: int, first: int | None) -> torch.Tensor:
    """``[count, length]`` of a text at places given by ``seed`` alone, each begun with ``first``, if given."""
    found = data.random_windows(tokens, count, length - (first is not None), seed)
    return rows_of_text(found.flatten(), length, first)


def collect(
    target: PreTrainedModel, tokens: torch.Tensor, first: int | None, recipe: Recipe, work: Path
) -> dict[str, Texts]:
    """The texts of a run, by their names in ``MIX``.

    Of the target's own, every other file is greedy: greedy text repeats itself far more than samples do, and a draft
    that never saw it fails where most users decode.
    """

    def write(prompts: torch.Tensor, index: int) -> torch.Tensor:
        return texts.sample(target, prompts, SAMPLE, recipe.seed + index, greedy=index % 2 == 1)

    length = min(LONG_WINDOW, positions(target), len(tokens))
    prompts = windows(tokens, recipe.samples, PROMPT, recipe.seed, first)
    collected = partial(texts.collect, target, work / "texts")
    return {
        "text": collected("text", rows_of_text(tokens, min(WINDOW, length), first)),
        "long": collected("long", rows_of_text(tokens, length, first)[::LONG_SHARE]),
        "own": collected("own", prompts, write),
    }


def parts_of_step(found: dict[str, Texts], recipe: Recipe, step: int) -> Iterator[Texts]:
    """The rows of a step, drawn by its number alone, in ``accumulate`` parts."""
    drawn = found[MIX[step % len(MIX)]]
    count = recipe.accumulate * max(1, recipe.batch // drawn.ids.shape[1] // recipe.accumulate)
    generator = torch.Generator("cpu").manual_seed(recipe.seed * 1_000_003 + step)
    rows = torch.randint(0, len(drawn), (count,), generator=generator, dtype=torch.int64, device="cpu")
    for part in rows.to(drawn.ids.device).tensor_split(recipe.accumulate):
        yield Texts(**{name: values[part] for name, values in vars(drawn).items()})


def distil(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Recipe,
    work: Path,
    *,
    first: int | None = None,
) -> loop.Fit:
    """Train ``draft``, float32, in place.

    Args:
        tokens: text to learn from, at least ``WINDOW`` tokens. held_out: text to score, as much.
        work: folder of the target's texts, the checkpoint ``draft.pt`` and the curve ``draft.png``. A run that was
            stopped goes on from there, and ends with the same weights as one that was not.
        first: the token that the target expects at the beginning of every text, if any.

    Raises:
        ValueError: the draft has other tokens than the target, or ``work`` holds another run.
        KeyboardInterrupt: Ctrl-C; what is done is saved.
    """
    theirs, ours = (model.config.get_text_config().vocab_size for model in (target, draft))
    if theirs != ours:
        raise ValueError(f"the draft has {ours} tokens and the target {theirs}: they must share a vocabulary")
    made_of = {"text": fingerprint([tokens]), "target": fingerprint(target.parameters()), "first": first}
    start = f"{draft.name_or_path or 'new'}, {draft.num_parameters()} parameters"
    loop.settle(work / "draft.json", asdict(recipe) | made_of | {"draft": start, "objective": recipe.objective.value})
    found = collect(target, tokens, first, recipe, work)
    scored = rows_of_text(held_out[:GLANCE], min(WINDOW, positions(target), len(held_out)), first)

    def losses(step: int) -> Iterator[torch.Tensor]:
        begins = step < recipe.forward_share * recipe.steps
        distance = (Objective.forward if begins else recipe.objective).function
        for part in parts_of_step(found, recipe, step):
            log_q = texts.coarse(texts.forward(draft, part.ids), part.tokens.long())
            yield distance(part.log_p.float(), log_q) / recipe.accumulate

    return loop.fit(
        draft,
        losses,
        label="draft",
        steps=recipe.steps,
        peak=recipe.peak,
        checkpoint=work / "draft.pt",
        validate=lambda: agreement(target, draft, scored),
    )


def measure(
    target: PreTrainedModel, draft: PreTrainedModel, held_out: torch.Tensor, seed: int, first: int | None = None
) -> dict[str, dict[str, float]]:
    """How well a draft foresees its target on held-out text, and on what the target writes after prompts from there."""
    rows = rows_of_text(held_out, min(WINDOW, positions(target), len(held_out)), first)
    written = texts.sample(target, windows(held_out, 128, PROMPT, seed, first), SAMPLE, seed + 1)
    return {"held_out": agreement(target, draft, rows), "own": agreement(target, draft, written, skip=PROMPT - 1)}


def positions(model: PreTrainedModel) -> int:
    """The longest text that a model has positions for."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", LONG_WINDOW))


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """What tells tensors from others: a hash of their bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
