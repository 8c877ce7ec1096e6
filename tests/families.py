"""Tiny random models of many families, and how specdec decodes with each: what the table in docs/models.md says.

python tests/families.py        # the table, from models made and proved here and now
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
# Large initial weights: a random model whose text varies, and whose best token is not a near tie.
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.35,
}  # fmt: skip
_HEADS = {k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"}  # of families that divide the hidden size by them
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.35}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.35}
_WINDOW = {"sliding_window": 6}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, **_WINDOW},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": {
        **LLAMA_LIKE, **_WINDOW, "num_hidden_layers": 4, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "tie_word_embeddings": False,
    },
    "gpt2": {**_GPT, "tie_word_embeddings": False},
    "mixtral": {**_HEADS, **_LOCAL_EXPERTS},
    "qwen3_moe": {**LLAMA_LIKE, **_EXPERTS},
    "qwen2_moe": {
        **_HEADS, **_EXPERTS, **_WINDOW, "shared_expert_intermediate_size": 16, "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "gemma": LLAMA_LIKE,
    "gemma3_text": {
        **LLAMA_LIKE, **_WINDOW, "num_hidden_layers": 3, "query_pre_attn_scalar": 16, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi": _HEADS,
    "phi3": _HEADS,
    "phimoe": {**_HEADS, **_LOCAL_EXPERTS},
    "gpt_neox": _HEADS,
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4, "n_ctx": 128},
    "gpt_bigcode": _GPT,
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.35},
    "falcon": {**_FALCON, "alibi": False},
    "gpt_oss": {**LLAMA_LIKE, **_LOCAL_EXPERTS, **_WINDOW, "rope_parameters": {"rope_type": "default"}},
    "stablelm": _HEADS,
    "olmo": _HEADS,
    "olmo2": _HEADS,
    "olmo3": {**_HEADS, **_WINDOW},
    "granite": _HEADS,
    "granitemoe": {**_HEADS, **_LOCAL_EXPERTS},
    "starcoder2": {**_HEADS, **_WINDOW},
    "cohere": _HEADS,
    "cohere2": {**LLAMA_LIKE, **_WINDOW},
    "glm": LLAMA_LIKE,
    "glm4": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "nemotron": _HEADS,
    "exaone4": {**LLAMA_LIKE, **_WINDOW},
    "ernie4_5": LLAMA_LIKE,
    "helium": LLAMA_LIKE,
    "llama4_text": {
        **LLAMA_LIKE, "num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 4,
        "attention_chunk_size": 8,
    },
    "deepseek_v3": {
        **_HEADS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "first_k_dense_replace": 1,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.35},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 6},
    "doge": {**_HEADS, "keep_window_size": 16},
    "moshi": {**{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}, "ffn_dim": 48, **_WINDOW},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.35},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "qwen3_next": {**LLAMA_LIKE, **_EXPERTS, "num_hidden_layers": 4},
}  # fmt: skip

DENSE = {
    "qwen2_moe": "its layers do not tell their windows", "gpt_oss": "attention sinks",
}  # fmt: skip
SINCE_5_24 = ["gptj", "codegen"]
"""Attended by themselves in earlier releases of transformers, under a mask."""


def _attends_by_itself(family: str) -> bool:
    return not hasattr(import_module(f"transformers.models.{family}.modeling_{family}"), "ALL_ATTENTION_FUNCTIONS")


FLAT = [*filter(_attends_by_itself, SINCE_5_24), "falcon", "deepseek_v3"]
REFUSED = {
    "bloom": "takes no position_ids", "mpt": "takes no position_ids", "mamba": "takes no position_ids",
    "rwkv": "takes no position_ids", "gpt_neo": "not the model's own", "doge": "not the model's own",
    "moshi": "a ragged forward",
    "qwen3_next": "do not all keep keys and values", "llama4_text": "ask the cache how long the text is",
}  # fmt: skip
DECODED = [family for family in CONFIGS if family not in REFUSED]


def table() -> str:
    """In Markdown."""
    others = {*DENSE, *FLAT, *SINCE_5_24}
    fused = [f"`{family}`" for family in DECODED if family not in others]
    fused += [f"`{family}` (from transformers 5.24 on)" for family in SINCE_5_24]
    rows = {
        "specdec's fused kernel": ", ".join(fused),
        "PyTorch, under a mask": ", ".join(f"`{family}` ({why})" for family, why in DENSE.items()),
        "the model's own, under a mask": ", ".join(f"`{family}`" for family in FLAT if family not in SINCE_5_24),
        "transformers' own loop": ", ".join(f"`{family}`" for family in REFUSED),
    }
    lines = [f"| {how} | {families} |" for how, families in rows.items()]
    return "\n".join(["| attention by | families |", "|---|---|", *lines])


def make_tiny(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A new random model of a family, without EOS, in eval mode."""
    numbers = {"vocab_size": VOCAB, **CONFIGS[model_type], **overrides}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**special, **numbers})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Some versions' sdpa ignores Gemma2's softcap.
        more = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
        model = AutoModelForCausalLM.from_config(config, **more).eval()
    model.generation_config.update(do_sample=False, **{**special, **{k: v for k, v in numbers.items() if k in special}})
    return model


if __name__ == "__main__":
    print(table())
