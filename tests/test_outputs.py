"""What else `generate()` returns or takes: scores, logits, keys and values; as transformers' own loop does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from side_by_side import PAST, RAGGED, Prompts, Tiny, wrap
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from specdec import SpecdecWarning, TokenTree
from specdec.hf import names

WANTED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
FAMILIES = ("llama", "gpt2", "gemma2", "mistral", "deepseek_v3")  # windows; keys and values of different widths


def _same_outputs(out: Any, expected: Any) -> None:
    assert type(out) is type(expected) is GenerateDecoderOnlyOutput
    assert torch.equal(out.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(out, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        for a, b in zip(ours or (), theirs or (), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _same_cache(cache: DynamicCache, expected: DynamicCache, mask: Tensor) -> None:
    """Where there is text; `mask` [B, length]."""
    assert cache.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape
            own = mask[:, -a.shape[2] :, None].bool()[:, None]
            torch.testing.assert_close(torch.where(own, a, 0), torch.where(own, b, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft", [None, "ngram", "self", "other"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {**WANTED, "repetition_penalty": 1.4},
    ],
    ids=["texts", "scores", "both, processed"],
)
@pytest.mark.parametrize("lengths", [[6], RAGGED], ids=["alone", "ragged"])
def test_by_token(
    lengths: list[int], arguments: dict[str, Any], draft: str | None, tiny: Tiny, prompts: Prompts
) -> None:
    model = tiny("llama")
    drafts = {"self": model, "other": tiny("llama", seed=7, num_hidden_layers=1)}
    wrapped = wrap(model, drafts.get(str(draft), draft))
    asked = {**prompts(lengths), "max_new_tokens": 11, **arguments}
    out, expected = wrapped.generate(**asked), model.generate(**asked)
    assert not wrapped.specdec.stats.fallbacks
    if draft == "self" and "repetition_penalty" not in arguments:
        assert wrapped.specdec.stats.tokens_per_step > 3
    _same_outputs(out, expected)
    columns = torch.cat([asked["attention_mask"], torch.ones(len(lengths), 10)], 1)
    _same_cache(out[PAST], expected[PAST], columns)


def test_scores_end_with_the_text(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    eos = model.generate(**prompts([6]), max_new_tokens=12)[0, 12].item()
    asked = {**prompts([6]), "max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 0, **WANTED}
    wrapped = wrap(model, model)
    out = wrapped.generate(**asked)
    _same_outputs(out, model.generate(**asked))
    assert out.sequences.shape[1] == 13
    assert not wrapped.specdec.stats.fallbacks
    ragged = {**asked, **prompts(RAGGED)}  # rows that have ended go on being scored there
    with pytest.warns(UserWarning, match="output_logits of a batch whose texts may end before others"):
        _same_outputs(wrapped.generate(**ragged), model.generate(**ragged))


class _Sure(StoppingCriteria):
    """Reads the scores so far."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), len(scores) >= 3)


