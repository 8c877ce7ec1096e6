"""What is masked counts for nothing: not even NaN, in rejected drafts, unused slots, padding or neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODED, FLAT
from side_by_side import Prompts, Tiny, wrap
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.draft import Draft
from specdec.engine.loop import Decoder
from specdec.engine.tree import TokenTree
from specdec.hf.attention import masked_attention
from specdec.hf.cache import RaggedCache, Way, readable

BAD = 96
"""A token whose embedding is not finite, and which no text holds."""


class BadDrafts(NgramDrafter):
    """Drafts the bad token, whenever anything: every draft is rejected, and has been run."""

    def __init__(self, tree: TokenTree) -> None:
        super().__init__(tree.depth)
        self.tree, self.depths = tree, (tree.depth,)

    def draft(self, state: Any, law: Any, live: Tensor, depth: int) -> Draft:
        tokens = torch.full_like(state.draft.tokens, BAD)
        return Draft(tokens, torch.full_like(state.lengths, tokens.shape[1]))


def spoil(model: PreTrainedModel, number: float) -> PreTrainedModel:
    """The model with a token that cannot be computed with, and that it never chooses."""
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = number
        if (head := model.get_output_embeddings()).weight is model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[BAD] = 0
        if head.bias is not None:
            head.bias[BAD] = -1e4
    return model


@pytest.fixture
def poisoned_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory a cache gets holds NaN; and so does, after every step, what is not part of a text."""
    hold, take = RaggedCache._hold, Decoder._take

    def poison(cache: RaggedCache, lengths: Tensor) -> None:
        slot = torch.arange(cache.n_slots)
        for layer in cache.layers:
            unused = slot >= lengths[:, None] if len(lengths) else torch.ones(cache.n_batch, cache.n_slots).bool()
            # What is never written is not there either: see `RaggedCache`.
            layer.keys[:, unused] = 1e30 if cache.way is Way.OWN else torch.nan
            layer.values[:, unused] = torch.nan if cache.way is Way.FUSED else 1e30
            if layer.lost is not None:
                layer.lost[unused] = True

    def _hold(self: RaggedCache, layers: list[Any]) -> None:
        grown, known = bool(self.layers) if hasattr(self, "layers") else False, getattr(self, "n_slots_known", 0)
        hold(self, layers)
        if layers and not grown:
            poison(self, torch.empty(0))
        elif layers:
            for layer in self.layers:
                layer.keys[:, :, known:] = 1e30 if self.way is Way.OWN else torch.nan
                layer.values[:, :, known:] = torch.nan if self.way is Way.FUSED else 1e30
        self.n_slots_known = self.n_slots if layers else 0

    def _take(self: Decoder, *args: Any) -> Any:
        out = take(self, *args)
        state = self.buffers.state
        poison(self.target.cache, state.lengths)
        if hasattr(self.drafter, "view"):
            poison(self.drafter.view.cache, (state.lengths - 1).clamp(min=0))
        return out

    monkeypatch.setattr(RaggedCache, "_hold", _hold)
    monkeypatch.setattr(Decoder, "_take", _take)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", DECODED)
