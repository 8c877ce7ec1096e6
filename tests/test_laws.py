"""Sampling: each law is transformers' own, and `generate()` follows it whatever drafts."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import specdec
from specdec.engine.laws import SamplingLaw
from specdec.hf.laws import law_of
from specdec.kernels.sampling.row_law import row_law, row_probs

Tiny = Callable[..., PreTrainedModel]

LAWS: dict[str, list[LogitsProcessor]] = {
    "plain": [],
    "temperature": [TemperatureLogitsWarper(0.7)],
    "top-k": [TopKLogitsWarper(3)],
    "top-p": [TopPLogitsWarper(0.8)],
    "min-p": [MinPLogitsWarper(0.2)],
    "typical": [TypicalLogitsWarper(0.6)],
    "all": [
        TemperatureLogitsWarper(1.6), TopKLogitsWarper(6), TopPLogitsWarper(0.9, min_tokens_to_keep=2),
        MinPLogitsWarper(0.05), TypicalLogitsWarper(0.95),
    ],
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.2, "top_k": 0},
    "typical": {"typical_p": 0.6, "top_k": 0},
    "all": {"temperature": 1.6, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95},
}


def _logits(kind: str, vocab: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    if kind == "random":
        return torch.randn(5, vocab, generator=generator).mul(3).to(dtype)
    if kind == "tied":
        return torch.arange(vocab).div(3, rounding_mode="floor").mul(0.5).expand(5, -1).to(dtype)
    return torch.zeros(5, vocab, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "tied", "uniform"])
@pytest.mark.parametrize("law", LAWS)
def test_laws_are_transformers_own(law: str, kind: str, dtype: torch.dtype) -> None:
    ours = law_of(LogitsProcessorList(LAWS[law]), True, torch.device("cpu"))
    for vocab in (8, 10, 33):
        logits = _logits(kind, vocab, dtype)
        expected = LogitsProcessorList(LAWS[law])(None, logits.float())
        assert torch.equal(ours.scores(logits), expected)
        torch.testing.assert_close(row_probs(*ours.rows(logits)), expected.softmax(-1), atol=1e-6, rtol=0)
        assert (ours.knobs is None) == (law in ("typical", "all"))
        # The same law, told by three numbers a row. Of ten equal tokens rounding decides whether 0.8 are eight or nine.
        if ours.knobs is not None and kind != "uniform":
            cuts = row_law(logits, ours.knobs, ours.top_k)
            torch.testing.assert_close(row_probs(logits, ours.knobs, *cuts), expected.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("warper", [TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper])
def test_ties_at_the_threshold_fall_on_the_same_side(warper: Callable[[float], LogitsProcessor]) -> None:
    for vocab, step in itertools.product(range(2, 31), range(1, 20)):
        processors = LogitsProcessorList([warper(step / 20)])
        ours = law_of(processors, True, torch.device("cpu"))
        logits = torch.zeros(1, vocab)
        assert torch.equal(ours.scores(logits), processors(None, logits)), (vocab, step)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_a_law_sums_to_one_at_any_temperature(temperature: float) -> None:
    ours = law_of(LogitsProcessorList([TemperatureLogitsWarper(temperature)]), True, torch.device("cpu"))
    logits = 25 + torch.rand(200, 50, generator=torch.Generator().manual_seed(0)) * temperature
    total = row_probs(*ours.rows(logits)).double().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=2e-6, rtol=0)


def test_laws_that_share_a_step_share_a_key() -> None:
    def key(*warpers: LogitsProcessor, do_sample: bool = True) -> object:
        return law_of(LogitsProcessorList(warpers), do_sample, torch.device("cpu")).key

    assert key(TopPLogitsWarper(0.8)) == key(TopPLogitsWarper(0.3))
    assert key(TemperatureLogitsWarper(0.8)) == key(TemperatureLogitsWarper(0.3))
    different = [
        key(), key(do_sample=False), key(TopPLogitsWarper(0.8)), key(TopPLogitsWarper(0.8, min_tokens_to_keep=2)),
        key(TopKLogitsWarper(3)), key(TopKLogitsWarper(4)), key(TopKLogitsWarper(3), TopPLogitsWarper(0.8)),
        key(TopPLogitsWarper(0.8), TopKLogitsWarper(3)), key(TopKLogitsWarper(3, filter_value=-9.0)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_the_users_processors_are_left_alone() -> None:
    warper = TopPLogitsWarper(0.8)
    law_of(LogitsProcessorList([warper]), True, torch.device("cpu"))
    assert isinstance(warper.top_p, float)


def test_a_copys_warpers_hold_the_copys_tensors() -> None:
    """A recorded step reads those of its own law, into which others' are copied."""
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(3), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)]
    law = law_of(LogitsProcessorList(warpers), True, torch.device("cpu"))
    mine = copy.deepcopy(law)
    temperature, _, top_p, min_p = mine.warpers
    held = [temperature.temperature, top_p.top_p, min_p.min_p, mine.knobs]  # type: ignore[attr-defined]
    assert all(tensor is other for tensor, other in zip(mine.tensors(), held, strict=True))
    assert not {*map(id, mine.tensors())} & {*map(id, law.tensors())}


