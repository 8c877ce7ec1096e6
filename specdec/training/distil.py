"""Distil a small draft from a target (DistillSpec, Zhou et al., arXiv 2310.08461).

The draft learns the target's law at every position of given text and of texts that the target wrote itself. What the
target says is computed once and kept (``specdec.training.texts``): a step costs the same whatever the target's size.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        batch: tokens of a step, at least one row. accumulate: parts that a step's rows are computed in.
        samples: texts that the target writes. peak: the highest learning rate.
    """

    objective: Objective = Objective.tv
    steps: int = 6000
    batch: int = 4096
    accumulate: int = 1
    samples: int = 2048
    peak: float = 4e-3
    seed: int = 0


def new_draft(vocabulary: int, scale: int = 1, layers: int = 2) -> LlamaForCausalLM:
    """A freshly initialised draft: 1.0M parameters over 4096 tokens at scale 1; the scale multiplies the widths.

    Its embeddings are not tied: a table to look rows up in costs no time, and what a token foretells is better known.
    """
    return llama(vocabulary, 96 * scale, layers, 3 * scale, scale, 256 * scale, tied=False)


def llama(
    vocabulary: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    *,
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
        max_position_embeddings=LONG_WINDOW,
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
        of(draft).weight[:, : directions.shape[1]] = rows @ directions


def rows_of_text(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """All of a text ``[tokens]`` as ``[rows, length]``, but for its end."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def collect(target: PreTrainedModel, tokens: torch.Tensor, recipe: Recipe, work: Path) -> dict[str, Texts]:
    """The texts of a run, by their names in ``MIX``.

    Of the target's own, every other file is greedy: greedy text repeats itself far more than samples do, and a draft
    that never saw it fails where most users decode.
    """

    def write(prompts: torch.Tensor, index: int) -> torch.Tensor:
        return texts.sample(target, prompts, SAMPLE, recipe.seed + index, greedy=index % 2 == 1)

    prompts = data.random_windows(tokens, recipe.samples, PROMPT, recipe.seed)
    collected = partial(texts.collect, target, work / "texts")
    return {
        "text": collected("text", rows_of_text(tokens, WINDOW)),
        "long": collected("long", rows_of_text(tokens, min(LONG_WINDOW, len(tokens)))[::LONG_SHARE]),
        "own": collected("own", prompts, write),
    }


def parts_of_step(found: dict[str, Texts], recipe: Recipe, step: int) -> Iterator[Texts]:
    """The rows of a step, drawn by its number alone, in ``accumulate`` parts."""
    drawn = found[MIX[step % len(MIX)]]
    count = max(recipe.batch // drawn.ids.shape[1], recipe.accumulate)
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
    stop_at: int | None = None,
) -> loop.Fit:
    """Train ``draft``, float32, in place.

    Args:
        tokens: text to learn from, at least ``WINDOW`` tokens; ``held_out``: text to score.
        work: folder of the target's texts and the checkpoint ``draft.pt``. A run that was stopped goes on from there,
            and ends with the same weights as one that was not.
        stop_at: stop early, with a checkpoint, after this step count.
    """
    objective = recipe.objective.function
    found = collect(target, tokens, recipe, work)

    def losses(step: int) -> Iterator[torch.Tensor]:
        for part in parts_of_step(found, recipe, step):
            log_q = texts.coarse(texts.forward(draft, part.ids), part.tokens.long())
            yield objective(part.log_p.float(), log_q) / recipe.accumulate

    return loop.fit(
        draft,
        losses,
        label="draft",
        steps=recipe.steps,
        peak=recipe.peak,
        checkpoint=work / "draft.pt",
        stop_at=stop_at,
        settings=asdict(recipe) | {"objective": recipe.objective.value, "tokens": len(tokens)},
        validate=lambda: agreement(target, draft, held_out[:GLANCE].split(WINDOW)),
    )
