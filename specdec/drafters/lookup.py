"""What followed a text's last words where these stand earlier in it, found on the host.

Source: Saxena, "Prompt Lookup Decoding", 2023; LLMA, arXiv 2304.04487. `NgramDrafter` finds the same on the device, for
texts that the host does not know yet.
"""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 2
"""Tokens that must match, where a draft model would draft instead: one token says little of what follows."""


class SuffixIndex:
    """A text that grows, and where its n-grams ended last.

    Args:
        max_ngram: longest suffix looked up.
    """

    def __init__(self, max_ngram: int) -> None:
        self.tokens: list[int] = []
        self._ends: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(max_ngram, min(SHORTEST, max_ngram) - 1, -1)
        }

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            n_tokens = len(self.tokens)
            for n, ends in self._ends.items():  # what ended the text until now is followed by something
                if n_tokens >= n:
                    ends[tuple(self.tokens[n_tokens - n :])] = n_tokens - 1
            self.tokens.append(token)

    def continuation(self, n_tokens: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest suffix that has one, `n_tokens` of it, or nothing;
        past the end of the text the period between the two goes on."""
        for n, ends in self._ends.items():
            end = ends.get(tuple(self.tokens[-n:]))
            if end is not None:
                period = len(self.tokens) - 1 - end
                return [self.tokens[end + 1 + ahead % period] for ahead in range(n_tokens)]
        return []
