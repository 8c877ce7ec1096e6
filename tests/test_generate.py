"""`generate()` of a wrapped model: everything a script may ask of it, against transformers' own."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import specdec

Tiny = Callable[..., PreTrainedModel]
Prompts = Callable[..., dict[str, Tensor]]
RAGGED = [9, 2, 1, 6]


def _wrap(model: PreTrainedModel, draft: Any = "ngram", **options: Any) -> PreTrainedModel:
    return specdec.compile(model, draft=draft, compile=False, **options)


@pytest.fixture
def model(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def wrapped(model: PreTrainedModel, tiny: Tiny) -> PreTrainedModel:
    return _wrap(model, tiny("llama", seed=7, num_hidden_layers=1), depth=3)


def _same(wrapped: PreTrainedModel, model: PreTrainedModel, **arguments: Any) -> Tensor:
    """Both generate the same, the wrapped one without falling back."""
    expected = model.generate(**arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(**arguments)
    assert torch.equal(out, expected)
    return out


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


# Arguments that transformers knows.


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_lengths(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    for arguments in ({"max_length": 30}, {"max_new_tokens": 30}, {"max_length": 10, "max_new_tokens": 7}, {}):
        _same(wrapped, model, **prompts(RAGGED), **arguments)


def test_generation_config_objects(
    wrapped: PreTrainedModel, fresh: Tiny, model: PreTrainedModel, prompts: Prompts
) -> None:
    inputs = prompts(RAGGED)
    out = _same(wrapped, model, **inputs, generation_config=GenerationConfig(max_new_tokens=11, pad_token_id=0))
    assert out.shape[1] == 20
    own = fresh("llama")
    own.generation_config.max_new_tokens = 5
    again = _wrap(own)
    assert torch.equal(again.generate(**inputs), out[:, :14])
    again.generation_config.max_new_tokens = 6
    assert torch.equal(again.generate(**inputs), out[:, :15])


def test_lists_of_ends(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    inputs = prompts(RAGGED)
    free = model.generate(**inputs, max_new_tokens=20)[:, 9:].tolist()
    for eos in (free[0][4], [free[0][4]], [free[1][8], free[3][2]]):
        out = _same(wrapped, model, **inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
        assert (out[:, -1] == 0).any() or out.shape[1] < 29


def test_a_mask_is_not_needed(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    ids = prompts([8, 8])["input_ids"]
    _same(wrapped, model, inputs=ids, max_new_tokens=9)
    _same(
        wrapped, model, inputs=prompts(RAGGED)["input_ids"], max_new_tokens=9
    )  # transformers finds the padding itself
    _same(wrapped, model, max_new_tokens=9)  # from the beginning-of-text token alone


def test_inference_mode(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    inputs = prompts(RAGGED)
    expected = model.generate(**inputs, max_new_tokens=9)
    with torch.inference_mode():
        assert torch.equal(wrapped.generate(**prompts(RAGGED), max_new_tokens=9), expected)
        sampled = wrapped.generate(**inputs, max_new_tokens=9, do_sample=True, top_p=0.9)
    assert sampled.shape == expected.shape
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=9), expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_no_gradients_are_kept(wrapped: PreTrainedModel, prompts: Prompts, do_sample: bool) -> None:
    out = wrapped.generate(**prompts(RAGGED), max_new_tokens=5, do_sample=do_sample)
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in wrapped.parameters())


def test_several_return_sequences(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    out = wrapped.generate(**prompts([4, 2]), max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 10)
    assert torch.equal(out[:, :4], prompts([4, 2])["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.tolist()}) == 6
    assert len(wrapped.specdec.seeds) == 6


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
    arguments = {**prompts([6]), "max_new_tokens": 20, "stopping_criteria": criteria}
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


def test_training_mode_falls_back(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    wrapped = _wrap(model)
    wrapped.train()
    with pytest.warns(UserWarning, match="training mode"):
        wrapped.generate(**prompts([4]), max_new_tokens=3)
    wrapped.eval()
    _same(wrapped, model, **prompts([4]), max_new_tokens=3)


def test_max_time_stops_early_with_a_true_beginning(tiny: Tiny, model: PreTrainedModel, prompts: Prompts) -> None:
    class Slow:
        depth = 1

        def __init__(self) -> None:
            self.inner = specdec.api.NgramDrafter(1)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def draft(self, *arguments: Any) -> Any:
            time.sleep(0.05)
            return self.inner.draft(*arguments)

    inputs = prompts(RAGGED)
    full = model.generate(**inputs, max_new_tokens=100)
    start = time.perf_counter()
    out = _wrap(model, Slow()).generate(**inputs, max_new_tokens=100, max_time=0.3)
    assert time.perf_counter() - start < 3
    assert 10 <= out.shape[1] < 60
    assert torch.equal(out, full[:, : out.shape[1]])


# Streamers.


class _Recorder:
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("draft", [None, "ngram", "self"])
def test_streamers_get_each_token_once(draft: str | None, model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = _wrap(model, model if draft == "self" else draft)
    ours, theirs = _Recorder(), _Recorder()
    out = wrapped.generate(**prompts([7]), max_new_tokens=12, streamer=ours)
    model.generate(**prompts([7]), max_new_tokens=12, streamer=theirs)
    assert ours.puts == theirs.puts
    assert ours.ended == 1
    assert [t for put in ours.puts for t in put] == out[0].tolist()


def test_streamers_stop_at_the_end_of_text(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    eos = model.generate(**prompts([7]), max_new_tokens=12)[0, 12].item()
    recorder = _Recorder()
    out = wrapped.generate(**prompts([7]), max_new_tokens=12, streamer=recorder, eos_token_id=eos)
    assert recorder.puts[-1] == [eos]
    assert [t for put in recorder.puts for t in put] == out[0].tolist()


def test_a_streamer_with_a_batch_fails_as_it_does_in_transformers(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts, tokenizer: PreTrainedTokenizerFast
) -> None:
    for each in (model, wrapped):
        with pytest.raises(ValueError, match="batch size 1"):
            each.generate(**prompts([3, 3]), max_new_tokens=3, streamer=TextStreamer(tokenizer))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


def test_text_streamers(
    wrapped: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer(["w5 w6 w7"], return_tensors="pt", return_token_type_ids=False)
    out = wrapped.generate(**inputs, max_new_tokens=8, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0]).split()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    arguments = {**inputs, "max_new_tokens": 8, "streamer": streamer}
    thread = threading.Thread(target=wrapped.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(out[0, 3:]).split()


def test_pipeline(wrapped: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["w5 w6 w7", "w9"]
    out, expected = (
        pipeline("text-generation", model=m, tokenizer=tokenizer)(texts, max_new_tokens=8, batch_size=2)
        for m in (wrapped, model)
    )
    assert out == expected
    assert wrapped.specdec.stats.steps > 0


# Drafts named by the call.


def test_assistant_models(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    wrapped = _wrap(model, None)
    expected = model.generate(**prompts([9]), max_new_tokens=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(**prompts([9]), max_new_tokens=12, assistant_model=model)
        assert torch.equal(out, expected)
        assert wrapped.specdec.stats.acceptance_by_position == [1.0] * 5
        expected = model.generate(**prompts(RAGGED), max_new_tokens=12)
        for assistant in (model, tiny("llama", seed=7, num_hidden_layers=1)):  # transformers takes no batch here
            out = wrapped.generate(**prompts(RAGGED), max_new_tokens=12, assistant_model=assistant)
            assert torch.equal(out, expected)


def test_prompt_lookup(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = _wrap(model, None)
    again = {"input_ids": prompts([9])["input_ids"].repeat(1, 3)}
    expected = model.generate(**again, max_new_tokens=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        out = wrapped.generate(**again, max_new_tokens=20, prompt_lookup_num_tokens=4, max_matching_ngram_size=2)
    assert torch.equal(out, expected)
    assert len(wrapped.specdec.stats.proposed) == 4
    assert wrapped.specdec.stats.proposed[0] > 0


def test_an_assistant_that_does_not_fit_falls_back(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    wrapped = _wrap(model, None)
    expected = model.generate(**prompts([9]), max_new_tokens=6)
    with pytest.warns(UserWarning, match="specdec runs transformers' own loop: drafts of type opt"):
        out = wrapped.generate(**prompts([9]), max_new_tokens=6, assistant_model=tiny("opt"))
    assert torch.equal(out, expected)


# The model itself.


def test_the_original_model_is_unchanged(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("gemma2")
    kind, config = type(model), copy.deepcopy(model.config.to_dict())
    forward = {name: vars(m).get("forward") for name, m in model.named_modules()}
    expected = model.generate(**prompts(RAGGED), max_new_tokens=8)
    logits = model(prompts(RAGGED)["input_ids"]).logits
    wrapped = _wrap(model, model)
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


def test_two_wrapped_models_interleaved(tiny: Tiny, prompts: Prompts) -> None:
    models = [tiny("llama"), tiny("gpt2"), tiny("llama")]
    wrapped = [_wrap(models[0], models[0]), _wrap(models[1], models[0]), _wrap(models[2])]
    expected = [m.generate(**prompts(RAGGED), max_new_tokens=8) for m in models]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        for i in order:
            assert torch.equal(wrapped[i].generate(**prompts(RAGGED), max_new_tokens=8), expected[i])


def test_one_generate_inside_another(tiny: Tiny, prompts: Prompts) -> None:
    """A streamer that uses a second wrapping of the same model between two tokens of the first."""
    model = tiny("llama")
    outer, inner = _wrap(model, model), _wrap(model, model)
    expected = model.generate(**prompts([5], seed=1), max_new_tokens=6)

    class Nested(_Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            assert torch.equal(inner.generate(**prompts([5], seed=1), max_new_tokens=6), expected)

    out = outer.generate(**prompts([7]), max_new_tokens=8, streamer=Nested())
    assert torch.equal(out, model.generate(**prompts([7]), max_new_tokens=8))


@pytest.mark.filterwarnings("ignore:specdec runs transformers' own loop. another generate")
@pytest.mark.parametrize("shared", [False, True])
def test_threads(shared: bool, tiny: Tiny, prompts: Prompts) -> None:
    models = [tiny("llama"), tiny("llama" if shared else "qwen3")]
    first = _wrap(models[0], models[0])
    wrapped = [first, first if shared else _wrap(models[1], models[0])]
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
    wrapped = _wrap(model, model, depth=3)
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
    _same(wrapped, loaded, **prompts(RAGGED), max_new_tokens=6)


def test_replaced_weights_are_seen(fresh: Tiny, prompts: Prompts) -> None:
    model, draft = fresh("llama"), fresh("llama")
    wrapped = _wrap(model, draft)
    inputs = prompts(RAGGED)
    first = wrapped.generate(**inputs, max_new_tokens=8)
    other = fresh("llama", seed=1)

    model.load_state_dict(other.state_dict())
    second = _same(wrapped, other, **inputs, max_new_tokens=8)
    assert not torch.equal(first, second)

    third_model = fresh("llama", seed=2)
    for name, parameter in third_model.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(wrapped.get_submodule(path), leaf, torch.nn.Parameter(parameter.detach().clone()))
    third = _same(wrapped, third_model, **inputs, max_new_tokens=8)
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
    _same(wrapped, other, **inputs, max_new_tokens=8)


# Seeds.


@pytest.mark.parametrize("draft", ["ngram", "other"])
def test_seeds_fix_the_text_whatever_the_batch(
    draft: str, model: PreTrainedModel, tiny: Tiny, prompts: Prompts
) -> None:
    wrapped = _wrap(model, "ngram" if draft == "ngram" else tiny("llama", seed=7, num_hidden_layers=1))
    lengths, seeds, width, n_new = [12, 2, 1, 6], [11, 22, 33, 2**61 + 5], 12, 14
    inputs = prompts(lengths, vocab=6)
    arguments = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_new_tokens": n_new}

    def sample(rows: list[int]) -> list[list[int]]:
        wrapped.specdec.seeds = [seeds[r] for r in rows]
        out = wrapped.generate(**{name: x[rows] for name, x in inputs.items()}, **arguments)
        assert wrapped.specdec.seeds.tolist() == [seeds[r] for r in rows]
        return out[:, width:].tolist()

    together = sample([0, 1, 2, 3])
    assert sample([0, 1, 2, 3]) == together
    assert sample([3, 1, 0, 2]) == [together[i] for i in (3, 1, 0, 2)]
    assert sample([2, 0]) == [together[2], together[0]]
    for row in range(4):
        assert sample([row]) == [together[row]]
    wrapped.specdec.seeds = [1, 2, 3, 4]
    assert wrapped.generate(**inputs, **arguments)[:, width:].tolist() != together


def test_seeds_are_drawn_from_torch_and_used_once(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    arguments = {**prompts([5, 4]), "do_sample": True, "max_new_tokens": 12}
    torch.manual_seed(5)
    first, again = wrapped.generate(**arguments), wrapped.generate(**arguments)
    assert not torch.equal(first, again)
    torch.manual_seed(5)
    assert torch.equal(wrapped.generate(**arguments), first)
    wrapped.specdec.seeds = wrapped.specdec.seeds
    assert torch.equal(wrapped.generate(**arguments), first)
    assert not torch.equal(wrapped.generate(**arguments), first)


def test_as_many_seeds_as_samples(wrapped: PreTrainedModel, prompts: Prompts) -> None:
    wrapped.specdec.seeds = [1, 2, 3]
    with pytest.raises(ValueError, match="3 seeds were set for a batch of 2"):
        wrapped.generate(**prompts([5, 4]), do_sample=True, max_new_tokens=4)
    wrapped.generate(**prompts([5, 4]), do_sample=True, max_new_tokens=4)


# Statistics.


@pytest.mark.parametrize("do_sample", [False, True])
def test_stats_add_up(do_sample: bool, wrapped: PreTrainedModel, prompts: Prompts, tmp_path: Path) -> None:
    stats = wrapped.specdec.stats
    assert stats.tokens_per_step == 0
    wrapped.generate(**prompts(RAGGED), max_new_tokens=9, do_sample=do_sample)
    wrapped.generate(**prompts([4]), max_new_tokens=5, do_sample=do_sample)
    assert stats.tokens == 4 * 9 + 5
    assert len(stats.proposed) == len(stats.accepted) == 3
    assert all(0 <= a <= p for a, p in zip(stats.accepted, stats.proposed, strict=True))
    assert stats.proposed == sorted(stats.proposed, reverse=True)
    assert stats.steps <= stats.sample_steps <= 4 * stats.steps
    assert stats.tokens_per_step == stats.tokens / stats.sample_steps
    assert stats.tokens <= stats.sample_steps + sum(stats.accepted)
    assert stats.seconds["decode"] > 0
    assert stats.seconds["compile"] == 0
    assert json.loads(json.dumps(stats.to_dict())) == stats.to_dict()
    assert stats.to_dict()["tokens"] == 41
    assert "41" in str(stats)
    stats.plot(str(tmp_path / "stats.png"))
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    stats.reset()
    assert stats.to_dict() == specdec.stats.Stats().to_dict()


def test_warmup_leaves_no_trace(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    for do_sample in (False, True):
        wrapped.specdec.warmup(batch_size=2, do_sample=do_sample)
    assert wrapped.specdec.stats.to_dict() == specdec.stats.Stats().to_dict()
    _same(wrapped, model, **prompts(RAGGED), max_new_tokens=5)
