"""generate_many(): every prompt's result is that of a `generate()` call of its own, also where others fail."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, pipeline

from specdec import Result, generate_many, zoo
from specdec.engine.launch import Launcher

LENGTHS = [9, 2, 31, 1, 14, 6, 22, 3, 3, 17, 5, 40]
TEXTS = list(torch.randint(1, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS))
SETTINGS: dict[str, Any] = {"max_new_tokens": 14, "pad_token_id": 0}


def generated(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    """[length] int64, of one prompt."""
    return model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **settings)[0]


def assert_right(results: list[Result], model: PreTrainedModel, texts: list[Tensor], **settings: Any) -> None:
    """One result a prompt, in order, each what transformers generates for it alone."""
    assert [result.index for result in results] == list(range(len(texts)))
    for result, ids in zip(results, texts, strict=True):
        assert result.error is None, result
        assert result.tokens is not None
        assert result.tokens.tolist() == generated(model, ids, **settings).tolist()


def speculates(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    """Nothing that went wrong has an effect on later calls."""
    before, steps = dict(wrapped.specdec.stats.fallbacks), wrapped.specdec.stats.steps
    same(wrapped, model, **prompts([6, 2, 9]), max_new_tokens=8)
    assert wrapped.specdec.stats.fallbacks == before
    assert wrapped.specdec.stats.steps > steps
    assert torch.is_grad_enabled()


# What may be given.


@pytest.mark.parametrize(("draft", "n_rows"), [(None, 3), ("ngram", 3), ("model", 1), ("model", 3), ("model", 50)])
def test_greedy_results_are_those_of_calls_of_their_own(
    draft: str | None, n_rows: int, model: PreTrainedModel, tiny: Tiny, prompts: Prompts
) -> None:
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1) if draft == "model" else draft)
    free = [generated(model, ids, **SETTINGS)[len(ids) :].tolist() for ids in TEXTS]
    settings = {**SETTINGS, "eos_token_id": [free[0][0], free[2][6], free[4][11]]}
    results = list(generate_many(wrapped, TEXTS, max_batch_size=n_rows, **settings))
    assert_right(results, model, TEXTS, **settings)
    assert len({len(r.tokens) - n for r, n in zip(results, LENGTHS, strict=True)}) > 2, "texts end together"
    assert not wrapped.specdec.stats.fallbacks
    speculates(wrapped, model, prompts)


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_sampled_results_are_those_of_their_seeds(draft: str, model: PreTrainedModel, tiny: Tiny) -> None:
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1) if draft == "model" else draft)
    settings = {**SETTINGS, "do_sample": True, "temperature": 1.3, "eos_token_id": [5, 6, 7, 8, 9]}
    torch.manual_seed(1)
    results = list(generate_many(wrapped, TEXTS, max_batch_size=4, **settings))
    seeds = wrapped.specdec.seeds
    assert len(seeds) == len(TEXTS)
    for result, ids, seed in zip(results, TEXTS, seeds, strict=True):
        wrapped.specdec.seeds = seed
        assert torch.equal(result.tokens, generated(wrapped, ids, **settings))
    torch.manual_seed(1)
    again = list(generate_many(wrapped, TEXTS, max_batch_size=7, **settings))
    wrapped.specdec.seeds = seeds
    lazily = list(generate_many(wrapped, iter(TEXTS), max_prompt_length=40, **settings))
    for result, same_again, same_lazily in zip(results, again, lazily, strict=True):
        assert torch.equal(result.tokens, same_again.tokens)
        assert torch.equal(result.tokens, same_lazily.tokens)


def test_as_many_seeds_as_prompts(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped.specdec.seeds = [1, 2]
    with pytest.raises(ValueError, match="2 seeds were set for a batch of 12"):
        list(generate_many(wrapped, TEXTS, **SETTINGS))
    wrapped.specdec.seeds = [1, 2]
    results = generate_many(wrapped, iter(TEXTS), max_prompt_length=40, **SETTINGS)
    assert_right([next(results), next(results)], model, TEXTS[:2], **SETTINGS)
    with pytest.raises(ValueError, match="2 seeds were set for more prompts"):
        next(results)
    speculates(wrapped, model, prompts)


def test_results_come_in_order_or_as_they_are_complete(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    inputs = prompts([3, 30, 30, 30, 30])
    texts = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
    settings = {"max_length": 36, "pad_token_id": 0}  # 33 new tokens of the first, six of the others
    in_order = list(generate_many(wrapped, texts, max_batch_size=2, **settings))
    assert_right(in_order, model, texts, **settings)
    as_complete = list(generate_many(wrapped, texts, max_batch_size=2, in_order=False, **settings))
    assert [result.index for result in as_complete] == [1, 2, 3, 4, 0]
    assert_right(sorted(as_complete, key=lambda result: result.index), model, texts, **settings)


def test_all_forms_of_a_prompt(wrapped: PreTrainedModel, model: PreTrainedModel) -> None:
    ids = torch.tensor([5, 6, 7, 8])
    padded = {"input_ids": torch.tensor([[0, 0, 5, 6, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    forms: list[Any] = [
        [5, 6, 7, 8], (5, 6, 7, 8), ids, ids[None], ids.int(), padded, {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [0, 5, 6, 7, 8], "attention_mask": [0, 1, 1, 1, 1]}, [[5, 6, 7, 8]],
        {"input_ids": [[5, 6, 7, 8]], "attention_mask": [[1, 1, 1, 1]]},
    ]  # fmt: skip
    results = list(generate_many(wrapped, forms, **SETTINGS))
    assert_right(results, model, [ids] * len(forms), **SETTINGS)
    assert all(result.tokens.dtype == torch.int64 for result in results)


def test_no_prompts(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    assert list(generate_many(wrapped, [], **SETTINGS)) == []
    assert list(generate_many(wrapped, iter([]), max_prompt_length=4, **SETTINGS)) == []
    speculates(wrapped, model, prompts)


def test_prompts_are_read_as_rows_come_free(wrapped: PreTrainedModel, model: PreTrainedModel) -> None:
    n_read = 0

    def reading() -> Iterator[Tensor]:
        nonlocal n_read
        for ids in TEXTS:
            n_read += 1
            yield ids

    results, most_ahead = [], []
    settings = {"max_length": 45, "pad_token_id": 0}
    for result in generate_many(wrapped, reading(), max_batch_size=3, max_prompt_length=40, in_order=False, **settings):
        most_ahead.append(n_read - len(results))
        results.append(result)
    assert max(most_ahead) == 3
    assert_right(sorted(results, key=lambda result: result.index), model, TEXTS, **settings)
    n_read = 0
    generate_many(wrapped, reading(), **settings)
    assert n_read == len(TEXTS)  # at once, to find the longest


def test_lengths_as_generate_takes_them(wrapped: PreTrainedModel, model: PreTrainedModel) -> None:
    both = {"max_length": 3, "max_new_tokens": 4}
    for settings in ({"max_length": 50}, {"max_new_tokens": 1}, {"max_new_tokens": 30}, both):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="specdec")
            results = list(generate_many(wrapped, TEXTS, max_batch_size=4, **settings))
        assert_right(results, model, TEXTS, **settings)


def test_a_text_without_time_ends_where_it_is(
    wrapped: PreTrainedModel, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own time, from when it is begun."""
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    step = Launcher.start

    def slow(*arguments: Any) -> Any:
        nonlocal now
        now += 1
        return step(*arguments)

    monkeypatch.setattr(Launcher, "start", slow)
    for result in generate_many(wrapped, TEXTS, max_batch_size=3, max_time=2.5, **SETTINGS):
        expected = generated(model, TEXTS[result.index], **SETTINGS)
        new = len(result.tokens) - len(TEXTS[result.index])
        assert result.error is None
        assert 3 <= new < 14  # of three steps
        assert torch.equal(result.tokens, expected[: len(result.tokens)])


