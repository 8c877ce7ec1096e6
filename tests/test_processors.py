"""Logits processors that look at the text: transformers' own by name, the user's own, alone and in ragged batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

import specdec
from specdec import zoo
from specdec.hf import processors
from specdec.hf.laws import NUMBERS, is_of_a_row

GREEDY: dict[str, dict[str, Any]] = {
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.7},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 3.0},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 1},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_no_repeat_ngram_size": 1},
    "MinLengthLogitsProcessor": {"min_length": 14, "eos_token_id": list(range(1, 97, 2)), "pad_token_id": 0},
    "MinNewTokensLengthLogitsProcessor": {
        "min_new_tokens": 5, "eos_token_id": list(range(1, 97, 2)), "pad_token_id": 0,
    },
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[5], 2.0], [[11, 12], 9.0], [[12], 3.0]]},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[i] for i in range(0, 97, 3)] + [[4, 5]], "eos_token_id": 96},
    "PrefixConstrainedLogitsProcessor": {
        "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 7 + row + k) % 97 for k in range(9)]
    },
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 7},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": 9},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {
        "exponential_decay_length_penalty": (3, 1.6), "eos_token_id": 8, "pad_token_id": 0,
    },
    "LogitNormalization": {"renormalize_logits": True},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": list(range(90))},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": list(range(50))},
}  # fmt: skip
SAMPLED: dict[str, dict[str, Any]] = {
    "TopHLogitsWarper": {"top_h": 0.5},
    "EpsilonLogitsWarper": {"epsilon_cutoff": 0.01},
    "EtaLogitsWarper": {"eta_cutoff": 0.02},
}
REFUSED: dict[str, dict[str, Any]] = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": 1.5},
    "WatermarkLogitsProcessor": {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 4.0}},
}
OTHERS = {
    "LogitsProcessor", "ClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor", "WhisperNoSpeechDetection", "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor",
}  # fmt: skip
"""The base class, and what is refused without a test of its own: for speech, or in need of more than a call says."""


def test_every_processor_of_transformers_is_here_or_in_a_step() -> None:
    classes = {
        name
        for name, kind in vars(logits_process).items()
        if isinstance(kind, type) and issubclass(kind, LogitsProcessor) and kind.__module__ == logits_process.__name__
    }
    in_steps = {kind.__name__ for kind in NUMBERS}
    assert {kind.__name__ for kind in processors._PURE} == {*GREEDY, *SAMPLED}
    assert classes == {*GREEDY, *SAMPLED, *REFUSED, *OTHERS, *in_steps}


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the processors that texts were shown to."""
    names: list[str] = []
    original = processors.process_row

    def process_row(given: LogitsProcessorList, *rest: Any) -> Any:
        names.extend(type(processor).__name__ for processor in given)
        return original(given, *rest)

    monkeypatch.setattr("specdec.hf.call.process_row", process_row)
    return names


ONE_SAMPLE = "PrefixConstrainedLogitsProcessor"  # a function of the user's


