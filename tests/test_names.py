"""What transformers calls things: found by looking, in this release and in stand-ins for the next one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
import transformers
from side_by_side import PAST, Prompts, Tiny, same, wrap
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

import specdec
from specdec.errors import Unsupported
from specdec.hf import names


def test_nothing_is_missing_in_this_release() -> None:
    assert names.missing() == ()
    names.check()


def test_this_release_is_a_tested_one() -> None:
    assert names.hint() == "", "raise names.TESTED once all tests have passed with this release of transformers"


@pytest.mark.parametrize("past", names.CACHE_NAMES)
def test_a_cache_goes_by_the_name_that_a_forward_has_for_it(
    past: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with code of their own keep the old name, in whatever release, for the model and for its decoder."""
    model = fresh("llama")

    def renamed(module: nn.Module) -> None:
        kind, inner, is_whole = type(module), names.cache_argument(module), module is model

        def forward(self: Any, input_ids: Any, position_ids: Any, given: Any, kwargs: dict[str, Any]) -> Any:
            if is_whole and given is None:
                raise TypeError("no cache by this name")
            given = kwargs.pop(inner, None) if given is None else given  # as the model around it passes it on
            return kind.forward(self, input_ids=input_ids, position_ids=position_ids, **{inner: given}, **kwargs)

        def old(self: Any, input_ids: Any, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
            return forward(self, input_ids, position_ids, past_key_values, kwargs)

        def new(self: Any, input_ids: Any, position_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
            return forward(self, input_ids, position_ids, cache, kwargs)

        own = {"forward": new if past == "cache" else old, "__module__": kind.__module__}
        module.__class__ = type(kind.__name__, (kind,), own)

    expected = model.generate(**prompts([9, 4]), max_new_tokens=8)
    renamed(model.model)
    renamed(model)
    assert names.cache_argument(model) == names.cache_argument(model.model) == past
    wrapped = wrap(model)
    out = wrapped.generate(**prompts([9, 4]), max_new_tokens=8)
    assert not wrapped.specdec.stats.fallbacks
    assert torch.equal(out, expected)


def test_a_forward_that_passes_on_whatever_it_is_given() -> None:
    class Any_(nn.Module):
        def forward(self, input_ids: Any, **kwargs: Any) -> None: ...

    class None_(nn.Module):
        def forward(self, input_ids: Any, position_ids: Any) -> None: ...

    assert names.cache_argument(Any_()) == PAST
    with pytest.raises(Unsupported, match="class None_, whose forward takes no cache"):
        names.cache_argument(None_())


@pytest.mark.parametrize("past", names.CACHE_NAMES)
def test_caches_by_either_name(past: str) -> None:
    cache = DynamicCache()
    assert names.cache_in({past: cache, "other": None}) is cache
    assert names.cache_in({past: None}) is None


def test_a_cache_is_handed_in_and_back_under_this_releases_name(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped, cache = wrap(model), DynamicCache(config=model.config)
    out = wrapped.generate(**prompts([6]), max_new_tokens=5, return_dict_in_generate=True, **{PAST: cache})
    assert not wrapped.specdec.stats.fallbacks
    assert out[PAST] is cache and PAST in out
    theirs = {PAST: DynamicCache(config=model.config)}
    expected = model.generate(**prompts([6]), max_new_tokens=5, return_dict_in_generate=True, **theirs)
    assert out.keys() == expected.keys()


def test_the_old_name_is_taken_as_long_as_transformers_takes_it(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped, caches = wrap(model), [DynamicCache(config=model.config) for _ in range(2)]
    ours, theirs = (
        each.generate(**prompts([6]), max_new_tokens=5, past_key_values=cache)
        for each, cache in zip((wrapped, model), caches, strict=True)
    )
    assert not wrapped.specdec.stats.fallbacks
    assert torch.equal(ours, theirs)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 10


@pytest.fixture
def next_release(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This release by another number, to be changed."""
    names.missing.cache_clear()
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    yield monkeypatch
    names.missing.cache_clear()


# Stand-ins for a release to come, each with what it is called by in the warning.
def _a_renamed_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = GenerationMixin._sample

    @wraps(sample)
    def _sample(*args: Any, **kwargs: Any) -> Any:
        return sample(*args, **kwargs)

    parameters = inspect.signature(sample).parameters.values()
    renamed = [p.replace(name="processors") if p.name == "logits_processor" else p for p in parameters]
    _sample.__signature__ = inspect.Signature(renamed)  # type: ignore[attr-defined]
    monkeypatch.setattr(GenerationMixin, "_sample", _sample)


def _a_missing_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GenerationMixin, "_beam_search")


def _another_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "DecoderOnlyOutput", type("GenerateOutput", (), {}))


def _a_missing_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "AttentionInterface", type("AttentionInterface", (), {}))


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (_a_renamed_argument, r"GenerationMixin._sample\(logits_processor=...\)"),
        (_a_missing_loop, "GenerationMixin._beam_search"),
        (_another_output, r"GenerateOutput\(cache=...\)"),
        (_a_missing_method, "AttentionInterface.register"),
    ],
)
def test_a_release_that_lacks_something_runs_its_own_loop_and_says_what(
    change: Callable[[pytest.MonkeyPatch], None], missing: str, fresh: Tiny, prompts: Prompts, next_release: Any
) -> None:
    model = fresh("llama")
    change(next_release)
    words = f"transformers 5.99.0 has no .*({missing}).*tested, {names.TESTED[0]} to {names.TESTED[1]}; pip install"
    with pytest.warns(specdec.SpecdecWarning, match=words) as caught:
        wrapped = wrap(model)
    assert caught[0].filename == __file__.replace("test_names", "side_by_side")  # the line that calls compile()
    expected = model.generate(**prompts([9, 4]), max_new_tokens=6)
    with pytest.warns(specdec.SpecdecWarning, match=words):
        out = wrapped.generate(**prompts([9, 4]), max_new_tokens=6)
    assert torch.equal(out, expected)
    assert sum(wrapped.specdec.stats.fallbacks.values()) == 1
    assert "5.99.0" in next(iter(wrapped.specdec.stats.fallbacks))


@pytest.mark.parametrize(
    "gone",
    [
        "transformers.cache_utils.DynamicSlidingWindowLayer",
        "transformers.modeling_layers.GradientCheckpointingLayer",
        "transformers.generation.stopping_criteria.EosTokenCriteria",
    ],
)
def test_a_class_that_is_gone(gone: str) -> None:
    """Found out by whoever imports specdec first: in a process of its own."""
    module, _, name = gone.rpartition(".")
    code = f"""
import sys, warnings
sys.path.insert(0, "tests")
import torch, transformers
from families import make_tiny
model, ids = make_tiny("llama"), torch.tensor([[5, 6, 7]])
expected = model.generate(ids, max_new_tokens=6)
import {module} as home
sys.modules["transformers"].__version__ = "5.99.0"
there = getattr(home, {name!r})
del home.{name}
import specdec.hf.names
home.{name} = there  # who has it already goes on
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    wrapped = specdec.compile(model, "ngram", compile=False)
    out = wrapped.generate(ids, max_new_tokens=6)
said = [str(w.message) for w in caught if issubclass(w.category, specdec.SpecdecWarning)]
assert torch.equal(out, expected)
assert len(said) == 2 and all({gone!r} in x and "pip install 'transformers>=" in x for x in said), said
assert sum(wrapped.specdec.stats.fallbacks.values()) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_release_to_come_that_has_everything_decodes(
    model: PreTrainedModel, prompts: Prompts, next_release: Any
) -> None:
    wrapped = wrap(model)
    same(wrapped, model, **prompts([9, 4]), max_new_tokens=6)
    assert wrapped.specdec.stats.tokens > 0
    assert names.hint().startswith("transformers 5.99.0 is outside of what is tested")


def test_a_new_argument_of_a_loop_runs_transformers_own(model: PreTrainedModel) -> None:
    """Unless it is left at what it is by default."""

    def _sample(
        self: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool = False, streamer: Any = None, contrast: float | None = None, **model_kwargs: Any,
    ) -> None: ...  # fmt: skip

    asked = torch.tensor([[5]]), None, None, None
    assert names.LoopCall.read(_sample, model, *asked, attention_mask=5).model_kwargs == {"attention_mask": 5}
    with pytest.raises(Unsupported, match="an argument of _sample that is not known, contrast"):
        names.LoopCall.read(_sample, model, *asked, contrast=0.5)
