"""What followed a text's last words where these stand earlier in it, or in earlier texts, found on the host.

Source: Saxena, "Prompt Lookup Decoding", 2023; LLMA, arXiv 2304.04487; of earlier texts REST, arXiv 2311.08252.
`NgramDrafter` finds the same on the device, for texts that the host does not know yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary

from specdec.engine.text import Text

SHORTEST = 2
"""Tokens that must match, where something else would draft instead: one token says little of what follows."""


class Ngrams:
    """Where n-grams of texts ended last, of each n from `max_ngram` down to SHORTEST."""

    def __init__(self, max_ngram: int) -> None:
        lengths = range(max_ngram, min(SHORTEST, max_ngram) - 1, -1)
        self._ends: dict[int, dict[tuple[int, ...], tuple[list[int], int]]] = {n: {} for n in lengths}

    def append(self, text: list[int], token: int) -> None:
        """A text goes on: what ended it until now is followed by something."""
        for n, ends in self._ends.items():
            if len(text) >= n:
                ends[tuple(text[len(text) - n :])] = text, len(text) - 1
        text.append(token)

    def forget(self, text: list[int]) -> None:
        """Of n-grams that ended last in this text nothing is known any more."""
        for n, ends in self._ends.items():
            for end in range(n, len(text)):
                ngram = tuple(text[end - n : end])
                if (found := ends.get(ngram)) is not None and found[0] is text:
                    del ends[ngram]

    def suffixes(self, text: list[int]) -> Iterator[tuple[list[int], int] | None]:
        """By each n, the longest first: the text and the place where this text's suffix ended before."""
        for n, ends in self._ends.items():
            yield ends.get(tuple(text[-n:]))


class SuffixIndex:
    """A text that grows, and where its n-grams ended last.

    Args:
        max_ngram: longest suffix looked up.
    """

    def __init__(self, max_ngram: int) -> None:
        self.tokens: list[int] = []
        self._ngrams = Ngrams(max_ngram)

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            self._ngrams.append(self.tokens, token)

    def continuation(self, n_tokens: int, others: Ngrams | None = None) -> list[int]:
        """What followed the latest earlier occurrence of the longest suffix that has one, in this text or else in
        `others`: `n_tokens` of it, fewer at another text's end, or nothing. Past the end of this text the period
        between the two goes on."""
        elsewhere = others.suffixes(self.tokens) if others else iter(())
        for own in self._ngrams.suffixes(self.tokens):
            other = next(elsewhere, None)
            if own is not None:
                _, end = own
                period = len(self.tokens) - 1 - end
                return [self.tokens[end + 1 + ahead % period] for ahead in range(n_tokens)]
            if other is not None:
                text, end = other
                return text[end + 1 : end + 1 + n_tokens]
        return []


class EarlierTexts(Ngrams):
    """N-grams of the texts that were decoded last, or are being decoded.

    Args:
        n_tokens: of texts that are remembered; what is over goes, the oldest text first.
    """

    def __init__(self, max_ngram: int, n_tokens: int) -> None:
        super().__init__(max_ngram)
        self._room = n_tokens
        self._copies: WeakKeyDictionary[Text, list[int]] = WeakKeyDictionary()
        self._kept: dict[int, list[int]] = {}  # by their ids, the oldest first

    def extend(self, text: Text, new: list[int]) -> None:
        """A text goes on, or begins."""
        if text not in self._copies:
            copy = self._copies[text] = []
            self._kept[id(copy)] = copy
        copy = self._copies[text]
        if id(copy) not in self._kept:  # it has been forgotten meanwhile
            return
        for token in new:
            self.append(copy, token)
        self._room -= len(new)
        while self._room < 0:
            oldest = self._kept.pop(next(iter(self._kept)))
            self.forget(oldest)
            self._room += len(oldest)


class LookUp:
    """What texts say about how they go on.

    Args:
        n_tokens: of what followed. max_ngram: longest suffix looked up. remember: tokens of the texts decoded last that
            are looked through beside a text itself.
    """

    def __init__(self, n_tokens: int, max_ngram: int, remember: int = 0) -> None:
        self.n_tokens, self._max_ngram = n_tokens, max_ngram
        self._indexes: WeakKeyDictionary[Text, SuffixIndex] = WeakKeyDictionary()  # nothing is left of a call
        self._earlier = EarlierTexts(max_ngram, remember) if remember else None

    def __call__(self, texts: Mapping[int, Text], is_certain: bool) -> dict[int, list[int]]:
        """By row, how these texts go on; rows of which nothing is known are left out.

        Args:
            is_certain: whether a text is the same with any draft. Otherwise earlier texts are not looked at: from one
                of the same seed, a draft would know the noise that it is judged by.
        """
        earlier = self._earlier if is_certain else None
        found = {}
        for row, text in texts.items():
            index = self._indexes.get(text)
            if is_new := index is None:
                index = self._indexes[text] = SuffixIndex(self._max_ngram)
            new = text.prompt.tolist() if is_new else text.tokens[len(index.tokens) - len(text.prompt) :]
            index.extend(new)
            if earlier is not None:
                earlier.extend(text, new)
            if tokens := index.continuation(self.n_tokens, earlier):
                found[row] = tokens
        return found
