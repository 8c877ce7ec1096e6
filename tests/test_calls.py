"""Calls, one after the other: what each leaves behind, whose settings count, what is said of it and where."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from side_by_side import PAST, RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)

import specdec
import specdec.engine.step
from specdec import SpecdecWarning, TokenTree, zoo
from specdec.decoders import N_NAMED
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.vocabulary import ForeignDraft
from specdec.hf import names

NEW = 6


@contextmanager
def said(*words: str) -> Iterator[None]:
    """So many warnings of ours, in this order, each with its word, and at a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [w for w in caught if issubclass(w.category, SpecdecWarning)]
    assert [word in str(w.message) for word, w in zip(words, ours, strict=True)] == [True] * len(words), ours
    assert {w.filename for w in ours} <= {__file__}


# What a call names is kept a while, not for ever.


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Memory must not wait for Python to look for it."""
    gc.disable()
    yield
    gc.enable()


def _named(wrapped: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor], **given: Any) -> list[Any]:
    """Weak references to all that a call with a draft of its own has made."""
    same(wrapped, model, **inputs, max_new_tokens=NEW, **given)
    decoder = [*wrapped.specdec._decoders.kept.values()][-1]
    parts = [decoder, decoder.drafter, decoder.steps, decoder.buffers, decoder.buffers.state]
    if view := getattr(decoder.drafter, "view", None):
        parts += [given["assistant_model"], view, view.module, view.cache, *view.cache.layers]
        parts += [view.cache.layers[0].keys.untyped_storage()]
    return [weakref.ref(part) for part in parts]


@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_few_drafts_that_calls_name_are_kept(
    draft: str, fresh: Tiny, tiny: Tiny, prompts: Prompts, without_collector: None
) -> None:
    model, inputs = tiny("llama"), prompts([6])
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1))
    wrapped.generate(**inputs, max_new_tokens=NEW)
    own, parts = wrapped.specdec._decoders.get(wrapped.specdec.draft), []
    for i in range(N_NAMED + 5):
        given = {"prompt_lookup_num_tokens": 2 + i}
        if draft == "assistant":
            given = {"assistant_model": fresh("llama", seed=i, num_hidden_layers=1)}
        parts.append(_named(wrapped, model, inputs, **given))
        del given
    assert [any(part() is not None for part in made) for made in parts] == [False] * 5 + [True] * N_NAMED
    assert wrapped.specdec._decoders.get(wrapped.specdec.draft) is own
    del own
    wrapped.specdec.free()
    assert not any(part() is not None for made in parts for part in made)


def test_the_one_used_last_stays(tiny: Tiny, prompts: Prompts) -> None:
    model, inputs = tiny("llama"), prompts([6])
    wrapped = wrap(model, None)
    first = _named(wrapped, model, inputs, prompt_lookup_num_tokens=2)
    for i in range(2 * N_NAMED):
        _named(wrapped, model, inputs, prompt_lookup_num_tokens=3 + i)
        assert _named(wrapped, model, inputs, prompt_lookup_num_tokens=2)[0]() is first[0]()


def test_an_assistants_tokenizers_are_not_kept(fresh: Tiny, model: PreTrainedModel) -> None:
    tokenizers = [zoo.load_pair()[2] for _ in range(2)]
    draft, target = fresh("llama", vocab_size=300), fresh("llama", vocab_size=301)
    assert ForeignDraft(draft, *tokenizers).overlap(target) is not None
    gone = [weakref.ref(tokenizer) for tokenizer in tokenizers]
    del tokenizers
    gc.collect()
    assert [tokenizer() for tokenizer in gone] == [None, None]


@pytest.mark.slow
def test_compiled_code_goes_with_its_decoder(tiny: Tiny, prompts: Prompts) -> None:
    """Dynamo puts what it compiles into this module, for as long as the compiled code lives."""

    def compiled() -> set[str]:
        gc.collect()
        return {name for name in vars(specdec.engine.step) if name.startswith("__compiled_fn")}

    before, wrapped = compiled(), specdec.compile(tiny("llama"), draft=None, depth=2, adapt=False)
    wrapped.generate(**prompts([6]), max_new_tokens=2, prompt_lookup_num_tokens=2)
    assert compiled() - before
    wrapped.specdec.free()
    assert not compiled() - before


# Seeds serve the next call, whatever becomes of it.


def _end(streamed: Any) -> None:
    raise KeyError("enough")


class _Full:
    """A streamer that fails."""

    put = staticmethod(_end)


def _generate_many(wrapped: PreTrainedModel, prompts: Any = (), **given: Any) -> None:
    list(specdec.generate_many(wrapped, prompts, progress=False, **given))


FAILING: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Any]] = {
    "falls back": lambda wrapped, inputs: wrapped.generate(**inputs, use_cache=False),
    "beams": lambda wrapped, inputs: wrapped.generate(**inputs, num_beams=2),
    "greedy": lambda wrapped, inputs: wrapped.generate(**inputs),
    "refused by transformers": lambda wrapped, inputs: wrapped.generate(**inputs, flavour="sweet"),
    "another number": lambda wrapped, inputs: wrapped.generate(**inputs, do_sample=True, num_return_sequences=3),
    "raises": lambda wrapped, inputs: wrapped.generate(**inputs, streamer=_Full()),
    "custom_generate": lambda wrapped, inputs: wrapped.generate(**inputs, custom_generate=lambda model, ids, **_: ids),
    "many": lambda wrapped, inputs: _generate_many(wrapped, [[3, 4], [5]], max_new_tokens=2, use_cache=False),
    "many, none": lambda wrapped, inputs: _generate_many(wrapped),
    "many, refused": lambda wrapped, inputs: _generate_many(wrapped, [[3, 4]], max_batch_size=0),
    "many, another number": lambda wrapped, inputs: _generate_many(wrapped, [[3]], max_new_tokens=2),
    "many, never read": lambda wrapped, inputs: specdec.generate_many(wrapped, [[3], [4]], max_new_tokens=2),
}


@pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
@pytest.mark.parametrize("what", FAILING)
def test_seeds_serve_one_call(what: str, wrapped: PreTrainedModel, prompts: Prompts) -> None:
    inputs: dict[str, Any] = {**prompts([5]), "max_new_tokens": NEW}
    wrapped.specdec.seeds = [1, 2]
    try:
        FAILING[what](wrapped, inputs)
    except (ValueError, KeyError):
        assert what not in ("falls back", "beams", "many")
    wrapped.generate(**inputs, do_sample=True)  # as one sample
    assert len(wrapped.specdec.seeds) == 1
    wrapped.specdec.seeds = [5]
    texts = [wrapped.generate(**inputs, do_sample=True) for _ in range(2)]
    assert not torch.equal(*texts)


def test_seeds_set_while_a_call_runs_are_the_nexts(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    class Setting(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            wrapped.specdec.seeds = [8]
            return torch.zeros(1, dtype=torch.bool)

    inputs: dict[str, Any] = {**prompts([5]), "max_new_tokens": NEW, "do_sample": True}
    wrapped.specdec.seeds = [8]
    text = wrapped.generate(**inputs)
    wrapped.specdec.seeds = [9]
    wrapped.generate(**inputs, stopping_criteria=StoppingCriteriaList([Setting()]))
    assert torch.equal(wrapped.generate(**inputs), text)


def test_no_seeds_are_those_of_a_call_that_fell_back(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    wrapped.generate(**prompts([5]), max_new_tokens=2, do_sample=True)
    with said("use_cache=False"):
        wrapped.generate(**prompts([5]), max_new_tokens=2, do_sample=True, use_cache=False)
    assert wrapped.specdec.seeds is None


# A wrapped model and the one it was made from hold the same.


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("on_wrapped", [True, False])
def test_the_mode_is_of_both(wrapped_first: bool, on_wrapped: bool, fresh: Tiny, prompts: Prompts) -> None:
    """Wrapped in training mode and then set to eval, on either; and the other way round."""
    model, inputs = fresh("gpt2", attn_pdrop=0.5, resid_pdrop=0.5), {**prompts([6]), "max_new_tokens": NEW}
    twin = fresh("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    if not wrapped_first:
        model.train()
    wrapped = wrap(model)
    each = wrapped if on_wrapped else model
    if wrapped_first:
        each.train()
    with said("the model is in training mode"):
        wrapped.generate(**inputs)
    each.eval()
    assert model.training is wrapped.training is False
    wrapped.specdec.stats.reset()
    same(wrapped, twin, **inputs)


def test_a_module_alone_in_training_mode(fresh: Tiny, prompts: Prompts) -> None:
    """One that heeds it: dropout, however little, or what holds dropout; not one that comes as new modules do."""
    model, inputs = fresh("gpt2", resid_pdrop=1e-9), {**prompts([6]), "max_new_tokens": NEW}
    wrapped = wrap(model)
    model.lm_head = nn.Linear(model.config.n_embd, model.config.vocab_size, bias=False)
    assert model.lm_head.training
    same(wrapped, model, **inputs)
    for module in (model.transformer.h[1].mlp.dropout, model.transformer.h[0].attn):
        module.train()
        with said("in training mode: transformer.h."):
            wrapped.generate(**inputs)
        module.eval()
        wrapped.specdec.stats.reset()
        same(wrapped, model, **inputs)


@pytest.mark.parametrize("on_wrapped", [True, False])
def test_configurations_that_are_replaced(on_wrapped: bool, fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = fresh("llama"), prompts([6])
    wrapped = wrap(model)
    each = wrapped if on_wrapped else model
    each.generation_config = GenerationConfig(max_new_tokens=4, repetition_penalty=1.5)
    decoder = wrapped.specdec._decoders.get("ngram")
    assert same(wrapped, model, **inputs).shape[1] == 10
    each.generation_config = GenerationConfig(max_new_tokens=5)
    assert same(wrapped, model, **inputs).shape[1] == 11
    assert wrapped.specdec._decoders.get("ngram") is decoder  # which no forward reads


def test_what_generate_notes_on_a_model_is_no_change_of_it(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    wrapped = wrap(model)
    decoders = set()
    for n_new in (4, 8, 12):
        wrapped.generate(**prompts([6]), max_new_tokens=n_new, cache_implementation="static")
        decoders.add(wrapped.specdec._decoders.get("ngram"))
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # transformers compiles by itself on GPUs only
    model.generate(**prompts([6]), max_new_tokens=4, cache_implementation="static", compile_config=config)
    decoders.add(wrapped.specdec._decoders.get("ngram"))
    assert len(decoders) == 1
    assert hasattr(model, "_previous_max_cache_length") and hasattr(model, "_compiled_call")


def test_what_a_wrapped_model_holds_may_know_it(fresh: Tiny, prompts: Prompts) -> None:
    """Copies are made of the model, and come to its wrapping, under way."""
    model, draft = fresh("llama"), fresh("llama", seed=7, num_hidden_layers=1)
    wrapped = wrap(model, draft)
    wrapped.owner, wrapped.old_forward = {"model": wrapped}, wrapped.forward
    same(wrapped, model, **prompts([6]), max_new_tokens=NEW)
    assert vars(model) is vars(wrapped)
    assert not hasattr(model, "specdec")


# Every call is counted, decoded here or named.


def test_decoding_of_ones_own_is_named(wrapped: PreTrainedModel, prompts: Prompts, tmp_path: Path) -> None:
    inputs: dict[str, Any] = {**prompts([6]), "max_new_tokens": NEW}
    reason = "a way to decode that is none of transformers' own loops"

    def own(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return input_ids + 1

    with said(reason):
        for _ in range(2):
            assert torch.equal(wrapped.generate(**inputs, custom_generate=own), inputs["input_ids"] + 1)
    assert wrapped.specdec.stats.fallbacks == {reason: 2}
    (tmp_path / "custom_generate").mkdir()
    code = "def generate(model, input_ids, **_):\n    return input_ids + 2\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    with said():
        out = wrapped.generate(**inputs, custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(out, inputs["input_ids"] + 2)
    assert wrapped.specdec.stats.fallbacks == {reason: 3}


def test_decoding_of_ones_own_that_comes_to_a_loop_is_decoded(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    inputs: dict[str, Any] = {**prompts([6]), "max_new_tokens": NEW}
    expected = model.generate(**inputs)
    with said():
        for loop in (lambda m, *a, **k: m._sample(*a, **k), lambda m, *a, **k: m.generate(**inputs)):
            assert torch.equal(wrapped.generate(**inputs, custom_generate=loop), expected)
    assert wrapped.specdec.stats.tokens == 2 * NEW


def test_continuous_batching_is_named(
    wrapped: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(self: Any, *_: Any, **__: Any) -> None:
        assert self is wrapped
        raise KeyError("no time for it")

    monkeypatch.setattr(GenerationMixin, "init_continuous_batching", begin)
    with said("continuous batching"):
        for call in (
            lambda: wrapped.generate_batch([[3, 4, 5]], max_new_tokens=3),
            lambda: wrapped.generate(**prompts([5]), max_new_tokens=3, cache_implementation="paged"),
            lambda: wrapped.init_continuous_batching(),
        ):
            with pytest.raises(KeyError, match="no time for it"):
                call()
    assert wrapped.specdec.stats.fallbacks == {"continuous batching": 3}


def test_a_generate_of_the_models_own_is_named(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    model.generate = lambda **_: "mine"
    with said("it has a generate() of its own"):
        wrapped = specdec.compile(model)
    assert wrapped.generate(**prompts([5])) == "mine"


# Reasons are the same words for every such call, and are said at the user's line.


def _forever(model: PreTrainedModel, prompts: Prompts, n: int) -> dict[str, Any]:
    return {"prefix_allowed_tokens_fn": lambda row, ids: [n], **prompts([n, 3])}


def _past(model: PreTrainedModel, prompts: Prompts, n: int) -> dict[str, Any]:
    inputs = prompts([n, n])
    return {**inputs, PAST: names.cache_in(model(inputs["input_ids"], use_cache=True))}


def _holes(model: PreTrainedModel, prompts: Prompts, n: int) -> dict[str, Any]:
    inputs = prompts([n])
    inputs["attention_mask"][0, n // 2] = 0
    return inputs


VARYING: dict[str, Callable[[PreTrainedModel, Prompts, int], dict[str, Any]]] = {
    "a function of the user's": _forever,
    "a cache as long as the prompt": _past,
    "holes": _holes,
    "nothing to look up": lambda model, prompts, n: {**prompts([n]), "prompt_lookup_num_tokens": -n},
}  # fmt: skip


def _of_size(model: PreTrainedModel, n_tokens: int) -> PreTrainedModel:
    return type(model)(type(model.config)(**{**model.config.to_dict(), "vocab_size": n_tokens})).eval()


@pytest.mark.parametrize("what", VARYING)
def test_what_varies_is_said_once(
    what: str, wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    with said(""):
        for n in (3, 4, 5):
            with torch.no_grad():
                given = VARYING[what](model, prompts, n)
            try:
                wrapped.generate(max_new_tokens=2, **given)
            except (ValueError, IndexError, RuntimeError):
                assert what not in ("a function of the user's", "holes")
    assert len(wrapped.specdec.stats.fallbacks) == 1
    assert wrapped.specdec.stats.fallbacks.total() == 3
    assert not any(letter.isdigit() for letter in next(iter(wrapped.specdec.stats.fallbacks)))


def test_warnings_are_at_the_users_line(model: PreTrainedModel, prompts: Prompts) -> None:
    """However the call came: see `said`."""
    with said("use_cache=False"):
        wrap(model).generate(**prompts([4]), max_new_tokens=2, use_cache=False)
    with said("use_cache=False"):
        _generate_many(wrap(model), [[3, 4]], max_new_tokens=2, use_cache=False)
    with said("use_cache=False"):
        wrap(model).specdec.warmup(use_cache=False)
    with said("a draft that does not fit"):
        assistant = _of_size(model, model.config.vocab_size)
        assistant.forward = partial(assistant.forward)
        wrap(model).generate(**prompts([4]), max_new_tokens=2, assistant_model=assistant)
    with said("use_cache=False"):
        writer = pipeline("text-generation", wrap(_of_size(model, 300)), tokenizer=zoo.load_pair()[2])
        writer("a", max_new_tokens=2, use_cache=False)
    with said("num_assistant_tokens_schedule='never'"):
        given = {"assistant_model": model, "num_assistant_tokens_schedule": "never"}
        wrap(model).generate(**prompts([4]), max_new_tokens=2, **given)


# What a call says of the draft it names.


def _drafting(wrapped: PreTrainedModel) -> tuple[int, bool | None]:
    """How deep the last call drafted, and whether it was to adapt."""
    decoder = [*wrapped.specdec._decoders.kept.values()][-1]
    return decoder.tree.depth, decoder.adapt


SCHEDULE = "num_assistant_tokens_schedule"


@pytest.mark.parametrize(
    ("of_call", "of_assistant", "expected"),
    [
        ({}, {}, (3, None)),
        ({"num_assistant_tokens": 2}, {}, (2, None)),
        ({}, {"num_assistant_tokens": 7}, (7, None)),
        ({}, {"num_assistant_tokens": 20}, (20, None)),  # what transformers takes by default, said
        ({"num_assistant_tokens": 2}, {"num_assistant_tokens": 7}, (2, None)),
        ({}, {SCHEDULE: "constant"}, (3, False)),
        ({"num_assistant_tokens": 2, SCHEDULE: "heuristic"}, {SCHEDULE: "constant"}, (2, None)),
        ({SCHEDULE: "heuristic_transient"}, {}, (3, None)),
    ],
)
def test_as_many_tokens_as_a_call_asks_for(
    of_call: dict[str, Any], of_assistant: dict[str, Any], expected: Any, fresh: Tiny, prompts: Prompts
) -> None:
    model, assistant = fresh("llama"), fresh("llama")
    for name, value in of_assistant.items():
        setattr(assistant.generation_config, name, value)
    wrapped = specdec.compile(model, draft=None, depth=3, compile=False)
    with said():
        same(wrapped, model, **prompts([6]), max_new_tokens=NEW, assistant_model=assistant, **of_call)
    assert _drafting(wrapped) == expected


@pytest.mark.parametrize(
    ("of_call", "of_assistant", "of_compile", "expected"),
    [
        (None, None, None, None),
        (None, None, 0.3, 0.3),
        (0.2, None, None, 0.2),
        (0.2, 0.6, 0.3, 0.2),
        (None, 0.6, 0.3, 0.6),
        (0.4, None, 0.3, 0.3),  # what transformers fills in by itself
        (None, 0.4, 0.3, 0.4),  # the same, said
        (0, None, 0.3, None),
    ],
)
def test_chains_end_where_a_call_says(
    of_call: float | None, of_assistant: float | None, of_compile: float | None, expected: float | None, fresh: Tiny,
    prompts: Prompts,
) -> None:  # fmt: skip
    model, assistant = fresh("llama"), fresh("llama", seed=7)
    assistant.generation_config.assistant_confidence_threshold = of_assistant
    given = {} if of_call is None else {"assistant_confidence_threshold": of_call}
    wrapped = wrap(model, model, stop_below=of_compile)
    with said():
        same(wrapped, model, **prompts([6]), max_new_tokens=NEW, assistant_model=assistant, **given)
    assert [*wrapped.specdec._decoders.kept][-1][1].stop_below == expected


def test_adapting_is_as_compile_says_unless_a_call_does(model: PreTrainedModel, prompts: Prompts) -> None:
    for adapt, expected in ((False, None), (True, True), (None, None)):
        wrapped = specdec.compile(model, draft=None, compile=False, adapt=adapt)
        given = {"assistant_model": model, SCHEDULE: "heuristic"}
        wrapped.generate(**prompts([6]), max_new_tokens=2, **given)
        assert _drafting(wrapped) == (5, expected)


def test_a_tree_gives_way_to_a_number_of_tokens(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(model, model, tree=TokenTree.from_widths(2, 2))
    wrapped.generate(**prompts([6]), max_new_tokens=NEW, assistant_model=model, num_assistant_tokens=3)
    assert _drafting(wrapped)[0] == 3
    wrapped.generate(**prompts([6]), max_new_tokens=NEW, prompt_lookup_num_tokens=4)
    assert _drafting(wrapped)[0] == 4
    wrapped.generate(**prompts([6]), max_new_tokens=NEW)
    assert _drafting(wrapped)[0] == 2


def test_what_is_not_followed_is_named_and_changes_no_token(fresh: Tiny, prompts: Prompts) -> None:
    model, assistant = fresh("llama"), fresh("llama", seed=7)
    wrapped, given = wrap(model, None), {"assistant_model": assistant, "max_new_tokens": NEW, **prompts([6])}
    expected = model.generate(**prompts([6]), max_new_tokens=NEW)
    tree = wrap(model, assistant, tree=TokenTree.from_widths(2, 2))
    with said("assistant_confidence_threshold", "num_assistant_tokens_schedule='sometimes'"):
        for threshold in (0.1, 0.2, 0.3):
            out = tree.generate(**given, assistant_confidence_threshold=threshold)
            assert torch.equal(out, expected)
        assistant.generation_config.num_assistant_tokens_schedule = "sometimes"
        assert torch.equal(wrapped.generate(**given), expected)
    assert not wrapped.specdec.stats.fallbacks


# Functions of the user's may keep a state; ends of text that no model has end nothing.


class _Counting:
    """What is allowed depends on how often it was asked; `asked` says for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int]]] = []

    def __call__(self, row: int, ids: Tensor) -> list[int]:
        self.asked.append((row, ids.tolist()))
        return [(len(self.asked) * 7 + k) % 97 for k in range(9)]


