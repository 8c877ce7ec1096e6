"""The target's first layers draft for it, over its own cache: the law stays, and their drafts are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from test_mixed import BOTH
from test_verifiers import VOCAB, check_law
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree
from specdec.drafters.early_exit import EarlyExit
from specdec.hf.early_exit import first_layers

TREE = TokenTree.from_widths(3, 2, 1)


@pytest.fixture
def exits(fresh: Tiny) -> PreTrainedModel:
    """A model whose layers after the second add nothing: what its first two say is always right."""
    model = fresh("llama", num_hidden_layers=4)
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "falcon"])
def test_greedy_tokens(family: str, tree: TokenTree | None, tiny: Tiny, prompts: Prompts) -> None:
    """By the fused kernel, under a mask, and by the model's own attention."""
    model = tiny(family)
    wrapped = wrap(model, "early-exit:1", tree=tree, adapt=False)
    for lengths in (RAGGED, [9]):
        same(wrapped, model, **prompts(lengths), max_new_tokens=40)
    assert not wrapped.specdec.stats.dropped_drafts
    assert sum(wrapped.specdec.stats.proposed) > 0


@pytest.mark.parametrize("options", [{}, {"tree": TREE}, {"adapt": None}, {"stop_below": 0.3}], ids=str)
def test_first_layers_that_are_right_are_always_accepted(
    options: dict[str, Any], exits: PreTrainedModel, prompts: Prompts
) -> None:
    """At every step of ragged texts, after any number of accepted tokens: what they attend to is the texts'."""
    wrapped = wrap(exits, "early-exit:2", **({"adapt": False} | options))
    same(wrapped, exits, **prompts(RAGGED), max_new_tokens=40)
    stats = wrapped.specdec.stats
    if "tree" in options:
        assert stats.tokens_per_step > TREE.depth  # of the last step some are beyond the limit
    else:
        assert stats.accepted == stats.proposed
        assert sum(stats.accepted) > 30


def test_with_ngrams_nothing_is_missed(exits: PreTrainedModel, prompts: Prompts) -> None:
    """What the text proposed is in the target's cache, and so in the draft's."""
    wrapped = wrap(exits, ["early-exit:2", "ngram"], adapt=False)
    texts = prompts([12, 20, 7])
    texts["input_ids"][:, -6:-3] = texts["input_ids"][:, -3:]
    same(wrapped, exits, **texts, max_new_tokens=60)
    model, text = (wrapped.specdec.stats.sources[name] for name in BOTH)
    assert model.accepted == model.verified > 20
    assert 0 < text.accepted < text.verified


@pytest.mark.parametrize("verifier", ["auto", "rrs", "coupled"])
def test_texts_follow_the_exact_law(verifier: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.drafters.model.SUPPORT_SIZE", 4)
    target = tiny("llama", vocab_size=VOCAB, num_hidden_layers=2, hidden_size=8, intermediate_size=8, head_dim=4,
                  num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    wrapped = wrap(target, "early-exit:1", verifier=verifier, tree=TokenTree.from_widths(2, 1))
    check_law(wrapped, target, "cut")
    assert 0 < sum(wrapped.specdec.stats.accepted) < sum(wrapped.specdec.stats.proposed)


def test_assistant_early_exit_of_a_call(exits: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(exits)
    same(wrapped, exits, **prompts([9]), max_new_tokens=20)
    before = wrapped.specdec.stats.steps
    out = wrapped.generate(**prompts([9]), max_new_tokens=20, assistant_early_exit=2, num_assistant_tokens=3)
    assert torch.equal(out, exits.generate(**prompts([9]), max_new_tokens=20))
    assert wrapped.specdec.stats.steps - before < 10
    assert not wrapped.specdec.stats.fallbacks
    with pytest.warns(specdec.SpecdecWarning, match="an early exit after 4 layers, and the model has 4"):
        wrapped.generate(**prompts([9]), max_new_tokens=2, assistant_early_exit=4)


def test_compiled_steps(exits: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = specdec.compile(exits, "early-exit:2", adapt=False)
    stats = wrapped.specdec.stats
    for lengths in ([RAGGED, [11, 3, 7]], [[9], [14]]):
        for each in lengths:
            stats.reset()
            out = wrapped.generate(**prompts(each), max_new_tokens=30)
            assert torch.equal(out, exits.generate(**prompts(each), max_new_tokens=30))
        assert stats.seconds["compile"] == 0 and not stats.eager
    assert stats.accepted == stats.proposed


def test_it_takes_no_cache_of_its_own(exits: PreTrainedModel, tiny: Tiny) -> None:
    handles = [
        wrap(exits, draft, depth=5).specdec for draft in ("early-exit:2", "ngram", tiny("llama", num_hidden_layers=2))
    ]
    own, without, with_draft = (handle.memory(4, 1000) for handle in handles)
    assert own == without < with_draft
    assert "its own first 2 layers; chain of 5" in repr(handles[0])


def test_the_users_model_is_left_alone(exits: PreTrainedModel) -> None:
    shallow = first_layers(exits, 2)
    assert (len(shallow.model.layers), shallow.config.num_hidden_layers) == (2, 2)
    assert (len(exits.model.layers), exits.config.num_hidden_layers) == (4, 4)
    assert shallow.lm_head.weight is exits.lm_head.weight


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("early-exit", "'early-exit': \"early-exit:4\" drafts with the first 4 layers"),
        ("early-exit:two", "'early-exit:two'"),
        ("early-exit:0", "must be at least 1, got 0"),
        ("early-exit:4", "an early exit after 4 layers, and the model has 4"),
    ],
)
def test_bad_names(name: str, said: str, exits: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=said):
        specdec.compile(exits, name)
    assert EarlyExit.named("early-exit:3") == EarlyExit(3)


def test_tuning(exits: PreTrainedModel, prompts: Prompts) -> None:
    wrapped = wrap(exits, "early-exit:2")
    wrapped.specdec.tune(**prompts([9, 5]), max_nodes=4, max_depth=3, max_new_tokens=20)
    same(wrapped, exits, **prompts(RAGGED), max_new_tokens=20)
    assert wrapped.specdec.config.tree is not None
