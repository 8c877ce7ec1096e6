"""tune(): the tree it chooses is the fastest for what it measured, and the one that later calls draft."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from transformers import PreTrainedModel

from specdec import TokenTree
from specdec.calls import Calls, Task
from specdec.hf.view import ModelView
from specdec.tune.best_tree import StepCost, expected_tokens, fastest_tree
from specdec.tune.choose import PROBES, Choice, forward_seconds

FREE = StepCost({1: 1.0, 8: 1.0}, 0.0)  # drafts cost nothing
DEAR = StepCost({1: 1.0, 8: 8.0}, 5.0)
SETTINGS = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 24}


@pytest.fixture
def draft(tiny: Tiny) -> PreTrainedModel:
    """The model `model` with other weights at its end: often right."""
    other = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        weight = other.lm_head.weight
        weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return other


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[StepCost], None]:
    """Makes this the cost that is measured: a test's tree must not depend on the machine's mood."""

    def fix(cost: StepCost) -> None:
        monkeypatch.setattr("specdec.tune.choose.measure_cost", lambda *_: cost)

    return fix


def test_the_fastest_tree_for_what_was_measured(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts
) -> None:
    """Nothing replaced: acceptance and cost are this machine's, whatever they are."""
    wrapped = wrap(model, draft)
    choice = wrapped.specdec.tune(**prompts(RAGGED), max_nodes=10, max_depth=4, **SETTINGS)
    assert [*choice.acceptance] == [1, 2, 3, 4]
    assert [len(shares) for shares in choice.acceptance.values()] == [1, 2, 3, 4]
    assert all(0 < sum(shares) <= 1 for shares in choice.acceptance.values())
    assert max(choice.cost.target) == 10
    fastest = fastest_tree(choice.acceptance, choice.cost, 4)
    assert choice.tree == (fastest if fastest.depth else TokenTree.chain(1))
    assert choice.chain.is_chain
    assert 1 <= choice.chain.depth <= 4
    assert wrapped.specdec.config.tree == choice.tree


def test_later_calls_draft_the_tree(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, costs: Callable[[StepCost], None]
) -> None:
    costs(FREE)
    wrapped = wrap(model, draft, depth=3, verifier="seqhub")
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=9)
    before = wrapped.specdec.stats.to_dict()
    choice = wrapped.specdec.tune(**prompts(RAGGED), max_depth=4, **SETTINGS)
    assert len(choice.tree) == 8
    assert not choice.tree.is_chain
    # Tuning counts nothing but says what it has chosen.
    assert wrapped.specdec.stats.to_dict() == {**before, "tree": str(choice)}
    assert wrapped.specdec.config.verifier == "seqhub"
    assert not wrapped.specdec.config.compile
    assert wrapped.specdec.config.depth is None
    wrapped.specdec.stats.reset()
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=20)
    stats = wrapped.specdec.stats
    assert len(stats.proposed) == choice.tree.depth
    assert [*stats.slots] == [k for k in sorted(set(choice.tree.n_children)) if k]
    assert stats.to_dict()["tree"] == str(choice)
    tokens = expected_tokens(choice.tree, choice.acceptance)
    told = (
        f"tree of 7 nodes, depth {choice.tree.depth}, {tokens:.2f} tokens in 1000.0 ms a step; best chain: chain of 4"
    )
    assert str(choice).startswith(told)
    assert told in " ".join(str(stats).replace("│", " ").split())


def test_where_no_draft_pays_one_token_is_drafted(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, costs: Callable[[StepCost], None]
) -> None:
    costs(DEAR)
    wrapped = wrap(model, draft)
    choice = wrapped.specdec.tune(**prompts([5]), **SETTINGS)
    assert choice.tree == choice.chain == TokenTree.chain(1)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=6)


def test_acceptance_is_that_of_the_given_calls(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, costs: Callable[[StepCost], None]
) -> None:
    costs(FREE)
    greedy = wrap(model, model).specdec.tune(**prompts(RAGGED), do_sample=False, max_new_tokens=43)
    # The draft is the target: the first child is the one. A text's last steps, with room for no child, do not count.
    for first, *others in greedy.acceptance.values():
        assert first == 1
        assert others == [0] * len(others)
    tree = wrap(model, draft).specdec.tune(**prompts(RAGGED), max_depth=2, **SETTINGS).tree
    assert tree.depth <= 2
    blocks = wrap(model, draft, verifier="block").specdec.tune(**prompts(RAGGED), **SETTINGS)
    assert [*blocks.acceptance] == [1]
    assert blocks.tree.is_chain