def test_criteria_that_may_read_scores_fall_back(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    asked = {**prompts([6]), "max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([_Sure()]), **WANTED}
    with pytest.warns(UserWarning, match="output_logits with stopping criterion _Sure"):
        out = wrap(model).generate(**asked)
    _same_outputs(out, model.generate(**asked))
    assert out.sequences.shape[1] == 9


def test_sampled_scores_are_what_was_drawn_from(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = wrap(model, model)
    asked = {**prompts([6]), "max_new_tokens": 12, "do_sample": True, "top_k": 5, "temperature": 1.5, **WANTED}
    out = wrapped.generate(**asked)
    assert not wrapped.specdec.stats.fallbacks
    assert sum(wrapped.specdec.stats.accepted) > 0
    whole = out.sequences
    logits = model(whole).logits[:, 5:-1]
    for place in range(12):
        torch.testing.assert_close(out.logits[place], logits[:, place], rtol=1e-4, atol=1e-4)
        scores = out.scores[place][0]
        assert scores.isfinite().sum() == 5
        assert scores[whole[0, 6 + place]].isfinite()
        kept = scores.isfinite()
        torch.testing.assert_close(scores[kept], out.logits[place][0, kept] / 1.5)


def _turns(model: PreTrainedModel, ids: Tensor, more: list[Tensor], cache: DynamicCache | None, **settings: Any) -> Any:
    """A conversation: each turn continues the last one's cache."""
    outs = []
    for words in [ids[:, :0], *more]:
        ids = torch.cat([ids, words], 1)
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, **settings}
        ids = model.generate(ids, **{PAST: cache}, **asked)
        outs.append(ids)
    return outs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft", ["ngram", "self"])
@pytest.mark.parametrize("configured", [False, True], ids=["plain", "of the config"])
def test_a_conversation(family: str, draft: str, configured: bool, tiny: Tiny, prompts: Prompts) -> None:
    """Ten turns past windows, each of them handing on the cache, which holds what transformers' would."""
    model = tiny(family)
    wrapped, ids = wrap(model, model if draft == "self" else draft), prompts([7])["input_ids"]
    more = [prompts([3], seed=n)["input_ids"] for n in range(4)]
    caches = [DynamicCache(config=model.config) if configured else DynamicCache() for _ in range(2)]
    ours, theirs = _turns(wrapped, ids, more, caches[0]), _turns(model, ids, more, caches[1])
    assert all(map(torch.equal, ours, theirs))
    assert not wrapped.specdec.stats.fallbacks
    _same_cache(*caches, torch.ones(1, ours[-1].shape[1] - 1))


def test_what_is_known_is_not_computed_again(tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = tiny("llama"), []
    wrapped, ids = wrap(model, None), prompts([40])["input_ids"]
    target = wrapped.specdec._decoders.get(None).target
    original = target._write
    monkeypatch.setattr(
        target, "_write", lambda pieces: (written.append(sum(len(x) for _, x in pieces.values())), original(pieces))
    )
    _turns(wrapped, ids, [prompts([3], seed=1)["input_ids"]], DynamicCache())
    assert written == [39, 3]  # of 44 known: the last of 5 new tokens and two of three words; the third is pending


def test_a_ragged_batch_goes_on(tiny: Tiny, prompts: Prompts) -> None:
    """Left padding is in the cache's columns, and in none of ours."""
    model = tiny("gemma2")
    outs = []
    for each in (model, wrap(model, model)):
        cache, asked = DynamicCache(), prompts(RAGGED)
        ids, mask = asked["input_ids"], asked["attention_mask"]
        for turn in range(3):
            ids = each.generate(ids, attention_mask=mask, **{PAST: cache}, max_new_tokens=4)
            words = prompts([2] * len(RAGGED), seed=turn)["input_ids"]
            ids = torch.cat([ids, words], 1)
            mask = torch.cat([mask, torch.ones(len(RAGGED), 6, dtype=torch.int64)], 1)
        outs.append((ids, cache))
    assert torch.equal(outs[0][0], outs[1][0])
    assert not each.specdec.stats.fallbacks
    _same_cache(outs[1][1], outs[0][1], mask[:, : outs[0][1].get_seq_length()])


def test_a_cache_of_ones_own_is_the_one_returned(tiny: Tiny, prompts: Prompts) -> None:
    wrapped, cache = wrap(tiny("llama")), DynamicCache()
    out = wrapped.generate(**prompts([6]), max_new_tokens=5, **{PAST: cache}, return_dict_in_generate=True)
    assert out[PAST] is cache
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("kind", ["static", "too long", "other batch"])
def test_caches_that_fall_back(kind: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    ids, reason = prompts([6])["input_ids"], {"static": "StaticCache", "too long": "6 tokens for prompts of 6"}
    reason |= {"other batch": "another number of samples: 2 for a batch of 1"}

    def cache() -> Any:
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=16)
        given = ids if kind == "too long" else ids.repeat(2, 1)[:, :4]
        return names.cache_in(model(given, use_cache=True))

    wrapped = wrap(model)
    results: list[Any] = []
    with pytest.warns(SpecdecWarning, match=reason[kind]):
        for each in (wrapped, model):
            try:
                results.append(each.generate(ids, max_new_tokens=5, **{PAST: cache()}).tolist())
            except (RuntimeError, ValueError) as error:
                results.append(type(error))
    assert results[0] == results[1]
    assert list(wrapped.specdec.stats.fallbacks.values()) == [1]


def test_scores_of_a_batch_that_runs_out_of_time(tiny: Tiny, prompts: Prompts) -> None:
    """After a step, in which some rows came further than others: all are cut to the shortest."""
    model = tiny("llama")
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1), tree=TokenTree.from_widths(32))
    out = wrapped.generate(**prompts([6] * 16), max_new_tokens=12, max_time=1e-9, **WANTED)
    assert sum(wrapped.specdec.stats.accepted) > 0
    assert out.sequences.shape == (16, 7)
    assert len(out.scores) == len(out.logits) == 1
    expected = model.generate(**prompts([6] * 16), max_new_tokens=1, **WANTED)
    _same_outputs(out, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["filler read", "filler masked"])
def test_a_batch_goes_on_whose_texts_ended_one_by_one(
    family: str, is_masked: bool, tiny: Tiny, prompts: Prompts
) -> None:
    """Their last token is in the cache, and the filler behind it too, which a mask of ones lets the next turn read."""
    model = tiny(family)
    eos = model.generate(**prompts(RAGGED), max_new_tokens=10)[0, 11].item()
    results = []
    for each in (model, wrap(model, model)):
        cache, asked = DynamicCache(), prompts(RAGGED)
        settings = {"max_new_tokens": 10, "eos_token_id": eos, "pad_token_id": 0, PAST: cache}
        ids = each.generate(**asked, **settings)
        assert ids[0, -1] == 0
        first_cache = [layer.keys.clone() for layer in cache.layers]
        mask = torch.cat([asked["attention_mask"], torch.ones_like(ids[:, 9:])], 1)
        if is_masked:
            mask[:, 9:] = (ids[:, 9:] != 0).long()
        words = prompts([2] * len(RAGGED), seed=1)["input_ids"]
        mask = torch.cat([mask, torch.ones_like(words)], 1)
        settings |= {"eos_token_id": None, "max_new_tokens": 6}
        ids = each.generate(torch.cat([ids, words], 1), attention_mask=mask, **settings)
        results.append((ids, first_cache))
    (expected, their_cache), (out, our_cache) = results
    assert torch.equal(out, expected)
    for ours, theirs in zip(our_cache, their_cache, strict=True):
        torch.testing.assert_close(ours[:, :, 9:], theirs[:, :, 9:], rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_model(tiny: Tiny, prompts: Prompts) -> None:
    ids = prompts([6])["input_ids"]
    other = names.cache_in(tiny("llama", num_hidden_layers=1)(ids[:, :4], use_cache=True))
    with pytest.warns(UserWarning, match="past_key_values of another model"), pytest.raises(IndexError):
        wrap(tiny("llama")).generate(ids, max_new_tokens=3, **{PAST: other})


def test_whole_numbers_of_any_kind(tiny: Tiny, prompts: Prompts) -> None:
    model, ids = tiny("llama"), prompts([6])["input_ids"].int()
    out = wrap(model).generate(ids, max_new_tokens=3)
    expected = model.generate(ids, max_new_tokens=3)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("scores", [False, True])
def test_out_of_time_when_some_have_reached_their_limit(
    scores: bool, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are cut to the shortest that goes on, as if there had been as many steps."""
    model = tiny("llama")
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1), tree=TokenTree.from_widths(24, 1))
    asked = {**prompts([6] * 8), "max_new_tokens": 12, **(WANTED if scores else {})}
    whole = model.generate(**prompts([6] * 8), max_new_tokens=12)
    for n_looks in range(5, 12):
        looks = iter([0.0] * n_looks)
        monkeypatch.setattr("specdec.engine.decide.time", SimpleNamespace(time=lambda looks=looks: next(looks, 1e18)))
        out = wrapped.generate(**asked, max_time=1e6)
        out = out.sequences if scores else out
        assert torch.equal(out, whole[:, : out.shape[1]])
    assert not wrapped.specdec.stats.fallbacks
