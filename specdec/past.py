"""Keys and values that a caller of `generate()` hands in or gets back, in transformers' own cache.

There a batch has one width: a row is its padding, its text, and once that has ended, filler. Here a text has a row of
its own, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.cache import RaggedCache
from specdec.errors import Unsupported
from specdec.hf import names

if TYPE_CHECKING:
    from specdec.decoder import Decoder


def is_users(cache: Any) -> bool:
    """Whether the cache is one that the caller handed in, and goes on using."""
    return getattr(cache, "_is_user_defined", False)


@dataclass(frozen=True)
class Past:
    """A cache of transformers', and where texts stand in it.

    Attributes:
        cache: grows, when a call is done, by what was decoded. width: columns of the prompts. padding: by row, the
            columns before the text. n_known: columns the cache has at first.
    """

    cache: Any
    width: int
    padding: list[int]
    n_known: int

    @classmethod
    def of(cls, cache: Any, width: int, padding: list[int]) -> Past:
        """What a cache holds of prompts.

        Raises:
            Unsupported: it is of a kind that only its own model fills, or of other prompts than these.
        """
        layers = getattr(cache, "layers", ())
        if type(cache) is not names.DynamicCache or {type(x) for x in layers} - {
            names.DynamicLayer,
            names.DynamicSlidingWindowLayer,
        }:
            kinds = sorted({type(x).__name__ for x in layers})
            raise Unsupported(f"past_key_values in {type(cache).__name__} with layers {', '.join(kinds)}")
        n_known = cache.get_seq_length()
        if n_known >= width:
            raise Unsupported(f"past_key_values of {n_known} tokens for prompts of {width}")
        rows = {layer.keys.shape[0] for layer in layers if n_known and layer.keys is not None}
        if rows - {len(padding)}:
            raise Unsupported(f"past_key_values of {rows.pop()} samples for a batch of {len(padding)}")
        return cls(cache, width, padding, n_known)

    def write_to(self, cache: RaggedCache, row: int) -> int:
        """Put what is known of a text into its row; how many of its tokens these are."""
        padding = self.padding[row]
        if self.n_known <= padding:
            return 0
        for own, theirs in zip(cache.layers, self.cache.layers, strict=True):
            first = max(padding, self.n_known - theirs.keys.shape[2])  # a window's layer has forgotten what is before
            for kept, given in (own.keys, theirs.keys), (own.values, theirs.values):
                kept[:, row, first - padding : self.n_known - padding] = given[row, :, first - self.n_known :]
        return self.n_known - padding

    def extend(self, decoder: Decoder, sequences: Tensor, n_new: list[int]) -> None:
        """Add what the cache lacks of sequences [B, length], all but their last column, of whose rows `n_new` tokens
        each were decoded."""
        texts = [row[padding:-1] for row, padding in zip(sequences, self.padding, strict=True)]
        written = [self.width - padding + n - 1 for padding, n in zip(self.padding, n_new, strict=True)]
        # Transformers' loop goes on with filler where a text has ended, as if it were text.
        decoder.buffers.grow(max(map(len, texts)) + 1)
        rest = {row: (n, text) for row, (n, text) in enumerate(zip(written, texts, strict=True)) if n < len(text)}
        decoder.target.prefill(rest)
        end = sequences.shape[1] - 1
        for index, layer in enumerate(decoder.target.cache.layers):
            new = []
            for kept in (layer.keys, layer.values):
                whole = kept.new_zeros(len(self.padding), kept.shape[0], end - self.n_known, kept.shape[3])
                for row, padding in enumerate(self.padding):
                    first = max(padding, self.n_known)
                    whole[row, :, first - self.n_known :] = kept[:, row, first - padding : end - padding]
                new.append(whole)
            self.cache.update(*new, index)

    def check(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
        """Whether what is known is of a model with layers of `shapes`, (G, D, Dv) each, and this dtype.

        Raises:
            Unsupported: it is not.
        """
        layers = [(x.keys, x.values) for x in self.cache.layers if x.keys is not None]
        held = [(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype) for keys, values in layers]
        if self.n_known and held != [(*shape, dtype) for shape in shapes]:
            raise Unsupported("past_key_values of another model")
