"""N-grams of earlier texts: what they find, what they cost, and that no text depends on them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from test_verifiers import SEEDS, VOCAB, check_law, draft, target  # noqa: F401
from transformers import PreTrainedModel

import specdec
from specdec.drafters.lookup import EarlierTexts, LookUp, SuffixIndex
from specdec.engine.text import Text

SOURCES = "ngram", "both"


def _drafts(source: str, tiny: Tiny) -> Any:
    return "ngram" if source == "ngram" else [tiny("llama", seed=7), "ngram"]


def _text(tokens: list[int]) -> Text:
    return Text(torch.tensor(tokens[:1]), 100, tokens=list(tokens[1:]))


def _search(text: list[int], texts: list[list[int]], n_tokens: int, max_ngram: int) -> list[int]:
    """The longest suffix, two tokens at least, in the text itself or else where others had it last."""
    for n in range(max_ngram, 1, -1):
        suffix = text[-n:]
        if len(suffix) < n:
            continue
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == suffix:
                period = len(text) - end
                return [text[end + i % period] for i in range(n_tokens)]
        for other in reversed(texts):
            for end in range(len(other) - 1, n - 1, -1):
                if other[end - n : end] == suffix:
                    return other[end : end + n_tokens]
    return []


@pytest.mark.parametrize("room", [60, 10**6])
def test_what_a_plain_search_finds(room: int) -> None:
    """In the texts that there is room for, the oldest of which go first."""
    chance, n_found, texts = random.Random(0), 0, []
    earlier, live = EarlierTexts(3, room), []
    for _ in range(30):
        tokens = [chance.randrange(4) for _ in range(20)]
        live.append(_text(tokens))
        earlier.extend(live[-1], tokens)
        texts.append(tokens)
        known = texts if room > 1000 else texts[-3:]
        for _ in range(10):
            asked = [chance.randrange(4) for _ in range(chance.randrange(1, 5))]
            index = SuffixIndex(3)
            index.extend(asked)
            expected = _search(asked, known, 5, 3)
            assert index.continuation(5, earlier) == expected
            n_found += bool(expected)
    assert n_found > 100
    stored = sum(map(len, earlier._ends.values()))
    assert stored <= 2 * 60 if room < 1000 else stored > 40


def test_a_text_longer_than_there_is_room_for_is_forgotten() -> None:
    earlier, text = EarlierTexts(2, 10), _text([1])
    for token in range(30):
        earlier.extend(text, [token % 5])
    assert not any(earlier._ends.values())
    earlier.extend(_text([1]), [1, 2, 3])
    assert any(earlier._ends.values())


@pytest.mark.parametrize("source", SOURCES)
def test_a_text_decoded_again_takes_few_steps(source: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("llama")
    wrapped = wrap(model, _drafts(source, tiny), adapt=False, remember=1000)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=40)
    wrapped.specdec.stats.reset()
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=40)
    assert wrapped.specdec.stats.steps <= 7  # 9 tokens each
    assert "n-grams of the text and of the last 1000 tokens before it" in repr(wrapped.specdec)
    wrapped.specdec.free()  # forgets them
    wrapped.specdec.stats.reset()
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=40)
    assert wrapped.specdec.stats.steps > 10


@pytest.mark.parametrize("source", SOURCES)
def test_coupled_texts_do_not_depend_on_earlier_ones(source: str, tiny: Tiny, prompts: Prompts) -> None:
    model, inputs = tiny("llama"), prompts([12, 2, 1, 6])
    options = {"do_sample": True, "max_new_tokens": 30, "temperature": 1.5}
    plain = wrap(model, verifier="coupled")
    wrapped = wrap(model, _drafts(source, tiny), verifier="coupled", adapt=False, remember=1000)
    steps = []
    for _ in range(2):
        plain.specdec.seeds = wrapped.specdec.seeds = SEEDS
        wrapped.specdec.stats.reset()
        assert torch.equal(wrapped.generate(**inputs, **options), plain.generate(**inputs, **options))
        steps.append(wrapped.specdec.stats.steps)
    assert steps[1] <= 6 < steps[0]


@pytest.mark.parametrize("verifier", ["auto", "rrs"])
def test_where_texts_depend_on_drafts_earlier_ones_are_not_looked_at(
    verifier: str, target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """The same seeds twice: the second texts would be drafted by who knows their noise."""
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    wrapped = wrap(target, [draft, "ngram"], verifier=verifier, depth=2, remember=10**6)
    wrapped.generate(torch.randint(1, VOCAB, (4, 30)), max_new_tokens=30)  # greedily: there are earlier texts
    texts = []
    for _ in range(2):
        wrapped.specdec.seeds = SEEDS
        ids = torch.arange(12).remainder(VOCAB - 1).view(4, 3) + 1
        texts.append(wrapped.generate(ids, do_sample=True, temperature=1.5, max_new_tokens=20))
    assert torch.equal(*texts)
    check_law(wrapped, target, "cut")


def test_many_prompts(tiny: Tiny, prompts: Prompts) -> None:
    """Texts that run beside each other know each other."""
    model = tiny("llama")
    wrapped = wrap(model, "ngram", adapt=False, remember=1000)
    prompt = prompts([9])["input_ids"][0]
    expected = model.generate(prompt[None], max_new_tokens=20)[0]
    for result in specdec.generate_many(wrapped, [prompt] * 6, max_batch_size=2, max_new_tokens=20, progress=False):
        assert result.tokens.tolist() == expected.tolist()
    accepted = wrapped.specdec.stats.sources["n-grams"].accepted
    assert accepted > 4 * 15


def test_it_is_for_ngrams(tiny: Tiny) -> None:
    model = tiny("llama")
    for draft_ in (None, tiny("llama", seed=7)):
        with pytest.raises(ValueError, match="remember=100 is for n-grams, and the draft is"):
            specdec.compile(model, draft_, remember=100)
    with pytest.raises(ValueError, match="remember must be at least 0, got -1"):
        specdec.compile(model, "ngram", remember=-1)
    assert LookUp(8, 3)._earlier is None
