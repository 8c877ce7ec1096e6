"""Limits that texts never reach cost nothing; what is past a draft's reach is not drafted for; and what is counted is
what was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import specdec
from specdec import TokenTree
from specdec.drafters.ngram import NgramDrafter
from specdec.engine import memory as buffers
from specdec.engine.draft import Draft
from specdec.graphs.compiled import CompiledSteps

FAR = [{"max_length": 10**30}, {"max_new_tokens": 2**31}, {"max_new_tokens": 10**8}, {"max_length": 2**63 - 1}]


def _ends(model: PreTrainedModel, ids: dict[str, Tensor], after: int) -> int:
    """A token that the first text comes to after about so many."""
    return int(model.generate(**ids, max_new_tokens=after)[0, -1])


@pytest.mark.parametrize("draft", ["ngram", "model", None])
@pytest.mark.parametrize("limit", FAR, ids=str)
def test_limits_beyond_any_memory(
    limit: dict[str, int], draft: str | None, model: PreTrainedModel, tiny: Tiny, prompts: Prompts
) -> None:
    """As tokenizers' `model_max_length` is: texts end all the same."""
    ids = prompts([9])
    settings = {"eos_token_id": _ends(model, ids, 20), "pad_token_id": 0}
    source = tiny("llama", seed=7, num_hidden_layers=1) if draft == "model" else draft
    wrapped = wrap(model, source)
    same(wrapped, model, **ids, **limit, **settings)
    assert wrapped.specdec._decoders.get(wrapped.specdec.draft).buffers.state.tokens.shape[1] < 1000
    many = specdec.generate_many(
        wrapped, [ids["input_ids"][0]] * 3, max_batch_size=2, progress=False, **limit, **settings
    )
    assert all(torch.equal(r.tokens, model.generate(**ids, **limit, **settings)[0]) for r in many)
    assert wrapped.specdec._decoders.get(wrapped.specdec.draft).buffers.state.tokens.shape[1] < 1000