def test_greedy_choices_are_the_largest_logits() -> None:
    logits = _logits("random", 33, torch.float32)
    assert torch.equal(SamplingLaw(True).choose(logits), logits.argmax(-1))


def test_a_processor_that_looks_at_the_text_is_left_to_the_host() -> None:
    """What drafts are drawn from knows the others."""
    processors = LogitsProcessorList([TopKLogitsWarper(3), RepetitionPenaltyLogitsProcessor(1.2)])
    law = law_of(processors, True, torch.device("cpu"))
    assert law.by_text
    assert (law.scores(torch.randn(5, 9)) > -torch.inf).sum(1).tolist() == [3] * 5
    assert law.key != law_of(processors[:1], True, torch.device("cpu")).key


VOCAB, N_NEW, N_SAMPLES = 6, 3, 4000
PROMPTS = torch.tensor([[0, 0, 3, 1, 2], [4, 2, 1, 4, 2], [1, 5, 1, 5, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def _exact_law(model: PreTrainedModel, prompt: Tensor, warpers: list[LogitsProcessor]) -> Tensor:
    """The law of all texts of `N_NEW` tokens after a prompt, from the plain model and transformers' warpers."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=N_NEW)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, -N_NEW - 1 : -1].float()
    scores = LogitsProcessorList(warpers)(None, logits.flatten(0, 1)).view_as(logits)
    return scores.softmax(-1).double().gather(2, texts[..., None])[..., 0].prod(-1)


@pytest.fixture(scope="module")
def tiny_target(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", vocab_size=VOCAB, num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=4,
                num_attention_heads=2, num_key_value_heads=1, initializer_range=0.35)  # fmt: skip


@pytest.mark.parametrize(
    ("law", "draft"), [*((law, "other") for law in ARGUMENTS), ("plain", "ngram"), ("top-p", "ngram"), ("all", "ngram")]
)
def test_samples_follow_the_exact_law(law: str, draft: str, tiny: Tiny, tiny_target: PreTrainedModel) -> None:
    other = tiny("gpt2", vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3)
    wrapped = specdec.compile(tiny_target, draft="ngram" if draft == "ngram" else other, compile=False, depth=2)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(
            PROMPTS, attention_mask=MASK, do_sample=True, max_new_tokens=N_NEW, num_return_sequences=N_SAMPLES,
            **ARGUMENTS[law],
        )  # fmt: skip
    assert 0 < wrapped.specdec.stats.accepted[0] < wrapped.specdec.stats.proposed[0]
    place_values = VOCAB ** torch.arange(N_NEW).flip(0)
    counts = (out[:, PROMPTS.shape[1] :] * place_values).sum(1).view(len(PROMPTS), N_SAMPLES)
    warpers = [w for name in ("temperature", "top-k", "top-p", "min-p", "typical") for w in _warpers(law, name)]
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        expected = _exact_law(tiny_target, prompt[mask.bool()], warpers) * N_SAMPLES
        observed = counts[row].bincount(minlength=VOCAB**N_NEW)
        assert observed[expected == 0].sum() == 0
        common = expected >= 5
        observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (observed, expected))
        keep = expected > 0
        observed, expected = observed[keep], expected[keep]
        assert len(expected) > 9
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def _warpers(law: str, name: str) -> list[LogitsProcessor]:
    """The warper `generate()` makes of an argument, in the order of transformers."""
    key, kind = {
        "temperature": ("temperature", TemperatureLogitsWarper), "top-k": ("top_k", TopKLogitsWarper),
        "top-p": ("top_p", TopPLogitsWarper), "min-p": ("min_p", MinPLogitsWarper),
        "typical": ("typical_p", TypicalLogitsWarper),
    }[name]  # fmt: skip
    value = ARGUMENTS[law].get(key)
    return [kind(value)] if value else []
