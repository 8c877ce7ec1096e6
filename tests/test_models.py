"""Six families in every way of greedy decoding: the very tokens of transformers' own `generate()`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.fallbacks import remedy

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"]
DRAFTS = ["none", "ngram", "other", "self"]
RAGGED = [17, 3, 1, 9]

Tiny = Callable[..., PreTrainedModel]
Prompts = Callable[..., dict[str, Tensor]]


def _draft(kind: str, family: str, tiny: Tiny) -> Any:
    drafts = {"none": None, "ngram": "ngram", "other": tiny("llama", seed=7, num_hidden_layers=1), "self": tiny(family)}
    return drafts[kind]


def _wrap(model: PreTrainedModel, draft: Any, **options: Any) -> PreTrainedModel:
    return specdec.compile(model, draft=draft, compile=False, adapt=False, **options)


def _generate_without_fallback(wrapped: PreTrainedModel, **arguments: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = wrapped.generate(**arguments)
    assert not wrapped.specdec.stats.fallbacks
    assert wrapped.specdec.stats.steps > 0
    return out


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, draft: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny(family)
    for lengths in ([12], RAGGED):
        wrapped = _wrap(model, _draft(draft, family, tiny))
        inputs = prompts(lengths)
        expected = model.generate(**inputs, max_new_tokens=40)
        assert len(set(expected[0, -40:].tolist())) > 8, "the random model says too little to test anything"
        assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=40), expected)
        stats = wrapped.specdec.stats
        if draft == "self":
            assert stats.acceptance_by_position == [1.0] * 5
            assert stats.steps == 7  # 40 tokens at six a step
        if draft == "none":
            assert stats.steps == 40


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_few_tokens(family: str, max_new_tokens: int, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny(family)
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=max_new_tokens)
    for draft in DRAFTS:
        wrapped = _wrap(model, _draft(draft, family, tiny))
        assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=max_new_tokens), expected)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_text(family: str, draft: str, tiny: Tiny, prompts: Prompts) -> None:
    """EOS ids that occur: the rows end at different places and are padded as transformers pads them."""
    model = tiny(family)
    inputs = prompts(RAGGED)
    free = model.generate(**inputs, max_new_tokens=30)[:, max(RAGGED) :].tolist()
    eos = [free[0][0], free[1][11], free[2][20]]
    arguments = {**inputs, "max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0}
    expected = model.generate(**arguments)
    assert len({next((i for i, t in enumerate(row) if t in eos), 30) for row in free}) > 1
    wrapped = _wrap(model, _draft(draft, family, tiny))
    assert torch.equal(_generate_without_fallback(wrapped, **arguments), expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_window_of_these_tests_matters(family: str, tiny: Tiny, prompts: Prompts) -> None:
    inputs = prompts([12])
    narrow, wide = (tiny(family, **o) for o in ({}, {"sliding_window": 100}))
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(narrow.generate(**inputs, max_new_tokens=20), wide.generate(**inputs, max_new_tokens=20))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_past_the_first_capacity(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """The cache grows while the text does, and finished samples leave it."""
    longer = {"n_positions": 400} if family == "gpt2" else {"max_position_embeddings": 400}
    model = tiny(family, **longer)
    inputs = prompts([200, 240])
    expected = model.generate(**inputs, max_new_tokens=60)
    wrapped = _wrap(model, model)
    assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=60), expected)
    assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 5


@pytest.mark.parametrize("depth", [1, 3, 12])
@pytest.mark.parametrize("draft", ["ngram", "other", "self"])
def test_depths(depth: int, draft: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=20)
    wrapped = _wrap(model, _draft(draft, "llama", tiny), depth=depth)
    assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=20), expected)
    assert len(wrapped.specdec.stats.proposed) == depth


def test_the_words_of_the_text_are_looked_up(tiny: Tiny) -> None:
    """A text that repeats itself is drafted from itself, and what is accepted saves steps."""
    model = tiny("llama")
    text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=30)
    again = torch.cat([text, text[:, :5]], 1)
    expected = model.generate(again, max_new_tokens=20)
    wrapped = _wrap(model, "ngram")
    assert torch.equal(_generate_without_fallback(wrapped, inputs=again, max_new_tokens=20), expected)
    assert wrapped.specdec.stats.proposed[0] > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_speculate_fully_from_themselves(
    family: str, dtype: torch.dtype, fresh: Tiny, prompts: Prompts
) -> None:
    model = fresh(family).to(dtype)
    inputs = prompts([12])
    wrapped = _wrap(model, model)
    out = _generate_without_fallback(wrapped, **inputs, max_new_tokens=24)
    assert torch.equal(out[:, :12], inputs["input_ids"])
    if dtype == torch.float64:
        assert torch.equal(out, model.generate(**inputs, max_new_tokens=24))
        assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 5


@pytest.mark.parametrize("family", ["bloom", "mamba"])
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_unsupported_families_fall_back_and_say_so_once(
    family: str, draft: str, tiny: Tiny, prompts: Prompts, recwarn: pytest.WarningsRecorder
) -> None:
    model = tiny(family)
    inputs = prompts([12])
    expected = model.generate(**inputs, max_new_tokens=8)
    wrapped = _wrap(model, _draft(draft, family, tiny))
    recwarn.clear()
    for _ in range(2):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8), expected)
    ours = [str(w.message) for w in recwarn if "specdec" in str(w.message)]
    reason = f"models of type {family}, whose forward takes no position_ids"
    assert ours == [f"specdec runs transformers' own loop: {reason}. {remedy(reason)}"]
    assert dict(wrapped.specdec.stats.fallbacks) == {reason: 2}


@pytest.mark.parametrize("draft", DRAFTS)
def test_gpt2_up_to_its_last_position(draft: str, tiny: Tiny, prompts: Prompts) -> None:
    """Drafts would reach past the learned positions; the text must not care."""
    model = tiny("gpt2")
    inputs = prompts([108, 90])
    expected = model.generate(**inputs, max_new_tokens=20)
    assert expected.shape[1] == model.config.n_positions
    wrapped = _wrap(model, _draft(draft, "gpt2", tiny))
    assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=20), expected)


def test_a_draft_of_a_shorter_context_than_the_text(tiny: Tiny, prompts: Prompts) -> None:
    model, draft = tiny("llama"), tiny("gpt2", seed=3, n_positions=16)
    inputs = prompts([10, 30])
    expected = model.generate(**inputs, max_new_tokens=20)
    assert torch.equal(_generate_without_fallback(_wrap(model, draft), **inputs, max_new_tokens=20), expected)


def test_dynamic_rope_runs_transformers_loop(fresh: Tiny, prompts: Prompts) -> None:
    """Its frequencies depend on the longest text of a forward: a neighbour or a draft would change them."""
    rope = {"rope_type": "dynamic", "factor": 1000.0, "rope_theta": 10000.0}
    model = fresh("llama", max_position_embeddings=64, rope_parameters=rope)
    inputs = prompts([50])
    expected = model.generate(**inputs, max_new_tokens=24)
    with pytest.warns(UserWarning, match="dynamic rope"):
        assert torch.equal(_wrap(model, "ngram").generate(**inputs, max_new_tokens=24), expected)
    with pytest.raises(ValueError, match="dynamic rope"):
        _wrap(fresh("llama"), model)


def test_dynamic_rope_of_some_layers_runs_transformers_loop(fresh: Tiny, prompts: Prompts) -> None:
    plain, dynamic = ({"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} for kind in ("linear", "dynamic"))
    model = fresh("gemma3_text", rope_parameters={"full_attention": dynamic, "sliding_attention": plain})
    with pytest.warns(UserWarning, match="dynamic rope"):
        _wrap(model, "ngram").generate(**prompts([5]), max_new_tokens=3)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_rope(rope: dict[str, Any], fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=20)
    wrapped = _wrap(model, model)
    assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=20), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_users_attention_implementation_does_not_matter(attention: str, fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=20)
    model.set_attn_implementation(attention)
    wrapped = _wrap(model, model)
    assert torch.equal(_generate_without_fallback(wrapped, **inputs, max_new_tokens=20), expected)
    assert model.config._attn_implementation == attention
