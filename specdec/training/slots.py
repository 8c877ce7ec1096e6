"""Forwards of adaptive tokens over whole texts: what training learns from, and what acceptance is measured by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from specdec.hf import names
from specdec.hf.adaptive import AdaptiveTokens
from specdec.hf.twin import Look

CHECKED, CHECK_TOLERANCE = 24, 1e-3
"""Tokens of the text that a model is checked with, and how far logits may be apart, relative to what they vary."""


def isolating_mask(anchors: Tensor, n_slots: int, length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, P * L, N + P * L]: a slot sees its text up to its anchor, and its own block up to itself.

    Args:
        anchors: [P] int64, places in a text of `length` tokens; each has a block of `n_slots` slots behind it.
    """
    device = anchors.device
    own = torch.arange(len(anchors) * n_slots, device=device, dtype=torch.int64)
    text = torch.arange(length, device=device, dtype=torch.int64) <= anchors.repeat_interleave(n_slots)[:, None]
    block = (own[:, None] // n_slots == own // n_slots) & (own <= own[:, None])
    visible = torch.cat([text, block], 1)
    return torch.zeros((), dtype=dtype, device=device).where(visible, torch.finfo(dtype).min)[None, None]


@dataclass(frozen=True)
class SlotModel:
    """A private copy of a model whose rows may be slots.

    Attributes:
        module: the copy, whose weights are the model's. tokens: what is inserted in it. trains: whether the weights
            learn, too.
    """

    module: PreTrainedModel
    tokens: AdaptiveTokens
    trains: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: AdaptiveTokens, *, trains: bool = False) -> SlotModel:
        """The model itself is left as it is; unless `trains`, no gradients reach its weights."""
        module = Look(model).twin(model).eval()
        if module.config._attn_implementation not in ("eager", "sdpa"):  # others take no mask of ours
            module.config._attn_implementation = "sdpa"
        for part in () if trains else module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(weight.detach(), requires_grad=False)
        tokens.insert(module)
        return cls(module, tokens, trains)

    def text(self, ids: Tensor, anchors: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """What tokens behind anchors say, logits [B, P, L, V] of the tokens at p + 1, ..., p + L of an anchor at p.

        Args:
            ids: [B, N] int64. anchors: [P] int64, places in the texts, at most N - 1 - L. cache: to be filled.
        """
        place = self._behind(anchors).flatten()
        position = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int64).expand(len(ids), -1)
        given = {"use_cache": cache is not None, names.cache_argument(self.module): cache}
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            logits = self.module(input_ids=ids, position_ids=position, logits_to_keep=place, **given).logits
        return logits.view(len(ids), len(anchors), self.tokens.n_slots, -1)

    def forward(self, ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """What the text and the slots behind its anchors say of the same tokens, logits [B, P, L, V] each: the token at
        p + m, and slot m of an anchor at p, of the one at p + m + 1.

        Texts run first and by themselves: they see no slots, and where only slots learn they need no gradients.
        """
        slot = torch.arange(1, self.tokens.n_slots + 1, device=ids.device, dtype=torch.int64)
        return self._run(ids, anchors, torch.zeros_like(slot), slot)

    def _behind(self, anchors: Tensor) -> Tensor:
        """[P, L] int64: the places of slots."""
        return anchors[:, None] + torch.arange(1, self.tokens.n_slots + 1, device=anchors.device, dtype=torch.int64)

    def _run(self, ids: Tensor, anchors: Tensor, tokens: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """The same of any tokens in the place of slots: both int64, and of a shape that expands to [B, P, L]."""
        cache, shape = DynamicCache(), (len(ids), len(anchors), self.tokens.n_slots)
        text = self.text(ids, anchors, cache)
        given = {
            "position_ids": self._behind(anchors).expand(shape).flatten(1),
            "attention_mask": isolating_mask(anchors, shape[2], ids.shape[1], self.module.dtype),
            names.cache_argument(self.module): cache,
        }
        with self.tokens.rows.at(slot.expand(shape).flatten(1)):
            logits = self.module(input_ids=tokens.expand(shape).flatten(1), use_cache=True, **given).logits
        return text, logits.view(*shape, -1)

    @torch.no_grad()
    def check(self) -> None:
        """Whether the model keeps to the mask and the positions: tokens of the text, in the place of slots, must say
        what they say there.

        Raises:
            ValueError: it does not.
        """
        n_slots, device = self.tokens.n_slots, self.module.device
        generator = torch.Generator("cpu").manual_seed(0)
        size = self.module.get_input_embeddings().weight.shape[0]
        drawn = torch.randint(0, size, (1, CHECKED + n_slots), generator=generator, dtype=torch.int64, device="cpu")
        ids = drawn.to(device)
        anchors = torch.tensor([CHECKED - 1, CHECKED // 2, CHECKED // 4 - 1], dtype=torch.int64, device=device)
        text, again = self._run(ids, anchors, ids[:, self._behind(anchors)], torch.zeros_like(anchors[:, None]))
        apart = ((again - text).float().std() / text.float().std()).item()
        if not apart <= (CHECK_TOLERANCE if self.module.dtype == torch.float32 else 0.1):
            raise ValueError(
                f"{type(self.module).__name__} takes no adaptive tokens: under a mask of specdec's, behind a cache, "
                f"tokens say something else than in their text (logits are {apart:.1%} apart)"
            )
