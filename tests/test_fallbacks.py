"""What `generate()` of a wrapped model leaves to transformers' own loop, and says so."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from specdec.calls import Calls
from specdec.engine.loop import Decoder
from specdec.errors import Unsupported
from specdec.hf.cache import RaggedCache


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
        ("use_cache=False", {"use_cache": False}),
        ("output_attentions", {"return_dict_in_generate": True, "output_attentions": True}),
        ("output_hidden_states", {"return_dict_in_generate": True, "output_hidden_states": True}),
        ("output_attentions", {"num_beams": 2, "return_dict_in_generate": True, "output_attentions": True}),
    ],
)
def test_what_is_not_supported_falls_back(
    reason: str, arguments: dict[str, Any], wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    _same_by_falling_back(wrapped, model, reason, **prompts(RAGGED), max_new_tokens=8, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")  # said once, counted always
        wrapped.generate(**prompts(RAGGED), max_new_tokens=8, **arguments)
    assert list(wrapped.specdec.stats.fallbacks.values()) == [2]


class _StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_custom_criteria_fall_back_in_a_batch(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    criteria = StoppingCriteriaList([_StopAt(13)])
    arguments = {**prompts([6, 4]), "max_new_tokens": 20, "stopping_criteria": criteria}
    out, _ = _same_by_falling_back(wrapped, model, "stopping criterion _StopAt", **arguments)
    assert out.shape[1] == 13


def test_training_mode_falls_back(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    wrapped = wrap(model)
    wrapped.train()
    with pytest.warns(UserWarning, match="training mode"):
        wrapped.generate(**prompts([4]), max_new_tokens=3)
    wrapped.eval()
    same(wrapped, model, **prompts([4]), max_new_tokens=3)


def test_an_assistant_that_does_not_fit_is_done_without(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(model, None)
    expected = model.generate(**prompts([9]), max_new_tokens=6)
    with pytest.warns(UserWarning, match="specdec decodes without the draft: models of type bloom"):
        out = wrapped.generate(**prompts([9]), max_new_tokens=6, assistant_model=tiny("bloom"))
    assert torch.equal(out, expected)
    assert not wrapped.specdec.stats.fallbacks
    assert [*wrapped.specdec.stats.dropped_drafts.values()] == [1]
    assert "decoded without the draft" in str(wrapped.specdec.stats)


def test_out_of_memory_falls_back_and_frees_what_was_made(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    wrapped = wrap(model, "ngram")
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=5)
    decoder = wrapped.specdec._decoders.get("ngram")

    def full(self: RaggedCache, *_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RaggedCache, "allocate", full)
        _same_by_falling_back(
            wrapped, model, f"out of memory: a batch of {len(RAGGED)}", **prompts(RAGGED),
            max_new_tokens=300,
        )  # fmt: skip
    assert wrapped.specdec._decoders.get("ngram") is not decoder
    gone = weakref.ref(decoder)
    del decoder
    assert gone() is None
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=5)


def test_memory_that_lacked_is_free_again_when_transformers_loop_starts(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = wrap(tiny("llama"), "ngram")
    wrapped.generate(**prompts(RAGGED), max_new_tokens=5)
    gone, are_gone = [weakref.ref(part) for part in _parts(wrapped.specdec._decoders.get("ngram"))], []

    def full(self: RaggedCache, *_: Any) -> None:
        raise torch.OutOfMemoryError

    def fall_back(self: Calls, why: Unsupported, parents_loop: Callable[[], Any]) -> Any:
        are_gone.extend(part() is None for part in gone)
        return parents_loop()

    monkeypatch.setattr(RaggedCache, "allocate", full)
    monkeypatch.setattr(Calls, "fall_back", fall_back)
    wrapped.generate(**prompts(RAGGED), max_new_tokens=300)
    assert are_gone == [True] * len(gone)


def _parts(decoder: Decoder) -> tuple[Any, ...]:
    """What holds memory: a decoder's buffers and its view's."""
    view: Any = decoder.target
    return decoder, decoder.buffers, decoder.buffers.state, view, view.cache


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
