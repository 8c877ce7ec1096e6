"""generate_many() where something fails: a clear report, all other results, and a model that works afterwards."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from test_many import LENGTHS, SETTINGS, TEXTS, assert_right, generated, speculates
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from specdec import Result, generate_many
from specdec.engine.launch import Launcher
from specdec.engine.state import BatchState
from specdec.hf.cache import RaggedCache


@pytest.mark.parametrize(("bad", "error", "message"), [
    (torch.ones(41, dtype=torch.int64), ValueError, "a prompt of 41 tokens is longer than 40"),
    (torch.ones(3), ValueError, "one text's token ids, got torch.float32"),
    (torch.ones(2, 3, dtype=torch.int64), ValueError, r"of shape \(2, 3\)"),
    ({"attention_mask": [1]}, KeyError, "input_ids"), 
    ("w5 w6", TypeError, r"must be token ids, as in tokenizer\(text\).input_ids, and is text: 'w5 w6'"),
    ([], ValueError, "token ids"), ([-1, 5], ValueError, "tokens -1 to 5, of a model that has 97"),
    ([5, 97], ValueError, "tokens 5 to 97"),
])  # fmt: skip
def test_a_prompt_that_is_none(
    bad: Any, error: type[Exception], message: str, wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
) -> None:  # fmt: skip
    given = [*TEXTS[:5], bad, *TEXTS[5:]]
    results = list(generate_many(wrapped, given, max_batch_size=3, max_prompt_length=40, **SETTINGS))
    broken = results.pop(5)
    assert broken.index == 5
    assert broken.tokens is None
    with pytest.raises(error, match=message):
        raise broken.error
    assert [result.index for result in results] == [i for i in range(13) if i != 5]
    assert_right([Result(i, r.tokens, r.error) for i, r in enumerate(results)], model, TEXTS, **SETTINGS)
    speculates(wrapped, model, prompts)


def test_a_text_past_gpt2s_positions(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("gpt2")
    wrapped = wrap(model, "ngram")
    given = [*TEXTS[:4], torch.full((120,), 5), *TEXTS[4:]]
    with pytest.warns(UserWarning, match="134 tokens for 128 positions"):
        results = list(generate_many(wrapped, given, **SETTINGS))
    broken = results.pop(4)
    assert isinstance(broken.error, IndexError)
    assert_right([Result(i, r.tokens, r.error) for i, r in enumerate(results)], model, TEXTS, **SETTINGS)
    speculates(wrapped, model, prompts)


class _After(StoppingCriteria):
    """Ends a text after one of some tokens; remembers what it was asked, and may raise."""

    def __init__(self, tokens: list[int], raises: Callable[[Tensor], bool] = lambda ids: False) -> None:
        self.tokens, self.raises = tokens, raises
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked.append(input_ids[0].tolist())
        if self.raises(input_ids[0]):
            raise LookupError("out of ideas")
        return torch.isin(input_ids[:, -1], torch.tensor(self.tokens))


@pytest.mark.parametrize("draft", ["ngram", "self"])
def test_criteria_are_exact_to_the_token(draft: str, model: PreTrainedModel) -> None:
    """Also where several tokens come at once; and they are asked after every one, as transformers asks."""
    wrapped = wrap(model, model if draft == "self" else draft)
    free = [generated(model, ids, **SETTINGS)[len(ids) :].tolist() for ids in TEXTS]
    ends = [free[0][7], free[2][1], free[4][12]]
    theirs, ours, many = (_After(ends) for _ in range(3))
    expected = [generated(model, ids, stopping_criteria=[theirs], **SETTINGS) for ids in TEXTS]
    assert len({len(out) - n for out, n in zip(expected, LENGTHS, strict=True)}) > 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec")
        for ids, out in zip(TEXTS, expected, strict=True):
            assert torch.equal(generated(wrapped, ids, stopping_criteria=[ours], **SETTINGS), out)
        results = list(generate_many(wrapped, TEXTS, max_batch_size=4, stopping_criteria=[many], **SETTINGS))
    for result, out in zip(results, expected, strict=True):
        assert torch.equal(result.tokens, out)
    assert ours.asked == theirs.asked
    assert sorted(many.asked) == sorted(theirs.asked)


def test_a_criterion_that_raises(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    def raises(ids: Tensor) -> bool:
        return ids[0] == TEXTS[4][0] and len(ids) == 14 + 8

    assert sum(bool(ids[0] == TEXTS[4][0]) for ids in TEXTS) == 1
    many = generate_many(wrapped, TEXTS, max_batch_size=3, stopping_criteria=[_After([], raises)], **SETTINGS)
    for result, ids in zip(many, TEXTS, strict=True):
        expected = generated(model, ids, **SETTINGS)
        if result.index == 4:
            assert isinstance(result.error, LookupError)
            assert 14 <= len(result.tokens) < 14 + 8
            assert torch.equal(result.tokens, expected[: len(result.tokens)])
        else:
            assert result.error is None
            assert torch.equal(result.tokens, expected)
    with pytest.raises(LookupError, match="out of ideas"):
        generated(wrapped, TEXTS[4], stopping_criteria=[_After([], raises)], **SETTINGS)
    speculates(wrapped, model, prompts)


def _raise_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException, at: int) -> None:
    """The `at`-th call of a method raises."""
    method, calls = getattr(owner, name), iter(range(1, 10**6))

    def called(*arguments: Any) -> Any:
        if next(calls) == at:
            raise error
        return method(*arguments)

    monkeypatch.setattr(owner, name, called)


def _check_cut(results: list[Result], error: type[BaseException], expected: list[Tensor]) -> list[bool]:
    """Texts are whole, or true beginnings with an error; which are whole."""
    for result in results:
        assert torch.equal(result.tokens, expected[result.index][: len(result.tokens)])
        if result.error is None:
            assert len(result.tokens) == len(expected[result.index])
        else:
            assert isinstance(result.error, error)
    return [result.error is None for result in results]


@pytest.mark.parametrize("in_order", [True, False])
def test_an_interruption_loses_nothing_that_was_done(
    in_order: bool, wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = [generated(model, ids, max_length=45, pad_token_id=0) for ids in TEXTS]
    _raise_once(monkeypatch, Launcher, "start", KeyboardInterrupt(), 80)
    results = []
    with pytest.raises(KeyboardInterrupt):
        for result in generate_many(wrapped, TEXTS, max_batch_size=3, in_order=in_order, max_length=45, pad_token_id=0):
            results.append(result)
    whole = _check_cut(results, KeyboardInterrupt, expected)
    assert whole.count(False) == 3
    assert whole.count(True) >= 3
    assert sorted(result.index for result in results) == list(range(len(results)))
    speculates(wrapped, model, prompts)


def test_no_memory_in_a_step(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Texts under way are lost, the others decoded, with new buffers: no error may keep the old ones alive."""
    expected = [generated(model, ids, max_length=45, pad_token_id=0) for ids in TEXTS]
    decoder = weakref.ref(wrapped.specdec._decoders.get(wrapped.specdec.draft))
    _raise_once(monkeypatch, Launcher, "start", torch.OutOfMemoryError("no memory"), 80)
    results = list(generate_many(wrapped, TEXTS, max_batch_size=3, max_length=45, pad_token_id=0))
    assert [result.index for result in results] == list(range(len(TEXTS)))
    whole = _check_cut(results, torch.OutOfMemoryError, expected)
    assert whole.count(False) == 3
    assert whole[-1]
    assert decoder() is None
    speculates(wrapped, model, prompts)


