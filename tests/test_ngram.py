"""The n-gram drafter proposes what a plain search through the text finds."""

from __future__ import annotations

import random

import pytest
import torch

from specdec.drafters.ngram import NgramDrafter
from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState

NO_EOS = torch.empty(0, dtype=torch.int64)


def _search(text: list[int], depth: int, max_ngram: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest matching suffix; nothing if not one token matches."""
    for n in range(max_ngram, 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                drafted: list[int] = []
                while len(drafted) < depth:  # past the end of the text, the draft itself goes on
                    drafted.append((text + drafted)[end + len(drafted)])
                return drafted
    return []


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab", [2, 3, 8])
def test_proposals_are_those_of_a_plain_search(vocab: int, max_ngram: int) -> None:
    rng = random.Random(vocab * max_ngram)
    texts = [[rng.randrange(vocab) for _ in range(rng.randint(1, 30))] for _ in range(150)]
    drafter = NgramDrafter(6, max_ngram)
    state = BatchState(len(texts), 36, 1, drafter.tree, 0, torch.device("cpu"))
    for row, text in enumerate(texts):
        state.admit(row, torch.tensor(text), 5, row)
    draft = drafter.draft(state, SamplingLaw(True), torch.arange(len(texts)), 6)
    expected = [_search(text, 6, max_ngram) for text in texts]
    assert {len(e) for e in expected} == {0, 6}
    for row, drafted in enumerate(expected):
        assert int(draft.counts[row]) == len(drafted)
        assert draft.tokens[row, : len(drafted)].tolist() == drafted
    assert draft.law is None  # nothing was drawn


@pytest.mark.parametrize(("depth", "max_ngram"), [(0, 3), (4, 0)])
def test_sizes_are_checked(depth: int, max_ngram: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        NgramDrafter(depth, max_ngram)
