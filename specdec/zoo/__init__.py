"""A small pair that ships with the library: a target, its draft and their tokenizer (README.md is their card)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.zoo.enlarge import SIZES, enlarge, enlarge_adaptive, pad_vocabulary

__all__ = [
    "SIZES", "enlarge", "enlarge_adaptive", "held_out_prompts", "held_out_texts", "load_pair", "metrics",
    "pad_vocabulary",
]  # fmt: skip

FOLDER = Path(__file__).parent
SEPARATOR = "<|endoftext|>\n"


def load_pair(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled ``(target, draft, tokenizer)``, both models in ``eval`` mode."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer")
    target, draft = (
        LlamaForCausalLM.from_pretrained(FOLDER / name, dtype=dtype).to(device).eval() for name in ("target", "draft")
    )
    return target, draft, tokenizer


def held_out_texts() -> list[str]:
    """Source text of the modules that neither the tokenizer nor the models were trained on."""
    return (FOLDER / "held_out.txt").read_text(encoding="utf-8").split(SEPARATOR)[:-1]


def held_out_prompts(tokenizer: PreTrainedTokenizerFast, n: int, length: int, seed: int = 0) -> torch.Tensor:
    """``[n, length]`` int64 ids of held-out text; each prompt starts at a line's end and stays in one module.

    Raises:
        ValueError: the text holds fewer than ``n`` such prompts.
    """
    prompts = []
    for text in held_out_texts():
        ids = tokenizer(text)["input_ids"]
        line_ends = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token.startswith("Ċ")]
        prompts += [ids[i : i + length] for i in line_ends if i + length <= len(ids)]
    if len(prompts) < n:
        raise ValueError(f"the held-out text has {len(prompts)} prompts of {length} tokens, {n} were asked for")
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator, dtype=torch.int64, device="cpu")
    return torch.tensor([prompts[i] for i in order[:n]], dtype=torch.int64, device="cpu")


def metrics() -> dict:
    """What the training run measured on the held-out text, as the model card states it."""
    return json.loads((FOLDER / "metrics.json").read_text())
