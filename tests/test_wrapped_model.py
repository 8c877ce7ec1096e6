"""A wrapped model as an object: beside the original and others, in threads, copied, saved, with other weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from transformers import AutoModelForCausalLM, PreTrainedModel


def test_the_original_model_is_unchanged(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("gemma2")
    kind, config = type(model), copy.deepcopy(model.config.to_dict())
    forward = {name: vars(m).get("forward") for name, m in model.named_modules()}
    expected = model.generate(**prompts(RAGGED), max_new_tokens=8)
    logits = model(prompts(RAGGED)["input_ids"]).logits
    wrapped = wrap(model, model)
    wrapped.generate(**prompts(RAGGED), max_new_tokens=8)
    assert type(model) is kind
    assert not hasattr(model, "specdec")
    assert model.config.to_dict() == config
    assert not hasattr(model.config, "specdec_cache")
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == forward
    assert torch.equal(model.generate(**prompts(RAGGED), max_new_tokens=8), expected)
    assert torch.equal(model(prompts(RAGGED)["input_ids"]).logits, logits)
    assert isinstance(wrapped, kind)
    assert torch.equal(wrapped(prompts(RAGGED)["input_ids"]).logits, logits)
    assert all(a is b for a, b in zip(model.parameters(), wrapped.parameters(), strict=True))


def test_a_class_is_wrapped_once_and_not_kept(fresh: Tiny) -> None:
    models = fresh("llama"), fresh("llama")
    own: Any = type("Own", (type(models[0]),), {})
    for model in models:
        model.__class__ = own
    first, second = map(wrap, models)
    assert type(first) is type(second)
    kinds = weakref.ref(own), weakref.ref(type(first))
    del models, model, own, first, second
    gc.collect()
    assert [kind() for kind in kinds] == [None, None]


def test_two_wrapped_models_interleaved(tiny: Tiny, prompts: Prompts) -> None:
    models = [tiny("llama"), tiny("gpt2"), tiny("llama")]
    wrapped = [wrap(models[0], models[0]), wrap(models[1], models[0]), wrap(models[2])]
    expected = [m.generate(**prompts(RAGGED), max_new_tokens=8) for m in models]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        for i in order:
            assert torch.equal(wrapped[i].generate(**prompts(RAGGED), max_new_tokens=8), expected[i])


@pytest.mark.filterwarnings("ignore:specdec runs transformers' own loop. another generate")
@pytest.mark.parametrize("shared", [False, True])
def test_threads(shared: bool, tiny: Tiny, prompts: Prompts) -> None:
    models = [tiny("llama"), tiny("llama" if shared else "qwen3")]
    first = wrap(models[0], models[0])
    wrapped = [first, first if shared else wrap(models[1], models[0])]
    expected = [m.generate(**prompts(RAGGED, seed=i), max_new_tokens=16) for i, m in enumerate(models)]
    results: list[list[bool]] = [[], []]

    def work(i: int) -> None:
        for _ in range(4):
            out = wrapped[i].generate(**prompts(RAGGED, seed=i), max_new_tokens=16)
            results[i].append(torch.equal(out, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 4, [True] * 4]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_wrapped_and_stand_alone(make: Callable[[Any], Any], fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    wrapped = wrap(model, model, depth=3)
    inputs = prompts(RAGGED)
    expected = wrapped.generate(**inputs, max_new_tokens=8)
    other = make(wrapped)
    assert type(other) is type(wrapped)
    assert other.specdec.config == wrapped.specdec.config
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other.generate(**inputs, max_new_tokens=8), expected)
    assert other.specdec.stats.acceptance_by_position == [1.0] * 3
    assert not torch.equal(wrapped.generate(**inputs, max_new_tokens=8), expected)


def test_saving(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts, tmp_path: Path) -> None:
    wrapped.generate(**prompts([3]), max_new_tokens=2)
    wrapped.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == wrapped.state_dict().keys()
    same(wrapped, loaded, **prompts(RAGGED), max_new_tokens=6)


def test_replaced_weights_are_seen(fresh: Tiny, prompts: Prompts) -> None:
    model, draft = fresh("llama"), fresh("llama")
    wrapped = wrap(model, draft)
    inputs = prompts(RAGGED)
    first = wrapped.generate(**inputs, max_new_tokens=8)
    other = fresh("llama", seed=1)

    model.load_state_dict(other.state_dict())
    second = same(wrapped, other, **inputs, max_new_tokens=8)
    assert not torch.equal(first, second)

    third_model = fresh("llama", seed=2)
    for name, parameter in third_model.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(wrapped.get_submodule(path), leaf, torch.nn.Parameter(parameter.detach().clone()))
    third = same(wrapped, third_model, **inputs, max_new_tokens=8)
    assert not torch.equal(second, third)

    for module in (draft, model):  # the draft too: it accepts everything only if it is read anew
        for name, parameter in other.named_parameters():
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, torch.nn.Parameter(parameter.detach().clone()))
    wrapped.specdec.stats.reset()
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8), second)
    assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 5

    model.double()
    other.double()
    same(wrapped, other, **inputs, max_new_tokens=8)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_settings_of_the_config_that_change_after_a_call(family: str, fresh: Tiny, prompts: Prompts) -> None:
    name = {"gemma2": "final_logit_softcapping", "granite": "logits_scaling"}[family]
    model = fresh(family)
    wrapped = wrap(model, model)
    same(wrapped, model, **prompts([6]), max_new_tokens=5)
    setattr(model.config, name, 3.0)
    asked = {**prompts([6]), "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = wrapped.generate(**asked), model.generate(**asked)
    assert not wrapped.specdec.stats.fallbacks
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    wrapped.config = copy.deepcopy(model.config)
    with pytest.warns(UserWarning, match="given another config"):
        wrapped.generate(**prompts([6]), max_new_tokens=2)


def test_greedy_calls_leave_torchs_generator_alone(fresh: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(fresh("llama"))
    before = torch.random.get_rng_state()
    wrapped.generate(**prompts([6]), max_new_tokens=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert wrapped.specdec.seeds is None
    wrapped.generate(**prompts([6]), max_new_tokens=8, do_sample=True)
    assert not torch.equal(torch.random.get_rng_state(), before)
    assert len(wrapped.specdec.seeds) == 1


def test_seeds_are_whole_numbers_and_can_be_taken_back(fresh: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(fresh("llama"))
    with pytest.raises(TypeError, match=r"must be whole numbers .*, got \[1\.5\]"):
        wrapped.specdec.seeds = [1.5]
    wrapped.specdec.seeds = [1, 2, 3]
    wrapped.specdec.seeds = None
    wrapped.generate(**prompts([6]), max_new_tokens=3, do_sample=True)
    assert len(wrapped.specdec.seeds) == 1
