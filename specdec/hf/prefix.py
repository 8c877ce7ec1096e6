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

from specdec.errors import Unsupported
from specdec.hf import names
from specdec.hf.cache import RaggedCache

if TYPE_CHECKING:
    from specdec.engine.loop import Decoder
    from specdec.hf.view import ModelView


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
            raise Unsupported(
                "past_key_values of a kind that only its own model fills",
                f"{type(cache).__name__} with layers {', '.join(kinds)}",
            )
        n_known = cache.get_seq_length()
        if n_known >= width:
            raise Unsupported("past_key_values as long as the prompts", f"{n_known} tokens for prompts of {width}")
        rows = {layer.keys.shape[0] for layer in layers if n_known and layer.keys is not None}
        if rows - {len(padding)}:
            raise Unsupported(
                "past_key_values of another number of samples", f"{rows.pop()} for a batch of {len(padding)}"
            )
        return cls(cache, width, padding, n_known)

    def write_to(self, cache: RaggedCache, row: int) -> int:
        """Put what is known of a text into its row; how many of its tokens these are."""
        padding = self.padding[row]
        if self.n_known <= padding:
            return 0
        for index, theirs in enumerate(self.cache.layers):
            first = max(padding, self.n_known - theirs.keys.shape[2])  # a window's layer has forgotten what is before
            given = (x[row, :, first - self.n_known :] for x in (theirs.keys, theirs.values))
            cache.put(index, row, first - padding, *given)
        return self.n_known - padding

    def extend(self, decoder: Decoder, view: ModelView, sequences: Tensor, n_new: list[int]) -> None:
        """Add what the cache lacks of sequences [B, length], all but their last column, of whose rows `n_new` tokens
        each were decoded."""
        texts = [row[padding:-1] for row, padding in zip(sequences, self.padding, strict=True)]
        written = [self.width - padding + n - 1 for padding, n in zip(self.padding, n_new, strict=True)]
        # Transformers' loop goes on with filler where a text has ended, as if it were text.
        decoder.buffers.grow(max(map(len, texts)) + 1)
        rest = {row: (n, text) for row, (n, text) in enumerate(zip(written, texts, strict=True)) if n < len(text)}
        view.prefill(rest)
        end = sequences.shape[1] - 1
        for index, layer in enumerate(view.cache.layers):
            kept = layer.keys, layer.values
            new = [x.new_zeros(len(self.padding), x.shape[0], end - self.n_known, x.shape[3]) for x in kept]
            for row, padding in enumerate(self.padding):
                first = max(padding, self.n_known)
                entries = view.cache.take(index, row, first - padding, end - padding)
                for whole, part in zip(new, entries, strict=True):
                    whole[row, :, first - self.n_known :] = part
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
