"""Models that see: prompts of words alone decode here, pictures run transformers' loop, and so do encoders of words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import LLAMA_LIKE, VOCAB
from side_by_side import RAGGED, Prompts, same, wrap
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VISION: dict[str, dict[str, Any]] = {
    "llava": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14, "projection_dim": 32,
    },
    "gemma3": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    },
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "llava": {},
    "gemma3": {"sliding_window": 6, "query_pre_attn_scalar": 16},
    # Positions of three axes, which are all alike in words.
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
}
IMAGE = VOCAB - 1


def make(kind: str) -> PreTrainedModel:
    ids = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    text = {"vocab_size": VOCAB, **LLAMA_LIKE, **ids, **TEXT[kind]}
    if kind == "llava":
        text |= {"model_type": "llama"}
    vision = {"model_type": "clip_vision_model", **VISION[kind]} if kind == "llava" else VISION[kind]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    for name in ("image_token_id", "image_token_index"):
        if hasattr(config, name):
            setattr(config, name, IMAGE)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("kind", VISION)
def test_prompts_of_words(kind: str, prompts: Prompts) -> None:
    model = make(kind)
    wrapped = wrap(model)
    for lengths in ([6], RAGGED):
        asked = prompts(lengths, vocab=90)
        same(wrapped, model, **asked, max_new_tokens=14)
    assert wrapped.specdec.stats.steps > 0


@pytest.mark.parametrize("axis", [0, 3])
def test_axes_of_positions_that_differ_run_transformers_own_loop(axis: int, prompts: Prompts) -> None:
    model, asked = make("qwen2_vl"), prompts([6], vocab=90)
    asked["position_ids"] = torch.arange(6).expand(4, 1, 6).clone()
    asked["position_ids"][axis] += 1
    expected = model.generate(**asked, max_new_tokens=5)
    with pytest.warns(UserWarning, match="position_ids that do not count the tokens"):
        assert torch.equal(wrap(model).generate(**asked, max_new_tokens=5), expected)


def test_pictures_run_transformers_own_loop() -> None:
    model = make("llava")
    wrapped, ids = wrap(model), torch.tensor([[5, 6, *[IMAGE] * 4, 7]])
    torch.manual_seed(1)
    asked = {"attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28), "max_new_tokens": 6}
    expected = model.generate(ids, **asked)
    with pytest.warns(UserWarning, match="specdec runs transformers' own loop: model arguments"):
        assert torch.equal(wrapped.generate(ids, **asked), expected)


def test_encoders_run_transformers_own_loop() -> None:
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **shape)).eval()
    wrapped, ids = wrap(model), torch.tensor([[5, 6, 7]])
    with pytest.warns(UserWarning, match="models of type t5, with an encoder"):
        assert torch.equal(wrapped.generate(ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6))
