"""Function-preserving enlargement: a small Llama embedded in a bigger one that costs what the bigger shape costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.hf.adaptive import AdaptiveTokens, linear_layers


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
    }


SIZES: Mapping[str, dict[str, int]] = {
    "25m": _shape(512, 7, 8, 4, 64, 1408),
    "100m": _shape(768, 12, 12, 4, 64, 2688),
    "300m": _shape(1024, 24, 16, 8, 64, 2944),
    "1b": _shape(2048, 16, 32, 8, 64, 8192) | {"vocab_size": 128256},  # Llama 3.2 1B, but for a head of its own
    "8b": _shape(4096, 32, 32, 8, 128, 14336) | {"vocab_size": 128256},  # Llama 3.1 8B
}

# A padded token's logit is -PAD_STRENGTH / |h|, h the last residual vector: some thousands below any real logit.
PAD_STRENGTH = 3e5
PAD_NORM_WEIGHT = 1e3


@torch.no_grad()
def enlarge(
    model: LlamaForCausalLM,
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A Llama of the given shape whose logits over the model's vocabulary equal the model's, up to rounding.

    The result is an ordinary ``LlamaForCausalLM`` with untied embeddings: it can be saved and loaded again. What the
    model does not need is dense random weight of ordinary scale, so that a forward pass does all of its work; zero
    are only the residual channels that stay unused, the projections back into the residual stream (``o_proj``,
    ``down_proj``) of unused heads, channels and layers, and the query rows of unused rotary pairs in used heads.

    * Residual stream: the model's channels come first, the others stay 0; RMSNorm's weight and eps make up for its
      mean over more channels.
    * Rotary embedding: with ``head_dim = m * d`` and the same theta, pair ``m * i`` has the frequency that pair ``i``
      had. Queries are scaled by ``sqrt(m)`` against the attention's ``1 / sqrt(head_dim)``.
    * Grouped queries: a key-value head is repeated where the new groups are smaller than the old.
    * Padded vocabulary: one spare residual channel carries a constant, taken out of RMSNorm's eps, from which the
      head computes a logit of a few thousand below zero for each padded token.

    Args:
        model: any ``LlamaForCausalLM`` without projection biases; it is not changed.
        vocab_size: at least the model's; ids from the model's vocabulary size on are never likely.
        dtype: default: the model's. Every tensor is made in it, on ``device``, one at a time.
        device: default: the model's.
        seed: of the random weights.

    Raises:
        ValueError: the shape does not hold the model; the message names both numbers.
    """
    old = model.config
    new = copy.deepcopy(old)
    new.update(
        _shape(hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, intermediate_size)
    )
    new.vocab_size = vocab_size or old.vocab_size
    new.tie_word_embeddings = False
    dtype, device = dtype or model.dtype, torch.device(device or model.device)
    new.dtype = dtype
    _check(old, new)

    # The constant channel c takes its square from eps: c^2 + D' eps' = D eps.
    padded = new.vocab_size > old.vocab_size
    constant = math.sqrt(old.rms_norm_eps * old.hidden_size / 2) if padded else 0.0
    new.rms_norm_eps = (old.rms_norm_eps * old.hidden_size - constant**2) / new.hidden_size

    with torch.device("meta"):
        big = LlamaForCausalLM(new)
    generator = torch.Generator(device).manual_seed(seed)
    source = dict(model.state_dict())
    state = {}
    for name, parameter in big.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        _embed(tensor, name, source, old, new, constant)
        state[name] = tensor
    big.load_state_dict(state, assign=True)
    with device:
        big.model.rotary_emb = type(big.model.rotary_emb)(config=new)
    big.generation_config = copy.deepcopy(model.generation_config)
    return big.eval().requires_grad_(False)


@torch.no_grad()
def enlarge_adaptive(tokens: AdaptiveTokens, model: LlamaForCausalLM, big: LlamaForCausalLM) -> AdaptiveTokens:
    """The model's adaptive tokens for what `enlarge` made of it: their slots say the same, up to rounding.

    Layers that the model does not have get matrices, too, which add nothing.

    Raises:
        ValueError: the big model has another vocabulary, or the tokens no matrices.
    """
    old, new = model.config, big.config
    if new.vocab_size != old.vocab_size:
        raise ValueError(
            f"adaptive tokens for a vocabulary of {old.vocab_size}, and the big model's is {new.vocab_size}"
        )
    if not tokens.paths:
        raise ValueError("a model that was fine-tuned with its adaptive tokens cannot be enlarged without them")
    small = {path: dict(each.named_parameters()) for path, each in zip(tokens.paths, tokens.adapters, strict=True)}
    rank, adapters = len(next(iter(small.values()))["down"]), {}
    for path, (n_in, n_out) in linear_layers(big).items():
        down, up = (
            torch.zeros(shape, dtype=torch.float32, device=big.device) for shape in ((rank, n_in), (n_out, rank))
        )
        if path in small:
            # Each is a projection of which one side is the other's rank.
            for tensor, own in (down, small[path]["down"]), (up, small[path]["up"]):
                if "mlp" not in path and (tensor is down) == ("o_proj" in path):  # the side of the heads
                    _embed_attention(tensor, path, own, old, new)
                else:
                    tensor[: own.shape[0], : own.shape[1]] = own
        adapters[path] = down, up
    vectors = torch.zeros(tokens.n_slots, new.hidden_size, dtype=torch.float32, device=big.device)
    vectors[:, : old.hidden_size] = tokens.vectors
    return AdaptiveTokens(vectors, adapters).to(big.device, big.dtype).requires_grad_(False)


