"""warmup(): what it takes, what it leaves behind, and what happens beside it."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, same, wrap
from transformers import PreTrainedModel

import specdec
from specdec.engine.loop import Decoder

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_warmup_leaves_no_trace(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    seeds = wrapped.specdec.seeds = torch.arange(len(RAGGED))
    for settings in ({}, {"do_sample": True, "top_p": 0.9}):
        wrapped.specdec.warmup(batch_sizes=(2, 3), max_length=40, **settings)
    assert wrapped.specdec.stats.to_dict() == specdec.engine.stats.Stats().to_dict()
    assert torch.equal(wrapped.specdec.seeds, seeds)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=5)


@pytest.mark.parametrize("given", [{"batch_sizes": ()}, {"batch_sizes": (2, 0)}, {"max_length": 1}])
def test_a_warmup_of_nothing_is_named(model: PreTrainedModel, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        wrap(model).specdec.warmup(**given)


def test_a_warmup_takes_what_generate_takes(model: PreTrainedModel) -> None:
    wrapped = wrap(model)
    with pytest.raises(ValueError, match="do_smaple"):
        wrapped.specdec.warmup(do_smaple=True)
    wrapped.generate(IDS, max_new_tokens=2)  # and is over
    assert wrapped.specdec.stats.tokens == 4


def test_without_rich_nothing_is_shown(
    model: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    wrapped = wrap(model, model)
    wrapped.specdec.warmup(max_length=20)
    wrapped.specdec.tune(**prompts([5]), max_nodes=2, max_depth=1, max_new_tokens=6)
    assert len([*specdec.generate_many(wrapped, [[5, 6], [7]], max_new_tokens=3)]) == 2
    assert capsys.readouterr().err == ""


def test_a_warmup_takes_no_second_length(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no max_new_tokens"):
        wrap(model).specdec.warmup(max_new_tokens=5)


def test_a_warmup_that_falls_back_says_so_and_decodes_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    sample = type(model)._sample
    monkeypatch.setattr(type(model), "_sample", wraps(sample)(lambda *_, **__: forwards.append(1)))
    with pytest.warns(UserWarning, match="transformers' own loop: a model with a _sample of its own"):
        wrap(model).specdec.warmup()
    assert not forwards


def test_a_warmup_stays_within_the_models_positions(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("gpt2")  # 128 positions
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        wrap(model).specdec.warmup(max_length=512)


def test_a_call_beside_a_warmup_is_not_a_warmup(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's generate() while one warms up: transformers' own loop, or ours, but all its tokens."""
    wrapped = wrap(model)
    expected = model.generate(IDS, max_new_tokens=6)
    outputs = []
    warm_up = Decoder.warm_up

    def slow(*arguments: Any) -> None:
        thread = threading.Thread(target=lambda: outputs.append(wrapped.generate(IDS, max_new_tokens=6)))
        thread.start()
        thread.join()
        warm_up(*arguments)

    monkeypatch.setattr(Decoder, "warm_up", slow)
    with pytest.warns(UserWarning, match="another generate"):
        wrapped.specdec.warmup()
    assert torch.equal(outputs[0], expected)
