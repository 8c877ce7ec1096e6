"""Beam search over a forest: transformers' sequences, scores and beam indices, whatever is speculated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DENSE, FLAT, VOCAB
from side_by_side import Prompts, Tiny, wrap
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import specdec
from specdec.engine import forest
from specdec.engine.pace import DEPTHS, TRIES, Pace
from specdec.engine.trie import Trie

ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(params=[0, 1, 3])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Layers that every forward speculates."""
    monkeypatch.setattr(Pace, "choose", lambda self: request.param)
    return request.param


def same_beams(ours: PreTrainedModel, theirs: PreTrainedModel, **given: Any) -> Any:
    """Both with torch's generator in one state; what ours returned."""
    outs = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        outs.append(model.generate(**given, **ALL))
    expected, out = outs
    assert type(out) is type(expected)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.beam_indices, expected.beam_indices)
    torch.testing.assert_close(out.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    for name in "scores", "logits":
        for mine, other in zip(out[name], expected[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    return out


def layers(wrapped: PreTrainedModel) -> float:
    stats = wrapped.specdec.stats
    assert stats.decoded and not stats.fallbacks and not stats.eager
    return stats.beam_layers / stats.beam_forwards


@pytest.mark.parametrize(("n_beams", "lengths"), [(2, [6]), (4, [5]), (3, [9, 1, 4])])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("ends", [None, [5, 11, 40]])
@pytest.mark.parametrize(("early_stopping", "length_penalty"), [(False, 1.0), (True, 0.0), ("never", 2.0)])
def test_sequences_scores_and_indices(
    n_beams: int, lengths: list[int], do_sample: bool, ends: list[int] | None, early_stopping: Any,
    length_penalty: float, depth: int, model: PreTrainedModel, prompts: Prompts,
) -> None:  # fmt: skip
    given = dict(
        num_beams=n_beams, do_sample=do_sample, early_stopping=early_stopping, length_penalty=length_penalty,
        max_new_tokens=14, pad_token_id=0, **({} if ends is None else {"eos_token_id": ends}),
    )  # fmt: skip
    wrapped = wrap(model, model)
    same_beams(wrapped, model, **prompts(lengths), **given)
    assert layers(wrapped) >= (1.0 if not depth or do_sample else 1.2)


class _Sawtooth(LogitsProcessor):
    """A user's own: what is likely depends on the length."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores - 0.1 * ((torch.arange(scores.shape[1]) + input_ids.shape[1]) % 7)


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": 7},
        {"num_return_sequences": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"logits_processor": LogitsProcessorList([_Sawtooth()])},
        {"bad_words_ids": [[4], [8, 9]], "renormalize_logits": True},
    ],
    ids=lambda given: "-".join(given),
)
def test_settings(
    given: dict[str, Any], depth: int, model: PreTrainedModel, wrapped: PreTrainedModel, prompts: Prompts
) -> None:
    same_beams(wrapped, model, **prompts([7, 2]), num_beams=3, max_new_tokens=12, pad_token_id=0, **given)
    layers(wrapped)


FAMILIES = "gpt2", "mistral", "gemma2", "qwen3", "mixtral", "phi", *list(DENSE)[:1], *list(FLAT)[:1]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, softcaps, learned positions; attention by the op, under a mask, and the model's own."""
    monkeypatch.setattr(Pace, "choose", lambda self: 2)
    model = tiny(family)
    wrapped = wrap(model, model)
    for lengths in ([12], [11, 3]):
        same_beams(wrapped, model, **prompts(lengths), num_beams=3, max_new_tokens=16, pad_token_id=0)
    assert layers(wrapped) > 1.2


@pytest.mark.parametrize("source", [None, "ngram", "both"])
def test_any_draft(source: Any, model: PreTrainedModel, prompts: Prompts) -> None:
    """Its own pace; what is no model speculates nothing."""
    draft = [model, "ngram"] if source == "both" else source
    wrapped = wrap(model, draft)
    same_beams(wrapped, model, **prompts([8, 5]), num_beams=2, max_new_tokens=40, pad_token_id=0)
    assert (layers(wrapped) > 1) == (source == "both")
    inputs = prompts([8, 5])  # and what is no beam search is decoded as ever
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=9), model.generate(**inputs, max_new_tokens=9))


def test_compiled(model: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function of the target and one of the draft serve all calls with so many beams."""
    monkeypatch.setattr(Pace, "choose", lambda self: 2)
    wrapped = specdec.compile(model, draft=model)
    for length in (5, 9, 70):
        same_beams(wrapped, model, **prompts([length]), num_beams=2, max_new_tokens=20, pad_token_id=0)
        compiled, wrapped.specdec.stats.seconds["compile"] = wrapped.specdec.stats.seconds["compile"], 0.0
        assert (compiled > 0) == (length == 5)
    assert layers(wrapped) > 1.5


def test_more_nodes_than_there_was_room_for(
    model: PreTrainedModel, wrapped: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest, "SLOTS", 4)
    monkeypatch.setattr(Pace, "choose", lambda self: 3)
    same_beams(wrapped, model, **prompts([6, 3]), num_beams=6, max_new_tokens=30, pad_token_id=0, do_sample=True)
    layers(wrapped)


def test_wrong_logits_show(model: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison finds a forest whose nodes see a sibling's tokens."""
    monkeypatch.setattr(forest, "ancestor_words", lambda parents: -torch.ones(*parents.shape, 2, dtype=torch.int64))
    with pytest.raises(AssertionError):
        same_beams(wrap(model, None), model, **prompts([6]), num_beams=3, max_new_tokens=12, pad_token_id=0)


@pytest.mark.parametrize(("reason", "given"), [
    ("past_key_values with beams", "past"),
    ("use_cache=False", {"use_cache": False}),
    ("logits processors", {"guidance_scale": 1.5}),
])  # fmt: skip
def test_what_falls_back(
    reason: str, given: Any, model: PreTrainedModel, wrapped: PreTrainedModel, prompts: Prompts
) -> None:
    inputs = {**prompts([6]), "num_beams": 2, "max_new_tokens": 5, "pad_token_id": 0}

    def past() -> dict[str, Any]:
        from transformers import DynamicCache

        return {"past_key_values": DynamicCache(config=model.config)} if given == "past" else given

    expected = model.generate(**inputs, **past())
    with pytest.warns(UserWarning, match=reason):
        assert torch.equal(wrapped.generate(**inputs, **past()), expected)
    assert list(wrapped.specdec.stats.fallbacks.values()) == [1]


def test_out_of_memory_the_loop_draws_the_same(
    model: PreTrainedModel, wrapped: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**prompts([6]), "num_beams": 2, "do_sample": True, "max_new_tokens": 9, "pad_token_id": 0}
    torch.manual_seed(3)
    expected = model.generate(**given)
    read, n = forest.Reader.read, itertools.count()

    def short(self: Any, *args: Any) -> None:
        if next(n) == 9:
            raise torch.OutOfMemoryError("for a test")
        read(self, *args)

    monkeypatch.setattr(forest.Reader, "read", short)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(wrapped.generate(**given), expected)


def test_a_trie_keeps_what_beams_can_come_to() -> None:
    trie = Trie(10, [3])
    a = trie.child(0, 4)
    b, c = trie.child(a, 5), trie.child(a, 6)
    dead, d = trie.child(0, 9), trie.child(c, 7)
    assert trie.child(a, 6) == c
    assert trie.path(d) == [0, a, c, d]
    assert trie.kept([b, c], {0, a, b, c}) == ([0], [a, b, c, d])
    assert trie.kept([b, c], {0}) == ([], [0, a, b, c, d])  # no model has read the others
    assert trie.kept([c, c], {0, a, c, d}) == ([0, a], [c, d])
    new = trie.move(*trie.kept([b, c], {0, a, b, c}))
    assert new == {a: 0, b: 1, c: 2, d: 3} and dead not in new
    assert (trie.length, trie.tokens, trie.parents, trie.depths) == (11, [4, 5, 6, 7], [-1, 0, 0, 2], [0, 1, 1, 2])
    assert trie.children == [{5: 1, 6: 2}, {}, {7: 3}, {}]


def test_the_pace_is_what_takes_least_time_a_layer() -> None:
    served: Callable[[int], int] = lambda depth: 1 + min(depth, 2)  # noqa: E731
    for costs, best in ((1.0, 1.1, 1.2, 1.3, 1.4), 2), ((1.0, 2.1, 3.2, 3.3, 3.4), 0):
        pace, chosen = Pace(), []
        for _ in range(200):
            chosen.append(depth := pace.choose())
            pace.learn(depth, costs[depth], served(depth))
        assert set(chosen[: TRIES * len(DEPTHS)]) == set(DEPTHS)
        assert chosen.count(best) > 160


def test_draws_are_of_all_tokens(model: PreTrainedModel, prompts: Prompts) -> None:
    """A text that says nothing tests nothing."""
    out = wrap(model, None).generate(**prompts([6]), num_beams=4, max_new_tokens=30, do_sample=True, pad_token_id=0)
    assert len(set(out[0, 6:].tolist())) > 4 and int(out.max()) < VOCAB