def test_what_a_pipeline_makes_of_texts() -> None:
    target, draft, tokenizer = zoo.load_pair()
    wrapped = wrap(target, draft)
    texts = ["def main(", "import os\n\nfor name in", "class"]
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = [out[0]["generated_text"] for out in pipe(texts, **settings)]
    inputs = [pipe.preprocess(text) for text in texts]
    results = list(generate_many(wrapped, inputs, max_batch_size=2, **settings))
    assert [tokenizer.decode(r.tokens, skip_special_tokens=True) for r in results] == expected
    padded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    rows = [{name: x[i] for name, x in padded.items()} for i in range(len(texts))]
    for result, again in zip(results, generate_many(wrapped, rows, **settings), strict=True):
        assert torch.equal(result.tokens, again.tokens)
    assert not wrapped.specdec.stats.fallbacks


def test_drafts_named_by_the_settings(model: PreTrainedModel) -> None:
    wrapped = wrap(model, None)
    assert_right(list(generate_many(wrapped, TEXTS, assistant_model=model, **SETTINGS)), model, TEXTS, **SETTINGS)
    assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 5
    wrapped.specdec.stats.reset()
    again = [ids.repeat(3) for ids in TEXTS]
    results = list(generate_many(wrapped, again, prompt_lookup_num_tokens=4, **SETTINGS))
    assert_right(results, model, again, **SETTINGS)
    assert len(wrapped.specdec.stats.proposed) == 4
    assert wrapped.specdec.stats.proposed[0] > 0
    assert not wrapped.specdec.stats.fallbacks