def pad_vocabulary(
    model: LlamaForCausalLM,
    vocab_size: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LlamaForCausalLM:
    """The model with more, never likely, tokens: a draft for a target enlarged to ``vocab_size``.

    The hidden size grows by 8 channels per head, of which one in all keeps the padding down.
    """
    shape = {key: getattr(model.config, key) for key in SIZES["25m"]}
    shape["hidden_size"] += 8 * model.config.num_attention_heads
    return enlarge(model, **shape, vocab_size=vocab_size, dtype=dtype, device=device)


def _check(old: LlamaConfig, new: LlamaConfig) -> None:
    """Raise ValueError unless a model of ``old`` fits into one of ``new``."""
    if old.attention_bias or old.mlp_bias:
        raise ValueError("cannot enlarge a model whose projections have biases (attention_bias or mlp_bias is set)")
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        if getattr(new, key) < getattr(old, key):
            raise ValueError(f"{key} {getattr(new, key)} is smaller than the model's {getattr(old, key)}")
    if new.head_dim % old.head_dim:
        raise ValueError(f"head_dim {new.head_dim} is not a multiple of {old.head_dim}")
    # transformers saves no other Llama than one whose heads divide its hidden size.
    for key, divisor in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
        if getattr(new, key) % getattr(new, divisor):
            raise ValueError(f"{key} {getattr(new, key)} is not a multiple of {divisor} {getattr(new, divisor)}")
    needed = max(kv for _, kv in _heads(old, new)) + 1
    if needed > new.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads {new.num_key_value_heads} is below the {needed} that {old.num_attention_heads} heads "
            f"over {old.num_key_value_heads} key-value heads need in groups of "
            f"{new.num_attention_heads // new.num_key_value_heads}"
        )
    if new.vocab_size > old.vocab_size and new.hidden_size == old.hidden_size:
        raise ValueError(
            f"vocab_size {new.vocab_size} above the model's {old.vocab_size} needs a spare channel: hidden_size "
            f"{new.hidden_size} must be above {old.hidden_size}"
        )


def _heads(old: LlamaConfig, new: LlamaConfig) -> list[tuple[int, int]]:
    """For each old head, the new head and the new key-value head it goes to."""
    old_group = old.num_attention_heads // old.num_key_value_heads
    new_group = new.num_attention_heads // new.num_key_value_heads
    copies = -(-old_group // new_group)
    places = []
    for head in range(old.num_attention_heads):
        kv, member = divmod(head, old_group)
        new_kv = kv * copies + member // new_group
        places.append((new_kv * new_group + member % new_group, new_kv))
    return places


def _embed(
    tensor: torch.Tensor,
    name: str,
    source: dict[str, torch.Tensor],
    old: LlamaConfig,
    new: LlamaConfig,
    constant: float,
) -> None:
    """Write the model's part, and the zeros that keep the rest silent, into one random tensor of the big model."""
    width, wide, small = old.hidden_size, new.hidden_size, source.get(name)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        tensor.zero_()
    if name == "model.embed_tokens.weight":
        tensor[:, width:] = 0
        if constant:
            tensor[:, width] = constant
        tensor[: old.vocab_size, :width] = source[name]
    elif name == "lm_head.weight":
        if constant:
            tensor[:, width] = 0
            tensor[old.vocab_size :, width] = -PAD_STRENGTH / (PAD_NORM_WEIGHT * constant * math.sqrt(wide))
        tensor[: old.vocab_size, :width] = source.get("lm_head.weight", source["model.embed_tokens.weight"])
    elif "norm" in name:
        if constant:
            tensor[width] = PAD_NORM_WEIGHT if name == "model.norm.weight" else 0
        if small is not None:
            tensor[:width] = small.float() * math.sqrt(width / wide)
    elif small is None:
        return  # a layer the model does not have
    elif "mlp" in name:
        tensor[: small.shape[0], : small.shape[1]] = small
    else:
        _embed_attention(tensor, name, small, old, new)


def _embed_attention(tensor: torch.Tensor, name: str, small: torch.Tensor, old: LlamaConfig, new: LlamaConfig) -> None:
    """One attention projection of a layer that the model has."""
    width, ratio = old.hidden_size, new.head_dim // old.head_dim
    half = torch.arange(old.head_dim // 2, device=tensor.device, dtype=torch.int64) * ratio
    pairs = torch.cat([half, half + new.head_dim // 2])  # rotate_half joins channel i with i + head_dim / 2
    group = old.num_attention_heads // old.num_key_value_heads
    for head, (new_head, new_kv) in enumerate(_heads(old, new)):
        q = slice(head * old.head_dim, (head + 1) * old.head_dim)
        kv = slice(head // group * old.head_dim, (head // group + 1) * old.head_dim)
        q_start, kv_start = new_head * new.head_dim, new_kv * new.head_dim
        if "q_proj" in name:
            tensor[q_start : q_start + new.head_dim, :width] = 0
            tensor[q_start + pairs, :width] = (small[q].float() * math.sqrt(ratio)).to(tensor)
        elif "k_proj" in name:
            tensor[kv_start + pairs, :width] = small[kv].to(tensor)
        elif "v_proj" in name:
            tensor[kv_start : kv_start + old.head_dim, :width] = small[kv]
        else:
            tensor[:width, q_start : q_start + old.head_dim] = small[:, q]