@pytest.mark.parametrize("draft", ["ngram", "model", "tree"])
def test_texts_that_outgrow_their_room(
    draft: str, model: PreTrainedModel, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several times, in a batch, and when a newcomer is longer than all before it."""
    monkeypatch.setattr(buffers, "SLOT_BUCKET", 16)
    options: dict[str, Any] = {"tree": TokenTree.from_widths(2, 2)} if draft == "tree" else {}
    wrapped = wrap(model, "ngram" if draft == "ngram" else tiny("llama", seed=7, num_hidden_layers=1), **options)
    same(wrapped, model, **prompts([3, 9, 1]), max_new_tokens=90)
    texts = [[5], [6, 7], list(range(10, 90)), [8] * 3]
    many = specdec.generate_many(
        wrapped, iter(texts), max_batch_size=2, max_prompt_length=80, max_new_tokens=50, progress=False
    )
    for result, text in zip(many, texts, strict=True):
        assert torch.equal(result.tokens, model.generate(torch.tensor([text]), max_new_tokens=50)[0])


def test_what_ngrams_look_through_is_the_text(model: PreTrainedModel, prompts: Prompts) -> None:
    """And not the columns of the limit."""
    seen = []

    class Watched(NgramDrafter):
        def draft(self, state: Any, *others: Any) -> Draft:
            seen.append(state.tokens.shape[1])
            return super().draft(state, *others)

    wrapped = wrap(model, Watched())
    wrapped.generate(**prompts([9]), max_new_tokens=10**6, eos_token_id=_ends(model, prompts([9]), 30), pad_token_id=0)
    assert not wrapped.specdec.stats.fallbacks
    assert set(seen) == {buffers.SLOT_BUCKET}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_past_its_positions_a_draft_drafts_nothing(
    family: str, do_sample: bool, model: PreTrainedModel, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"n_positions": 40} if family == "gpt2" else {"max_position_embeddings": 40}
    draft = fresh(family, **short)
    longest, n_forwards = 0, 0
    wrapped = wrap(model, draft, depth=3)
    drafter = wrapped.specdec._decoders.get(draft).drafter
    forward = drafter.view.forward

    def watch(tokens: Tensor, nodes: Any, rows: Any = 0) -> Tensor:
        nonlocal longest, n_forwards
        longest, n_forwards = max(longest, int(nodes.position.max())), n_forwards + 1
        return forward(tokens, nodes, rows)

    monkeypatch.setattr(drafter.view, "forward", watch)
    asked = {**prompts([9]), "max_new_tokens": 80, "do_sample": do_sample}
    wrapped.specdec.seeds = [5] if do_sample else None
    out = wrapped.generate(**asked)
    assert 0 < longest < 40
    before = n_forwards
    wrapped.generate(**prompts([45]), max_new_tokens=20, do_sample=do_sample)
    assert n_forwards == before
    stats = wrapped.specdec.stats
    assert not stats.fallbacks
    assert stats.undrafted_texts["texts past the draft's context of 40 tokens"] > 40
    assert "past the draft's context of 40 tokens" in str(stats)
    if not do_sample:
        assert torch.equal(out, model.generate(**asked))
    else:  # a neighbour that can still be drafted for changes nothing
        wrapped.specdec.seeds = [5, 6]
        both = prompts([9, 2])
        both["input_ids"][0, -9:] = asked["input_ids"][0]
        assert torch.equal(wrapped.generate(**{**asked, **both})[0], out[0])


class _Right(NgramDrafter):
    """Drafts what the target will say: all of it is accepted."""

    def __init__(self, text: Tensor, tree: TokenTree) -> None:
        super().__init__(tree.depth)
        self.text, self.tree, self.depths = text, tree, (tree.depth,)

    def draft(self, state: Any, law: Any, live: Tensor, depth: int) -> Draft:
        place = state.lengths[:, None] + torch.tensor(self.tree.depths[1:])
        tokens = self.text[place.clamp(max=len(self.text) - 1)]
        return Draft(tokens, torch.full_like(state.lengths, tokens.shape[1]))


class _StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("end", ["eos", "limit", "criterion", "stop string"])
def test_what_is_counted_is_what_was_written(end: str, n: int, model: PreTrainedModel, prompts: Prompts) -> None:
    """Of drafts of five, all right, of a text that ends after its n-th new token."""
    ids = prompts([9])
    text = model.generate(**ids, max_new_tokens=30)[0]
    new = text[9:].tolist()
    assert new[n - 1] not in new[: n - 1]  # else it would end sooner
    asked: dict[str, Any] = {"max_new_tokens": 25}
    if end == "eos":
        asked |= {"eos_token_id": new[n - 1], "pad_token_id": 0}
    elif end == "limit":
        asked["max_new_tokens"] = n
    else:
        asked["stopping_criteria"] = StoppingCriteriaList([_StopAt(9 + n)])
    wrapped = wrap(model, _Right(text, TokenTree.chain(5)))
    assert wrapped.generate(**ids, **asked)[0].tolist() == text[: 9 + n].tolist()
    stats = wrapped.specdec.stats
    assert stats.tokens == n
    drafted = n - (n >= 6)  # every sixth token is the target's own
    assert sum(stats.accepted) == sum(stats.proposed) == drafted
    assert stats.accepted[:2] == [1 + (n > 6), int(n > 1) + (n > 7)]
    assert stats.tokens_per_step == n / (1 + (n > 6))


def test_nodes_past_the_end_are_not_counted(model: PreTrainedModel, prompts: Prompts) -> None:
    """Nor are visits of nodes from which the path did not go on because the text had ended."""
    ids = prompts([9])
    text = model.generate(**ids, max_new_tokens=30)[0]
    wrapped = wrap(model, _Right(text, TokenTree.from_widths(2, 2, 2)))
    wrapped.generate(**ids, max_new_tokens=25, eos_token_id=int(text[10]), pad_token_id=0)
    stats = wrapped.specdec.stats
    assert (stats.proposed, stats.accepted) == ([1, 1, 0], [1, 1, 0])
    assert stats.slots == {2: [2, 2, 0]}


def test_a_deadlines_cut_is_counted(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(model)
    out = wrapped.generate(**prompts([9, 4]), max_new_tokens=50, max_time=0.0)
    assert wrapped.specdec.stats.tokens == 2 * (out.shape[1] - 9)


def test_print_says_first_what_was_not_decoded(model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(model)
    wrapped.generate(**prompts([4]), max_new_tokens=3)
    assert wrapped.specdec.stats.verdict is None and "calls were decoded" not in str(wrapped.specdec.stats)
    for _ in range(2):
        wrapped.generate(**prompts([4]), max_new_tokens=3, guidance_scale=2.0)
    assert str(wrapped.specdec.stats).startswith("1 of 3 calls were decoded by specdec: logits processors")
    wrapped.generate(**prompts([4]), max_new_tokens=3, use_cache=False)
    wrapped.specdec.stats.decoded = 0
    why = "logits processors UnbatchedClassifierFreeGuidanceLogitsProcessor (2 calls); use_cache=False (1 calls)"
    assert wrapped.specdec.stats.verdict == f"0 of 3 calls were decoded by specdec: {why}"


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_what_exploring_needs_is_compiled_in_the_first_call(
    n_prompts: int, model: PreTrainedModel, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later calls of a kind compile nothing, whatever looks worth a try, for as long as it may be."""
    made: list[object] = []

    class Counted(CompiledSteps):
        """Compiles by noting that it would."""

        def get(self, function: Any, key: Any, size: int) -> Any:
            self.was_compiling = key not in made
            made.extend([key] * self.was_compiling)
            return function

        def has(self, key: Any) -> bool:
            return key in made

    monkeypatch.setattr("specdec.decoders.CompiledSteps", Counted)
    wrapped = specdec.compile(model, tiny("llama", seed=7), depth=8)
    lengths = [4] * n_prompts
    wrapped.generate(**prompts(lengths), max_new_tokens=12)
    after_one = list(made)
    assert 0 < len(after_one) <= 3
    for seed in range(6):
        same(wrapped, model, **prompts(lengths, seed=seed), max_new_tokens=120)
    assert made == after_one
    assert wrapped.specdec.stats.undrafted > 3  # it has looked
