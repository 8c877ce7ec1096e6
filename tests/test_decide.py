"""What one process cannot know of another is decided in one place, and what is decided there is followed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap

import specdec
from specdec.engine import decide, seeds
from specdec.engine.control import policy
from specdec.engine.tree import TokenTree
from specdec.graphs.captured import Mark
from specdec.tune import choose
from specdec.tune.best_tree import StepCost

Decide = Callable[..., dict[str, list[Any]]]


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Decide:
    """Answers questions, by name, otherwise than this process would; returns what it would have answered."""

    def patch(**answers: Any) -> dict[str, list[Any]]:
        asked: dict[str, list[Any]] = {}

        def answer(name: str, value: Any) -> Any:
            asked.setdefault(name, []).append(value)
            return answers.get(name.replace(" ", "_"), value)

        for module in (decide, seeds, policy, choose):
            monkeypatch.setattr(module, "decide", answer)
        return asked

    return patch


def test_a_decided_end_of_time(tiny: Tiny, prompts: Prompts, decided: Decide) -> None:
    """A call with hours left, and one of many texts; and one whose time is up here but not elsewhere."""
    wrapped, settings = wrap(tiny("llama")), {"max_new_tokens": 20, "max_time": 3600}
    whole = wrapped.generate(**prompts([5]), **settings)
    asked = decided(is_past=True)
    first = wrapped.generate(**prompts([5]), **settings)
    assert 5 < first.shape[1] < whole.shape[1] == 25
    assert torch.equal(first, whole[:, : first.shape[1]])
    assert asked["is past"] == [False]
    many = specdec.generate_many(wrapped, [whole[0, :5]], progress=False, **settings)
    assert [result.tokens.tolist() for result in many] == first.tolist()
    decided(is_past=False)
    assert torch.equal(wrapped.generate(**prompts([5]), **settings | {"max_time": 1e-9}), whole)


def test_a_call_without_a_limit_asks_for_no_time(tiny: Tiny, prompts: Prompts, decided: Decide) -> None:
    asked = decided()
    wrap(tiny("llama")).generate(**prompts([5]), max_new_tokens=6)
    assert set(asked) == {"lacks memory"}


def test_decided_seeds(tiny: Tiny, prompts: Prompts, decided: Decide) -> None:
    """Of a call, and of any number of texts."""
    wrapped, settings = wrap(tiny("llama")), {"do_sample": True, "top_k": 0, "max_new_tokens": 9}
    wrapped.specdec.seeds = [7, 8]
    expected = wrapped.generate(**prompts([5, 3]), **settings)
    asked = decided(seeds=torch.tensor([7, 8]), seed_of_seeds=3)
    assert torch.equal(wrapped.generate(**prompts([5, 3]), **settings), expected)
    assert wrapped.specdec.seeds.tolist() == [7, 8] != asked["seeds"][0].tolist()
    drawn = []
    for _ in range(2):
        texts = (ids for ids in expected[:, :4])
        many = specdec.generate_many(wrapped, texts, max_prompt_length=4, progress=False, **settings)
        drawn.append([result.tokens.tolist() for result in many])
    assert drawn[0] == drawn[1]
    assert len(set(asked["seed of seeds"])) == 2


def test_decided_seconds(tiny: Tiny, prompts: Prompts, decided: Decide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's clock says, what is drafted follows what was decided."""
    clock = random.Random(0)
    monkeypatch.setattr(Mark, "until", lambda *_: clock.random())
    seconds = 0.0, 0.25, 1.0
    asked = decided(seconds_of_a_step=seconds)
    found = []
    for _ in range(2):
        wrapped = wrap(tiny("llama"), tiny("llama", seed=7), depth=3, adapt=None)
        wrapped.generate(**prompts([9, 4]), max_new_tokens=60)
        found.append(wrapped.specdec.stats.to_dict())
        measured = found[-1]["decisions"]
        taken = [measured["draft_seconds"], measured["forward_seconds"]]
        assert [{x for curve in part.values() for x in curve.values()} for part in taken] == [{0.25}, {1.0}]
    assert found[0]["allowed"] == found[1]["allowed"]
    assert found[0]["decisions"] == found[1]["decisions"]
    assert len(set(asked["seconds of a step"])) > found[0]["steps"]


def test_decided_seconds_of_forwards(
    tiny: Tiny, prompts: Prompts, decided: Decide, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, dear = (StepCost({1: 1.0, 64: 1.0}, level) for level in (0.0, 100.0))
    monkeypatch.setattr(choose, "measure_cost", lambda *_: free)
    asked = decided(seconds_of_forwards=dear)
    wrapped = wrap(tiny("llama"), tiny("llama"))
    assert wrapped.specdec.tune(**prompts([5]), max_new_tokens=8, pad_token_id=0).tree == TokenTree.chain(1)
    assert asked["seconds of forwards"] == [free]


def test_memory_that_another_process_lacks(tiny: Tiny, prompts: Prompts, decided: Decide) -> None:
    model = tiny("llama")
    wrapped = wrap(model)
    decided(lacks_memory=True)
    with pytest.warns(specdec.SpecdecWarning, match="out of memory"):
        out = wrapped.generate(**prompts([5]), max_new_tokens=6)
    assert torch.equal(out, model.generate(**prompts([5]), max_new_tokens=6))
    assert wrapped.specdec.stats.decoded == 0


def test_memory_that_this_process_lacks(decided: Decide) -> None:
    """It is said, and nobody's answer makes up for it."""
    asked = decided(lacks_memory=False)
    with pytest.raises(torch.OutOfMemoryError, match="here"), decide.agreed_memory():
        raise torch.OutOfMemoryError("here")
    with pytest.raises(LookupError), decide.agreed_memory():  # fails alike everywhere
        raise LookupError
    with decide.agreed_memory():
        pass
    assert asked == {"lacks memory": [True, False]}