def test_rejected_drafts_that_are_not_finite(family: str, number: float, fresh: Tiny, prompts: Prompts) -> None:
    model = spoil(fresh(family), number)
    ids = prompts([9, 4, 6], vocab=BAD)
    expected = model.generate(**ids, max_new_tokens=14)
    for tree in TokenTree.chain(3), TokenTree.from_widths(2, 2):
        wrapped = wrap(model, BadDrafts(tree))
        assert wrapped.generate(**ids, max_new_tokens=14).tolist() == expected.tolist()
        assert not wrapped.specdec.stats.fallbacks
        assert sum(wrapped.specdec.stats.proposed) > 0 == sum(wrapped.specdec.stats.accepted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_oss", *FLAT])
def test_rejected_drafts_in_half_precision(family: str, fresh: Tiny, prompts: Prompts) -> None:
    """As most checkpoints are; on a CPU PyTorch attends, under a mask."""
    model = spoil(fresh(family).to(torch.bfloat16), float("nan"))
    ids = prompts([9, 4, 6], vocab=BAD)
    wrapped, plain = wrap(model, BadDrafts(TokenTree.chain(3))), wrap(model, None)
    expected = plain.generate(**ids, max_new_tokens=14, return_dict_in_generate=True, output_logits=True)
    out = wrapped.generate(**ids, max_new_tokens=14, return_dict_in_generate=True, output_logits=True)
    assert not wrapped.specdec.stats.fallbacks
    assert all(x.isfinite().all() for x in out.logits)
    assert all(torch.allclose(a, b, atol=0.5) for a, b in zip(out.logits[:2], expected.logits[:2], strict=True))


@pytest.mark.usefixtures("poisoned_caches")
@pytest.mark.parametrize("draft", ["ngram", "model", "tree"])
@pytest.mark.parametrize("family", DECODED)
def test_what_is_in_slots_that_nobody_sees(family: str, draft: str, tiny: Tiny, prompts: Prompts) -> None:
    model, ids = tiny(family), prompts([7, 2, 11])
    expected = model.generate(**ids, max_new_tokens=20)
    other = tiny("llama", seed=3, num_hidden_layers=1) if draft == "model" else tiny(family, seed=3)
    options = {"tree": TokenTree.from_widths(2, 2)} if draft == "tree" else {"depth": 3}
    wrapped = wrap(model, "ngram" if draft == "ngram" else other, **options)
    for _ in range(2):  # the second in the memory of the first
        assert wrapped.generate(**ids, max_new_tokens=20).tolist() == expected.tolist()
    many = specdec.generate_many(
        wrapped, [[5, 6, 7], [8] * 12, [9, 10]], max_batch_size=2, max_new_tokens=9, progress=False
    )
    for result, text in zip(many, ([5, 6, 7], [8] * 12, [9, 10]), strict=True):
        assert result.error is None
        assert result.tokens.tolist() == model.generate(torch.tensor([text]), max_new_tokens=9)[0].tolist()
    assert not wrapped.specdec.stats.fallbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "gptj", "codegen", *FLAT])
def test_a_text_that_cannot_be_computed_with_is_alone_with_it(
    family: str, dtype: torch.dtype, fresh: Tiny, prompts: Prompts
) -> None:
    """It writes what it writes in transformers' loop, and its neighbours theirs."""
    model = spoil(fresh(family).to(dtype), float("nan"))
    ids = prompts([9, 4, 6], vocab=BAD)
    ids["input_ids"][1, -2] = BAD
    asked = {**ids, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**asked)
    wrapped = wrap(model)
    out = wrapped.generate(**asked)
    assert not wrapped.specdec.stats.fallbacks
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        assert ours.isnan().all(-1).tolist() == theirs.isnan().all(-1).tolist() == [False, True, False]
        assert ours[[0, 2]].isfinite().all()
    if dtype is torch.float32:
        assert out.sequences.tolist() == expected.sequences.tolist()
    rows = [row[mask.bool()].tolist() for row, mask in zip(ids["input_ids"], ids["attention_mask"], strict=True)]
    many = list(specdec.generate_many(wrapped, rows, max_batch_size=3, max_new_tokens=8, progress=False))
    for row in 0, 2:
        assert many[row].tokens[len(rows[row]) :].tolist() == out.sequences[row, 9:].tolist()


def test_what_is_lost_is_nan_to_those_who_see_it_only() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 4, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)
    mask = torch.tensor([[[0, 0, -torch.inf, -torch.inf, -torch.inf], [0, 0, 0, -torch.inf, -torch.inf], [0] * 5]])
    clean = masked_attention(q, k, v, mask, 0.3)
    v[:, :, 2:] = torch.inf
    lost = ~v.isfinite().all(-1).all(0)
    out = masked_attention(q, *readable(k, v, lost, torch.nan), mask, 0.3)
    assert torch.equal(out[:, 0], clean[:, 0])
    assert out[:, 1:].isnan().all()
