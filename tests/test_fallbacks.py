"""What `generate()` of a wrapped model leaves to transformers' own loop, and says so."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from specdec.cache import RaggedCache


def _same_by_falling_back(wrapped: PreTrainedModel, model: PreTrainedModel, reason: str, **arguments: Any) -> Any:
    torch.manual_seed(3)
    expected = model.generate(**arguments)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=f"specdec runs transformers' own loop: .*{reason}"):
        out = wrapped.generate(**arguments)
    pick = (lambda o: o.sequences) if not isinstance(expected, Tensor) else (lambda o: o)
    assert type(out) is type(expected)
    assert torch.equal(pick(out), pick(expected))
    assert list(wrapped.specdec.stats.fallbacks.values()) == [1]
    return out, expected


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("RepetitionPenaltyLogitsProcessor", {"repetition_penalty": 1.7}),
        ("NoRepeatNGramLogitsProcessor", {"no_repeat_ngram_size": 1}),
        ("MinNewTokensLengthLogitsProcessor", {"min_new_tokens": 4, "eos_token_id": 5, "pad_token_id": 0}),
        ("SuppressTokensLogitsProcessor", {"suppress_tokens": list(range(50))}),
        ("EpsilonLogitsWarper", {"do_sample": True, "epsilon_cutoff": 0.02}),
        ("use_cache=False", {"use_cache": False}),
        ("return_dict_in_generate", {"return_dict_in_generate": True}),
        ("output_scores", {"return_dict_in_generate": True, "output_scores": True}),
    ],
)
def test_what_is_not_supported_falls_back(
    reason: str, arguments: dict[str, Any], wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    out, expected = _same_by_falling_back(wrapped, model, reason, **prompts(RAGGED), max_new_tokens=8, **arguments)
    if "output_scores" in arguments:
        assert all(torch.equal(a, b) for a, b in zip(out.scores, expected.scores, strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")  # said once, counted always
        wrapped.generate(**prompts(RAGGED), max_new_tokens=8, **arguments)
    assert list(wrapped.specdec.stats.fallbacks.values()) == [2]


def test_beams_run_transformers_own_loop(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    arguments = {**prompts([5, 3]), "max_new_tokens": 6, "num_beams": 3}
    assert torch.equal(wrapped.generate(**arguments), model.generate(**arguments))


class _StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class _Negate(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return -scores


def test_custom_criteria_and_processors_fall_back(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    criteria = StoppingCriteriaList([_StopAt(13)])
    arguments = {**prompts([6, 4]), "max_new_tokens": 20, "stopping_criteria": criteria}
    out, _ = _same_by_falling_back(wrapped, model, "stopping criterion _StopAt", **arguments)
    assert out.shape[1] == 13
    wrapped.specdec.stats.reset()

    arguments = {**prompts([6]), "max_new_tokens": 5, "logits_processor": LogitsProcessorList([_Negate()])}
    _same_by_falling_back(wrapped, model, "_Negate", **arguments)


def test_earlier_text_in_the_cache_falls_back(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    ids = prompts([8])["input_ids"]

    def cached() -> Any:
        return model(ids[:, :5], use_cache=True).past_key_values

    expected = model.generate(ids, max_new_tokens=6, past_key_values=cached())
    with pytest.warns(UserWarning, match="earlier text"):
        assert torch.equal(wrapped.generate(ids, max_new_tokens=6, past_key_values=cached()), expected)


def test_a_cache_that_is_handed_in_empty_is_filled(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    ours, theirs = (DynamicCache(config=model.config) for _ in range(2))
    expected = model.generate(**prompts([6]), max_new_tokens=5, past_key_values=theirs)
    assert torch.equal(wrapped.generate(**prompts([6]), max_new_tokens=5, past_key_values=ours), expected)
    assert ours.get_seq_length() == theirs.get_seq_length() > 0
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close((a.keys, a.values), (b.keys, b.values))


def test_training_mode_falls_back(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    wrapped = wrap(model)
    wrapped.train()
    with pytest.warns(UserWarning, match="training mode"):
        wrapped.generate(**prompts([4]), max_new_tokens=3)
    wrapped.eval()
    same(wrapped, model, **prompts([4]), max_new_tokens=3)


def test_an_assistant_that_does_not_fit_falls_back(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(model, None)
    expected = model.generate(**prompts([9]), max_new_tokens=6)
    with pytest.warns(UserWarning, match="specdec runs transformers' own loop: the draft: models of type bloom"):
        out = wrapped.generate(**prompts([9]), max_new_tokens=6, assistant_model=tiny("bloom"))
    assert torch.equal(out, expected)


def test_out_of_memory_falls_back_and_frees_what_was_made(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    wrapped = wrap(model, "ngram")
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=5)
    decoder = wrapped.specdec.decoder("ngram")

    def full(self: RaggedCache, *_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RaggedCache, "allocate", full)
        _same_by_falling_back(
            wrapped, model, f"out of memory for a batch of {len(RAGGED)}", **prompts(RAGGED),
            max_new_tokens=300,
        )  # fmt: skip
    assert wrapped.specdec.decoder("ngram") is not decoder
    gone = weakref.ref(decoder)
    del decoder
    assert gone() is None
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=5)


def test_out_of_memory_after_tokens_were_streamed_is_raised(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another loop would hand out the same tokens again."""
    wrapped = wrap(tiny("llama"), "ngram")
    put: list[int] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            put.extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    def full(self: RaggedCache, *_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RaggedCache, "grow", full)
    with pytest.raises(torch.OutOfMemoryError):
        wrapped.generate(**prompts([4]), max_new_tokens=400, streamer=Streamer())
    assert 200 < len(put) < 400
