"""Families by what they do, not by name: proved on first use, and decoded to transformers' very tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODED, DENSE, FLAT, REFUSED, table
from side_by_side import Prompts, Tiny, wrap
from torch import Tensor
from transformers import PreTrainedModel

from specdec import generate_many
from specdec.errors import Unsupported
from specdec.hf import attention, proof
from specdec.hf.cache import Way
from specdec.hf.view import ModelView
from specdec.hf.windows import is_window


@pytest.mark.parametrize("family", DECODED)
def test_greedy_tokens(family: str, tiny: Tiny, prompts: Prompts) -> None:
    model = tiny(family)
    view = ModelView(model)
    assert view.cache.way is (Way.OWN if family in FLAT else Way.MASKED if family in DENSE else Way.FUSED)
    for lengths in ([12], [17, 3, 1, 9]):
        inputs = prompts(lengths)
        expected = model.generate(**inputs, max_new_tokens=30)
        assert len(set(expected[:, -30:].flatten().tolist())) > 4, "a text that says nothing tests nothing"
        for draft in (model, "ngram"):
            wrapped = wrap(model, draft)
            assert torch.equal(wrapped.generate(**inputs, max_new_tokens=30), expected)
            stats = wrapped.specdec.stats
            assert not stats.fallbacks
            assert stats.steps > 0
            if draft is model:
                assert stats.acceptance_by_position == [1.0] * 5
            decoder = wrapped.specdec._decoders.get(draft)
            model.generate(**inputs, max_new_tokens=2)  # whatever it notes on its modules is no change
            assert wrapped.specdec._decoders.get(draft) is decoder


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_proved_runs_transformers_loop(family: str, tiny: Tiny, prompts: Prompts) -> None:
    model, inputs = tiny(family), prompts([12])
    expected = model.generate(**inputs, max_new_tokens=8)
    wrapped = wrap(model, "ngram")
    with pytest.warns(UserWarning, match=REFUSED[family]):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8), expected)
    ((reason, n),) = wrapped.specdec.stats.fallbacks.items()
    assert f"models of type {family}" in reason
    assert n == 1


def test_positions_counted_in_slots_are_found_out(fresh: Tiny) -> None:
    """ALiBi's distances are of slots, of which a tree's nodes have others than positions."""
    with pytest.raises(Unsupported, match="models of type falcon"):
        ModelView(fresh("falcon", alibi=True))


def test_a_draft_that_cannot_be_proved(tiny: Tiny, prompts: Prompts) -> None:
    wrapped = wrap(tiny("llama"), tiny("bloom"))
    with pytest.warns(UserWarning, match="the draft: models of type bloom"):
        wrapped.generate(**prompts([5]), max_new_tokens=4)


@pytest.mark.parametrize(("window", "rule", "is_it"), [
    (0, lambda b, h, q, k: k <= q, True),
    (6, lambda b, h, q, k: (k <= q) & (k > q - 6), True),
    (6, lambda b, h, q, k: (k <= q) & (k >= q - 6), False),
    (0, lambda b, h, q, k: (k <= q) & (k > q - 5000), False),  # a window nobody told
    (4096, lambda b, h, q, k: (k <= q) & (k > q - 4096), True),
    (4096, lambda b, h, q, k: k <= q, False),
    (0, lambda b, h, q, k: (k <= q) & (k // 8192 == q // 8192), False),  # chunks
    (0, lambda b, h, q, k: k == k, False),
    (0, lambda b, h, q, k: q[b] > k, False),
])  # fmt: skip
def test_windows(window: int, rule: Callable[..., Tensor], is_it: bool) -> None:
    assert is_window(rule, window, 16384, torch.device("cpu")) == is_it


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrong_positions_are_found_out(family: str, fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelView, "_positions", lambda self, nodes: nodes.node[None])
    with pytest.raises(Unsupported, match="not the model's own"):
        ModelView(fresh(family))


def test_a_broken_kernel_is_not_used_and_said(fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kernel = fresh("llama"), attention.ragged_attention
    monkeypatch.setattr(attention, "ragged_attention", lambda *arguments: 1.1 * kernel(*arguments))
    with pytest.warns(UserWarning, match="leaves attention to PyTorch, models of type llama: .* not the model's own"):
        assert ModelView(model).cache.way is not Way.FUSED


@pytest.mark.parametrize("where", ["plain", "ragged"])
def test_no_memory_to_prove_is_no_refusal(where: str, fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(*((type(model), "forward") if where == "plain" else (ModelView, "forward")), fails)
        patch.setattr(proof, "check_forward", lambda model: None)
        with pytest.raises(torch.OutOfMemoryError):
            ModelView(model)
    assert ModelView(model).cache.way is Way.FUSED


def test_half_precision_is_proved_too(fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama").bfloat16()
    assert ModelView(model).cache.way is not Way.OWN
    monkeypatch.setattr(ModelView, "_positions", lambda self, nodes: 3 * nodes.position[None])
    with pytest.raises(Unsupported, match="not the model's own"):
        ModelView(model)


def test_proving_leaves_things_as_they_were(fresh: Tiny) -> None:
    model: PreTrainedModel = fresh("llama")
    state, config = torch.get_rng_state(), model.config.to_dict()
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    view = ModelView(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert len(calls) >= 2 * (1 + 5)  # the user's own forward ran
    assert not view.cache.layers


def test_the_table_in_the_documentation_is_this_one() -> None:
    assert table() in (Path(__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")


def test_many_prompts_of_what_cannot_be_proved(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("bloom")
    texts = [prompts([n])["input_ids"][0] for n in (3, 5)]
    with pytest.warns(UserWarning, match="takes no position_ids"):
        results = list(generate_many(wrap(model), texts, max_new_tokens=4))
    for text, result in zip(texts, results, strict=True):
        assert torch.equal(result.tokens, model.generate(text[None], max_new_tokens=4)[0])


def test_tuning_what_cannot_be_proved(tiny: Tiny, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="takes no position_ids"):
        wrap(tiny("bloom"), tiny("llama")).specdec.tune(**prompts([5]))


def test_refusals_are_remembered_and_weights_moved_are_proved_again(fresh: Tiny) -> None:
    model = fresh("gpt_neo")
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for expected in (True, False):
        calls.clear()
        with pytest.raises(Unsupported, match="gpt_neo"):
            ModelView(model)
        assert bool(calls) == expected
    with pytest.raises(Unsupported, match="gpt_neo"):
        ModelView(model.double())
    assert calls