@pytest.mark.parametrize("lengths", [[6], RAGGED])
def test_a_function_with_a_state(
    lengths: list[int], wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Any
) -> None:
    theirs, ours = _Counting(), _Counting()
    inputs = {**prompts(lengths), "max_new_tokens": 10}
    expected = model.generate(**inputs, prefix_allowed_tokens_fn=theirs)
    with said(*["PrefixConstrainedLogitsProcessor with a batch of several samples"] * (len(lengths) > 1)):
        assert torch.equal(wrapped.generate(**inputs, prefix_allowed_tokens_fn=ours), expected)
    assert ours.asked == theirs.asked
    assert bool(wrapped.specdec.stats.fallbacks) == (len(lengths) > 1)


@pytest.mark.parametrize("never", [-1, 97, [-1, 5000], [-100, 2**40]])
def test_an_end_that_no_text_has(
    never: Any, wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    settings = {"max_new_tokens": NEW, "eos_token_id": never, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (each.generate(**prompts(RAGGED), **settings) for each in (wrapped, model))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == NEW
    assert not wrapped.specdec.stats.fallbacks


def test_an_end_beside_one_that_no_text_has(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    end = model.generate(**prompts([6]), max_new_tokens=NEW)[0, 8].item()
    out = same(wrapped, model, **prompts([6]), max_new_tokens=NEW, eos_token_id=[-1, end], pad_token_id=0)
    assert out.shape[1] <= 9


# Arguments.

NAN, WRONG = float("nan"), [True, False, 2.5, float("nan"), "4", np.float64(2), np.bool_(True), torch.tensor(2.0)]
FEW = [0, -1, np.int64(0), torch.tensor(-3)]
SIZES: dict[str, Callable[[PreTrainedModel, Any], Any]] = {
    "depth": lambda model, n: wrap(model, depth=n),
    "max_ngram": lambda model, n: wrap(model, max_ngram=n),
    "max_batch_size": lambda model, n: specdec.generate_many(wrap(model), [[3]], max_batch_size=n),
    "max_prompt_length": lambda model, n: specdec.generate_many(wrap(model), [[3]], max_prompt_length=n),
    "batch_sizes": lambda model, n: wrap(model).specdec.warmup(batch_sizes=[n]),
    "max_length": lambda model, n: wrap(model).specdec.warmup(max_length=n),
    "batch_size": lambda model, n: wrap(model).specdec.memory(n, 20),
    "max_length ": lambda model, n: wrap(model).specdec.memory(2, n),
    "max_nodes": lambda model, n: wrap(model, model).specdec.tune(torch.tensor([[3]]), max_nodes=n),
    "max_depth": lambda model, n: wrap(model, model).specdec.tune(torch.tensor([[3]]), max_depth=n),
    "depth ": lambda model, n: NgramDrafter(n),
    "max_ngram ": lambda model, n: NgramDrafter(2, n),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_whole_numbers(name: str, model: PreTrainedModel) -> None:
    for value in WRONG:
        with pytest.raises(
            TypeError, match=rf"{name.strip()} must be a whole number, got .* \({type(value).__name__}\)"
        ):
            SIZES[name](model, value)
    for value in FEW:
        with pytest.raises(ValueError, match=f"{name.strip()} must be at least [12], got {int(value)}"):
            SIZES[name](model, value)


def test_all_kinds_of_whole_numbers_are_taken(model: PreTrainedModel, prompts: Prompts) -> None:
    for two in (np.int64(2), np.uint8(2), torch.tensor(2)):
        wrapped = wrap(model, depth=two, max_ngram=two)
        assert wrapped.specdec.config == wrap(model, depth=2, max_ngram=2).specdec.config
        assert type(wrapped.specdec.config.depth) is int
        same(wrapped, model, **prompts([6]), max_new_tokens=3)
        assert wrapped.specdec.memory(two, 10 * two) == wrapped.specdec.memory(2, 20)
        results = specdec.generate_many(wrapped, [[3, 4]] * 3, max_batch_size=two, max_new_tokens=2, progress=False)
        assert [len(result.tokens) for result in results if result.tokens is not None] == [4, 4, 4]


@pytest.mark.parametrize("value", [1, 0, None, "no", np.bool_(True)])
def test_flags_are_truth_values(value: Any, model: PreTrainedModel) -> None:
    for name in ("in_order", "progress"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            specdec.generate_many(wrap(model), [[3]], **{name: value})
    with pytest.raises(TypeError, match="compile must be True or False"):
        specdec.compile(model, compile=value)
    if value is not None:
        with pytest.raises(TypeError, match="adapt must be True or False"):
            specdec.compile(model, adapt=value)


NO_SEEDS = [
    True, [True, False], 1.0, [NAN], 1j, "7", object(), [], 2**64, [-(2**70)], np.array([2**63], dtype=np.uint64),
]  # fmt: skip


@pytest.mark.parametrize("seeds", NO_SEEDS)
def test_what_is_no_seed(seeds: Any, wrapped: PreTrainedModel) -> None:
    wrapped.specdec.seeds = [3]
    with pytest.raises(TypeError, match=r"seeds must be whole numbers from -2\*\*63 to 2\*\*63 - 1, got "):
        wrapped.specdec.seeds = seeds
    assert wrapped.specdec.seeds.tolist() == [3]


@pytest.mark.parametrize("seeds", [5, [5], (5,), np.int32(5), np.array([5], dtype=np.uint64), torch.tensor([[5]])])
def test_all_kinds_of_seeds(seeds: Any, wrapped: PreTrainedModel) -> None:
    wrapped.specdec.seeds = seeds
    assert wrapped.specdec.seeds.tolist() == [5]


def test_what_else_cannot_be(model: PreTrainedModel) -> None:
    wrapped = wrap(model, model)
    with pytest.raises(TypeError, match=r"batch_sizes must be a sequence of whole numbers, such as \(1, 8\), got 4"):
        wrapped.specdec.warmup(batch_sizes=4)
    with pytest.raises(TypeError, match=r"input_ids must be a tensor \[B, length\] of token ids, got \[\[1, 2\]\]"):
        wrapped.specdec.tune([[1, 2]])
    with pytest.raises(TypeError, match=r"input_ids must be a tensor .* got \(2,\)"):
        wrapped.specdec.tune(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="each of token ids, and got 'a text'"):
        specdec.generate_many(wrapped, "a text")
    with pytest.raises(ValueError, match=r"verifier must be one of .*got \['auto'\]"):
        wrap(model, model, verifier=["auto"])
    result = next(specdec.generate_many(wrapped, [[True, False]], max_new_tokens=2, progress=False))
    assert "one text's token ids, got torch.bool" in str(result.error)


def test_the_memory_of_a_model_that_is_not_decoded_with(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"transformers' own loop: .*bloom"):
        wrap(tiny("bloom"), None).specdec.memory(2, 20)


def test_a_criterion_of_transformers_is_no_function_of_the_users(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    criteria, processors = StoppingCriteriaList([MaxLengthCriteria(12)]), LogitsProcessorList()
    same(wrapped, model, **prompts(RAGGED), stopping_criteria=criteria, logits_processor=processors, max_new_tokens=20)