# What transformers does by itself.


@pytest.mark.parametrize(("reason", "settings"), [
    ("WatermarkLogitsProcessor", {"watermarking_config": {"bias": 4.0}}), ("use_cache", {"use_cache": False}),
    ("scores, logits", {"return_dict_in_generate": True, "output_scores": True}),
])  # fmt: skip
def test_settings_left_to_transformers(
    reason: str, settings: dict[str, Any], wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
) -> None:  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        results = list(generate_many(wrapped, TEXTS[:4], **SETTINGS, **settings))
    assert [reason in str(w.message) for w in caught if "specdec" in str(w.message)] == [True]
    plain = {} if "output_scores" in settings else settings  # results hold the sequences of what it returns
    assert_right(results, model, TEXTS[:4], **SETTINGS, **plain)
    assert wrapped.specdec.stats.fallbacks.total() == 4
    speculates(wrapped, model, prompts)


def test_of_dictionaries_the_sequences_are_kept(wrapped: PreTrainedModel, model: PreTrainedModel) -> None:
    results = list(generate_many(wrapped, TEXTS[:4], **SETTINGS, return_dict_in_generate=True))
    assert_right(results, model, TEXTS[:4], **SETTINGS)
    assert not wrapped.specdec.stats.fallbacks


def test_beams(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "num_beams": 3}
    search, n_calls = GenerationMixin._beam_search, itertools.count()

    def counted(*arguments: Any, **keywords: Any) -> Any:
        next(n_calls)
        return search(*arguments, **keywords)

    monkeypatch.setattr(GenerationMixin, "_beam_search", counted)
    assert len(list(generate_many(wrapped, TEXTS[:3], **settings))) == next(n_calls)  # once each
    assert_right(list(generate_many(wrapped, TEXTS[:3], **settings)), model, TEXTS[:3], **settings)
    settings["num_return_sequences"] = 2
    for result in generate_many(wrapped, TEXTS[:3], **settings):
        assert torch.equal(result.tokens, model.generate(TEXTS[result.index][None], **settings))
    speculates(wrapped, model, prompts)


def test_several_sequences_of_a_prompt(wrapped: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="num_return_sequences"):
        result, *_ = generate_many(wrapped, TEXTS[:2], do_sample=True, num_return_sequences=3, **SETTINGS)
    assert result.tokens.shape == (3, LENGTHS[0] + 14)
    assert torch.equal(result.tokens[:, : LENGTHS[0]], TEXTS[0].expand(3, -1))


@pytest.mark.filterwarnings("ignore:specdec runs transformers' own loop. no room")
@pytest.mark.parametrize(("settings", "error"), [
    ({"flavour": "sweet"}, ValueError), ({"max_new_tokens": 0}, ValueError),
    ({"do_sample": True, "temperature": -1.0}, ValueError), ({"num_return_sequences": 2}, ValueError),
])  # fmt: skip
def test_settings_that_transformers_refuses(
    settings: dict[str, Any], error: type[Exception], wrapped: PreTrainedModel, model: PreTrainedModel,
    prompts: Prompts,
) -> None:  # fmt: skip
    arguments = {**SETTINGS, **settings}
    with pytest.raises(error) as expected:
        generated(model, TEXTS[0], **arguments)
    for result in generate_many(wrapped, TEXTS, **arguments):
        assert result.tokens is None
        assert type(result.error) is expected.type
        assert str(result.error) == str(expected.value)
    speculates(wrapped, model, prompts)


def test_arguments(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match=r"specdec\.compile"):
        generate_many(model, TEXTS)
    for sizes in ({"max_batch_size": 0}, {"max_prompt_length": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be at least 1, got 0"):
            generate_many(wrapped, TEXTS, **sizes)
    with pytest.raises(TypeError, match="each of token ids, and got one mapping"):
        generate_many(wrapped, prompts([3, 4]))
    with pytest.raises(ValueError, match="streamer"):
        generate_many(wrapped, TEXTS, streamer=object())