def test_no_memory_for_the_rows(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wrapped.specdec._decoders.get(wrapped.specdec.draft)  # models are proved
    _raise_once(monkeypatch, RaggedCache, "allocate", torch.OutOfMemoryError("no memory"), 1)
    results = generate_many(wrapped, TEXTS, max_batch_size=3, **SETTINGS)
    first = next(results)
    assert isinstance(first.error, torch.OutOfMemoryError)
    assert torch.equal(first.tokens, TEXTS[0])
    with pytest.raises(RuntimeError, match=r"3 rows of 54 tokens, 0\.\d GiB: no memory"):
        next(results)
    speculates(wrapped, model, prompts)


def test_no_memory_to_admit_a_prompt(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _raise_once(monkeypatch, BatchState, "admit", torch.OutOfMemoryError("no memory"), 6)
    results = list(generate_many(wrapped, TEXTS, max_batch_size=3, in_order=True, **SETTINGS))
    assert [result.index for result in results] == list(range(len(TEXTS)))
    whole = _check_cut(results, torch.OutOfMemoryError, [generated(model, ids, **SETTINGS) for ids in TEXTS])
    assert whole == [i != 5 for i in range(len(TEXTS))]
    assert torch.equal(results[5].tokens, TEXTS[5])
    speculates(wrapped, model, prompts)


def test_steps_that_always_fail_end_the_run(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fails(*_: Any) -> Any:
        raise RuntimeError("out of order")

    results = []
    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "start", fails)
        with pytest.raises(RuntimeError, match=r"decoding stopped, with 3 rows.*out of order"):
            results += generate_many(wrapped, TEXTS, max_batch_size=3, **SETTINGS)
    speculates(wrapped, model, prompts)


@pytest.mark.parametrize("error", [OSError("the file is gone"), KeyboardInterrupt()])
def test_prompts_that_cannot_be_read(
    error: BaseException, wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    def reading() -> Iterator[Tensor]:
        yield from TEXTS[:7]
        raise error

    with pytest.raises(type(error)):
        generate_many(wrapped, reading(), **SETTINGS)
    results = []
    with pytest.raises(type(error)):
        for result in generate_many(wrapped, reading(), max_batch_size=3, max_prompt_length=40, **SETTINGS):
            results.append(result)
    if isinstance(error, KeyboardInterrupt):  # in a hurry
        assert not all(_check_cut(results, type(error), [generated(model, ids, **SETTINGS) for ids in TEXTS]))
    else:
        assert_right(results, model, TEXTS[:7], **SETTINGS)
    speculates(wrapped, model, prompts)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_law_that_is_nan_is_one_texts_error(
    in_order: bool, fresh: Tiny, model: PreTrainedModel, prompts: Prompts
) -> None:
    broken = fresh("llama")
    wrapped = wrap(broken, model)

    def results(given: list[Tensor], **settings: Any) -> list[Result]:
        wrapped.specdec.seeds = torch.arange(len(given))
        found = generate_many(wrapped, given, max_batch_size=3, in_order=in_order, do_sample=True, **settings)
        return sorted(found, key=lambda result: result.index)

    expected, longer = results(TEXTS, **SETTINGS), results(TEXTS, max_new_tokens=25)
    unsaid = next(token for token in range(1, 97) if not any(token in result.tokens for result in longer))
    with torch.no_grad():
        broken.get_input_embeddings().weight[unsaid] = float("nan")
    poisoned = [*TEXTS[:4], torch.tensor([5, unsaid]), *TEXTS[5:]]
    for result, whole in zip(results(poisoned, **SETTINGS), expected, strict=True):
        if result.index == 4:
            assert isinstance(result.error, RuntimeError)
            assert "NaN" in str(result.error)
        else:
            assert result.error is None
            assert torch.equal(result.tokens, whole.tokens)
    broken.load_state_dict(model.state_dict())
    speculates(wrapped, model, prompts)


# Consumers.


def test_a_consumer_that_stops_early(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    for _ in generate_many(wrapped, TEXTS, max_batch_size=3, **SETTINGS):
        break
    speculates(wrapped, model, prompts)
    results = generate_many(wrapped, TEXTS, max_batch_size=3, **SETTINGS)
    next(results)
    results.close()
    speculates(wrapped, model, prompts)
    generate_many(wrapped, TEXTS, **SETTINGS)  # never begun
    speculates(wrapped, model, prompts)


def test_calls_between_results(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    results = generate_many(wrapped, TEXTS, max_batch_size=3, **SETTINGS)
    got = [next(results)]
    with pytest.warns(UserWarning, match="specdec runs transformers' own loop: another generate"):
        out = wrapped.generate(**prompts([7, 3]), max_new_tokens=6)
    assert torch.equal(out, model.generate(**prompts([7, 3]), max_new_tokens=6))
    with pytest.raises(RuntimeError, match="another generate"):
        list(generate_many(wrapped, TEXTS, **SETTINGS))
    assert torch.is_grad_enabled()
    assert_right(got + list(results), model, TEXTS, **SETTINGS)
    speculates(wrapped, model, prompts)


@pytest.mark.filterwarnings("ignore:specdec runs transformers' own loop. another generate")
def test_two_threads(wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts) -> None:
    expected = model.generate(**prompts([7, 3]), max_new_tokens=6)
    right: list[bool] = []
    done = threading.Event()

    def other() -> None:
        while not done.is_set():
            right.append(torch.equal(wrapped.generate(**prompts([7, 3]), max_new_tokens=6), expected))

    results = generate_many(wrapped, TEXTS * 2, max_batch_size=3, **SETTINGS)
    got = [next(results)]  # begun: whoever comes second falls back
    thread = threading.Thread(target=other)
    thread.start()
    got += results
    done.set()
    thread.join()
    assert_right(got, model, TEXTS * 2, **SETTINGS)
    assert all(right)
    assert wrapped.specdec.stats.fallbacks["another generate() of this model is running"] > 0
    speculates(wrapped, model, prompts)


def test_the_bar_is_drawn_in_a_terminal_only(
    wrapped: PreTrainedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(generate_many(wrapped, TEXTS[:3], **SETTINGS))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    list(generate_many(wrapped, TEXTS[:3], **SETTINGS))
    assert "3/3" in capsys.readouterr().err
    list(generate_many(wrapped, TEXTS[:3], progress=False, **SETTINGS))
    assert capsys.readouterr() == ("", "")
