"""What a few tokens cannot show: attention, masks, caches and ropes that do something else far away."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from specdec.errors import Unsupported
from specdec.hf import proof
from specdec.hf.cache import Way
from specdec.hf.plain import Plain
from specdec.hf.view import ModelView

Put = Callable[[pytest.MonkeyPatch, PreTrainedModel], None]


def far_is_loud(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """Attention that is transformers' own for texts of up to 100 tokens."""
    value = torch.cat([value[:, :, :-100] * 5, value[:, :, -100:]], 2)
    return sdpa_attention_forward(module, query, key, value, *rest, **options)


@wraps(sdpa_attention_forward)
def by_its_name(*arguments: Any, **options: Any) -> Any:
    return far_is_loud(*arguments, **options)


def far_is_hidden(*arguments: Any, mask_function: Callable[..., Tensor], **options: Any) -> Any:
    """The mask of a window of 100 tokens."""

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, query, key) & (key > query - 100)

    options["allow_is_causal_skip"] = False
    return sdpa_mask(*arguments, mask_function=near, **options)


def _registered(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    patch.setitem(AttentionInterface._global_mapping, "far", far_is_loud)
    patch.setitem(AttentionMaskInterface._global_mapping, "far", sdpa_mask)
    model.set_attn_implementation("far")


def _in_place_of_sdpa(function: Any, patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    patch.setitem(AttentionInterface._global_mapping, "sdpa", function)


def _in_the_table(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", far_is_loud)


def _in_a_table_of_the_models_own(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    own = AttentionInterface()
    own["sdpa"] = far_is_loud
    patch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", own)


def _in_place_of_eager(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    patch.setattr(modeling_llama, "eager_attention_forward", far_is_loud)
    model.set_attn_implementation("eager")


def _mask(table: Any, patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    patch.setitem(table, "sdpa", far_is_hidden)


@pytest.mark.parametrize("put", [
    _registered, partial(_in_place_of_sdpa, far_is_loud), partial(_in_place_of_sdpa, by_its_name),
    partial(_in_place_of_sdpa, partial(far_is_loud)), _in_the_table, _in_a_table_of_the_models_own, _in_place_of_eager,
    partial(_mask, AttentionMaskInterface._global_mapping), partial(_mask, ALL_MASK_ATTENTION_FUNCTIONS._local_mapping),
], ids=["a name", "sdpa", "wrapped", "partial", "table", "own table", "eager", "mask", "table of masks"])  # fmt: skip
@pytest.mark.parametrize("when", ["first", "between calls"])
def test_attention_of_ones_own_runs_transformers_loop(
    put: Put, when: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = fresh("llama"), prompts([120])
    wrapped = wrap(model)
    theirs = model.generate(**inputs, max_new_tokens=6)
    if when == "between calls":
        same(wrapped, model, **inputs, max_new_tokens=6)
    put(monkeypatch, model)
    expected = model.generate(**inputs, max_new_tokens=6)
    assert not torch.equal(expected, theirs), "attention that does nothing of its own tests nothing"
    with pytest.warns(UserWarning, match="transformers' own loop: attention by a function that is not transformers'"):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=6), expected)
    assert list(wrapped.specdec.stats.fallbacks) == ["attention by a function that is not transformers' own"]


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_attention_of_transformers_own_is_known(how: str, fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    model.set_attn_implementation(how)
    wrapped = wrap(model)
    wrapped.generate(**prompts([5]), max_new_tokens=3)
    assert not wrapped.specdec.stats.fallbacks


@pytest.mark.parametrize(("family", "settings", "reason"), [
    ("llama", {"sliding_window": 20}, "not the model's own"),
    ("llama", {"sliding_window": 2000}, "cache forgets what their masks show: all but 2000 tokens"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 2000}, None),
    ("llama", {"attention_chunk_size": 2000}, "cache forgets what their masks show: all but 2000 tokens"),
    ("gpt_neox", {"sliding_window": 2000}, "cache forgets what their masks show"),
    ("moshi", {"sliding_window": 3000}, "cache forgets what their masks show|a ragged forward fails"),
    ("doge", {"keep_window_size": 2048}, "make masks of their own|not the model's own"),
    ("falcon", {"alibi": False, "local_window": 1500}, "a window too long to try out: {'local_window': 1500}"),
    ("falcon", {"alibi": False, "local_window": 1000}, None),
    ("llama", {"local_window": 1500}, None),  # its masks say that there is none
])  # fmt: skip
def test_windows_are_those_of_masks(family: str, settings: dict[str, Any], reason: str | None, fresh: Tiny) -> None:
    """Transformers' cache forgets by the configuration, masks by the model's code."""
    if reason is None:
        ModelView(fresh(family, **settings))
    else:
        with pytest.raises(Unsupported, match=f"models of type {family}.*({reason})"):
            ModelView(fresh(family, **settings))


class MovingRope(torch.nn.Module):
    """A rope that turns at half the speed in texts that are long, whatever the configuration says."""

    def __init__(self, rope: torch.nn.Module, longest: int) -> None:
        super().__init__()
        self.rope, self.longest = rope, longest

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.rope(x, position_ids if position_ids.max() < self.longest else position_ids / 2)


@pytest.mark.parametrize("longest", [50, 200])
def test_a_rope_that_moves(longest: int, fresh: Tiny) -> None:
    model = fresh("llama")
    model.model.rotary_emb = MovingRope(model.model.rotary_emb, longest)
    with pytest.raises(Unsupported, match="not the model's own"):
        ModelView(model)


def test_a_rope_of_ones_own_that_stays(fresh: Tiny) -> None:
    model = fresh("llama")
    model.model.rotary_emb = MovingRope(model.model.rotary_emb, 10**9)
    assert ModelView(model).cache.way is Way.FUSED


@pytest.mark.parametrize("bias", [0.0, 3.0, -1e30])
def test_logits_that_are_all_equal(bias: float, fresh: Tiny, prompts: Prompts) -> None:
    model = _says(fresh("phi"), torch.full((97,), bias))
    same(wrap(model), model, **prompts([7, 3]), max_new_tokens=5)


def test_logits_that_are_never_to_be_had(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("phi")
    with torch.no_grad():
        model.lm_head.bias[40:] = -torch.inf
    same(wrap(model), model, **prompts([7, 3]), max_new_tokens=5)


@pytest.mark.parametrize(("number", "reason"), [
    (-torch.inf, "its own logits are all -inf"), (torch.nan, "are not finite"), (torch.inf, "are not finite"),
])  # fmt: skip
def test_logits_that_say_nothing(number: float, reason: str, fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = _says(fresh("phi"), torch.full((97,), number)), prompts([7, 3])
    wrapped = wrap(model)
    with pytest.warns(UserWarning, match=f"transformers' own loop: models of type phi: .*{reason}"):
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=5), model.generate(**inputs, max_new_tokens=5))


def _says(model: PreTrainedModel, logits: Tensor) -> PreTrainedModel:
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(logits)
    return model


def test_differences_are_of_what_is_finite() -> None:
    theirs = torch.tensor([[1.0, 2, -torch.inf, 4], [3, 3, 3, 3]])
    assert proof.distance(theirs.clone(), theirs) == 0
    for place, value in ((0, 2), 5.0), ((0, 0), -torch.inf), ((0, 0), torch.nan), ((1, 1), 3.1), ((1, 1), torch.nan):
        ours = theirs.clone()
        ours[place] = value
        assert not proof.distance(ours, theirs) <= 1e-2
    assert proof.distance(theirs + 1e-6, theirs) < 1e-5


def test_rows_of_embeddings_that_no_text_uses(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] = torch.nan
        model.lm_head.weight[40:] = 0
    same(wrap(model), model, **prompts([7, 3], vocab=40), max_new_tokens=5)


def test_rounding_may_choose_another_expert_once(fresh: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision a refusal is of three pairs of texts; in float32 of one."""
    look, seen = proof._difference_of, []

    def unlucky(view: ModelView, plain: Plain) -> Unsupported | None:
        if any(plain is other for other in seen):
            return look(view, plain)
        seen.append(plain)
        return Unsupported("by chance") if len(seen) < 3 else look(view, plain)

    monkeypatch.setattr(proof, "_difference_of", unlucky)
    assert ModelView(fresh("llama").bfloat16()).cache.way is not Way.OWN
    assert len({plain.texts[1][0].item() for plain in seen}) == len(seen) == 3
    seen.clear()
    monkeypatch.setattr(proof, "_difference_of", lambda *_: Unsupported("by chance"))
    with pytest.raises(Unsupported, match="by chance"):
        ModelView(fresh("llama"))