@pytest.mark.parametrize(
    ("name", "lengths"),
    [(n, lengths) for n in GREEDY for lengths in ([6], RAGGED) if n != ONE_SAMPLE or lengths == [6]],
)
def test_greedy_tokens_are_transformers(
    name: str, lengths: list[int], tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny("llama"), _asked(monkeypatch)
    lengths = [1] * len(lengths) if name == "ForcedBOSTokenLogitsProcessor" else lengths  # after one token only
    arguments = {**prompts(lengths), "max_new_tokens": 12, **GREEDY[name]}
    plain = model.generate(**prompts(lengths), max_new_tokens=12)
    for draft in ("ngram", model, tiny("llama", seed=7, num_hidden_layers=1)):
        wrapped = wrap(model, draft)
        out = same(wrapped, model, **arguments)
        assert wrapped.specdec.stats.steps > 0
    assert name in asked
    harmless = name in ("InfNanRemoveLogitsProcessor", "LogitNormalization")
    assert torch.equal(out, plain) == harmless


@pytest.mark.parametrize("name", ["InfNanRemoveLogitsProcessor", "LogitNormalization"])
def test_all_is_accepted_that_processors_leave_as_it_is(name: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = wrap(model, model, depth=3)
    same(wrapped, model, **prompts([6]), max_new_tokens=12, **GREEDY[name])
    assert wrapped.specdec.stats.tokens_per_step == 4


def test_a_tree_of_drafts(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    draft = tiny("llama", seed=7, num_hidden_layers=1)
    wrapped = wrap(model, draft, tree=specdec.TokenTree.from_widths(3, 2, 1))
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=20, repetition_penalty=1.3)
    assert sum(wrapped.specdec.stats.accepted) > 0


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("lengths", [[6], RAGGED], ids=["alone", "ragged"])
def test_a_seeds_text_is_the_same_with_any_draft(
    name: str, lengths: list[int], tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny("llama"), _asked(monkeypatch)
    texts = []
    for draft in (None, "ngram", model, tiny("llama", seed=7, num_hidden_layers=1)):
        wrapped = wrap(model, draft)
        wrapped.specdec.seeds = range(len(lengths))
        arguments = {"do_sample": True, "max_new_tokens": 16, "repetition_penalty": 1.1, **SAMPLED[name]}
        texts.append(wrapped.generate(**prompts(lengths), **arguments))
        assert not wrapped.specdec.stats.fallbacks
        if draft is model:
            assert sum(wrapped.specdec.stats.accepted) > 0
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert name in asked


def test_sampled_tokens_have_the_law_of_the_processors(tiny: Tiny, prompts: Prompts) -> None:
    """Of the second new token, which may be a draft's, in 2000 samples against transformers' own scores."""
    model = tiny("llama", vocab_size=12)
    arguments = {"do_sample": True, "temperature": 0.8, "epsilon_cutoff": 0.03, "repetition_penalty": 1.5}
    asked = {**prompts([5], vocab=12), "max_new_tokens": 2, **arguments}
    wrapped = wrap(model, tiny("llama", seed=7, num_hidden_layers=1, vocab_size=12), depth=2)
    out = wrapped.generate(**asked, num_return_sequences=2000)[:, 5:]
    assert not wrapped.specdec.stats.fallbacks
    assert wrapped.specdec.stats.accepted[0] > 0
    first = int(out[:, 0].mode().values)
    seen = out[out[:, 0] == first, 1]
    whole = torch.cat([prompts([5], vocab=12)["input_ids"], torch.tensor([[first]])], 1)
    again = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, **arguments}
    law = model.generate(whole, attention_mask=torch.ones_like(whole), **again).scores[0][0].softmax(-1)
    counts = torch.bincount(seen, minlength=12)
    assert counts[law == 0].sum() == 0
    law = law.double() / law.double().sum()
    assert stats.chisquare(counts[law > 0], len(seen) * law[law > 0]).pvalue > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_a_text_falls_back(name: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped, arguments = wrap(model), {**prompts([6]), "max_new_tokens": 5, **REFUSED[name]}
    with pytest.warns(UserWarning, match=f"logits processors {name}"):
        out = wrapped.generate(**arguments)
    assert torch.equal(out, model.generate(**arguments))
    assert not wrapped.specdec.stats.steps


def test_what_was_made_for_fewer_rows_falls_back(tiny: Tiny, prompts: Prompts) -> None:
    """Transformers makes it of the prompts, before these become several rows each."""
    model = tiny("llama")
    wrapped, arguments = wrap(model), {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2}
    arguments |= {**prompts([6]), "encoder_no_repeat_ngram_size": 1}
    torch.manual_seed(0)
    expected = model.generate(**arguments)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="logits processors EncoderNoRepeatNGramLogitsProcessor"):
        assert torch.equal(wrapped.generate(**arguments), expected)


class _Rhyme(LogitsProcessor, StoppingCriteria):
    """Keeps a state: every third token asked for is the one before it, and what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(tuple(input_ids[0].tolist()))
        if len(self.seen) % 3 == 0:
            scores[:, input_ids[0, -1]] = 1e4
        return scores


@pytest.mark.parametrize("draft", ["ngram", "self"])
def test_processors_of_ones_own_see_what_transformers_shows_them(draft: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped, ours, theirs = wrap(model, model if draft == "self" else draft), _Rhyme(), _Rhyme()
    arguments = {**prompts([6]), "max_new_tokens": 14, "temperature": 0.7, "do_sample": False}
    out = wrapped.generate(**arguments, logits_processor=LogitsProcessorList([ours]))
    assert torch.equal(out, model.generate(**arguments, logits_processor=LogitsProcessorList([theirs])))
    assert not wrapped.specdec.stats.fallbacks
    assert wrapped.specdec.stats.steps > 0
    assert draft == "ngram" or sum(wrapped.specdec.stats.accepted) > 0
    assert ours.seen == theirs.seen
    ours.seen, theirs.seen = [], []
    ends = {"eos_token_id": out[0, 10].item(), "pad_token_id": 0}  # in the middle of a draft
    for each, processor in ((wrapped, ours), (model, theirs)):
        each.generate(**arguments, **ends, logits_processor=LogitsProcessorList([processor]))
    assert ours.seen == theirs.seen


def test_processors_of_ones_own_fall_back_in_batches_and_many(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped, arguments = wrap(model), {**prompts(RAGGED), "max_new_tokens": 6}
    with pytest.warns(UserWarning, match="logits processor _Rhyme with a batch of several samples"):
        out = wrapped.generate(**arguments, logits_processor=LogitsProcessorList([_Rhyme()]))
    assert torch.equal(out, model.generate(**arguments, logits_processor=LogitsProcessorList([_Rhyme()])))
    texts = [[3, 4, 5], [6, 7]]
    with pytest.warns(UserWarning, match="logits processors of one's own in generate_many"):
        kept = [_Rhyme()]
        settings = {"max_new_tokens": 6, "logits_processor": LogitsProcessorList(kept), "progress": False}
        results = list(specdec.generate_many(wrapped, texts, **settings))
    again = LogitsProcessorList([_Rhyme()])
    for text, result in zip(texts, results, strict=True):
        ids = torch.tensor([text])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, logits_processor=again)
        assert torch.equal(result.tokens, expected[0])


def test_many_prompts_each_with_its_own(tiny: Tiny, prompts: Prompts) -> None:
    """What is made of a prompt (its length, its words) is that prompt's."""
    model = tiny("llama")
    wrapped, texts = wrap(model), [prompts([n], seed=n)["input_ids"][0] for n in (3, 9, 1, 6, 4)]
    settings = {
        "max_new_tokens": 10, "min_new_tokens": 5, "encoder_no_repeat_ngram_size": 1, "repetition_penalty": 1.2,
        "eos_token_id": list(range(1, 97, 2)), "pad_token_id": 0,
    }  # fmt: skip
    results = list(specdec.generate_many(wrapped, texts, max_batch_size=2, progress=False, **settings))
    assert not wrapped.specdec.stats.fallbacks
    for text, result in zip(texts, results, strict=True):
        expected = model.generate(text[None], attention_mask=torch.ones_like(text[None]), **settings)[0]
        assert result.error is None
        assert torch.equal(result.tokens, expected)


def test_many_prompts_with_processors_and_a_criterion_of_ones_own(tiny: Tiny, prompts: Prompts) -> None:
    model, texts = tiny("llama"), [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    settings = {"max_new_tokens": 12, "repetition_penalty": 1.3, "stopping_criteria": StoppingCriteriaList([_Stop()])}
    wrapped = wrap(model)
    results = list(specdec.generate_many(wrapped, texts, max_batch_size=2, progress=False, **settings))
    assert not wrapped.specdec.stats.fallbacks
    for text, result in zip(texts, results, strict=True):
        ids = torch.tensor([text])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
        assert len(expected) == 9
        assert torch.equal(result.tokens, expected)


def test_a_processor_that_raises(tiny: Tiny, prompts: Prompts) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 9:
                raise KeyError("no such word")
            return scores

    model = tiny("llama")
    wrapped = wrap(model)
    with pytest.raises(KeyError, match="no such word"):
        wrapped.generate(**prompts([6]), max_new_tokens=8, logits_processor=LogitsProcessorList([Broken()]))
    same(wrapped, model, **prompts([6]), max_new_tokens=8)


def test_scores_that_leave_no_law(tiny: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(tiny("llama"))
    with pytest.raises(RuntimeError, match="no law to sample from"):
        wrapped.generate(**prompts([6]), max_new_tokens=8, do_sample=True, suppress_tokens=list(range(97)))


@pytest.mark.slow
def test_compiled(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = specdec.compile(model, draft=tiny("llama", seed=7, num_hidden_layers=1))
    for lengths in ([6], RAGGED):
        same(wrapped, model, **prompts(lengths), max_new_tokens=16, no_repeat_ngram_size=2, repetition_penalty=1.3)


def test_what_is_known_of_kinds() -> None:
    assert is_of_a_row(logits_process.TopKLogitsWarper(3))
    assert not is_of_a_row(logits_process.MinLengthLogitsProcessor(3, 1))
    assert processors.is_pure(logits_process.MinLengthLogitsProcessor(3, 1))
    assert not processors.is_pure(_Rhyme())


def test_stop_strings_in_batches(tiny: Tiny, prompts: Prompts) -> None:
    model: PreTrainedModel = tiny("llama")
    wrapped, tokenizer = wrap(model), zoo.load_pair()[2]
    out = model.generate(**prompts(RAGGED), max_new_tokens=12)
    strings = [tokenizer.decode(out[row, place : place + 2]) for row, place in ((0, 11), (2, 14))]
    arguments = {"tokenizer": tokenizer, "stop_strings": strings}
    with pytest.warns(UserWarning, match="stop strings with a batch of several samples and no end of text"):
        wrapped.generate(**prompts(RAGGED), max_new_tokens=2, **arguments)
    wrapped.specdec.stats.reset()
    arguments |= {"eos_token_id": 96, "pad_token_id": 0}
    stopped = same(wrapped, model, **prompts(RAGGED), max_new_tokens=12, **arguments)
    assert not torch.equal(stopped, out[:, : stopped.shape[1]])
    assert wrapped.specdec.stats.steps > 0
    criteria = StoppingCriteriaList([_Rhyme()])
    with pytest.warns(UserWarning, match="stopping criterion _Rhyme with a batch"), pytest.raises(TypeError):
        wrapped.generate(**prompts(RAGGED), max_new_tokens=3, stopping_criteria=criteria)


class _Until(LogitsProcessor):
    """Fails where it is asked past a length."""

    def __init__(self, length: int) -> None:
        self.length, self.calls = length, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if input_ids.shape[1] > self.length:
            raise KeyError("asked past the end")
        return scores


class _Stop(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9)


@pytest.mark.parametrize("draft", ["ngram", "self"])
def test_nothing_is_asked_past_a_stop(draft: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = wrap(model, model if draft == "self" else draft)
    asked = {**prompts([6]), "max_new_tokens": 10, "stopping_criteria": StoppingCriteriaList([_Stop()])}
    ours, theirs = _Until(8), _Until(8)
    out = wrapped.generate(**asked, logits_processor=LogitsProcessorList([ours]))
    assert torch.equal(out, model.generate(**asked, logits_processor=LogitsProcessorList([theirs])))
    assert out.shape[1] == 9
    assert ours.calls == theirs.calls == 3
    assert not wrapped.specdec.stats.fallbacks


@pytest.mark.parametrize("kind", ["processor", "criterion"])
def test_what_came_before_an_error_is_streamed(kind: str, tiny: Tiny, prompts: Prompts) -> None:
    class Fails(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if input_ids.shape[1] == 10:
                raise KeyError("no such word")
            return torch.zeros(1, dtype=torch.bool)

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            raise AssertionError("it did not end")

    model, seen = tiny("llama"), []
    for each in (wrap(model, model), model):
        given: dict[str, Any] = {"logits_processor": LogitsProcessorList([_Until(9)])}
        if kind == "criterion":
            given = {"stopping_criteria": StoppingCriteriaList([Fails()])}
        streamer = Streamer()
        with pytest.raises(KeyError):
            each.generate(**prompts([6]), max_new_tokens=10, streamer=streamer, **given)
        seen.append(streamer.tokens)
    assert seen[0] == seen[1]
    assert len(seen[0]) == (9 if kind == "criterion" else 10)  # a token is judged before it is handed out