def test_more_nodes_than_a_cache_bucket(model: PreTrainedModel) -> None:
    seconds = forward_seconds(ModelView(model), 300, False, repeats=1)
    assert max(seconds) == 300


def test_torchs_generator_is_left_as_it_was(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, costs: Callable[[StepCost], None]
) -> None:
    costs(FREE)
    before = torch.random.get_rng_state()
    wrap(model, draft).specdec.tune(**prompts([5]), **SETTINGS)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_decoded_and_timed(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[Any, ...]] = []
    timed: list[tuple[Any, ...]] = []
    decode = Calls.decode

    def record(self: Calls, task: Task) -> Any:
        call, config = task.call, task.config
        settings, ids = call.generation_config, call.input_ids
        told = settings.temperature, settings.max_new_tokens, config.verifier
        mask = call.model_kwargs["attention_mask"]  # transformers drops one that hides nothing
        decoded.append((config.tree, len(ids), int((ids >= 0 if mask is None else mask).sum()), *told))
        return decode(self, task)

    def cost(target: Any, own: Any, n_nodes: int, compiled: bool, step: float) -> StepCost:
        timed.append((target.source, own.source, n_nodes, compiled, step > 0))
        return FREE

    monkeypatch.setattr(Calls, "decode", record)
    monkeypatch.setattr("specdec.tune.choose.measure_cost", cost)
    wrapped = wrap(model, draft, verifier="rrsw")
    wrapped.specdec.tune(**prompts(RAGGED), max_nodes=12, **SETTINGS)
    told = 0.7, 24, "rrsw"
    once = TokenTree.chain(1), 1, RAGGED[0], *told
    assert decoded == [*((tree, 4, sum(RAGGED), *told) for tree in PROBES), once, once]  # the first one warms up
    assert timed == [(model, draft, 12, False, True)]
    decoded.clear()
    wrapped.specdec.tune(prompts([5, 5])["input_ids"], **SETTINGS)  # without a mask
    assert decoded[0][:3] == (PROBES[0], 2, 10)


def test_tuning_again(
    model: PreTrainedModel, draft: PreTrainedModel, prompts: Prompts, costs: Callable[[StepCost], None]
) -> None:
    wrapped = wrap(model, draft)
    choices: list[Choice] = []
    for cost in (FREE, DEAR):
        costs(cost)
        choices.append(wrapped.specdec.tune(**prompts(RAGGED), **SETTINGS))
        same(wrapped, model, **prompts(RAGGED), max_new_tokens=8)
    assert wrapped.specdec.config.tree == choices[1].tree != choices[0].tree
    assert wrapped.specdec.stats.tree == str(choices[1])


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_tree(
    make: Callable[[Any], Any], fresh: Tiny, prompts: Prompts, costs: Callable[[StepCost], None]
) -> None:
    costs(FREE)
    model = fresh("llama")
    wrapped = wrap(model, model)
    choice = wrapped.specdec.tune(**prompts(RAGGED), **SETTINGS)
    other = make(wrapped)
    assert other.specdec.config == wrapped.specdec.config
    same(other, model, **prompts(RAGGED), max_new_tokens=8)
    assert len(other.specdec.stats.proposed) == choice.tree.depth


# What cannot be tuned.


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_there_must_be_a_draft_model(drafter: str | None, model: PreTrainedModel, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match=f"tune.. chooses a draft model's tree, and the draft is {drafter!r}"):
        wrap(model, drafter).specdec.tune(**prompts([5]), **SETTINGS)


@pytest.mark.parametrize("limits", [{"max_nodes": 1}, {"max_nodes": 0}, {"max_depth": 0}])
def test_there_must_be_room_for_a_draft(limits: dict[str, int], wrapped: PreTrainedModel, prompts: Prompts) -> None:
    name, value = next(iter(limits.items()))
    with pytest.raises(ValueError, match=f"{name} must be at least {1 + (name == 'max_nodes')}, got {value}"):
        wrapped.specdec.tune(**prompts([5]), **limits, **SETTINGS)


def test_calls_that_fall_back_are_named_and_change_nothing(
    wrapped: PreTrainedModel, model: PreTrainedModel, prompts: Prompts
) -> None:
    config = wrapped.specdec.config
    with warnings.catch_warnings(), pytest.raises(ValueError, match="beams"):
        warnings.simplefilter("ignore")
        wrapped.specdec.tune(**prompts([5]), num_beams=2, max_new_tokens=4)
    with pytest.raises(ValueError, match="do_smaple"):
        wrapped.specdec.tune(**prompts([5]), do_smaple=True)
    assert wrapped.specdec.config == config
    assert wrapped.specdec.stats.tree is None
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=8)
